"""What the benchmark times is the whole of it, and implementations that differ are refused."""

import importlib
import importlib.util
import time

import jax
import numpy as np
import pytest

import tree_ffn
from experiments.benchmarks import compiled, energy, layers, timing
from experiments.reporting.record import load_results
from experiments.reporting.registry import tables_of
from tests.experiments.programs import alone, call
from tree_ffn.errors import InputError
from tree_ffn.models import ffn as models
from tree_ffn.tree import IMPLEMENTATIONS, LeafSpec
from tree_ffn.tree.leaf import beam
from tree_ffn.tree.leaf.route import route

WIDTH = 128


@pytest.fixture
def benchmark():
    with alone("benchmark"):
        yield importlib.import_module("experiments.benchmark")


def case_of(benchmark, direction: str, n_tokens: int = 32, shape: str = "wide"):
    spec = benchmark.layer_spec(shape, WIDTH, 5, "hard", "gelu")
    return benchmark.Case(WIDTH, n_tokens, spec, direction, "float32")


@pytest.mark.parametrize("layout", range(4))
def test_training_has_three_times_the_products_of_a_forward_pass(benchmark, layout):
    """A compiler that finds the output unused, or its cotangent constant, leaves products out."""
    flops = {}
    for direction in benchmark.PASSES:
        this = case_of(benchmark, direction, n_tokens=512)  # one layer
        variant = benchmark.dense_variants(this, 256, "dense")[layout]
        analysis = timing.Timed(this, variant, jax.random.key(0)).run.cost_analysis()
        flops[direction] = analysis["flops"]
    products = 2 * 2 * 512 * WIDTH * 256
    assert flops["train"] - flops["forward"] >= 2 * products


def test_each_layer_has_its_weights_and_waits_for_the_last(benchmark):
    weights, x = jax.numpy.asarray([2.0, 3.0, 5.0]), jax.numpy.asarray([1.0, 10.0, 100.0, 7.0])
    chain = timing.chained(lambda w, x: w * x, 3)
    assert chain(weights, x) == pytest.approx(5 * (100 + 1e-3 * 3 * (10 + 1e-3 * 2)), rel=1e-6)


def test_a_time_is_of_one_call_of_one_layer_and_so_is_memory(benchmark):
    case = case_of(benchmark, "forward", n_tokens=1)
    init, apply = (lambda key: jax.random.normal(key, (WIDTH, WIDTH))), (lambda w, x: jax.numpy.tanh(x @ w))
    timed = timing.Timed(case, timing.Variant("one", init, apply), jax.random.key(0))
    assert timed.layers == 32
    inputs, began = timing.inputs(case, jax.random.key(1), 32, 50), time.perf_counter()
    timed.measure(inputs)
    elapsed = time.perf_counter() - began
    assert 0.1 * elapsed < 50 * 32 * timed.times[0] <= elapsed
    assert timed.memory() == pytest.approx(4 * WIDTH * WIDTH, rel=0.2)  # its weights; tokens are few


def test_no_call_gets_the_tokens_of_another(benchmark, monkeypatch):
    """A tree finds the experts of a token that came before in the caches, a dense layer does not."""
    case, seen = case_of(benchmark, "forward", n_tokens=1), []
    init, apply = (lambda key: jax.random.normal(key, (WIDTH, WIDTH))), (lambda w, x: jax.numpy.tanh(x @ w))
    timed = timing.Timed(case, timing.Variant("one", init, apply), jax.random.key(0))
    monkeypatch.setattr(
        timing.Timed, "measure", lambda self, inputs: (seen.extend(inputs), self.times.append(1e-5))
    )
    timing.time_all(case, [timed], 0.0, jax.random.key(1))
    assert len(seen) > 3 * 50 and len({bytes(x) for x in map(jax.numpy.asarray, seen)}) == len(seen)


def test_dense_by_numpy_has_the_same_products(benchmark):
    case = case_of(benchmark, "forward", n_tokens=8)
    *_, openblas = benchmark.dense_variants(case, 64, "dense")
    timed = timing.Timed(case, openblas, jax.random.key(0))
    [x] = timing.inputs(case, jax.random.key(1), timed.layers, 1)
    timed.measure([x])
    assert timed.memory() is None and timed.name == "dense[openblas]" and timed.median > 0
    weights = timed.weights[-1]
    assert weights["w_in"].shape == (WIDTH, 64) and weights["w_out"].shape == (64, WIDTH)


def test_experts_are_used_as_unevenly_as_after_a_training(benchmark):
    case = case_of(benchmark, "forward", n_tokens=512, shape="leaf")
    init = jax.jit(benchmark.layer_variant(case, "masked", "skewed").init)
    run = jax.jit(route, static_argnums=2)

    def entropy(seed):
        [x_NTE] = timing.inputs(case, jax.random.key(seed), 1, 1)
        ids_TK, _ = run(init(jax.random.key(seed)), x_NTE[0], case.spec.after_start)
        share_X = np.bincount(np.asarray(ids_TK).reshape(-1), minlength=512) / ids_TK.size
        return -(share_X * np.log(np.maximum(share_X, 1e-30))).sum() / np.log(512)

    assert 0.8 < np.mean(list(map(entropy, range(8)))) < 0.88


def test_times_every_variant(benchmark, monkeypatch):
    monkeypatch.setattr(layers, "ceilings", lambda dtype: (1e10, 1e11))
    train, forward = (case_of(benchmark, direction, n_tokens=512) for direction in ("train", "forward"))
    variants = [benchmark.layer_variant(train, name, "uniform") for name in IMPLEMENTATIONS]
    timed = [timing.Timed(train, variant, jax.random.key(0)) for variant in variants]
    timing.time_all(train, timed, 0.0, jax.random.key(1))
    assert all(len(t.times) >= 3 and t.median > 0 and t.memory() for t in timed)
    assert benchmark.floor_seconds(train) > benchmark.floor_seconds(forward)


def test_dense_layers_have_the_layers_units_and_ratios_say_how_much_faster(benchmark):
    case = case_of(benchmark, "forward", n_tokens=512, shape="leaf")  # one layer: less to compile
    timed = benchmark.layers_to_time(case, ["masked"], "uniform", jax.random.key(0))
    kinds = [t.name.partition("[")[0] for t in timed]
    assert kinds == ["dense"] * 5 + ["narrow"] * 5 + ["masked"]
    assert [t.weights[0]["b_in"].size for t in timed[:-1]] == [512] * 5 + [16] * 5  # F and A
    for t, kind in zip(timed, kinds):
        seconds = {"dense": 0.8, "narrow": 0.1, "masked": 0.2}[kind]
        t.times = [seconds, 9.0, seconds]  # the median counts
    timed[0].times, timed[7].times = [1.4] * 3, [0.05] * 3
    figures = benchmark.figures(timed, floor=0.05)
    assert list(figures) == [timed[1].name, timed[7].name, "masked"]  # the fastest layouts
    masked = figures["masked"]
    assert masked.pop("memory_mb") > 0
    assert masked == pytest.approx(
        {"time_ms": 200.0, "ratio_to_dense": 4.0, "ratio_to_narrow": 0.25, "floor_share": 0.25}
    )


def test_the_energy_of_a_token_is_what_a_counter_rises_by(benchmark):
    """One that counts a joule for every call."""
    case, calls = case_of(benchmark, "forward", n_tokens=512, shape="leaf"), []
    timed = timing.Timed(case, benchmark.layer_variant(case, "masked", "uniform"), jax.random.key(0))
    run = timed.run
    timed.run = lambda *arrays: calls.append(1) or run(*arrays)
    [x_NTE] = timing.inputs(case, jax.random.key(1), timed.layers, 1)
    timed.draw(x_NTE, lambda: float(len(calls)), seconds=0.05)
    assert timed.joules == pytest.approx(1 / timed.layers / 512) and len(calls) > 10
    assert energy.counter() is None or jax.default_backend() == "gpu"


def test_an_implementation_that_computes_something_else_is_not_timed(benchmark, monkeypatch):
    wrong = lambda *given: 2.0 * IMPLEMENTATIONS["gather"](*given)
    monkeypatch.setitem(IMPLEMENTATIONS, "grouped", wrong)
    for shape in ("wide", "leaf"):
        case = case_of(benchmark, "forward", shape=shape)
        benchmark.check_outputs(case, ["gather"], "uniform", jax.random.key(0))
        with pytest.raises(RuntimeError, match="grouped differs from masked"):
            benchmark.check_outputs(case, ["grouped"], "uniform", jax.random.key(0))


@pytest.mark.parametrize("n_tokens", [1, 32])
def test_the_recommended_layer_is_timed_as_it_is_used(benchmark, monkeypatch, n_tokens, capsys):
    """Its F and A are of units, and what it has to read, to multiply and to print is of routers too."""
    monkeypatch.setattr(layers, "ceilings", lambda dtype: (1e10, 1e30))
    case = case_of(benchmark, "forward", n_tokens, "leaf")
    assert case.spec == tree_ffn.recipe(WIDTH)
    assert (case.spec.total_units, case.spec.active_units) == (512, 16)
    units, routers = min(512, 16 * n_tokens), min(511, 95 * n_tokens)
    assert benchmark.floor_seconds(case) == 4 * WIDTH * (2 * units + routers + 2 * n_tokens) / 1e10
    monkeypatch.setattr(layers, "ceilings", lambda dtype: (1e30, 1e10))
    forward = n_tokens * 2 * WIDTH * (2 * 16 + 95) / 1e10
    assert benchmark.floor_seconds(case) == forward
    train = case_of(benchmark, "train", n_tokens, "leaf")
    assert benchmark.floor_seconds(train) == pytest.approx(3 * forward)
    start = benchmark.floor_seconds(case_of(benchmark, "start", n_tokens, "leaf"))
    assert start == pytest.approx(3 * n_tokens * 2 * WIDTH * (2 * 512 + 95) / 1e10)
    benchmark.print_case(case, {})
    name, said = (
        f"d128_T{n_tokens}_X512_W1_K16_tree_forward",
        "127 products, routing counted: 12.4% of dense's",
    )
    assert name in (printed := capsys.readouterr().out) and said in printed


@pytest.mark.parametrize("width", [768, 2048, 640])
def test_experts_of_any_width_keep_the_units_of_the_layer(width):
    active = width // 8
    for W in (W for W in range(1, active + 1) if active % W == 0):
        spec = layers.granular_spec(width, W, "gelu")
        assert (spec.total_units, spec.active_units, spec.expert_width) == (4 * width, active, W)
    with pytest.raises(InputError, match=f"--expert_widths: 7 is not allowed at --widths={width}; use"):
        layers.granular_spec(width, 7, "gelu")


def test_fine_and_coarse_experts_are_timed_beside_the_same_dense_layer(tmp_path):
    results = tmp_path / "granularity.jsonl"
    command = ["granularity", "--widths=128", "--expert_widths=4,16", "--tokens=1", "--seconds=0"]
    outcome = call("benchmark", *command, "--implementations=gather", f"--results={results}")
    assert outcome.code == 0, outcome.err
    times = {row["row"]: row["value"] for row in load_results(str(results)) if row["metric"] == "time_ms"}
    fine, coarse = "d128_T1_X128_W4_K4_tree_forward", "d128_T1_X32_W16_K1_tree_forward"
    assert list(times) == [f"{case}.{one}" for case in (fine, coarse) for one in ("dense", "gather")]
    assert times[f"{fine}.dense"] == times[f"{coarse}.dense"]
    [table] = tables_of(load_results(str(results)), [])
    assert table.head[:6] == ["E", "T", "shape", "pass", "dense", "gather"]  # no column of narrow
    assert [line[2] for line in table.cells] == ["X=32 W=16 K=1", "X=128 W=4 K=4"]


@pytest.mark.parametrize(
    "shape, products",
    [("wide", 2 * 12), ("narrow", 2 * 12), ("leaf", 2 * 16 + 95), ("mixture", 2 * 16 + 128)],
)
def test_every_shape_has_its_products(benchmark, shape, products):
    assert models.products(case_of(benchmark, "forward", shape=shape).spec) == products


def test_bad_input():
    for flags, said in {
        "--widths=64": "--widths: 64 is not allowed; use a multiple of 128",
        "--passes=start --shapes=wide": "--passes: start is not allowed with d768_T1_P1_W12_start",
        "--shapes=recipe": "--shapes: 'recipe' is not known",
        "--implementations=loop": "--implementations: 'loop' is not known",
        "--usage=one_leaf": "--usage (of d768_T1_X512_W6_K16_tree_forward): 'one_leaf' is not known",
    }.items():
        done = call("benchmark", *flags.split())
        assert done.code == 2 and said in done.err and "Traceback" not in done.err


def test_a_beam_is_timed_where_it_has_two_executions(benchmark, monkeypatch):
    case = benchmark.Routing(WIDTH, 5, tree_ffn.recipe(WIDTH), "forward", "float32")
    variant = benchmark.route_variant(case, "all_rows")
    params, x = jax.jit(variant.init)(jax.random.key(0)), jax.numpy.ones((5, WIDTH))
    ids, log_p = jax.jit(beam.of_all_rows, static_argnums=2)(params, x, case.spec)
    sums = (ids.astype(log_p.dtype) + log_p).sum(axis=1)
    assert jax.jit(variant.apply)(params, x).tolist() == [[float(one)] * WIDTH for one in sums]
    monkeypatch.setattr(benchmark, "in_place", lambda dtype: False)
    with pytest.raises(InputError, match="route: the C[+][+] part is not in use; run make kernels"):
        benchmark.route_suite()


needs_libtpu = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason="needs libtpu: pip install 'tree_ffn[tpu]'"
)


@pytest.mark.parametrize(
    "topology, said", [("h200-1", "use a slice of TPUs"), ("v5e-5", "use one of v5e-4, ")]
)
def test_a_topology_is_one_of_tpus(topology, said):
    outcome = call("benchmark", "layer", f"--topology={topology}")
    assert outcome.code == 2 and said in outcome.err and len(outcome.err.strip().splitlines()) == 1


def test_layers_for_tpus_that_are_not_here(tmp_path):
    """By libtpu; where it is missing, the command that installs it is said."""
    results = tmp_path / "layer_tpu.jsonl"
    command = ["layer", "--topology=v5e-4", "--shapes=mixture", "--widths=128", "--tokens=128"]
    command += ["--implementations=masked", f"--results={results}"]
    outcome = call("benchmark", *command)
    if importlib.util.find_spec("libtpu") is None:
        assert outcome.code == 2 and "is missing; pip install 'tree_ffn[tpu]'" in outcome.err
        return
    assert outcome.code == 0 and "d128_T128_X128_W4_K4_softmax_forward  (bfloat16)" in outcome.out, (
        outcome.err
    )
    rows = load_results(str(results))
    assert {row["device"] for row in rows} == {"tpu_v5_lite"}
    [table] = tables_of(rows, [])
    assert [line[4] for line in table.cells] == ["dense", "masked"] and table.cells[0][9] == "1.00"


@needs_libtpu
@pytest.mark.parametrize("direction", ["forward", "train"])
@pytest.mark.parametrize("topology", ["v5e-4", "v6e-8"])
def test_the_leaf_layer_compiles_for_tpus(benchmark, topology, direction):
    """In both forms: all units and no number read by index; tiles of neighbours, read by index."""
    spec = LeafSpec(n_experts=32, expert_width=6, top_k=4)
    case, device = benchmark.Case(WIDTH, 256, spec, direction, "bfloat16"), compiled.chip(topology)
    variant = lambda name: benchmark.layer_variant(case, name, "uniform")
    masked, grouped = (compiled.figures(case, variant(name), device) for name in ("masked", "grouped"))
    products = {"forward": 2, "train": 6}[direction]
    assert masked["executed_gflop"] > products * 2 * 256 * spec.total_units * WIDTH / 1e9
    assert masked["unestimated_gb"] == 0 < min(masked["mcycles"], grouped["unestimated_gb"])
