"""Figures of a run: loss in its three units, usage of every layer, tokens a second."""

import math
import time

import jax
import numpy as np

from tree_ffn.errors import check_metric
from tree_ffn.models.cost import products_metrics
from tree_ffn.models.ffn import units
from tree_ffn.models.spec import ModelSpec
from tree_ffn.training import probe
from tree_ffn.tree import LeafSpec, PrunedSpec
from tree_ffn.tree.usage import metrics


def loss_metrics(loss: float, bytes_per_token: float = 0.0) -> dict[str, float]:
    """Loss in nats a token, perplexity, and bits per byte where the bytes are known.

        ppl = exp(loss),   bits_per_byte = loss / ln 2 / bytes_per_token

    Raises:
      NotFinite: the loss is NaN or infinite.

    Example:
      >>> loss_metrics(math.log(256.0), bytes_per_token=1.0)["bits_per_byte"]
      8.0
    """
    check_metric("loss", loss)
    values = {"loss": loss, "ppl": math.exp(min(loss, 700.0))}
    if bytes_per_token:
        values["bits_per_byte"] = loss / math.log(2.0) / bytes_per_token
    return values


def costs(model: ModelSpec) -> dict[str, float]:
    """`active_share`, A / F over all layers, and `products` and `products_share` (`products_metrics`)."""
    layers = [units(ffn) for ffn in model.ffns]
    share = sum(layer.active for layer in layers) / sum(layer.total for layer in layers)
    return {"active_share": share, **products_metrics(model)}


def usage_metrics(usage, model: ModelSpec) -> dict[str, float]:
    """Flat metrics of every layer that routes, keyed `dead_leaves/<layer>` and so on.

    Args:
      usage: visit counts, one a run, as `step.empty_usage`.
      model: says which layers a run holds.

    Returns:
      `dead_leaves` (share of leaves, or experts, without a visit; pruned
      leaves do not count), `leaf_entropy` (over its largest value) and, of
      trees, the others of `tree.usage.metrics`.
    """

    def of_run(ffn, counts):
        if counts is None:
            return None
        is_leaf = isinstance(ffn, LeafSpec)
        found = _expert_metrics(np.asarray(counts)) if is_leaf else _tree_metrics(counts)
        kept = ffn.n_kept if is_leaf else ffn.nodes[-1] if isinstance(ffn, PrunedSpec) else 0
        if kept:  # of the leaves that it has
            visited = (np.asarray(counts) > 0).sum(axis=(1, 2))
            found = {**found, "dead_leaves": 1 - visited / kept}
        return found

    return _by_layer([of_run(ffn, counts) for (ffn, _), counts in zip(model.runs, usage)], model)


def probe_metrics(probed, model: ModelSpec) -> dict[str, float]:
    """Flat metrics of `probe.probe` of every layer of trees, keyed as those of `usage_metrics`."""
    runs = [None if run is None else probe.probe_metrics(run) for run in probed]
    return _by_layer(runs, model)


def moved_metrics(moved, model: ModelSpec) -> dict[str, float]:
    """`changed/<layer>`: share of leaves, over tokens and trees, that are others than before.

    Args:
      moved: float [layers, P, D + 1] a run of trees, as `usage.moved`; None for other layers.
      model: says which layers a run holds.
    """
    runs = [None if run is None else {"changed": run[:, :, -1].mean(axis=1)} for run in moved]
    return _by_layer(runs, model)


def _by_layer(runs, model: ModelSpec) -> dict[str, float]:
    """{`name/<layer>`: value} of {name: one value a layer} a run."""
    values, first = {}, 0
    for (_, n_layers), found in zip(model.runs, runs):
        for name, one_a_layer in jax.device_get(found or {}).items():
            values |= {f"{name}/{first + layer}": float(one_a_layer[layer]) for layer in range(n_layers)}
        first += n_layers
    return values


_tree_metrics = jax.jit(jax.vmap(metrics))  # of counts [layers, P, 2^D]


def _expert_metrics(counts: np.ndarray) -> dict[str, np.ndarray]:
    """Dead share and entropy / log X of expert counts [layers, 1, X]."""
    n_experts = counts.shape[-1]
    share = counts[:, 0] / np.maximum(counts.sum(axis=(1, 2)), 1)[:, None]
    entropy = -(share * np.log(np.where(share > 0, share, 1.0))).sum(axis=1)
    return {
        "dead_leaves": (share == 0).mean(axis=1),
        "leaf_entropy": entropy / max(math.log(n_experts), 1e-9),
    }


class Throughput:
    """Tokens per second of training alone: compiling, validation and saving are left out.

    The clock starts when the first step has finished, and stands still in `pause`.
    """

    def __init__(self, clock=time.perf_counter):
        self._clock, self._since, self._tokens, self._seconds = clock, None, 0, 0.0

    def step(self, tokens: int) -> None:
        """A step of `tokens` tokens has finished."""
        now = self._clock()
        if self._since is not None:
            self._seconds += now - self._since
            self._tokens += tokens
        self._since = now

    def pause(self) -> None:
        """Something else is done before the next step finishes; that step is not counted."""
        self._since = None

    def take(self) -> float | None:
        """Tokens per second since the last call; None before two steps have finished."""
        rate = self._tokens / self._seconds if self._seconds > 0 else None
        self._tokens, self._seconds = 0, 0.0
        return rate
