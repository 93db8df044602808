"""Text as one stream in which every token is predicted once: for scores that are compared with others'."""

from typing import NamedTuple

import numpy as np

from tree_ffn.data.corpus import Log
from tree_ffn.data.lost import Lost
from tree_ffn.data.spec import CorpusSpec
from tree_ffn.data.text_files import file_inputs
from tree_ffn.data.tokenizers import Tokenizer
from tree_ffn.errors import InputError


class WholeText(NamedTuple):
    """All tokens of some files in order, each document behind an end token.

    Attributes:
      tokens: int32 [n + 1]; the first is an end token.
      counted: bool [n], whether tokens[1:] is text; an end token is read, not scored.
      words: words between white space, and ends of line, as WikiText counts them.
      bytes: UTF-8 bytes of the text, but of lost characters.
      sha256: of the files' stored bytes, as `text_files.content_hash`.
      lost: the characters that have no token.
    """

    tokens: np.ndarray
    counted: np.ndarray
    words: int
    bytes: int
    sha256: str
    lost: Lost = Lost()

    def rows(self, context: int) -> tuple[np.ndarray, np.ndarray]:
        """The stream in rows: tokens int32 [R, C + 1], and which targets count, bool [R, C].

        Rows share one token, so every target has its turn once; the last row
        is filled up with end tokens that do not count.
        """
        n_rows = -(-len(self.counted) // context)
        tokens = np.full(n_rows * context + 1, self.tokens[0], np.int32)
        tokens[: len(self.tokens)] = self.tokens
        counted = np.zeros(n_rows * context, bool)
        counted[: len(self.counted)] = self.counted
        starts = np.arange(n_rows)[:, None] * context
        return tokens[starts + np.arange(context + 1)[None]], counted.reshape(n_rows, context)


def whole_text(files: str, tokenizer: Tokenizer, text_field: str = "text", log: Log = print) -> WholeText:
    """Reads and tokenises files; nothing is kept on disk.

    Args:
      files: glob patterns, comma separated.
      tokenizer: gives ids and the end token.
      text_field: of JSON and parquet.
      log: takes a line on each file that holds the same as another, and on lost characters.

    Raises:
      InputError: a file cannot be used, there is no text in them, or too much of it has no token.
    """
    inputs = file_inputs(CorpusSpec(corpus="files", files=files, text_field=text_field))
    for line in inputs.notes:
        log(line)
    end = np.array([tokenizer.end_id], np.int32)
    parts, counted, words, size, lost = [end], [], 0, 0, Lost()
    text = ""
    for source in inputs.sources:
        for segment in source.read(lambda position: None):
            ids = tokenizer.encode(segment.text)
            parts += [ids, end] if segment.ends else [ids]
            counted += [np.ones(len(ids), bool), np.zeros(int(segment.ends), bool)]
            text += segment.text
            lost_here, size_here = Lost.count(tokenizer.losses, segment.text, ids)
            lost, size = lost + lost_here, size + size_here
            if segment.ends:  # segments may end within a word
                words += len(text.split()) + text.count("\n")
                text = ""
    lost.check(tokenizer.name)
    if lost.n:
        log(lost.said())
    if not size:
        raise InputError(f"files: {files!r} hold no text; name others.")
    return WholeText(np.concatenate(parts), np.concatenate(counted), words, size, inputs.sha256, lost)
