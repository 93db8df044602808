"""Rows of tokens as an ArrayRecord data set of TFDS; needs no TensorFlow."""

import contextlib
import io
import os
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
import tensorflow_datasets as tfds


class TokenRows(tfds.core.GeneratorBasedBuilder):
    """Rows of C + 1 tokens, in stream order.

    The tokens are kept as one run of bytes a row: a sequence feature would
    cost 30 times as long to decode.
    """

    # Where the class is defined. TFDS would look that up with a package it does not require (datasets#11212),
    # and needs it for checksum files only, of which there are none.
    code_path = None

    VERSION = tfds.core.Version("1.0.0")

    def __init__(
        self,
        *,
        blocks: dict[str, Iterable[np.ndarray]] | None = None,
        row_tokens: int = 1,
        dtype: np.dtype | type = np.uint16,
        **kwargs,
    ):
        self.blocks, self.row_tokens, self.row_dtype = blocks or {}, row_tokens, dtype
        super().__init__(**kwargs)

    def _info(self) -> tfds.core.DatasetInfo:
        tokens = tfds.features.Tensor(shape=(self.row_tokens,), dtype=self.row_dtype, encoding="bytes")
        return tfds.core.DatasetInfo(
            builder=self,
            description="Rows of tokens; neighbours share one token.",
            features=tfds.features.FeaturesDict({"tokens": tokens}),
            disable_shuffling=True,
        )

    def _split_generators(self, dl_manager):
        return {split: self._generate_examples(blocks) for split, blocks in self.blocks.items()}

    def _generate_examples(self, blocks: Iterable[np.ndarray]) -> Iterator[tuple[int, dict]]:
        rows = (row for block in blocks for row in block)
        return ((number, {"tokens": row}) for number, row in enumerate(rows))


def write_array_record(
    directory: Path, blocks: dict[str, Iterable[np.ndarray]], row_tokens: int, dtype: np.dtype
) -> None:
    """Writes splits as a TFDS directory (the one with dataset_info.json).

    Args:
      directory: made by the call.
      blocks: of each split, its rows in blocks [n, C + 1].
      row_tokens: C + 1.
      dtype: of the tokens.
    """
    work = directory.with_name(f"{directory.name}.work")
    builder = TokenRows(
        blocks=blocks,
        row_tokens=row_tokens,
        dtype=dtype,
        data_dir=os.fspath(work),
        file_format="array_record",
    )
    # TFDS prints and draws bars of its own; ours has been drawn by now.
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        builder.download_and_prepare()
    os.replace(os.fspath(builder.data_dir), directory)
    shutil.rmtree(work)
