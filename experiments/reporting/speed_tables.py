"""The tables of time: of one layer, of training whole models, and of scoring answers.

Only experiments/benchmark.py times layers; all ratios of a line come from one of its runs.
"""

import functools
import itertools
import re
import statistics

from experiments.reporting.aggregate import (
    baseline,
    block,
    by_seed,
    clocked,
    groups,
    last_of,
    learning_rate,
    lines_of,
    mean,
    origin,
    paired,
    setting,
    spread,
    task,
)  # fmt: skip
from experiments.reporting.render import Table
from tree_ffn.errors import InputError
from tree_ffn.plain import flat

BASELINES = {"dense", "narrow"}
FIRST = ("masked", "gather", "grouped")  # columns; those of other implementations follow
# Within a line of timings the variants differ; the ceilings are measured anew each time.
SPEED_FREE = r"(variant|copy_gb_per_s|product_gflop_per_s)$"
SPEED_COMMON = r"(spec\.(routing|activation|shape\.depth)|cores)$"


def trained_on(row: dict) -> tuple:
    """Runs of one length on one device, however alike others are, of one model and as many tokens a step."""
    return *clocked(row), size(row)


def size(row: dict) -> str:
    """`opt_125m_T16384`: the model without its layers, and the tokens of a step."""
    model = setting(row, "model.preset") or f"{setting(row, 'model.n_layers')}x{setting(row, 'model.width')}"
    return f"{model}_T{row['config']['train']['batch_size'] * row['config']['model']['max_seq_len']}"


def timed(row: dict) -> tuple:
    """Timings of one device, dtype and kind of layer, with kernels or not, of new tokens or the same."""
    kernels, new = bool(setting(row, "kernels")), bool(setting(row, "new_tokens"))
    return row["device"], row["config"].get("dtype", "float32"), layer(row), kernels, new


def layer(row: dict) -> str:
    """What was timed, for the table's title.

    Example:
      >>> layer({"config": {"spec": {"shape": {"depth": 7}, "routing": "hard", "router": "first_unit"}}})
      'the path layer, hard'
    """
    if setting(row, "spec.n_experts") is not None:
        return f"the leaf layer, {setting(row, 'spec.router')}"
    return f"the path layer, {setting(row, 'spec.routing')}"


def speed_layer(rows: list[dict]) -> Table:
    """A line per width, tokens, shape, pass and usage; all ratios are of one run each."""
    named = lambda row: speed_name(row)[:4]
    usage = lambda row: row["config"].get("usage", "uniform")
    by_number = lambda shape: tuple(map(int, re.findall(r"\d+", shape)))
    key = lambda row: (*named(row)[:2], by_number(named(row)[2]), *named(row)[2:], usage(row))
    lines = {(*at[:2], *at[3:]): line for at, line in groups(rows, key).items()}
    for line in lines.values():
        lines_of([{**row, "row": row["row"].split(".")[0]} for row in line], SPEED_FREE, SPEED_COMMON)
    lines_of(rows, free=".", common=SPEED_COMMON)
    timed_ones = dict.fromkeys(map(variant, rows))
    shown = [name for name in dict.fromkeys((*FIRST, *timed_ones)) if name in timed_ones.keys() - BASELINES]
    cells = []
    for (width, tokens, shape, direction, used), line in lines.items():
        figures: dict[str, dict] = {}
        for row in line:
            figures.setdefault(variant(row), {})[row["metric"]] = row["value"]
        shape += "" if used == "uniform" else f", {used}"
        cells.append([str(width), str(tokens), shape, direction, *speed_cells(figures, shown)])
    device, dtype, what, compiled, new = timed(rows[0])
    where = f"{device}, {dtype}" + (", after `make kernels`" if compiled else "")
    where += "" if new else ", the same tokens again and again"
    text = (
        f"One layer in {dtype}: milliseconds, and how many times as fast as dense, the fastest of its "
        "layouts. The fastest implementation is bold; the last columns are about it: which share of its "
        "time memory or arithmetic alone would need, and its memory (that of dense). That floor has the "
        "bandwidth of a copy and counts weights as if tokens shared none, so a share may exceed 100%. "
        f"{gather_limit(rows)}{origin(rows)}"
    )
    head = ["E", "T", "shape", "pass", "dense", "narrow", *shown]
    head += ["floor", "MiB (dense)", "mJ a token (dense)"]
    full = [any(line[i] for line in cells) for i in range(len(head))]
    head, *cells = (list(itertools.compress(line, full)) for line in [head, *cells])
    return block(f"Speed of {what}, {where}", text, head, cells, line[-1], labels=4, lines=lines)


def speed_route(rows: list[dict]) -> Table:
    """A line per width and number of tokens: both executions of the recipe's beam, of one run."""
    lines = groups(rows, lambda row: (setting(row, "width"), setting(row, "tokens")))
    cells = []
    for sizes, line in lines.items():
        times = {setting(row, "variant"): row["value"] for row in line}
        ratio = f"{times['all_rows'] / times['asked_rows']:.2f}"
        shown = [milliseconds(times[name]) for name in ("all_rows", "asked_rows")]
        cells.append([*map(str, sizes), *shown, ratio])
    text = (
        "Routing of the recommended layer alone, forward, float32, after `make kernels`: milliseconds by "
        f"a product with all 511 rows, and by the 95 that are asked, read level after level. {origin(rows)}"
    )
    head = ["E", "T", "all rows", "asked rows", "times as fast"]
    return block(f"Speed of the beam, {rows[-1]['device']}", text, head, cells, rows[-1], labels=2)


def speed_peers(rows: list[dict]) -> Table:
    """A line per layer of another repository, or of ours beside it, and number of tokens."""
    cells = []
    lines = groups(rows, lambda row: tuple(setting(row, key) for key in ("tokens", "repository", "layer")))
    for line in lines.values():
        get, values = functools.partial(setting, line[-1]), {row["metric"]: row["value"] for row in line}
        repository, name = get("repository"), get("layer")
        name = f"ours (beside {repository})" if name == "ours" else f"{repository}, `{name}`"
        times = [milliseconds(values[metric]) for metric in ("time_ms", "dense_ms")]
        cells.append([name, f"{get('width')}", f"{get('tokens')}", *times, f"{values['ratio_to_dense']:.2f}"])
    commits = {f"{setting(row, 'repository')} {str(setting(row, 'commit'))[:12]}": None for row in rows}
    torch, threads = setting(rows[-1], "torch"), setting(rows[-1], "threads")
    text = (
        "Layers of other repositories, forward in float32, and ours of the same shape or, beside PEER, the "
        "recommended one: milliseconds, and how many times as fast as the dense layer in turns with it: "
        f"PyTorch's own ({torch}, {threads} threads) beside theirs, the fastest of ours beside ours. "
        f"Repositories by commit: {', '.join(commits)}. {origin(rows)}"
    )
    where = f"{rows[0]['device']}" + (", ours after `make kernels`" if setting(rows[-1], "kernels") else "")
    head = ["layer", "E", "T", "ms", "dense", "times as fast"]
    return block(f"Speed of other layers, {where}", text, head, cells, last_of(lines), lines=lines)


def gather_limit(rows: list[dict]) -> str:
    """Up to how many tokens gather was timed, where other implementations were for more."""
    tokens = {name: max(speed_name(row)[1] for row in line) for name, line in groups(rows, variant).items()}
    if "gather" not in tokens or tokens["gather"] == max(tokens.values()):
        return ""
    most = tokens["gather"]
    return f"Gather copies weights for every token and is timed up to T = {most:,} (`--gather_limit`). "


def speed_name(row: dict) -> tuple:
    """(E, T, shape, pass, variant) of a row, by its config; a W for each level is written 1x1x24.

    Raises:
      InputError: the config does not say all of these.
    """
    known = flat(row["config"])
    keys = ("width", "tokens", "direction", "variant")
    if "spec.n_experts" in known:
        sizes = {"X": "spec.n_experts", "W": "spec.expert_width", "K": "spec.top_k"}
    else:
        sizes = {"P": "spec.shape.n_trees", "W": "spec.shape.node_width"}
    for key in (*keys, *sizes.values()):
        if key not in known:
            raise InputError(f"results: speed_layer row {row['row']!r} has no {key} in its config.")
    width, tokens, direction, name = (known[key] for key in keys)
    shape = " ".join(f"{letter}={_by_level(known[key])}" for letter, key in sizes.items())
    return width, tokens, shape, direction, name.partition("[")[0]


def _by_level(value) -> str:
    return "x".join(map(str, value)) if isinstance(value, list) else str(value)


def variant(row: dict) -> str:
    """`dense`, `narrow` or an implementation."""
    return speed_name(row)[-1]


def speed_cells(figures: dict[str, dict], shown: list[str]) -> list[str]:
    """Cells of a line, {variant: {metric: value}}: times, then the fastest's floor share, memory, energy."""
    times = {name: figures[name]["time_ms"] for name in shown if "time_ms" in figures.get(name, {})}
    best = min(times, key=lambda name: times[name], default="")
    cells = [milliseconds(figures.get(name, {}).get("time_ms")) for name in ("dense", "narrow")]
    for name in shown:
        ratio = figures.get(name, {}).get("ratio_to_dense")
        text = milliseconds(times.get(name)) + ("" if ratio is None else f" ({ratio:.2f}x)")
        cells.append(f"**{text}**" if name == best else text)
    own, dense = figures.get(best, {}), figures.get("dense", {})
    floor = f"{own['floor_share']:.1%}" if "floor_share" in own else ""
    both = lambda metric, form: (
        f"{own[metric]:{form}} ({dense[metric]:{form}})" if {metric} <= own.keys() & dense.keys() else ""
    )
    return [*cells, floor, both("memory_mb", ",.0f"), both("energy_mj", ".3g")]


def milliseconds(value: float | None) -> str:
    """Three to four digits.

    Example:
      >>> milliseconds(0.01234), milliseconds(1.234), milliseconds(123.4), milliseconds(None)
      ('0.0123', '1.23', '123.4', '')
    """
    return "" if value is None else f"{value:.4f}" if value < 0.1 else f"{value:.{2 if value < 100 else 1}f}"


def speed_train(rows: list[dict]) -> Table:
    named = [{**row, "row": row["row"].removeprefix(f"{size(row)}_")} for row in rows]
    lines = lines_of(named, free="seed$")  # an implementation changes the speed
    rates = {name: by_seed(line, "tokens_per_s") for name, line in lines.items()}
    dense = by_seed(baseline(lines, "dense"), "tokens_per_s")
    cells = []
    for name, line in lines.items():
        losses = by_seed(line, "val_loss")
        ratio = paired(lambda x, d: x / d, rates[name], dense)
        cells.append([
            f"`{name}`", mean(line, "tokens_per_s", ",.0f"),
            f"{statistics.fmean(ratio):.2f}" if ratio else "", mean(line, "active_share", ".1%"),
            spread(losses.values()), learning_rate(line), str(len(losses)),
        ])  # fmt: skip
    text = f"Training of whole models: {task(rows)}. Validation loss in nats a token. {origin(rows)}"
    head = ["", "tokens/s", "x dense", "active share", "val loss", "lr", "seeds"]
    title = f"Speed of training, {size(rows[0])}, {rows[0]['device']}"
    return block(title, text, head, cells, last_of(lines), lines=lines)


def stepped(row: dict) -> tuple:
    """Steps of one run: of one commit, device, and size of model and batch."""
    keys = ("model.width", "model.n_layers", "model.max_seq_len", "train.batch_size", "data.vocab_size")
    return row["device"], row["commit"], *(setting(row, key) or 0 for key in keys)


def speed_steps(rows: list[dict]) -> Table:
    """A line per config: time of a training step, and what counting visits takes of it."""
    lines = groups(rows, lambda row: row["row"])
    cells = []
    for name, line in lines.items():
        figures = {row["metric"]: row["value"] for row in line}
        counting = f"{figures['counting']:.1%}" if "counting" in figures else ""
        cells.append([
            f"`{name}`", milliseconds(figures.get("time_ms")), f"{figures.get('tokens_per_s', 0):,.0f}",
            f"{figures.get('ratio_to_first', 0):.2f}", counting,
        ])  # fmt: skip
    device, _, width, n_layers, context, batch_size, vocab_size = stepped(rows[0])
    text = (
        f"Whole training steps, no text read: {n_layers} layers of width {width}, {batch_size} sequences of "
        f"{context} random tokens of {vocab_size:,}. Speed is to the config that was named first; counting "
        f"is the share of a step that visit counts take, of medians in turns (below 0: noise). {origin(rows)}"
    )
    head = ["", "ms a step", "tokens/s", "speed", "counting"]
    return block(f"Speed of whole steps, width {width}, {device}", text, head, cells, last_of(lines))


def decoded(row: dict) -> tuple:
    """Decoding of one run: of one commit, device, size of model and batch, with kernels or not."""
    keys = (
        "model.width",
        "model.n_layers",
        "model.dtype",
        "decode.batch",
        "decode.context",
        "decode.kernels",
    )
    return row["device"], row["commit"], *(setting(row, key) for key in keys)


def speed_decode(rows: list[dict]) -> Table:
    """A line per config: time of a token."""
    cells = []
    lines = groups(rows, lambda row: row["row"])
    for name, line in lines.items():
        figures = {row["metric"]: row["value"] for row in line}
        cells.append([
            f"`{name}`", milliseconds(figures.get("time_ms")), f"{figures.get('tokens_per_s', 0):,.1f}",
            f"{figures.get('ratio_to_first', 0):.2f}",
        ])  # fmt: skip
    device, _, width, n_layers, dtype, batch, context, kernels = decoded(rows[0])
    text = (
        f"Text made token by token by models of random weights: {n_layers} layers of width {width} in "
        f"{dtype}, {batch} at once after {context} tokens, each next one drawn at random. Speed is to the "
        f"config that was named first. {origin(rows)}"
    )
    where = f"{device}, {dtype}" + (", after `make kernels`" if kernels else "")
    title = f"Speed of decoding, width {width}, {batch} at once, {where}"
    return block(title, text, ["", "ms a token", "tokens/s", "speed"], cells, last_of(lines))


def scored_on(row: dict) -> str:
    """Scoring on one device."""
    return row["device"]


def answer_speed(rows: list[dict]) -> Table:
    """A line a model and set of questions."""
    lines = groups(rows, lambda row: (row["row"], setting(row, "scored.questions")))
    cells = []
    for (name, n), line in lines.items():
        values = {row["metric"]: row["value"] for row in line}
        shown = [f"{values[key]:,.0f}" for key in ("questions_per_s", "questions_per_s_cold", "tokens_per_s")]
        cells.append([f"`{name}`", f"{n:,}", f"{setting(line[-1], 'scored.tokens'):,}", *shown])
    text = (
        "Questions of the harness's tasks (a pair of context and continuation, or a prompt to continue), "
        f"answered; cold: the first time, compiling included. {origin(rows)}"
    )
    head = ["model", "questions", "their tokens", "questions/s", "cold", "tokens/s"]
    return block(f"Speed of answers, {rows[-1]['device']}", text, head, cells, rows[-1])


def scoring_speed(rows: list[dict]) -> Table:
    """A line a model and number of rows: our adapter against the harness's backend `hf`, of one run."""
    cells = []
    lines = groups(rows, lambda row: (row["row"], setting(row, "rows")))
    for (name, n_rows), line in lines.items():
        values = {row["metric"]: row["value"] for row in line}
        figures = [f"{values[metric]:,.1f}" for metric in ("rows_per_s", "rows_per_s_cold", "hf_rows_per_s")]
        batch, turns = (str(setting(line[-1], key)) for key in ("hf_batch_size", "turns"))
        cells.append([f"`{name}`", f"{n_rows:,}", turns, *figures, batch, f"{values['ratio_to_hf']:.2f}"])
    versions = ", ".join(f"{name} {number}" for name, number in rows[-1]["config"]["hf"].items())
    text = (
        "Log-likelihoods of HellaSwag's endings, four a row, by our adapter and by the harness's own backend "
        f"`hf` ({versions}), with the same weights and in turns; the backend with the fastest of the batch "
        "sizes tried. Rows a second, tokenising included; cold: our first time, compiling included. "
        f"{origin(rows)}"
    )
    head = ["model", "rows", "turns", "ours", "cold", "`hf`", "its batch", "times as fast"]
    return block(f"Speed of scoring, {rows[-1]['device']}", text, head, cells, rows[-1])
