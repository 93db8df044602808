"""Times other people's sparse layers, from checkouts of their repositories, each beside a dense layer.

    python -m experiments.benchmark_peers --ultrafastbert=../UltraFastBERT --peer=../PEER-pytorch

Their code is not here: it is imported from where the flags say, and runs in PyTorch, on a CPU in float32.
Their layers and PyTorch's dense layer of as many units take turns; then our layer of that shape and the
fastest of our dense layers do. Each call has new tokens, and chains of layers outgrow the caches, as in
`benchmark`. With UltraFastBERT's weights our path layer has to agree with theirs before it is timed. Needs
torch; PEER needs einops and einx, too.
"""

import importlib
import math
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable

import jax
import numpy as np
from absl import flags

from experiments.benchmarks.layers import Case, dense_variants, fastest, layer_variant
from experiments.benchmarks.timing import Timed, time_all
from experiments.common import cli, path_flags
from experiments.reporting import record
from tree_ffn import recipe
from tree_ffn.errors import InputError, check_positive_int, is_whole_number
from tree_ffn.models.ffn import apply_ffn, init_ffn
from tree_ffn.tree import TreeShape, TreeSpec
from tree_ffn.tree.combine import fastest as by_rule
from tree_ffn.tree.rows import in_place

_ULTRAFASTBERT = path_flags.define("ultrafastbert", None, "Checkout of pbelcak/UltraFastBERT.")
_PEER = path_flags.define("peer", None, "Checkout of lucidrains/PEER-pytorch.")
_WIDTH = flags.DEFINE_integer("width", 768, "Model width E, a multiple of 128.")
_DEPTH = flags.DEFINE_integer("depth", 11, "Depth of UltraFastBERT's tree; theirs has 11.")
_TOKENS = flags.DEFINE_list("tokens", ["1", "16"], "Token counts T.")
_SECONDS = flags.DEFINE_float("seconds", 1.0, "Time to spend on each layer.")
_RESULTS = path_flags.define_written("results", None, "Append rows of table speed_peers to this file.")

TOLERANCE = 1e-3  # of the length of outputs
# {flag: (folder that modules are imported from, the module that has the layers)}
PLACES = {"ultrafastbert": ("benchmark_pytorch", "fff"), "peer": (".", "PEER_pytorch.PEER")}


class Theirs:
    """A chain of PyTorch's layers, each with weights of its own, that `time_all` times as it does ours."""

    eager = True

    def __init__(self, name: str, layers: int, make: Callable):
        self.name, self.layers, self.times = name, layers, []
        self.modules = [make().eval() for _ in range(layers)]

    def measure(self, inputs: list) -> None:
        """Calls the chain once with each input; the mean time of a call of one layer is kept."""
        torch = importlib.import_module("torch")
        inputs = [torch.from_numpy(np.array(x_NTE)) for x_NTE in inputs]
        start = time.perf_counter()
        with torch.inference_mode():
            for x_NTE in inputs:
                y_TE = x_NTE[0] * 0
                for module, x_TE in zip(self.modules, x_NTE):
                    y_TE = module(x_TE + 1e-3 * y_TE).reshape(y_TE.shape)
        self.times.append((time.perf_counter() - start) / len(inputs) / self.layers)

    @property
    def median(self) -> float:
        return statistics.median(self.times)


def imported(flag: str, checkout: str):
    """The module of a checkout that has its layers."""
    folder, name = PLACES[flag]
    if not os.path.isdir(place := os.path.join(checkout, folder)):
        raise InputError(f"--{flag}: {checkout!r} is no checkout of that repository; {place!r} is missing.")
    sys.path.insert(0, place)
    try:
        importlib.import_module("torch")
        return importlib.import_module(name)
    except ImportError as error:
        raise InputError(f"--{flag}: {name} cannot be imported ({error}); install what it needs.") from error


def layers_of(flag: str, module) -> tuple[dict[str, Callable], int, object]:
    """What makes each layer of a repository, their units in all, and our layer of that shape."""
    width, depth = _WIDTH.value, _DEPTH.value
    if flag == "ultrafastbert":
        make = lambda: module.FFF(input_width=width, output_width=width, depth=depth)
        check_same(make(), spec := TreeSpec(TreeShape(1, depth, 1)))
        return {"FFF": make}, 2 ** (depth + 1) - 1, spec
    units = math.ceil(math.sqrt(4 * width)) ** 2  # experts of one, in a square; E / 8 of them are chosen
    chosen = {"heads": width // 128, "num_experts_per_head": 16, "non_competing_scores": False}
    peer = lambda: module.PEER(width, num_experts=units, **chosen)
    batch = importlib.import_module("torch").nn.Unflatten(0, (1, -1))
    return (
        {"PEER": lambda: importlib.import_module("torch").nn.Sequential(batch, peer())},
        units,
        recipe(width),
    )


def check_same(layer, spec: TreeSpec) -> None:
    """Refuses to time a layer of UltraFastBERT that is not our path layer with the same weights."""
    x = np.random.default_rng(0).standard_normal((16, layer.w1s.shape[1]), np.float32)
    params = init_ffn(jax.random.key(0), spec, x.shape[1])
    params |= {"b_in": params["b_in"] * 0, "b_out": params["b_out"] * 0}
    params |= {mine: jax.numpy.asarray(weights.detach().numpy())[None]
               for mine, weights in (("w_in", layer.w1s), ("w_out", layer.w2s))}  # fmt: skip
    ours = np.asarray(apply_ffn(params, x, spec, "masked")[0])
    theirs = layer(importlib.import_module("torch").from_numpy(x)).detach().numpy().reshape(x.shape)
    error = float(np.linalg.norm(ours - theirs) / np.linalg.norm(theirs))
    if not error < TOLERANCE:
        raise RuntimeError(f"FFF differs from our path layer with the same weights by {error:.2g}")


def times(case: Case, units: int, makers: dict[str, Callable]) -> dict[str, tuple[float, float]]:
    """{layer: (its median, that of the dense layer beside it)}, in seconds; ours last.

    Args:
      case: our layer, and the tokens.
      units: of PyTorch's dense layer.
      makers: of their layers.
    """
    nn, key = importlib.import_module("torch").nn, jax.random.key(0)
    linear = lambda n_in, n_out: nn.Linear(n_in, n_out, bias=False)
    dense = lambda: nn.Sequential(linear(case.width, units), nn.GELU(), linear(units, case.width))
    theirs = [Theirs(name, case.layers(), make) for name, make in ({"dense": dense} | makers).items()]
    time_all(case, theirs, _SECONDS.value, key)
    params = jax.eval_shape(layer_variant(case, "masked", "uniform").init, key)
    chosen = by_rule(params, jax.ShapeDtypeStruct((case.n_tokens, case.width), case.dtype), case.spec)
    layouts = dense_variants(case, case.spec.total_units, "dense")
    ours = [Timed(case, one, key) for one in (*layouts, layer_variant(case, chosen, "uniform"))]
    time_all(case, ours, _SECONDS.value, jax.random.fold_in(key, 1))
    found = {one.name: (one.median, theirs[0].median) for one in theirs[1:]}
    return found | {"ours": (ours[-1].median, fastest(ours, "dense").median)}


def report(case: Case, config: dict, pair: tuple[float, float]) -> None:
    """Prints a layer's time and how many times as fast as dense it is, and appends both as rows.

    Args:
      case: the tokens.
      config: what was timed.
      pair: seconds of the layer, and of the dense layer beside it.
    """
    figures = {"time_ms": 1e3 * pair[0], "dense_ms": 1e3 * pair[1], "ratio_to_dense": pair[1] / pair[0]}
    name = f"d{case.width}_T{case.n_tokens}_{config['repository']}_{config['layer']}"
    print(name, *(f"{metric} {value:.4g}" for metric, value in figures.items()), flush=True)
    for metric, value in figures.items() if _RESULTS.value else ():
        unit = "1" if metric == "ratio_to_dense" else "ms"
        record.append_result(
            _RESULTS.value, table="speed_peers", row=name, metric=metric, value=value, seed=None,
            config=config, unit=unit,
        )  # fmt: skip


def main() -> None:
    checkouts = {flag.name: flag.value for flag in (_ULTRAFASTBERT, _PEER) if flag.value}
    if not checkouts:
        raise InputError("--ultrafastbert and --peer are missing; name a checkout.")
    check_positive_int("--depth", _DEPTH.value)
    if _WIDTH.value <= 0 or _WIDTH.value % 128:
        raise InputError(f"--width: {_WIDTH.value} is not allowed; use a multiple of 128.")
    if not _TOKENS.value or not all(is_whole_number(word) and int(word) for word in _TOKENS.value):
        raise InputError(
            f"--tokens: {','.join(_TOKENS.value)!r} is not allowed; use whole numbers, e.g. 1,16."
        )
    for flag, module in {flag: imported(flag, checkout) for flag, checkout in checkouts.items()}.items():
        makers, units, spec = layers_of(flag, module)
        head = ["git", "-C", checkouts[flag], "rev-parse", "HEAD"]
        torch = importlib.import_module("torch")
        config = {
            "repository": flag, "width": _WIDTH.value, "units": units, "torch": torch.__version__,
            "threads": torch.get_num_threads(), "kernels": in_place("float32"),
            "cores": len(os.sched_getaffinity(0)),
            "commit": subprocess.run(head, capture_output=True, text=True).stdout.strip(),
        }  # fmt: skip
        for case in (Case(_WIDTH.value, int(n), spec, "forward", "float32") for n in _TOKENS.value):
            for name, pair in times(case, units, makers).items():
                report(case, config | {"layer": name, "tokens": case.n_tokens}, pair)


if __name__ == "__main__":
    cli.run(main, prints=lambda: not _RESULTS.value)
