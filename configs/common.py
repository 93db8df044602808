"""What every config has: all knobs with a first value, and the grammar of a config's argument."""

from typing import Any, NamedTuple

from ml_collections import ConfigDict
from ml_collections.config_dict import FieldReference

from configs.presets import FIELDS, PRESETS


def parse_arg(arg: str | None, **defaults) -> ConfigDict:
    """Reads the text after the colon of `--config=configs/x.py:key=value,...`, strictly.

    Args:
      arg: `key=value` pairs, comma separated; None or "" gives the defaults.
      **defaults: the known keys; a value is read as the type of its default.

    Returns:
      a ConfigDict of `defaults` with what `arg` says.

    Raises:
      ValueError: one sentence: an unknown or repeated key, or a value of another type.

    Example:
      >>> parse_arg("steps=10,kind=dense", steps=5, kind="tree", remat=False).to_dict()
      {'kind': 'dense', 'remat': False, 'steps': 10}
    """
    values, seen = dict(defaults), set()
    for item in arg.split(",") if arg else ():
        key, equals, text = item.partition("=")
        if not equals or key not in defaults:
            known = ", ".join(f"{name}={default}" for name, default in defaults.items())
            raise ValueError(f"config argument: {item!r} is not known; use key=value of: {known}.")
        if key in seen:
            raise ValueError(f"config argument: {key!r} is given twice; give it once.")
        seen.add(key)
        values[key] = _read(key, text, type(defaults[key]))
    return ConfigDict(values)


def _read(key, text, kind):
    if kind is bool:
        if text not in ("true", "false"):
            raise ValueError(f"config argument: {key}={text} is not allowed; use true or false.")
        return text == "true"
    try:
        return kind(text)
    except ValueError:
        allowed = f"use a value of type {kind.__name__}"
        raise ValueError(f"config argument: {key}={text} is not allowed; {allowed}.") from None


def check_known(arg: ConfigDict, **known: dict[str, Any] | tuple[str, ...]) -> None:
    """Refuses a name in a config's argument that is none of those it may be.

    Args:
      arg: as `parse_arg` reads it.
      **known: the names that a key may have.

    Raises:
      ValueError: one sentence with the key, its value and the names.

    Example:
      >>> check_known(parse_arg("row=moe", row="dense"), row=("dense", "moe"))
    """
    for key, names in known.items():
        if arg[key] not in names:
            raise ValueError(
                f"config argument: {key}={arg[key]} is not known; use one of: {', '.join(names)}."
            )


class _Op(NamedTuple):
    """How a FieldReference is computed from others, in the form that ml_collections reads."""

    fn: Any
    args: list


def follow(default, fn, *references) -> FieldReference:
    """A field that is fn(*references) until something else is assigned to it.

    So `--config.model.width=512` also widens the tree, and a config file, a
    preset and a flag may each say a part without knowing of the others. A
    finished run's config.json shows plain values.
    """
    op = _Op(lambda _, *values: fn(*values), list(references))
    return FieldReference(default, field_type=type(default), op=op)


class _Preset(FieldReference):
    """The name of a preset; an unknown one is refused where it is set."""

    def set(self, value, type_safe=True):
        if value and value not in PRESETS:
            known = ", ".join(PRESETS)
            raise ValueError(f"model.preset: {value!r} is not known; use one of: {known} (or '' for micro).")
        super().set(value, type_safe)


def base_config() -> ConfigDict:
    """Every knob with its first value; a config file changes what it is about."""
    config = ConfigDict()
    config.seed = 0
    config.model = model_config()
    config.ffn = ffn_config(config.model.get_ref("width"))
    config.data = data_config()

    config.train = ConfigDict()
    config.train.batch_size = 32  # rows a step, over all devices and microbatches
    config.train.steps = 1000
    config.train.grad_accum_steps = 1  # microbatches a step
    config.train.log_every = 20  # steps between lines of metrics
    config.train.eval_every = 200  # steps between validations; 0: with checkpoints only
    config.train.eval_batches = 20  # batches of a validation; 0: the whole split
    config.train.checkpoint_every = 200  # steps between checkpoints; 0: at the end only
    config.train.probe = True  # at validations of trees: gradients by node, units that work
    config.train.keep = 2  # latest checkpoints kept, beside the best

    config.optim = ConfigDict()
    config.optim.lr = 1e-3  # highest learning rate
    config.optim.schedule = "cosine"  # cosine | wsd | constant, after the warm-up
    config.optim.warmup_steps = config.train.get_ref("steps") // 10  # steps of linear rise
    config.optim.final_share = 0.1  # final rate / lr
    config.optim.decay_share = 0.2  # of wsd: share of the steps that its decay takes
    config.optim.b1 = 0.9
    config.optim.b2 = 0.95
    config.optim.eps = 1e-8
    config.optim.weight_decay = 0.1  # of matrices; no biases, norms, thresholds
    config.optim.clip_norm = 1.0  # largest norm of the gradient; 0: no clipping

    config.mesh = ConfigDict()
    config.mesh.data = -1  # devices that split the batch; -1: all that "model" leaves
    config.mesh.model = 1  # devices that split weights and trees
    return config


def model_config() -> ConfigDict:
    """The decoder; its sizes follow `preset` until they are set."""
    model = ConfigDict()
    preset = _Preset("")
    model.preset = preset  # a name of configs/presets.py; '' means micro
    for place, name in enumerate(FIELDS):
        model[name] = follow(0, lambda preset, place=place: PRESETS[preset or "micro"][place], preset)
    model.layers = ""  # '': ffn.kind everywhere; or e.g. 'dense,leaf*4,dense'
    model.dtype = "float32"  # of activations and products: float32 | bfloat16
    model.param_dtype = "float32"  # of stored weights; training needs float32
    model.remat = False  # recompute activations in the backward pass: less memory, a third more time
    model.unroll = 12  # equal layers in one turn of their loop: more run faster and compile longer
    model.norm_eps = 1e-5
    model.vocab_multiple = 1  # embedding rows are rounded up to a multiple (64 helps GPUs)
    # Standard deviations of the initial weights, in units of 1 / sqrt(fan-in)
    # but for embed. A large w_out swamps the embeddings and hides every
    # difference between feed-forward layers.
    model.init = ConfigDict({"embed": 0.05, "attn_in": 1.0, "attn_out": 0.1, "w_in": 0.7, "w_out": 0.05})
    return model


def ffn_config(width: FieldReference) -> ConfigDict:
    """The feed-forward layer: one tree whose nodes follow the model's width.

    The leaf layer as recommended: 512 experts of E / 128 units, F = 4 E as in an ordinary dense layer, behind
    one tree; A = E / 8. The path layer: with D = 7 and W = E / 64 it has about the same F and A.
    """
    ffn = ConfigDict()
    ffn.kind = "leaf"  # dense | narrow | leaf | tree | random_tree
    ffn.width = 0  # of dense and narrow; 0: F and A of the leaf layer
    ffn.activation = "gelu"  # a name of tree_ffn/tree/activations.py
    ffn.implementation = "auto"  # auto | masked | gather | grouped
    ffn.balance_rate = 0.0  # step by which the choice (of trees, thresholds) moves against the load; 0: none
    ffn.n_trees = 1  # P; of leaf: trees whose leaves are the experts
    # Of leaf.
    ffn.n_experts = 512  # X
    ffn.expert_width = follow(0, lambda width: max(1, width // 128), width)  # W
    ffn.top_k = 16  # K, experts that a token uses
    ffn.router = "tree"  # tree | softmax (a mixture of experts) | hash | random
    ffn.gate_norm = "rms"  # none | l1 | l2 | rms: what of a token's gates is 1, their sum, or that of squares
    ffn.dense_start = 0.2  # share of the training in which experts that are not chosen add something
    # Of tree, the paper's layer.
    ffn.depth = 7  # D
    # W: one for all levels, or one per level, e.g. 1,1,1,32
    ffn.node_width = follow((), lambda width: (max(1, width // 64),), width)
    ffn.act_site = "node"  # node | sum
    ffn.routing = "hard"  # hard (the paper) | straight_through
    return ffn


def data_config() -> ConfigDict:
    """Where text comes from and how it becomes rows of tokens."""
    data = ConfigDict()
    data.files = ""  # of files: glob patterns, comma separated
    data.valid_files = ""  # of files: what is held out; '': valid_share of the documents
    data.text_field = "text"  # of JSON and parquet files
    data.tfds_dir = ""  # of tfds: a prepared directory
    data.tfds_name = ""  # of tfds: a registered name
    # python_stdlib | files | tfds; until it is set: the one whose fields above are named.
    data.corpus = follow("", _default_corpus, *map(data.get_ref, ("files", "tfds_dir", "tfds_name")))
    data.tokenizer = "bytes"  # bytes | tokenizer.json(.xz) | 'vocab.json,merges.bpe'
    data.cache_dir = "data_cache"  # where prepared rows are kept
    data.valid_share = 0.05
    data.format = "auto"  # auto | array_record | memory
    data.workers = 2  # threads that read ahead
    return data


def _default_corpus(files, tfds_dir, tfds_name, otherwise="python_stdlib"):
    return "files" if files else "tfds" if tfds_dir or tfds_name else otherwise


def without_default_text(config: ConfigDict, otherwise: str = "files") -> None:
    """Makes a config whose text has to be named, or asked for: `--config.data.corpus=python_stdlib`.

    For those that need more than the 11 MB of the standard library, which is not trained on unasked.

    Args:
      config: of `base_config`.
      otherwise: the corpus where none is named; `files` is refused then, for want of `data.files`.
    """
    corpus = lambda files, directory, name: _default_corpus(files, directory, name, otherwise)
    config.data.corpus = follow("", corpus, *map(config.data.get_ref, ("files", "tfds_dir", "tfds_name")))
