"""Rows of tokens as an ArrayRecord data set of TFDS; needs no TensorFlow."""

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import tensorflow_datasets as tfds

from tree_ffn.data.rows import Split


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
        self, *, splits: dict[str, Split] | None = None, row_tokens: int = 1, dtype="uint16", **kwargs
    ):
        self.row_splits, self.row_tokens, self.row_dtype = splits or {}, row_tokens, np.dtype(dtype)
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
        return {name: self._generate_examples(split) for name, split in self.row_splits.items()}

    def _generate_examples(self, split: Split) -> Iterator[tuple[int, dict]]:
        number = 0
        for block in split.rows():
            for row in block:
                yield number, {"tokens": row}
                number += 1


def write_array_record(directory: Path, splits: dict[str, Split], row_tokens: int, dtype: np.dtype) -> None:
    """Writes all splits as a TFDS directory (the one with dataset_info.json)."""
    work = directory.with_name(directory.name + ".work")
    shutil.rmtree(work, ignore_errors=True)
    builder = TokenRows(
        splits=splits,
        row_tokens=row_tokens,
        dtype=dtype,
        data_dir=os.fspath(work),
        file_format="array_record",
    )
    builder.download_and_prepare()
    os.replace(os.fspath(builder.data_dir), directory)
    shutil.rmtree(work)
