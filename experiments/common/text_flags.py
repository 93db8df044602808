"""The flags that name another text than a run's own."""

from absl import flags

from experiments.common import path_flags
from tree_ffn.data.spec import CORPORA

flags.disclaim_key_flags()  # they are those of the program that calls `define`


def define(*, use: str) -> tuple[flags.FlagHolder, ...]:
    """--corpus, --files, --tfds_dir, --tfds_name, --text_field, --tokenizer and --cache_dir, in this order.

    Args:
      use: what becomes of the text: "score", "calibrate on".
    """
    return (
        flags.DEFINE_enum("corpus", None, CORPORA, f"Another corpus than the run's to {use}."),
        path_flags.define_each("files", None, f"Text files to {use} (glob patterns, comma separated)."),
        path_flags.define("tfds_dir", None, f"Prepared TFDS directory to {use}."),
        flags.DEFINE_string("tfds_name", None, f"Registered TFDS data set to {use}, kept in --tfds_dir."),
        flags.DEFINE_string("text_field", None, "Field of JSONL files or of a data set with the text."),
        path_flags.define_each("tokenizer", None, "Where the model's tokenizer is now, if it has moved."),
        path_flags.define("cache_dir", None, "Where prepared rows are kept; as in the run by default."),
    )
