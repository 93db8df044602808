"""Writes a Hugging Face checkpoint of the GPT-2 or OPT family as an exported model.

    python -m experiments.import_model --from=opt-125m --to=exported/opt
    python -m experiments.generate --export=exported/opt --prompt="The layer"
    python -m experiments.export --export=exported/opt --to=opt-125m-back --format=hf

--from is a directory with config.json and safetensors (and the tokenizer's files, which are copied), or a
name on the Hugging Face hub, e.g. facebook/opt-125m, if the package huggingface_hub and a network are
there; *.safetensors, *.json and merges.txt are fetched. Pickles are not read.
"""

import os
from pathlib import Path

from absl import flags

from experiments.common import cli, hub, path_flags, tokenizer_files
from tree_ffn.data.special_tokens import Said, said_beside
from tree_ffn.data.tokenizers import Tokenizer, load_tokenizer
from tree_ffn.errors import InputError
from tree_ffn.huggingface import pretrained
from tree_ffn.locks import only_writer
from tree_ffn.models import export
from tree_ffn.paths import split_at_commas

_FROM = path_flags.define("from", None, "Directory of a checkpoint, or its name on the Hugging Face hub.")
_REVISION = flags.DEFINE_string("revision", None, "Branch, tag or commit on the hub; main by default.")
_TO = path_flags.define("to", None, "Directory of the exported model.")
_PARAM_DTYPE = flags.DEFINE_string(
    "param_dtype", "float32", "Of the stored weights: float32, bfloat16, float16, or keep that of the files."
)
_MAX_SEQ_LEN = flags.DEFINE_integer("max_seq_len", None, "Positions to keep; all by default.")
_TOKENIZER = path_flags.define_each(
    "tokenizer",
    None,
    "The model's tokenizer, where --from has no files of it; as data.tokenizer of a config.",
)


def main() -> None:
    for flag in (_FROM, _TO):
        if flag.value is None:
            raise InputError(f"--{flag.name} is missing; name a directory.")
    with only_writer(_TO.value, "--to"):
        _import()


def _import() -> None:
    directory = hub.directory_of(_FROM.value, _REVISION.value)
    tokenizer, name, paths = _tokenizer(directory)
    said = said_beside(Path(directory), Path(directory))
    if tokenizer is not None:
        tokenizer_files.check_fit(tokenizer, said, beside=not _TOKENIZER.value)
    model = pretrained.load(
        directory,
        param_dtype=_PARAM_DTYPE.value,
        max_seq_len=_MAX_SEQ_LEN.value,
        vocab_size=tokenizer and tokenizer.vocab_size,
    )
    meta = {"pretrained": model.origin, "begins_with": _begins_with(model, said, tokenizer)}
    if tokenizer is not None:
        meta["end_id"] = tokenizer.end_id
    export.save(_TO.value, model.spec, model.variables, name, meta)
    tokenizer_files.copy(paths, _TO.value)
    print(f"{_TO.value}: {model.origin['family']}, {model.spec.n_layers} layers, width {model.spec.width}")
    if rounded := model.origin["rounded"]:
        print(f"{rounded} tensors are float64; they were rounded to {model.spec.param_dtype}")
    if tokenizer is None:
        print("no tokenizer is beside the checkpoint; experiments.generate will need --tokenizer")
    elif others := sorted({*said.end_ids} - {tokenizer.end_id}):
        print(f"texts end with {tokenizer.end_token} only; its files name {others} as ends too")


def _tokenizer(directory: str) -> tuple[Tokenizer | None, str, list[str]]:
    """The tokenizer, the name to keep, and the files to copy; (None, '', []) without one."""
    if _TOKENIZER.value:
        found, paths = _TOKENIZER.value, split_at_commas(_TOKENIZER.value)
        name = ",".join(os.path.basename(path) for path in paths)
        template = tokenizer_files.files_in(tokenizer_files.directory_of(found), [tokenizer_files.TEMPLATE])
        paths = [] if found == "bytes" else [*paths, *template]
    elif name := tokenizer_files.find(directory):
        found, paths = tokenizer_files.beside(directory, name), tokenizer_files.files_in(directory)
    else:
        return None, "", []
    return load_tokenizer(found, directory), name, paths


def _begins_with(model: pretrained.Pretrained, said: Said, tokenizer: Tokenizer | None) -> list[int]:
    """Ids that stand before every text: of a family that begins so, or where the tokenizer's files say it."""
    family = pretrained.FAMILIES[model.origin["family"]]
    if not (family.begins if said.begins is None else said.begins):
        return []
    begin = getattr(tokenizer, "begin_id", None)
    begin = model.origin["config"].get("bos_token_id", 2) if begin is None else begin
    if type(begin) is int and not 0 <= begin < model.spec.vocab_size:
        raise InputError(
            f"--from: texts begin with token {begin} (bos_token_id), the model has {model.spec.vocab_size} "
            "tokens; correct it in config.json."
        )
    return [begin] if type(begin) is int else []


if __name__ == "__main__":
    cli.run(main)
