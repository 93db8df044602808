"""Times the layer against dense layers: the only source of speed claims.

    python -m experiments.benchmark layer                            # the recipe's layer, here: a minute
    python -m experiments.benchmark layer --usage=skewed --passes=forward,train --tokens=1,4,16,64,256,4096
    python -m experiments.benchmark layer --shapes=wide,narrow,leaf,mixture --widths=768,2048 \\
        --results=results/speed_layer.jsonl
    python -m experiments.benchmark granularity --tokens=1,256     # from fine experts to coarse ones
    python -m experiments.benchmark route --tokens=1,4,16,64     # the two executions of the recipe's beam
    python -m experiments.benchmark layer --topology=v5e-4 --tokens=16384 --passes=train    # compiles alone

How it is measured. Every variant is compiled as a chain of layers with weights of their own (a call rotates
through more weight memory than caches hold) where each layer's input depends on the last one's output. Every
call has tokens that no call had before. Outputs are compared with the masked implementation before anything
is timed. The variants of one row take turns, and the ratios are of medians in one run. The dense layer is
the fastest of four weight layouts, on a CPU of OpenBLAS's products (without the activation) too, found for
each row anew. The floor is the larger of the fewest bytes over the copy bandwidth and of the fewest
operations over the rate of a large matrix product, both measured first.

With --topology nothing is timed: layers are compiled for one chip of a slice of TPUs that need not be here
(`pip install 'tree_ffn[tpu]'`), and what the compiler says of them is printed (benchmarks/compiled.py).
"""

import itertools
import os
from collections.abc import Callable

import jax
import jax.numpy as jnp
from absl import flags

from experiments.benchmarks import compiled, energy
from experiments.benchmarks.layers import (
    PASSES,
    SHAPES,
    USAGES,
    Case,
    check_outputs,
    compared,
    dense_variants,
    fastest,
    figures,
    floor_seconds,
    granular_spec,
    layer_spec,
    layer_variant,
    what,
)
from experiments.benchmarks.timing import Timed, Variant, ceilings, inputs, time_all
from experiments.common import cli, path_flags
from experiments.reporting import record
from experiments.reporting.aggregate import groups
from tree_ffn.errors import InputError, check_choice, is_whole_number
from tree_ffn.models.ffn import init_ffn, products
from tree_ffn.tree import IMPLEMENTATIONS, LeafSpec
from tree_ffn.tree.kernels import cuda
from tree_ffn.tree.leaf import beam
from tree_ffn.tree.path.spec import ROUTINGS
from tree_ffn.tree.rows import in_place

FLAGS = flags.FLAGS
flags.DEFINE_list("widths", ["768"], "Model widths E.")
flags.DEFINE_list("tokens", ["1", "16", "256"], "Token counts T.")
flags.DEFINE_list("shapes", ["leaf"], f"Layers with A = E / 8: {', '.join(SHAPES)}.")
flags.DEFINE_list(
    "expert_widths",
    ["1", "2", "3", "6", "12", "24", "48", "96"],
    "Of granularity: units W of an expert, divisors of E / 8.",
)
flags.DEFINE_list(
    "passes",
    ["forward"],
    "Of forward, train (forward and backward) and start (train in a leaf layer's dense start).",
)
flags.DEFINE_list("implementations", list(IMPLEMENTATIONS), "Which implementations to time.")
flags.DEFINE_integer("depth", 7, "Depth D of the trees of shapes wide and narrow.")
flags.DEFINE_string("routing", "hard", f"Routing of these trees: {' or '.join(ROUTINGS)}.")
flags.DEFINE_string("activation", "gelu", "Activation of all layers.")
flags.DEFINE_enum(
    "usage", "uniform", USAGES,
    "Which leaves tokens reach: all alike; some more, experts as in the trained recipe; one path.",
)  # fmt: skip
flags.DEFINE_string("dtype", "", "float32 or bfloat16; default: bfloat16 on accelerators, float32 on CPUs.")
flags.DEFINE_float("seconds", 1.0, "Time to spend on a measurement of one variant.")
flags.DEFINE_bool("energy", False, "On a GPU: measure the energy of a token, too; 2 s a variant.")
flags.DEFINE_integer("gather_limit", 256, "Most tokens for which gather is timed (it is for few).")
flags.DEFINE_string(
    "topology", "", "Compile for a chip of this slice of TPUs, such as v5e-4, and time nothing."
)
path_flags.define_written("results", "", "File to append rows to, e.g. results/speed_layer.jsonl.")
flags.DEFINE_integer("seed", 0, "Seed of weights and inputs.")


def run_case(
    case: Case, implementations: list[str], usage: str, seconds: float, seed: int
) -> dict[str, dict]:
    """Times of dense, narrow and every implementation: {variant: {metric: value}}.

    Args:
      case: what is timed.
      implementations: those to time.
      usage: as in `layer_variant`.
      seconds: of each variant.
      seed: of weights and inputs.
    """
    key, implementations = jax.random.key(seed), those_for(case, implementations)
    check_outputs(case, implementations, usage, key)
    timed = layers_to_time(case, implementations, usage, key)
    time_all(case, timed, seconds, key)
    draw_energy(case, compared(timed), key)
    return figures(timed, floor_seconds(case))


def draw_energy(case: Case, timed: list[Timed], key) -> None:
    """Measures the energy of a token, where that is asked for and counted.

    Args:
      case: what was timed.
      timed: what of it is measured, one after the other.
      key: of the input.
    """
    if FLAGS.energy and (joules := energy.counter()):
        (x_NTE,) = inputs(case, key, timed[0].layers, 1)
        for one in timed:
            one.draw(x_NTE, joules)


def those_for(case: Case, implementations: list[str]) -> list[str]:
    """The implementations that compute a case, gather for few tokens only."""
    if case.direction == "start":
        return ["masked"]  # the others compute no expert that is not chosen
    return [name for name in implementations if name != "gather" or case.n_tokens <= FLAGS.gather_limit]


def layers_to_time(case: Case, implementations: list[str], usage: str, key) -> list[Timed]:
    """Dense of F units and narrow of A, each in every layout; then every implementation.

    Args:
      case: what is timed.
      implementations: those to time.
      usage: as in `layer_variant`.
      key: of the weights.
    """
    variants = [
        *dense_variants(case, case.spec.total_units, "dense"),
        *dense_variants(case, case.spec.active_units, "narrow"),
        *(layer_variant(case, name, usage) for name in implementations),
    ]
    return [Timed(case, variant, key) for variant in variants]


def print_case(case: Case, rows: dict[str, dict]) -> None:
    asked = products(case.spec)
    share = f"{asked / (2 * case.spec.total_units):.1%} of dense's"
    print(f"\n{case.name}  ({case.dtype}; {asked} products, routing counted: {share})")
    head = f"  {'layer':<16}{'ms':>11}{'x dense':>9}{'x narrow':>10}{'of floor':>10}{'MiB':>9}"
    print(f"{head}{'mJ a token':>12}" if FLAGS.energy else head)
    for name, row in rows.items():
        floor = f"{100 * row['floor_share']:.1f} %" if "[" not in name else ""
        narrow = f"{row['ratio_to_narrow']:.2f}" if "ratio_to_narrow" in row else ""
        print(
            f"  {name:<16}{row['time_ms']:>11.4f}{row['ratio_to_dense']:>9.2f}"
            f"{narrow:>10}{floor:>10}{row.get('memory_mb', 0):>9.0f}"
            + (f"{row['energy_mj']:>12.4f}" if "energy_mj" in row else ""),
            flush=True,
        )


def layer_suite() -> None:
    """Times all cases that the flags name; they are checked before the first is timed."""
    cases = cases_of_flags(
        lambda width: [
            layer_spec(shape, width, FLAGS.depth, FLAGS.routing, FLAGS.activation) for shape in FLAGS.shapes
        ]
    )
    if FLAGS.topology:
        return compile_all(cases, compiled.chip(FLAGS.topology))
    print_machine(cases[0].dtype)
    for case in cases:
        rows = run_case(case, FLAGS.implementations, FLAGS.usage, FLAGS.seconds, FLAGS.seed)
        print_case(case, rows)
        if FLAGS.results:
            write_rows("speed_layer", case, rows)


def print_machine(dtype: str) -> None:
    """What the machine does at best, and whether a CPU's kernels are there."""
    bandwidth, rate = ceilings(dtype)
    if jax.default_backend() == "cpu":
        print(f"The C++ part is {'' if in_place(dtype) else 'not '}in use (make kernels).")
    kind = jax.devices()[0].device_kind
    print(f"{kind}: copy {bandwidth / 1e9:.1f} GB/s, {dtype} product {rate / 1e9:.0f} GFLOP/s")


def granularity_suite() -> None:
    """Times leaf layers of one F and one A, from fine experts to coarse ones, in turns with dense."""
    units = numbers("--expert_widths", FLAGS.expert_widths)
    cases = cases_of_flags(lambda width: [granular_spec(width, W, FLAGS.activation) for W in units])
    print_machine(cases[0].dtype)
    key = jax.random.key(FLAGS.seed)
    for same in groups(cases, lambda case: (case.width, case.n_tokens, case.direction)).values():
        layouts = dense_variants(same[0], same[0].spec.total_units, "dense")
        dense = [Timed(same[0], layout, key) for layout in layouts]
        timed = {}
        for case in same:
            names = those_for(case, FLAGS.implementations)
            check_outputs(case, names, FLAGS.usage, key)
            timed[case] = [Timed(case, layer_variant(case, name, FLAGS.usage), key) for name in names]
        time_all(same[0], [*dense, *itertools.chain(*timed.values())], FLAGS.seconds, key)
        best = [min(of_case, key=lambda t: t.median) for of_case in timed.values()]
        draw_energy(same[0], [fastest(dense, "dense"), *best], key)
        for case, of_case in timed.items():
            rows = figures([*dense, *of_case], floor_seconds(case))
            print_case(case, rows)
            if FLAGS.results:
                write_rows("granularity", case, rows)


def compile_all(cases: list[Case], device) -> None:
    """Compiles dense and every implementation of all cases for a device, one at a time."""
    print(f"One chip, {device.device_kind}, by its compiler; nothing runs.")
    head = "".join(f"{name:>16}" for name in compiled.UNITS)
    for case in cases:
        dense = dense_variants(case, case.spec.total_units, "dense")[-1]  # both weights [F, E]
        names = those_for(case, FLAGS.implementations)
        print(f"\n{case.name}  ({case.dtype})\n  {'layer':<16}{head}")
        for variant in [dense, *(layer_variant(case, name, FLAGS.usage) for name in names)]:
            found = compiled.figures(case, variant, device)
            said = "".join(f"{found[name]:>16,.2f}" for name in compiled.UNITS)
            print(f"  {variant.name:<16}{said}", flush=True)
            if FLAGS.results:
                row = f"{case.name}.{variant.name.partition('[')[0]}"
                compiled.write(FLAGS.results, row, found, what(case, variant.name), device)


class Routing(Case):
    """The same of a layer's router alone."""

    def layers(self) -> int:
        """Length of the chain: of the recipe at E = 768, 50 MB of routers for few tokens."""
        return 32 if self.n_tokens <= 64 else 4


ROUTES = {"all_rows": beam.of_all_rows, "asked_rows": beam.of_asked_rows}


def route_variant(case: Case, name: str) -> Variant:
    """An execution of the recipe's beam; what is chosen, and how likely, adds up to the output."""

    def apply(params, x_TE):
        ids_TK, log_p_TK = ROUTES[name](params, x_TE, case.spec)
        sum_T1 = (ids_TK.astype(jnp.float32) + log_p_TK).sum(axis=1, keepdims=True)
        return jnp.broadcast_to(sum_T1, x_TE.shape)

    def init(key):
        params = init_ffn(key, case.spec, case.width)
        return {name: params[name] for name in ("w_router", "b_router")}

    return Variant(name, init, apply)


def route_suite() -> None:
    """Times both executions of the recipe's beam, forward, for all widths and numbers of tokens."""
    if not in_place("float32"):
        raise InputError("route: the C++ part is not in use; run make kernels, on a CPU.")
    for width in numbers("--widths", FLAGS.widths):
        for n_tokens in numbers("--tokens", FLAGS.tokens):
            spec = layer_spec("leaf", width, FLAGS.depth, FLAGS.routing, FLAGS.activation)
            case, key = Routing(width, n_tokens, spec, "forward", "float32"), jax.random.key(FLAGS.seed)
            timed = [Timed(case, route_variant(case, name), key) for name in ROUTES]
            time_all(case, timed, FLAGS.seconds, key)
            rows = {t.name: {"time_ms": 1e3 * t.median} for t in timed}
            print(case.name, *(f"{name} {row['time_ms']:.4f} ms" for name, row in rows.items()), flush=True)
            if FLAGS.results:
                write_rows("speed_route", case, rows)


def cases_of_flags(specs: Callable[[int], list]) -> list[Case]:
    """Every width with every layer that `specs` has of it, number of tokens and pass."""
    for direction in FLAGS.passes:
        check_choice("--passes", direction, PASSES)
    for name in FLAGS.implementations:
        check_choice("--implementations", name, IMPLEMENTATIONS)
    on_cpu = jax.default_backend() == "cpu" and not FLAGS.topology
    dtype = FLAGS.dtype or ("float32" if on_cpu else "bfloat16")
    check_choice("--dtype", dtype, ("float32", "bfloat16"))
    cases = [
        Case(width, n_tokens, spec, direction, dtype)
        for width in numbers("--widths", FLAGS.widths)
        for spec in specs(width)
        for n_tokens in numbers("--tokens", FLAGS.tokens)
        for direction in FLAGS.passes
    ]
    if not cases:
        raise InputError("--widths, --tokens, --shapes, --passes: one is empty; name at least one of each.")
    for case in cases:
        allowed = USAGES
        if isinstance(case.spec, LeafSpec):
            allowed = ("uniform", "skewed") if "b_router" in case.spec.router_params else ("uniform",)
        check_choice(f"--usage (of {case.name})", FLAGS.usage, allowed)
        if case.direction == "start" and not isinstance(case.spec, LeafSpec):
            raise InputError(
                f"--passes: start is not allowed with {case.name}; leaf layers alone start dense."
            )
    return cases


def numbers(flag: str, words: list[str]) -> list[int]:
    """The words of a flag as whole numbers."""
    for word in words:
        if not is_whole_number(word) or int(word) < 1:
            raise InputError(
                f"{flag}: {word!r} is not allowed; use whole numbers of at least 1, such as 256,768."
            )
    return [int(word) for word in words]


def write_rows(table: str, case: Case, rows: dict[str, dict]) -> None:
    """Appends a row for every figure to --results.

    Args:
      table: of the rows.
      case: what was timed.
      rows: {variant: {metric: value}}.
    """
    bandwidth, rate = ceilings(case.dtype)
    for variant, metrics in rows.items():
        config = what(case, variant) | {
            "usage": FLAGS.usage,
            "new_tokens": True,  # at every call; rows without it are of one input again and again
            "kernels": in_place(case.dtype) or cuda.is_loaded("experts"),
            "cores": len(os.sched_getaffinity(0)),
            "copy_gb_per_s": bandwidth / 1e9,
            "product_gflop_per_s": rate / 1e9,
        }
        for metric, value in metrics.items():
            record.append_result(
                FLAGS.results,
                table=table,
                row=f"{case.name}.{variant.partition('[')[0]}",
                metric=metric,
                value=value,
                unit={"time_ms": "ms", "memory_mb": "MiB", "energy_mj": "mJ"}.get(metric, "1"),
                seed=None,
                config=config,
            )


SUITES = {"layer": layer_suite, "granularity": granularity_suite, "route": route_suite}


def main(suite: str = "layer") -> None:
    check_choice("suite", suite, SUITES)
    SUITES[suite]()


if __name__ == "__main__":
    cli.run(main, prints=lambda: not FLAGS.results)
