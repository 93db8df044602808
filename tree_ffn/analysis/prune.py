"""Static pruning: the subtrees, or experts, that calibration text does not visit, and the model without them.

    visits[n]   calibration tokens that pass node n, or choose expert n; the threshold is a share of all
    a node goes, with all below it, if visits[n] <= threshold * tokens and its sibling stays
    an expert goes if visits[n] <= threshold * tokens, and K others of more visits stay

so 0 removes what was never visited. Of two children that would both go, the
more visited one stays (the left one at a tie): every kept node of the upper
levels has a child, and at threshold 1 each tree is down to one path. Counts are
those of the full model: a token that has to turn away from what is gone is not
counted anew. What a higher threshold keeps, a lower one keeps too.
"""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import numpy as np

from tree_ffn.data.cache import RowSource
from tree_ffn.data.pipeline import first_rows
from tree_ffn.errors import InputError, check_metric, check_positive_int
from tree_ffn.models.dense import DenseSpec
from tree_ffn.models.layer_stacks import split_layers, stack_layers
from tree_ffn.models.spec import FFNSpec, ModelSpec, kind_of
from tree_ffn.training.compiled import Scorer
from tree_ffn.training.restore import Restored
from tree_ffn.tree import LeafSpec, PrunedSpec, TreeSpec, leaf, prune
from tree_ffn.tree.leaf.pruned import present_experts
from tree_ffn.tree.path.pruned import present_leaves

# A dead leaf is one without a visit in this many tokens a leaf of its tree, or an expert.
TOKENS_PER_LEAF = 1000


class Calibration(NamedTuple):
    """Visits of a model's leaves.

    Attributes:
      usage: one array a run of layers, as `training.step.empty_usage`.
      tokens: how many tokens were read.
    """

    usage: tuple
    tokens: int


def check_threshold(threshold: float) -> None:
    """Raises InputError unless `threshold` is a share, from 0 to 1."""
    if not 0 <= threshold <= 1:
        raise InputError(f"threshold: {threshold!r} is not allowed; use a share of the tokens from 0 to 1.")


def tokens_needed(model: ModelSpec) -> int:
    """Tokens that judge dead leaves: 1,000 for each leaf of a tree, or expert, of the layer that has most.

    Raises:
      InputError: the model has no layer that can be pruned.
    """
    leaves = [n for ffn in model.ffns if (n := _leaves(ffn))]
    if not leaves:
        kinds = ", ".join(sorted({repr(kind_of(ffn)) for ffn in model.ffns}))
        raise InputError(
            f"model: it has no layer that can be pruned, its ffn.kind is {kinds}; only layers of 'tree', "
            "'random_tree' and 'leaf' can, but for router 'hash', which has no next best."
        )
    return TOKENS_PER_LEAF * max(leaves)


def _leaves(ffn: FFNSpec) -> int:
    """Leaves of a tree, or experts; 0 where none can be removed."""
    if isinstance(ffn, LeafSpec):
        return ffn.n_experts if ffn.router != "hash" else 0
    return ffn.shape.n_leaves if isinstance(ffn, TreeSpec) else 0


def calibrate(
    run: Restored, sources: Sequence[RowSource], tokens: int = 0, batch_size: int = 16
) -> Calibration:
    """Counts the visits of a model's leaves over calibration text.

    Args:
      run: a restored run.
      sources: rows of the model's context + 1 tokens, read in the fixed order of
        validation and never twice.
      tokens: least number to read (whole batches are, as far as there is text);
        0 reads what `tokens_needed` says.
      batch_size: rows a batch.

    Raises:
      InputError: too few tokens to judge a dead leaf, asked for or there.
      NotFinite: the loss on the text is NaN or infinite.

    Example:
      >>> calibrate(run, [corpus.train]).tokens                     # doctest: +SKIP
      128000
    """
    check_positive_int("batch_size", batch_size)
    check_positive_int("tokens", tokens, least=0)
    needed, context = tokens_needed(run.model), run.model.max_seq_len
    leaves = needed // TOKENS_PER_LEAF
    rule = f"which of {leaves:,} leaves are dead takes {needed:,} tokens to judge ({TOKENS_PER_LEAF:,} each)"
    if 0 < tokens < needed:
        raise InputError(f"tokens: {tokens:,} is not allowed; {rule}, so use at least that many.")
    tokens = tokens or needed
    there = sum(map(len, sources)) * context
    if there < tokens:
        raise InputError(
            f"calibration: the text has {there:,} tokens, and {tokens:,} are asked for; "
            f"{rule}, so use more text."
        )
    n_rows = -(-tokens // (context * batch_size)) * batch_size
    batches = first_rows(sources, n_rows, batch_size)
    with jax.set_mesh(run.mesh):
        score = Scorer(run.model, run.mesh)(run.variables, batches)
    check_metric("loss on the calibration text", score.loss)
    return Calibration(score.usage, score.tokens)


def kept_leaves(counts_PJ: np.ndarray, threshold: float, tokens: int, present_PJ=None) -> np.ndarray:
    """The leaves that stay, by the rule in the head of this file: bool [P, 2^D].

    Args:
      counts_PJ: visits of the leaves.
      threshold: share of the tokens, from 0 to 1.
      tokens: calibration tokens.
      present_PJ: leaves that there are; all by default.

    Example:
      >>> kept_leaves(np.array([[90, 0, 3, 7]]), threshold=0.05, tokens=100).tolist()
      [[True, False, False, True]]
    """
    check_threshold(threshold)
    present_PJ = np.ones(counts_PJ.shape, bool) if present_PJ is None else present_PJ
    n_trees, n_leaves = counts_PJ.shape
    keep = np.ones((n_trees, 1), bool)
    while keep.shape[1] < n_leaves:
        pairs = (n_trees, keep.shape[1], 2, -1)
        visits = np.asarray(counts_PJ, np.int64).reshape(pairs).sum(axis=-1)
        visits = np.where(present_PJ.reshape(pairs).any(axis=-1), visits, -1)
        most = np.argmax(visits, axis=-1)[..., None] == np.arange(2)  # the left one at a tie
        stays = (visits > threshold * tokens) | most
        keep = (keep[..., None] & stays).reshape(n_trees, -1)
    return keep


def kept_experts(counts_X: np.ndarray, threshold: float, tokens: int, top_k: int, present_X=None):
    """The experts that stay, by the rule in the head of this file: bool [X].

    Args:
      counts_X: visits of the experts.
      threshold: share of the tokens, from 0 to 1.
      tokens: calibration tokens.
      top_k: K.
      present_X: experts that there are; all by default.

    Example:
      >>> kept_experts(np.array([90, 0, 10, 60, 40]), threshold=0.1, tokens=100, top_k=2).tolist()
      [True, False, False, True, True]
    """
    check_threshold(threshold)
    present_X = np.ones(counts_X.shape, bool) if present_X is None else present_X
    keep_X = present_X & (counts_X > threshold * tokens)
    keep_X[np.argsort(-np.where(present_X, counts_X, -1), kind="stable")[:top_k]] = True
    return keep_X


def can_be_static(spec: FFNSpec) -> bool:
    """Whether a layer is dense but for its form: one path a tree, every unit's activation added."""
    return isinstance(spec, PrunedSpec) and spec.is_one_path and spec.act_site == "node"


def static_layer(params: dict, spec: PrunedSpec) -> tuple[DenseSpec, dict]:
    """The dense layer of A units that a layer with one path a tree is, where `can_be_static`.

    Equal to rounding: the units are those of the paths, root levels first; which
    products are summed in which order is not the same.
    """
    dense = {name: params[name] for name in ("w_in", "b_in", "w_out", "b_out")}
    return DenseSpec(spec.active_units, spec.activation), dense


def prune_model(
    model: ModelSpec, variables: dict, calibration: Calibration, threshold: float, static: bool = False
) -> tuple[ModelSpec, dict]:
    """The model without what a threshold removes; layers that lose nothing stay as they are.

    Args:
      model: a trained model.
      variables: its {"params", "routing"}.
      calibration: its leaves' visits.
      threshold: share of the calibration tokens, from 0 to 1.
      static: write layers that `can_be_static` as dense ones.

    Returns:
      spec and variables (NumPy arrays).

    Raises:
      InputError: the threshold is not allowed, or the model has no layer that can be pruned.
    """
    check_threshold(threshold)
    tokens_needed(model)  # raises where nothing can be pruned
    variables = jax.tree.map(np.asarray, jax.device_get(variables))
    layers, ffns = split_layers(model, variables), []
    counts = [
        run if run is None else run[j] for run, (_, n) in zip(calibration.usage, model.runs) for j in range(n)
    ]
    for layer, ffn, counts_PJ in zip(layers, model.ffns, counts, strict=True):
        if _leaves(ffn):
            ffn = _prune_layer(layer, ffn, np.asarray(counts_PJ), calibration.tokens, threshold, static)
        ffns.append(ffn)
    return stack_layers(model, variables, ffns, layers)


def _prune_layer(
    layer: dict, spec: FFNSpec, counts_PJ, tokens: int, threshold: float, static: bool
) -> FFNSpec:
    """The layer's new spec; its FFN's arrays in `layer` are replaced."""
    trained = layer["params"]["ffn"]
    params = {**trained, **layer.get("routing", {}).get("ffn", {})}
    if isinstance(spec, LeafSpec):
        present_X = present_experts(params, spec)
        keep_X = kept_experts(counts_PJ[0], threshold, tokens, spec.top_k, present_X)
        if (keep_X != present_X).any():
            spec, params = leaf.prune(params, spec, keep_X)
    elif isinstance(spec, TreeSpec):
        present_PJ = present_leaves(params, spec)
        keep_PJ = kept_leaves(counts_PJ, threshold, tokens, present_PJ)
        if (keep_PJ != present_PJ).any():
            spec, params = prune(params, spec, keep_PJ)
    if static and can_be_static(spec):
        assert isinstance(spec, PrunedSpec)
        dense, layer["params"]["ffn"] = static_layer(params, spec)
        del layer["routing"]
        return dense
    layer["params"]["ffn"] = {name: params[name] for name in trained}
    if routing := {name: value for name, value in params.items() if name not in trained}:
        layer["routing"] = {"ffn": routing}
    return spec
