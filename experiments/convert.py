"""Turns the dense layers of a model into sparse ones, and says how much of them is kept before any training.

    python -m experiments.convert --workdir=runs/dense
    python -m experiments.convert --workdir=runs/dense --method=cluster --to=runs/leaf
    python -m experiments.convert --workdir=runs/dense --kind=tree --n_trees=3 --depth=7 --to=runs/tree \
        --method=cluster
    python -m experiments.convert --export=exported/opt --files='texts/*.txt' --n_experts=256 --top_k=8 \
        --method=cluster --to=runs/opt_leaf

--kind says what they become. `leaf`: --n_experts experts of --expert_width units at the leaves of trees, of
which a token uses --top_k. `tree`: the paper's layer, --n_trees trees of --depth whose paths visit
--node_width units at each node.

Every unit of a dense layer gets a place, so there must be room for all, unless --drop leaves out those that
are used least; places that are left over hold zeros. --methods places them at `random`, by `frequency` of
use, or by `cluster`: halves that work for different tokens, from the root down. Decisions are linear routers
fitted to calibration text; those of a leaf layer go on learning. Of paths --router says where they are kept:
`separate` from the units (no optimizer trains them; their D products a tree are not counted in A, and are in
the share of the dense layers' arithmetic that is printed), or `spent`, as the first unit of each node (so
there is room for fewer units; fine-tuning trains them, and refits let them add to the output).

--refits says how often, at most, the units' output weights are solved for by least squares, so that they make
up for the units that are not visited, routers being fitted anew between; with 0 a visited unit is the dense
unit.

The table: the share of each dense layer's output that is kept on held-out tokens, and the validation loss;
with the best paths or experts of each token in the place of the routers' (`/experts`: what is missing up to
it is lost by routers, the rest by places); beside those of the best A units of each token (`oracle`, which
no router knows) and the best A units for all tokens (`static`), whose output weights are solved for alike.

--to writes the model of --method as a run at step 0, for experiments/finetune, evaluate, generate, export.
"""

import contextlib

from absl import flags

from experiments.common import cli, path_flags, starts, text_flags
from experiments.conversion.converting import Sizes, convert_all
from tree_ffn.conversion.convert import ROUTERS, Recipe, check_convertible, path_layer, tokens_needed
from tree_ffn.conversion.placement import METHODS
from tree_ffn.errors import InputError, check_choice, check_positive_int, is_whole_number
from tree_ffn.locks import new_directory
from tree_ffn.models import DenseSpec
from tree_ffn.tree import LeafSpec, TreeShape, TreeSpec
from tree_ffn.tree.leaf.routers import GATE_NORMS

_WORKDIR = path_flags.define("workdir", None, "Directory of a training run of dense layers.")
_STEP = flags.DEFINE_string("step", "best", "Checkpoint: best (by validation loss), latest, or a step.")
_EXPORT = path_flags.define("export", None, "Instead of a run: directory of an exported model.")
_KIND = flags.DEFINE_enum("kind", "leaf", ["leaf", "tree"], "What dense layers become.")
_N_TREES = flags.DEFINE_integer("n_trees", 1, "P, trees of a layer.")
_N_EXPERTS = flags.DEFINE_integer("n_experts", 512, "X, experts of a leaf layer: the leaves of its trees.")
_EXPERT_WIDTH = flags.DEFINE_integer("expert_width", 0, "W, units of an expert; 0: as few as have room.")
_TOP_K = flags.DEFINE_integer("top_k", 16, "K, experts that a token uses.")
_GATE_NORM = flags.DEFINE_enum(
    "gate_norm", "rms", list(GATE_NORMS), "What of a token's gates is 1 (LeafSpec)."
)
_DEPTH = flags.DEFINE_integer("depth", 7, "D, decisions of a path.")
_NODE_WIDTH = flags.DEFINE_list("node_width", ["1"], "W, units of a path's node: one number, or one a level.")
_MAX_SHARE = flags.DEFINE_float(
    "max_share", 1.0, "Refuse a layer of which more than this share, A / F, works for a token, e.g. 0.05."
)
_METHODS = flags.DEFINE_list("methods", None, f"Which ways to place units: {', '.join(METHODS)}; all.")
_ROUTER = flags.DEFINE_string("router", "separate", f"Where paths keep decisions: {' or '.join(ROUTERS)}.")
_REFITS = flags.DEFINE_integer("refits", 3, "How often output weights are solved for, at most.")
_DROP = flags.DEFINE_bool("drop", False, "Leave out units that find no place, the least used.")
_SEED = flags.DEFINE_integer("seed", 0, "Of random choices.")
_TOKENS = flags.DEFINE_integer("tokens", 0, "Calibration tokens; 0: 8,192, or more for 32 visits a leaf.")
_HELD_OUT = flags.DEFINE_integer(
    "held_out", 8192, "Tokens of the validation split that shares are measured on."
)
_CORPUS, _FILES, *_OTHERS, _TOKENIZER, _CACHE_DIR = text_flags.define(use="calibrate on")
_BATCH_SIZE = flags.DEFINE_integer("batch_size", 16, "Rows a batch.")
_BATCHES = flags.DEFINE_integer("batches", 20, "Batches of held-out text to score; 0 is all.")
_METHOD = flags.DEFINE_string("method", None, "The method of the model that --to gets.")
_TO = path_flags.define("to", None, "New directory for the converted model.")
_RESULTS = path_flags.define_written("results", None, "Append the metrics to this results file (JSONL).")


def main() -> None:
    methods, n_tokens = _checked_flags()
    with new_directory(_TO.value, "--to") if _TO.value else contextlib.nullcontext():
        _convert(methods, n_tokens)


def _convert(methods: list[str], n_tokens: int) -> None:
    step = int(_STEP.value) if is_whole_number(_STEP.value) else _STEP.value
    run = starts.load(_WORKDIR.value or _EXPORT.value, step, _TOKENIZER.value)
    layer = _layer(max((ffn.width for ffn in run.model.ffns if isinstance(ffn, DenseSpec)), default=1))
    recipes = [Recipe(layer, method, _SEED.value, _REFITS.value, _DROP.value) for method in methods]
    for recipe in recipes:  # before any text is read
        check_convertible(run.model, recipe)
    places = (_CORPUS, _FILES, *_OTHERS, _TOKENIZER, _CACHE_DIR)
    run, text = starts.with_text(run, **{flag.name: flag.value for flag in places})
    sizes = Sizes(n_tokens, _HELD_OUT.value, _BATCH_SIZE.value, _BATCHES.value)
    to = {recipe: _TO.value for recipe in recipes if _TO.value and recipe.method == _METHOD.value}
    convert_all(run, text, recipes, sizes, to=to, results=_RESULTS.value)
    if _TO.value:
        print(f"\n{_TO.value}: a run at step 0, by {_METHOD.value}")


def _checked_flags() -> tuple[list[str], int]:
    """The methods to try and the calibration tokens; looks at all flags before anything is loaded."""
    if bool(_WORKDIR.value) == bool(_EXPORT.value):
        raise InputError("--workdir or --export: give one of them, and not both, to say which model to use.")
    if (_TO.value is None) != (_METHOD.value is None):
        missing = "to" if _TO.value is None else "method"
        raise InputError(f"--{missing} is missing; --method and --to go together: which model, and where.")
    methods = _METHODS.value or ([_METHOD.value] if _METHOD.value else list(METHODS))
    methods = [*methods, _METHOD.value] if _METHOD.value and _METHOD.value not in methods else methods
    for method in methods:
        check_choice("--method", method, METHODS)
    for flag in (_BATCHES, _REFITS):
        check_positive_int(f"--{flag.name}", flag.value, least=0)
    for flag in (_BATCH_SIZE, _HELD_OUT):
        check_positive_int(f"--{flag.name}", flag.value)
    return methods, _checked_tokens(_layer(1))


def _layer(n_units: int) -> LeafSpec | TreeSpec:
    """What dense layers of so many units, at most, become."""
    of_leaves, of_paths = [_N_EXPERTS, _EXPERT_WIDTH, _TOP_K, _GATE_NORM], [_ROUTER, _DEPTH, _NODE_WIDTH]
    for flag in of_paths if _KIND.value == "leaf" else of_leaves:
        if flag.present:
            raise InputError(f"--{flag.name}: is not allowed with --kind={_KIND.value}; leave it out.")
    return _leaves(n_units) if _KIND.value == "leaf" else _paths()


def _leaves(n_units: int) -> LeafSpec:
    check_positive_int("--expert_width", _EXPERT_WIDTH.value, least=0)
    check_positive_int("--n_experts", _N_EXPERTS.value)
    return LeafSpec(
        n_experts=_N_EXPERTS.value,
        expert_width=_EXPERT_WIDTH.value or -(-n_units // _N_EXPERTS.value),
        top_k=_TOP_K.value,
        n_trees=_N_TREES.value,
        gate_norm=_GATE_NORM.value,
    )


def _paths() -> TreeSpec:
    words = _NODE_WIDTH.value
    if not words or not all(is_whole_number(word.strip()) for word in words):
        raise InputError(f"--node_width: {','.join(words)!r} is not allowed; use whole numbers, e.g. 1,1,32.")
    widths = tuple(map(int, words))
    shape = TreeShape(_N_TREES.value, _DEPTH.value, widths[0] if len(widths) == 1 else widths)
    return path_layer(shape, _ROUTER.value)


def _checked_tokens(layer: LeafSpec | TreeSpec) -> int:
    """Calibration tokens, enough for a layer of this shape, whatever its units are."""
    if not layer.active_units <= _MAX_SHARE.value * layer.total_units:
        share = layer.active_units / layer.total_units
        raise InputError(
            f"--max_share: {_MAX_SHARE.value:g} is not reached by this layer, {share:.1%} of whose units "
            "work for a token; use a larger --depth or a smaller --node_width; of a leaf layer more "
            "--n_experts or a smaller --top_k."
        )
    needed = tokens_needed(layer)
    check_positive_int("--tokens", _TOKENS.value, least=0)
    if 0 < _TOKENS.value < needed:
        raise InputError(
            f"--tokens: {_TOKENS.value:,} is not allowed; routers are fitted to 32 visits of every leaf, "
            f"which takes at least {needed:,} tokens here."
        )
    return _TOKENS.value or max(8192, needed)


if __name__ == "__main__":
    cli.run(main, prints=lambda: not (_TO.value or _RESULTS.value))
