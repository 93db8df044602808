"""Prepares the corpus of a config, so that training starts at once.

    python -m experiments.prepare_data --config=configs/default.py --config.data.files='texts/*.txt.xz'

Training prepares what is missing by itself; run this where a machine with an
accelerator would only wait. It may be stopped at any time: the same command
goes on. It also downloads and prepares TFDS data sets by name
(`--config.data.tfds_name=lm1b`), which training never does: many of them need
TensorFlow (`pip install tensorflow-cpu`) and a network.
"""

import contextlib
import json

from absl import flags
from ml_collections import config_flags

from experiments.common import cli
from tree_ffn.data import CorpusSpec, corpus_spec_from_config, prepare
from tree_ffn.errors import InputError, reason
from tree_ffn.training.plan import settled


def main() -> None:
    config = flags.FLAGS.config
    if config is None:
        raise InputError("--config is missing; name a file, e.g. --config=configs/quickstart.py.")
    spec = corpus_spec_from_config(config)
    if spec.corpus == "tfds" and spec.tfds_name:
        prepare_named(spec)
    corpus = prepare(spec, settled(config).model.max_seq_len + 1)
    print(json.dumps(corpus.meta, indent=2))
    print(f"ready in {corpus.directory}")


def prepare_named(spec: CorpusSpec) -> None:
    """Downloads and prepares the TFDS data set `data.tfds_name` as ArrayRecord, if it is not there.

    Raises:
      InputError: TFDS does not know it, or cannot prepare it here.
    """
    with contextlib.suppress(ImportError):
        import tensorflow  # noqa: F401  # without it TFDS finds fewer data sets, and prepares fewer
    from tree_ffn.data.tfds_input import named_builder

    builder = named_builder(spec)
    if builder.is_prepared():
        return
    print(f"preparing TFDS data set {spec.tfds_name} in {builder.data_dir}")
    try:
        builder.download_and_prepare(file_format="array_record")
    except Exception as error:  # no network, a missing package, a full disk: TFDS wraps them in many ways
        raise InputError(
            f"data.tfds_name: {spec.tfds_name!r} cannot be prepared here ({reason(error)}); "
            "some sets need a network or the package tensorflow-cpu."
        ) from error


if __name__ == "__main__":
    # Defined here only: other programs have a flag of the same name, and tests import several of them.
    config_flags.DEFINE_config_file("config", None, "The run whose corpus to prepare.", lock_config=True)
    cli.run(main)
