"""What generate, answer and the harness print behind a prompt."""

import numpy as np

from experiments.lm_harness.continued import continued
from tests.data.kinds_of_tokenizers import file_tokenizer
from tests.models.kinds import KINDS, model_spec, random_variables
from tree_ffn.inference.batching import Batch, Request, generate
from tree_ffn.inference.sampling import Sampling


def test_texts_are_what_the_whole_has_more_than_the_prompt():
    tokenizer = file_tokenizer("byte fallback")
    spec = model_spec(KINDS["leaf"], vocab_size=tokenizer.vocab_size, max_seq_len=48)
    variables = random_variables(spec)
    # Scores so flat that words are sampled, and bytes that are no characters.
    variables["params"]["embed"]["tokens"] *= 0.3
    prompts = [tuple(tokenizer.encode(text).tolist()) for text in ("the", "the tree", "a 🌳")]
    sampling, batch = Sampling(temperature=1.5), Batch(spec, variables, 3)
    requests = [Request(ids, 30, sampling, seed=1) for ids in prompts]
    texts = [""] * 3
    for place, text, _ in continued(batch, requests, tokenizer, [[]] * 3):
        texts[place] += text
    new = [generate(spec, variables, [ids], 30, sampling, seed=1)[0] for ids in prompts]
    for ids, made, text in zip(prompts, new, texts):
        made = made[: made.index(tokenizer.end_id)] if tokenizer.end_id in made else made
        assert tokenizer.decode(ids) + text == tokenizer.decode([*ids, *made])
    assert np.any([text.startswith(" ") for text in texts]) or "\ufffd" in "".join(texts)
