"""Results rows become tables: statistics, what may be compared, pages."""

import dataclasses
import pathlib

import pytest

from experiments.reporting import record
from experiments.reporting.registry import TABLES, TOPICS, read_rows, tables_of, topic
from experiments.tables import render
from tests.experiments.programs import call
from tree_ffn.errors import InputError
from tree_ffn.tree import LeafSpec, TreeShape, TreeSpec
from tree_ffn.upgrades import ADDED, VERSION

ROOT = pathlib.Path(__file__).parent.parent.parent.parent


@pytest.fixture(autouse=True)
def quick_rows(monkeypatch):
    """Rows without asking git and the package index each time."""
    monkeypatch.setattr(record, "commit", lambda: "abc123")
    monkeypatch.setattr(record, "versions", lambda: {"jax": "0.10.2"})


def config(steps=500, lr=2e-3, sha="1" * 64, splits=None, **ffn):
    """As a run records it; of the layer, what differs from a hard tree of P=2, W=1, D=7."""
    return {
        "model": {"n_layers": 4, "width": 128, "max_seq_len": 256},
        "train": {"steps": steps, "batch_size": 8, "log_every": 20},
        "optim": {"lr": lr, "skip_above": 0.0, "skip_at_most": 10, "master_weights": False},
        "data": {"corpus": "text", "sha256": sha, "vocab_size": 257, "splits": splits or {}},
        "ffn": {**FFN, **ffn},
    }


KINDS = ("dense", "narrow", "moe", "hash", "random_tree", "tree")
FFN = {
    "implementation": "auto", "activation": "gelu", "width": 510, "n_trees": 2, "depth": 7, "node_width": [1],
    "act_site": "node", "routing": "hard", "balance_rate": 0.0, "n_experts": 32, "expert_width": 16,
    "top_k": 1, "gate_norm": "none", "dense_start": 0.0,
}  # fmt: skip
LAYERS = {
    "moe": {"kind": "leaf", "router": "softmax", "n_trees": 1},
    "hash": {"kind": "leaf", "router": "hash", "n_trees": 1},
    "narrow": {"kind": "narrow", "width": 16},
}
# The same sections until version 5: every kind had all fields, and trees said F and A of the others.
OLD = {
    "implementation": "auto", "activation": "gelu", "width": 0, "n_trees": 2, "depth": 7, "node_width": [1],
    "shared_width": 0, "act_site": "node", "routing": "hard", "balance": "none", "balance_rate": 1e-3,
    "gate": "min", "kappa": 1.0, "beta": 1.0, "n_experts": 32, "expert_width": 0, "top_k": 1,
    "renormalise": False, "moe_balance": "none", "aux_weight": 0.01,
}  # fmt: skip


def add(path, row, seed, table="cpu_small", device="cpu", figures=None, of=None, **loss):
    """Appends a run's figures; bits per byte is half of the loss."""
    figures = figures or {"val_loss": loss["loss"], "bits_per_byte": loss["loss"] / 2}
    of = of or config()
    if "ffn" in of and "kind" not in of["ffn"]:
        kind = next(kind for kind in KINDS if kind in row)
        of = {**of, "ffn": {**of["ffn"], **LAYERS.get(kind, {"kind": kind})}}
    for metric, value in figures.items():
        record.append_result(
            str(path), table=table, row=row, metric=metric, value=value, seed=seed, config=of,
            device=device, unit="1", command="python -m experiments.train --config=configs/cpu_small.py",
        )  # fmt: skip


def cells(markdown, name):
    """Cells of the lines that begin with a name."""
    lines = [line for line in markdown.splitlines() if line.startswith(f"| {name} |")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


@pytest.fixture
def small(tmp_path):
    """Three kinds, two seeds of each, and one seed of one more."""
    path = tmp_path / "cpu_small.jsonl"
    for seed, shift in ((0, 0.0), (1, 0.1)):
        add(path, "tree_hard_P2_W1", seed, loss=2.5 + shift)
        add(path, "narrow_A16", seed, loss=3.0 + shift)
        add(path, "dense", seed, loss=2.0 + shift)
    add(path, "moe_top1_X32", 0, loss=2.25)
    return path


def test_mean_spread_and_gap(small):
    text = render(str(small))
    (tree,), (moe,) = cells(text, "`tree_hard_P2_W1`"), cells(text, "`moe_top1_X32`")
    assert tree[1:4] == ["1.2750 ± 0.0354", "2.5500 ± 0.0707", "0.500 ± 0.000"]
    assert moe[1:4] == ["1.1250 (one seed)", "2.2500 (one seed)", "0.750 (one seed)"]
    assert (tree[-1], moe[-1]) == ("2", "1")
    places = [text.index(f"| `{kind}") for kind in ("dense", "narrow", "moe", "tree")]
    assert places == sorted(places)
    assert "abc123" in text and "jax 0.10.2" in text and "seeds 0, 1" in text and "111111111111" in text


def test_attempts_stand_beside_the_baselines_of_their_task(tmp_path):
    path = tmp_path / "t1_small.jsonl"
    for row, loss in (("dense", 2.0), ("narrow_A16", 3.0), ("tree_hard_P2_W1", 2.9)):
        add(path, row, 0, table="t1_small", loss=loss)
    add(path, "dense", 1, table="t1_small", of=config(sha="2" * 64, steps=1500), loss=1.0)
    for row, loss, of in (
        ("hash_X32", 2.25, config()),
        ("random_tree_P2", 2.5, config(sha="3" * 64, steps=1500)),
    ):
        add(path, row, 0, table="quality_attempts", of=of, loss=loss)
    text = render(str(path))
    attempts = text[text.index("## Attempts") :]
    assert cells(attempts, "`hash_X32`")[0][3] == "0.750 (one seed)"
    assert len(cells(attempts, "`dense`")) == len(cells(attempts, "`narrow_A16`")) == 1
    assert not cells(attempts, "`tree_hard_P2_W1`")  # no baseline
    assert cells(attempts, "`random_tree_P2`")[0][3] == ""  # of another text: nothing to be compared with


def test_lengths_and_devices_are_tables_of_their_own(small):
    add(small, "dense", 0, of=config(steps=1500), loss=1.5)
    add(small, "dense", 0, device="h200", loss=1.0)
    add(small, "dense", 1, device="h100", loss=1.2)  # a card like it: another seed of the same line
    text = render(str(small))
    assert text.count("## Small comparison") == 3 and "1500 steps" in text
    assert [row[1] for row in cells(text, "`dense`")] == [
        "0.5500 ± 0.0707", "1.0250 ± 0.0354", "0.7500 (one seed)",
    ]  # fmt: skip
    assert "Device `h100, h200`" in text


@pytest.mark.parametrize(
    "row, old, cost",
    [
        ("dense", {"kind": "dense"}, "1,020"),
        ("narrow_A16", {"kind": "narrow"}, "32"),
        ("narrow_A16", {"kind": "narrow", "router": "silent", "depth": 5, "n_trees": 16}, "32"),
        ("tree_hard_P2_W1", {"kind": "tree"}, "32"),
        ("random_tree_P2_W1", {"kind": "random_tree", "routing": "continuous"}, "46"),
        ("moe_top1_X32", {"kind": "moe"}, "64"),
        ("hash_X32", {"kind": "hash", "top_k": 4}, "32"),
    ],
)
def test_one_layer_recorded_before_and_after_it_had_other_keys_is_one_line(tmp_path, row, old, cost):
    path = tmp_path / "rows.jsonl"
    before = {**config(), "ffn": {**OLD, **old}, "config_version": 4}
    add(path, row, 0, of=before | {"ffn": added() | before["ffn"]}, loss=2.0)
    add(path, row, 1, of=before | {"config_version": 0}, loss=2.1)
    add(path, row, 2, loss=2.2)
    assert record.load_results(str(path))[0]["config"]["config_version"] == VERSION
    (line,) = cells(render(str(path)), f"`{row}`")
    assert (line[2], line[5], line[-1]) == ("2.1000 ± 0.1000", cost, "3")
    changed = config(activation="relu")
    add(path, row, 3, of=changed, loss=2.2)
    with pytest.raises(InputError, match="ffn.activation is both"):
        render(str(path))


def added():
    """What a section `ffn` of version 4 had beside `OLD`."""
    return {name: value for name, value in ADDED["ffn"].items() if name not in OLD}


def test_layers_that_are_gone_stand_in_tables_by_what_was_recorded(tmp_path):
    """Silent routers and a beam, a hash's paths, shared units, all leaves, groups: products by hand."""
    path = tmp_path / "rows.jsonl"
    experts = {"router": "silent", "depth": 5, "n_trees": 16, "routing": "continuous", "beam": 2}
    rows = {
        "tree_continuous_beam2": ({"kind": "tree", **experts}, "176"),  # 16 units, 16 (1 + 4 2) routers
        "hash_tree_P2_W1": ({"kind": "hash_tree"}, "32"),
        "tree_shared": ({"kind": "tree", "shared_width": 6}, "44"),
        "leaf_best": ({"kind": "leaf", "top_k": 4, "expert_width": 3, "leaf_trees": 2}, "54"),  # 24 + 30
        "moe_grouped": ({"kind": "moe", "top_k": 4, "expert_width": 4, "expert_groups": 2}, "64"),
    }
    for row, (ffn, _) in rows.items():
        of = {**config(), "ffn": {**OLD, **added(), **ffn}, "config_version": 4}
        add(path, row, 0, of=of, figures={"val_loss": 2.5, "bits_per_byte": 1.0, "active_share": 0.125})
    for row, loss in (("dense", 2.0), ("narrow_A16", 3.0)):
        add(path, row, 0, loss=loss)
    for row, (_, cost) in rows.items():
        (line,) = cells(render(str(path)), f"`{row}`")
        assert line[3:6] == ["0.500 (one seed)", "12.5%", cost], row


def test_recorded_products_stand_before_arithmetic(tmp_path):
    add(
        tmp_path / "r.jsonl",
        "moe_top1_X32",
        0,
        figures={"val_loss": 2.0, "bits_per_byte": 1.0, "products": 7},
    )
    assert cells(render(str(tmp_path / "r.jsonl")), "`moe_top1_X32`")[0][5] == "7"


def test_keys_that_are_no_more_count_as_what_was_computed_then(small):
    older = {**config(), "ffn": {**OLD, "kind": "dense", "balance_floor": 0.5}, "config_version": 0}
    add(small, "dense", 2, of=older, loss=2.2)
    assert cells(render(str(small)), "`dense`")[0][-1] == "3"
    leaks = {"kind": "tree", "balance": "sign", "leak": 0.5}
    of = {**config(), "ffn": {**OLD, **leaks}, "config_version": 0}
    add(small, "tree_hard_P2_W1", 2, of=of, loss=2.2)
    with pytest.raises(InputError, match=r"tree_hard_P2_W1: ffn\.\w+ is both"):
        render(str(small))


def test_other_texts_stand_below_with_gaps_of_their_own(tmp_path):
    path = tmp_path / "t1_small.jsonl"
    texts = {"narrow_A16": (5.0, 6.0), "dense": (4.0, 4.0), "tree_hard_P2_W1": (4.25, 5.5)}
    for row, (novels, joined) in texts.items():
        figures = {"val_loss": 3.0, "bits_per_byte": 1.0, "novels_loss": novels, "novels_bits_per_byte": 1.5}
        figures |= {"wikitext2_joined_loss": joined, "wikitext2_joined_bits_per_byte": 1.25}
        add(path, row, 0, "t1_small", figures=figures)
    text = render(str(path))
    assert "## Language modelling (T1), cpu, 500 steps: other texts" in text and "nats a word" not in text
    assert cells(text, "`tree_hard_P2_W1`")[1] == [
        "`tree_hard_P2_W1`", "1.5000 (one seed)", "0.750 (one seed)", "1",
        "1.2500 (one seed)", "0.250 (one seed)", "1",
    ]  # fmt: skip


def pruned(path, row, seed, loss, threshold=0.0, tokens=4000, step=500):
    said = {"threshold": threshold, "static": False, "tokens": tokens, "sha256": "3" * 64, "step": step}
    figures = {"val_loss": loss, "loss_rise": 0.0, "units_kept": 100, "units_share": 0.5, "bytes": 2e6}
    add(path, row, seed, "prune_small", figures=figures, of={**config(), "prune": said})


def test_seeds_are_pruned_at_the_best_step_of_each(tmp_path):
    path = tmp_path / "prune.jsonl"
    pruned(path, "tree_hard_P2_W1", 0, 2.0, step=400)
    pruned(path, "tree_hard_P2_W1", 1, 3.0, step=500)
    pruned(path, "tree_hard_P1_W2", 0, 2.5, tokens=128_000)
    text = " ".join(render(str(path)).split())
    (line,) = cells(render(str(path)), "`tree_hard_P2_W1`")
    assert line[5] == "2.5000 ± 0.7071" and line[-1] == "2"
    assert "of 4,000 or 128,000 calibration tokens (sha256 333333333333) visits; 0 removes" in text
    pruned(path, "tree_hard_P2_W1", 1, 2.9, step=300)
    with pytest.raises(InputError, match="prune.step is both 500 and 300"):
        render(str(path))


def test_a_later_row_supersedes(small):
    add(small, "moe_top1_X32", 0, loss=2.0)
    add(small, "moe_top1_X32", 0, of=config(implementation="masked"), loss=1.5)  # same layer
    assert cells(render(str(small)), "`moe_top1_X32`")[0][2] == "1.5000 (one seed)"


@pytest.mark.parametrize(
    "row, other, key",
    [
        ("dense", config(sha="2" * 64), "data.sha256"),
        ("random_tree_P2_W1", config(sha="2" * 64), "data.sha256"),
        ("random_tree_P2_W1", config(splits={"valid": {"rows": 9}}), "data.splits.valid.rows"),
        ("dense", config(lr=4e-3), "optim.lr"),
        ("dense", config(activation="relu"), "ffn.activation"),
    ],
)
def test_what_differs_is_not_averaged(small, row, other, key):
    add(small, row, 2, of=other, loss=2.0)
    with pytest.raises(InputError, match=key):
        render(str(small))


def opt_125m(**fields):
    return config(**fields) | {"model": config()["model"] | {"preset": "opt_125m"}}


def test_a_table_may_have_any_name(tmp_path):
    """It says how far its lines end from dense, seed by seed."""
    path = tmp_path / "rows.jsonl"
    for seed, dense in enumerate((1.0, 3.0)):
        add(path, "dense", seed, table="mine", loss=dense)
        add(path, "narrow_A16", seed, table="mine", loss=dense + 2 + seed)
    (table,) = tables_of(*read_rows(str(path)))
    assert table.title == "mine, 500 steps"
    lines = {cells[0]: dict(zip(table.head, cells)) for cells in table.cells}
    assert lines["`narrow_A16`"]["less dense"] == "2.5000 ± 0.7071"
    assert lines["`dense`"]["less dense"] == "0.0000 ± 0.0000"


def test_steps_are_never_mixed(tmp_path):
    path = tmp_path / "speed_train.jsonl"
    for kind, rate, steps in (("dense", 100.0, 10), ("tree", 150.0, 10), ("tree", 9000.0, 20)):
        figures = {"tokens_per_s": rate, "val_loss": 3.0}
        add(path, f"opt_125m_T2048_{kind}", 0, "speed_train", "h200", figures, opt_125m(steps=steps))
    text = render(str(path))
    assert text.count("## Speed of training, opt_125m_T2048, h200") == 2
    first, second = cells(text, "`tree`")
    assert first[1:3] == ["150", "1.50"] and second[1:3] == ["9,000", ""]
    assert first[4] == "3.0000 (one seed)"


def test_rates_of_cards_that_learn_alike_are_not_averaged(tmp_path):
    path = tmp_path / "speed_train.jsonl"
    for table, name in (("speed_train", "opt_125m_T2048_dense"), ("quickstart", "narrow_A16")):
        for device, rate in (("h100", 100.0), ("h200", 150.0)):
            figures = {"tokens_per_s": rate, "val_loss": 3.0, "bits_per_byte": 1.5}
            add(path, name, 0, table, device, figures, opt_125m())
            add(path, name, 1, table, device, figures, opt_125m())
    text = render(str(path))
    assert [row[1] for row in cells(text, "`dense`")] == ["100", "150"]
    assert [row[4] for row in cells(text, "`narrow_A16`")] == ["100", "150"]
    assert "h100, h200" not in text


def test_quickstart_margin_is_seed_by_seed(tmp_path):
    path = tmp_path / "quickstart.jsonl"
    for seed, tree, narrow in ((0, 2.0, 2.1), (1, 2.2, 2.4), (2, 2.6, 2.5)):
        add(path, "tree_hard_P2_W1", seed, "quickstart", loss=2 * tree)
        add(path, "narrow_A16", seed, "quickstart", loss=2 * narrow)
    add(path, "tree_masked_train", None, "quickstart", figures={"time_ms": 90.0})
    text = render(str(path))
    (tree,), (narrow,) = cells(text, "`tree_hard_P2_W1`"), cells(text, "`narrow_A16`")
    assert tree[2] == "0.0667 ± 0.1528" and narrow[2] == ""
    assert "ended below narrow in 2 of 3" in " ".join(text.split())
    assert "`tree_masked_train` 90 ms" in " ".join(text.split())


def test_tuning_stays_apart(small):
    path = small.with_name("cpu_small_tuning.jsonl")
    for lr, loss in ((2e-3, 1.2), (4e-3, 1.0), (8e-3, 1.1)):
        add(path, "dense", 0, of=config(lr=lr), loss=loss)
        add(path, "narrow_A16", 0, of=config(lr=lr), loss=loss if lr < 8e-3 else 0.5)
    text = render(str(small.with_name("*.jsonl")))
    result, grid = cells(text, "`dense`")
    assert result[1] == "1.0250 ± 0.0354"
    assert grid[1:] == ["0.6000", "**0.5000**", "0.5500"]
    assert cells(text, "`narrow_A16`")[1][3] == "**0.2500** (edge)"


def add_time(path, name, variant, ms, ratio, usage="uniform", depth=7, spec=None):
    spec = dataclasses.asdict(spec or TreeSpec(TreeShape(1, depth, 12)))
    of = {"variant": variant, "dtype": "float32", "usage": usage, "spec": spec, "cores": 2, "width": 768}
    of |= {"tokens": 1, "direction": "forward"} if "_T1_" in name else {"tokens": 4096, "direction": "train"}
    of["copy_gb_per_s"] = ms  # measured anew each time
    figures = {"time_ms": ms, "ratio_to_dense": ratio, "floor_share": 0.25, "memory_mb": 8.0}
    add(path, f"{name}.{variant}", None, "speed_layer", figures=figures, of=of)


def test_leaf_layers_have_speed_tables_of_their_own(tmp_path):
    path = tmp_path / "speed_layer.jsonl"
    add_time(path, "d768_T4096_P1_W12_train", "grouped", 12.0, 10.0)
    for router in ("tree", "softmax"):
        spec = LeafSpec(n_experts=512, expert_width=6, top_k=16, router=router)
        add_time(path, f"d768_T4096_{router}", "masked", 2.0, 0.5, spec=spec)
    text = render(str(path))
    for what in ("the path layer, hard", "the leaf layer, tree", "the leaf layer, softmax"):
        assert f"## Speed of {what}, cpu, float32" in text
    assert [row[2] for row in cells(text, "768")] == ["X=512 W=6 K=16"] * 2 + ["P=1 W=12"]


def test_speed_of_the_layer(tmp_path):
    path, name = tmp_path / "speed_layer.jsonl", "d768_T4096_P1_W12_train"
    for variant, ms, ratio in (
        ("dense", 123.44, 1.0), ("narrow", 4.0, 30.9), ("masked", 100.0, 1.23), ("grouped", 12.0, 10.29),
        ("masked", 110.0, 1.12), ("of_my_own", 130.0, 0.95),
    ):  # fmt: skip
        add_time(path, name, variant, ms, ratio)
    add_time(path, "d768_T1_P1_W12_forward", "gather", 0.0123, 2.0)
    add_time(path, name, "grouped", 50.0, 2.5, usage="skewed")
    text = render(str(path))
    rows = cells(text, "768")
    assert [row[1:4] for row in rows] == [
        ["1", "P=1 W=12", "forward"], ["4096", "P=1 W=12, skewed", "train"], ["4096", "P=1 W=12", "train"],
    ]  # fmt: skip
    assert rows[2][4:] == [
        "123.4", "4.00", "110.0 (1.12x)", "", "**12.00 (10.29x)**", "130.0 (0.95x)", "25.0%", "8 (8)",
    ]  # fmt: skip
    assert rows[0][4:8] == ["", "", "", "**0.0123 (2.00x)**"]
    assert "2 CPU cores" in text and "timed up to T = 1 (`--gather_limit`)" in " ".join(text.split())
    add_time(path, name, "grouped", 1.0, 100.0, depth=3)
    with pytest.raises(InputError, match="spec.shape.depth"):
        render(str(path))


def test_both_executions_of_a_beam_stand_in_a_line(tmp_path):
    path = tmp_path / "speed_route.jsonl"
    for n_tokens, *times in ((1, 0.12, 0.04), (64, 1.0, 2.0)):
        for variant, ms in zip(("all_rows", "asked_rows"), times):
            of = {"variant": variant, "width": 768, "tokens": n_tokens, "cores": 2}
            add(path, f"d768_T{n_tokens}.{variant}", None, "speed_route", figures={"time_ms": ms}, of=of)
    text = render(str(path))
    assert "## Speed of the beam, cpu" in text and "2 CPU cores" in text
    assert cells(text, "768") == [
        ["768", "1", "0.12", "0.0400", "3.00"], ["768", "64", "1.00", "2.00", "0.50"],
    ]  # fmt: skip


def test_a_speed_row_that_does_not_say_what_was_timed_is_named(tmp_path):
    path = tmp_path / "speed_layer.jsonl"
    add_time(path, "fast", "grouped", 1.0, 2.0)
    assert cells(render(str(path)), "768")[0][1:4] == ["4096", "P=1 W=12", "train"]  # whatever it is called
    add(path, "slow.grouped", None, "speed_layer", figures={"time_ms": 1.0}, of={"width": 768})
    with pytest.raises(InputError, match=r"'slow\.grouped' has no tokens in its config"):
        render(str(path))


@pytest.mark.parametrize(
    "section, changed, key",
    [
        ("model", {"n_layers": 24}, "model.n_layers"), ("model", {"dtype": "bfloat16"}, "model.dtype"),
        ("optim", {"warmup_steps": 300}, "optim.warmup_steps"), ("optim", {"b1": 0.8}, "optim.b1"),
        ("model", {"init": {"embed": 1.0}}, "model.init.embed"),
    ],
)  # fmt: skip
def test_only_the_layer_its_rate_and_its_output_scale_may_differ(section, changed, key, small):
    other = config()
    other["model"] |= {"init": {"w_out": 0.5}}
    other["optim"] |= {"lr": 1e-3, "b2": 0.99}
    add(small, "hash_X32", 0, of=other, loss=2.5)
    assert cells(render(str(small)), "`hash_X32`")[0][3] == "0.500 (one seed)"
    other[section] |= changed
    add(small, "moe_top4_X128", 0, of=other, loss=2.2)
    with pytest.raises(InputError, match=f"its lines: {key} is both"):
        render(str(small))


def test_a_baseline_is_one_by_its_config(small):
    dense = config(**LAYERS["moe"])
    rows = small.with_name("other.jsonl")
    add(rows, "narrow_A16", 0, loss=3.0)
    add(rows, "dense", 0, of=dense, loss=2.0)
    add(rows, "tree_hard_P2_W1", 0, loss=2.5)
    assert [cells(render(str(rows)), name)[0][3] for name in ("`dense`", "`tree_hard_P2_W1`")] == ["", ""]


def test_the_later_date_counts_whatever_file_it_is_in(tmp_path):
    add(tmp_path / "b.jsonl", "dense", 0, loss=2.0)
    old = (tmp_path / "b.jsonl").read_text()
    today = record.load_results(str(tmp_path / "b.jsonl"))[0]["date"]
    add(tmp_path / "a.jsonl", "dense", 0, loss=1.0)
    (tmp_path / "b.jsonl").write_text(old.replace(today, "2026-01-31"))
    values = {row["metric"]: row["value"] for row in record.load_results(str(tmp_path / "*.jsonl"))}
    assert values == {"val_loss": 1.0, "bits_per_byte": 0.5}
    (tmp_path / "b.jsonl").write_text(old.replace(today, "yesterday"))
    with pytest.raises(InputError, match="date 'yesterday' is not allowed; use a day such as 2026-11-30"):
        record.load_results(str(tmp_path / "*.jsonl"))


def test_pages_are_written_and_checked(small):
    pages = small.parent / "pages"
    arguments = (f"--results={small}", f"--pages={pages}")
    missing = call("tables", "--check", *arguments)
    assert missing.code == 1 and "index.md, cpu_small.md: out of date" in missing.err and not pages.exists()
    assert call("tables", "--write", *arguments) == (0, "", "")
    assert {page.name for page in pages.iterdir()} == {"index.md", "cpu_small.md"}
    assert call("tables", "--check", *arguments).code == 0
    page = pages / "cpu_small.md"
    written = page.read_text()
    page.write_text(written + "by hand\n")
    assert call("tables", "--check", *arguments).code == 1
    assert call("tables", "--write", *arguments).code == 0 and page.read_text() == written
    assert written.endswith(call("tables", f"--results={small}").out)


def test_every_table_has_a_page():
    topics = {topic(name, [{"device": device}]) for name in TABLES for device in ("cpu", "h200")}
    assert topics | {"learning_rates"} == set(TOPICS)


def test_no_results_leave_an_index(tmp_path):
    pages = tmp_path / "pages"
    assert call("tables", "--write", f"--results={tmp_path}/*.jsonl", f"--pages={pages}").code == 0
    assert [page.name for page in pages.iterdir()] == ["index.md"]


def test_files_that_are_not_there(tmp_path):
    done = call("tables", f"--results={tmp_path}/rows.jsonl")
    assert done.code == 2 and "rows.jsonl" in done.err
    (tmp_path / "file").touch()
    done = call("tables", "--write", f"--results={tmp_path}/*.jsonl", f"--pages={tmp_path}/file/pages")
    assert done.code == 2 and "--pages" in done.err and done.err.count("\n") == 1


def test_the_pages_are_what_results_give():
    done = call("tables", "--check", f"--results={ROOT}/results/*.jsonl", f"--pages={ROOT}/docs/results")
    assert done == (0, "", "")


def test_a_mixed_table_says_so_and_computes_no_gap(small):
    add(small, "tree_hard_P2_W1", 0, of=config(sha="2" * 64), loss=2.0)
    arguments = ("tables", f"--results={small}")
    refused = call(*arguments)
    assert refused.code == 2 and "data.sha256" in refused.err and refused.err.count("\n") == 1
    add(small, "dense", 0, of=config(steps=1500), loss=1.5)
    text = " ".join(call(*arguments, "--mixed").out.split())
    assert "MIXED: its lines differ in data.sha256, train.steps and cannot be compared." in text
    assert "`tree_hard_P2_W1@11111111@500`" in text and "`dense@11111111@1500`" in text
    assert "0.500 ± 0.000" not in text
    refused = call(*arguments, "--mixed", "--write")
    assert refused.code == 2 and "--mixed are not allowed with --write" in refused.err


def test_latex(small):
    text = call("tables", f"--results={small}", "--latex").out
    assert r"\texttt{tree\_hard\_P2\_W1} & 1.2750 $\pm$ 0.0354 & 2.5500 $\pm$ 0.0707 & 0.500" in text
    lines = text.splitlines()
    place = next(i for i, line in enumerate(lines) if line.startswith(r"\texttt{dense}"))
    assert lines[place - 1] == "% python -m experiments.train --config=configs/cpu_small.py"
    body = text[text.index(r"\begin{tabular}") :]
    assert body.count(r"\\") == 5 and r"\toprule" in body and "**" not in text
    assert not any("%" in line.replace(r"\%", "") for line in lines if not line.startswith("%"))


def test_an_empty_file_is_named(tmp_path):
    (tmp_path / "r.jsonl").touch()
    outcome = call("tables", f"--results={tmp_path}/r.jsonl")
    assert outcome.code == 2 and "r.jsonl holds no rows; remove it" in outcome.err
    assert call("tables", f"--results={tmp_path}/none.jsonl").code == 2


def test_dynamics_have_the_columns_that_were_measured(tmp_path):
    path = tmp_path / "t4_small.jsonl"
    name = "tree_hard_P12_W1_gelu_node"
    figures = {"val_loss": 3.0, "dead_leaves": 0.25, "leaf_entropy": 0.5}
    add(path, f"{name}_none", 0, "t4_small", figures=figures)
    head = "| val loss | dead leaves | leaf entropy | lr | seeds |"
    assert head in render(str(path))
    add(path, f"{name}_sign", 0, "t4_small", figures={"val_loss": 2.5, "skew": 0.125, "working_units": 40.0})
    for kind, loss in (("dense", 2.0), ("narrow_A96", 4.0)):
        add(path, kind, 0, "t4_small", figures={"val_loss": loss})
    text = render(str(path))
    (none,), (sign,) = cells(text, f"`{name}_none`"), cells(text, f"`{name}_sign`")
    one = " (one seed)"
    assert none[1:] == ["3.0000" + one, "0.500" + one, "25.0%", "0.50", "", "", "0.002", "1"]
    assert sign[1:] == ["2.5000" + one, "0.750" + one, "", "", "0.12", "40.0", "0.002", "1"]


def test_the_plan_of_a_large_model(tmp_path):
    path = tmp_path / "plan.jsonl"
    figures = {"argument_gb": 15.754, "temporary_gb": 38.9, "step_tflop": 3970.0, "executed_tflop": 7940.0}
    sent = {"peak_gb": 16.43, "sent_gb": 15.28, "compiler_s": 0.380, "days": 2.0}
    for name, more, sync in (("h200-8", {}, {}), ("v5e-16", sent, {"grad_sync": "step"})):
        of = {**config(), "model": {"preset": "opt_1.3b", "remat": "full", "max_seq_len": 2048}}
        of |= {"train": {"batch_size": 512, "grad_accum_steps": 4, **sync}}
        of |= {"plan": {"slice": name, "devices": 16, "tokens": 26e9}}
        add(path, "dense", None, "plan", figures=figures | more, of=of)
    assert "at a time, of 16.9 (v5e), 141 (h200); GB" in render(str(path)).replace("\n", " ")
    assert cells(render(str(path)), "`dense`") == [
        ["`dense`", "h200-8", "remat full", "4", "15.75", "38.90", "", "", "", "", "50%", "", "", ""],
        ["`dense`", "v5e-16", "remat full, grad_sync step", "4",
         "15.75", "38.90", "16.43", "15.3", "", "0.38", "50%", "", "2.00", ""],
    ]  # fmt: skip
