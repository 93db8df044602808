"""The texts of sequences that are continued together, piece by piece."""

from collections.abc import Iterator, Sequence

from tree_ffn.data.tokenizers import Tokenizer
from tree_ffn.errors import NotFinite
from tree_ffn.inference.batching import Batch, Request
from tree_ffn.inference.detokenize import TextStream


def continued(
    batch: Batch, requests: Sequence[Request], tokenizer: Tokenizer, stops: Sequence[Sequence[str]]
) -> Iterator[tuple[int, str, bool]]:
    """What every step adds to each text.

    Args:
      batch: an empty one.
      requests: what to continue.
      tokenizer: of the model; its end token ends a text.
      stops: the strings that end the text of each request; they are not part of it.

    Yields:
      (the request's place, the text that is certain now, whether it was the last) for every token.

    Raises:
      InputError: the model cannot do a request.
      NotFinite: names the request's place, if there are several.
    """
    for one in requests:
        batch.add(one)
    places = {one: i for i, one in enumerate(requests)}
    texts = [TextStream(tokenizer, its_stops, one.prompt) for one, its_stops in zip(requests, stops)]
    while len(batch):
        for made in batch.step():
            place = places[made.request]
            if made.failed:
                raise NotFinite(f"prompt {place}: {made.failed}" if len(requests) > 1 else str(made.failed))
            text = texts[place].push(made.token)
            if texts[place].stopped:
                batch.drop(made.request)
            elif made.last:
                text += texts[place].rest()
            yield place, text, texts[place].stopped or made.last
