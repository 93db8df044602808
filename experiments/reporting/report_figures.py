"""The figures of a report: of one run, of several runs together, and of the rows of a table."""

import html
import os
import statistics
from typing import NamedTuple

import numpy as np

from experiments.reporting.aggregate import (
    by_seed,
    differences,
    groups,
    middle,
    not_comparable,
    rank,
    setting,
)
from experiments.reporting.costs import cost
from experiments.reporting.drawing import N_COLOURS, Point, Series, heat_map, line_chart, scatter
from tree_ffn.analysis import dynamics
from tree_ffn.training.workdir import read_config, read_json

MOST_HEAT_MAPS = 4  # of a run: its first and last layer of trees, and some between
MOST_ROWS = 768  # of a heat map: no screen shows more

CAPTIONS = {
    "loss": "<b>Loss.</b> That of training is the mean over the steps since the last line.",
    "losses": "<b>Validation loss.</b> On the same held-out batches.",
    "mixed": "<b>Validation loss.</b>",
    "speed": "<b>Speed.</b> Tokens a second of training alone: compiling and validation are left out.",
    "moves": "<b>How fast routing freezes.</b> Share of the tokens of a fixed batch that change leaf within "
    "100 steps, mean over trees. Near 0 paths are fixed, and what they leave out can be pruned.",
    "dead": "<b>Dead leaves.</b> Leaves, or experts, without a visit in the validation batches. A rise is "
    "auto-pruning; a fall means that training spreads tokens over more of them.",
    "balance": "<b>Balance.</b> Entropy of visits over leaves, of a tree or all experts: 1 is all alike, 0 "
    "one leaf.",
    "right": "<b>Which way.</b> Share of a level's decisions that go right, mean over layers. An activation "
    "that is silent below 0 pulls units to the left.",
    "skew": "<b>How one-sided.</b> 0 where every node halves its tokens, 1 where each sends all one way; "
    "mean over layers.",
    "gradient": "<b>Who learns.</b> Norm of the gradient of left and of right children at some levels, mean "
    "over layers, on one batch. One side far below the other is what starves paths.",
    "working": "<b>Who works.</b> Units of a token's paths whose |g act(z)| is above 0.01: a visited unit "
    "whose activation is about 0 does no work.",
    "pareto": "Points are numbered as in the key; those of one kind of layer have one colour and sign. Bars "
    "are the standard deviation over seeds, where there are several; the dashed line is the Pareto front "
    "(both smaller is better). Points of one x stand side by side; the best of them is at its place.",
}
AGAINST = {
    "products": ("products a token and layer", "Loss against products, routing counted"),
    "total": ("units a layer", "Loss against units in all"),
    "time": ("ms a training step", "Loss against measured time"),
}


class Run(NamedTuple):
    """What a run has left in its workdir, but for checkpoints."""

    name: str
    config: dict
    data: dict
    origin: dict
    metrics: list[dict]
    usage: dict


def load_run(workdir: str) -> Run:
    """Reads a run.

    Raises:
      InputError: it is no run, or a file of it is damaged.
    """
    metrics = dynamics.read_lines(workdir, "metrics.jsonl")
    config = read_config(workdir) or {}
    data, origin = (read_json(workdir, f"{name}.json") or {} for name in ("data", "origin"))
    usage = dynamics.load_usage(workdir)
    return Run(os.path.basename(os.path.normpath(workdir)), config, data, origin, metrics, usage)


def figure(svg: str, caption: str) -> str:
    """A drawing with what it shows and how to read it; `caption` is HTML."""
    return f"<figure>{svg}<figcaption>{caption}</figcaption></figure>"


def of_split(run: Run, split: str, name: str) -> tuple[list, list]:
    """(steps, values) of a figure in metrics.jsonl.

    Args:
      run: with its metrics.
      split: train or valid.
      name: of the figure.
    """
    lines = [line for line in run.metrics if line["split"] == split and name in line]
    return [line["step"] for line in lines], [line[name] for line in lines]


def run_differences(runs: list[Run]) -> dict[str, tuple]:
    """{key: two of its values} of what keeps the losses of runs from being compared: text, steps, size."""
    return differences([{**run.config, "data": run.data} for run in runs])


def run_figures(runs: list[Run]) -> list[str]:
    """Loss and speed: training and validation of one run, validation alone of several."""
    name = (lambda run, alone: alone) if len(runs) == 1 else (lambda run, alone: run.name)
    losses = [Series(name(run, "valid"), *of_split(run, "valid", "loss")) for run in runs]
    if len(runs) == 1:
        losses.append(Series("train", *of_split(runs[0], "train", "loss")))
    speeds = [Series(name(run, ""), *of_split(run, "train", "tokens_per_s")) for run in runs]
    said = CAPTIONS["loss" if len(runs) == 1 else "losses"]
    if different := run_differences(runs):
        said = f"{CAPTIONS['mixed']} {not_comparable('the runs', ', '.join(different))}"
    return [
        figure(line_chart("Loss over steps", losses, "step", "nats a token"), said),
        figure(line_chart("Tokens per second", speeds, "step", "tokens/s", zero=True), CAPTIONS["speed"]),
    ]


def usage_metrics(run: Run) -> list[str]:
    """Everything on how a run's leaves or experts are used; empty for a run without such layers."""
    routed = {layer: arrays for layer, arrays in run.usage.items() if ("valid", "visits") in arrays}
    trees = {layer: arrays for layer, arrays in routed.items() if ("valid", "moved") in arrays}
    if not routed:
        return []

    def by_layer(title, y_label, caption, values, layers=routed):
        series = [Series(f"layer {layer}", *values(layer)) for layer in layers]
        return figure(line_chart(title, series, "step", y_label, zero=True), caption)

    recorded = lambda name: lambda layer: of_split(run, "valid", f"{name}/{layer}")
    figures = [
        by_layer("Dead leaves", "share of leaves", CAPTIONS["dead"], recorded("dead_leaves")),
        by_layer("Leaf entropy", "of its largest", CAPTIONS["balance"], recorded("leaf_entropy")),
    ]
    if trees:
        caption = CAPTIONS["moves"] + freezing(trees)
        moves = by_layer(
            "Leaves that move",
            "share a 100 steps",
            caption,
            lambda layer: dynamics.moves(trees[layer]),
            trees,
        )
        figures = [moves, *figures, *decision_figures(trees), *probe_metrics(trees)]
    places = np.linspace(0, len(routed) - 1, min(MOST_HEAT_MAPS, len(routed))).round().astype(int)
    layers = list(routed)
    return figures + [heat_figure(layers[place], routed[layers[place]]) for place in places]


def freezing(trees: dict) -> str:
    """Says when each layer has frozen."""
    steps = {layer: dynamics.freeze_step(arrays) for layer, arrays in trees.items()}
    said = ", ".join(f"{layer}: {'not' if step is None else step}" for layer, step in steps.items())
    return f" Below 5 % for good from step, by layer: {said}."


def decision_figures(trees: dict) -> list[str]:
    """By level of the trees, mean over layers: which way, and how one-sided."""
    steps = next(iter(trees.values()))["valid", "visits"].steps
    decided = [dynamics.decisions(arrays["valid", "visits"].values) for arrays in trees.values()]
    if not decided[0].right.shape[1]:  # D = 0
        return []

    def by_level(name, title, y_label, zero):
        values_SD = np.mean([getattr(one, name) for one in decided], axis=0)
        series = [Series(f"level {level}", steps, column) for level, column in enumerate(values_SD.T)]
        return figure(line_chart(title, series, "step", y_label, zero=zero), CAPTIONS[name])

    return [by_level("right", "Right share", "share", False), by_level("skew", "Skew", "skew", True)]


def probe_metrics(trees: dict) -> list[str]:
    """Who learns and who works, where the run has probed it."""
    if not all(("valid", "gradient") in arrays for arrays in trees.values()):
        return []
    steps = next(iter(trees.values()))["valid", "gradient"].steps
    both = np.mean(
        [dynamics.gradient_by_side(arrays["valid", "gradient"].values) for arrays in trees.values()], axis=0
    )
    levels = sorted({1, both.shape[1] // 2, both.shape[1] - 1} & set(range(1, both.shape[1])))
    gradients = [
        Series(f"{name} {level}", steps, both[:, level, side])
        for side, name in enumerate(("left", "right"))
        for level in levels
    ]
    working = [
        Series(f"layer {layer}", steps, arrays["valid", "working"].values.astype(float).sum(axis=(1, 2)))
        for layer, arrays in trees.items()
    ]
    chart = line_chart("Working units", working, "step", "units a token", zero=True)
    figures = [figure(chart, CAPTIONS["working"])]
    if gradients:
        chart = line_chart("Gradient by side", gradients, "step", "norm", zero=True)
        figures.insert(0, figure(chart, CAPTIONS["gradient"]))
    return figures


def heat_figure(layer: int, arrays: dict) -> str:
    """Visits of every leaf over time, trees one below the other."""
    key = ("train", "visits") if ("train", "visits") in arrays else ("valid", "visits")
    steps, visits_SPJ = arrays[key]
    share = visits_SPJ / np.maximum(visits_SPJ.sum(axis=-1, keepdims=True), 1)
    n_trees, n_leaves = share.shape[1:]
    rows = share.reshape(len(steps), -1).T
    fold = -(-len(rows) // MOST_ROWS)  # neighbours are averaged
    rows = np.add.reduceat(rows, np.arange(0, len(rows), fold), axis=0) / fold
    ticks = [((i + 0.5) / len(steps), str(steps[i])) for i in range(0, len(steps), -(-len(steps) // 5))]
    names = [((p + 0.5) / n_trees, f"tree {p}") for p in range(0, n_trees, -(-n_trees // 12))]
    top = float(np.quantile(rows, 0.99)) or 1.0
    picture = heat_map(f"Visits of leaves, layer {layer}", rows, "step", "leaf", ticks, names, top)
    caption = (
        f"<b>Leaves of layer {layer}.</b> Share of its tree's visits that each of {n_leaves} leaves gets, "
        f"over time; full colour is {top:.1%} or more, balance would be {1 / n_leaves:.1%}. Bands that go "
        "pale die out."
    )
    return figure(picture, caption)


def timed_on(rows: list[dict]) -> str | None:
    """The device on which most lines were timed: times of different devices never share a figure."""
    lines_timed = groups(
        (row for row in rows if row["metric"] == "seconds_per_step"), lambda row: row["device"]
    )
    return max(lines_timed, key=lambda name: len({row["row"] for row in lines_timed[name]}), default=None)


def row_points(rows: list[dict]) -> dict[str, list[Point]]:
    """Points (x, validation loss, its spread over seeds) of a table's rows, by what x is."""
    found: dict[str, list[Point]] = {kind: [] for kind in AGAINST}
    on = timed_on(rows)
    for name, line in sorted(groups(rows, lambda row: row["row"]).items(), key=lambda item: rank(item[1][0])):
        losses = list(by_seed(line, "val_loss").values())
        if not losses:
            continue
        loss, spread = middle(losses)
        known = cost(next(row for row in line if row["metric"] == "val_loss"))
        if known is None:
            continue
        places = {"products": known.products, "total": known.total}
        if seconds := [
            row["value"] for row in line if row["metric"] == "seconds_per_step" and row["device"] == on
        ]:
            places["time"] = 1e3 * statistics.fmean(seconds)
        for kind, x in places.items():
            found[kind].append(Point(name, x, loss, spread, rank(line[0])))
    # The numbers of the points are the same in every figure: one that lacks some is not drawn.
    return {kind: points for kind, points in found.items() if len(points) == len(found["products"])}


def pareto_figures(rows: list[dict]) -> list[str]:
    """Validation loss of a table's lines against products, all units and time; the points' key."""
    drawn = {kind: points for kind, points in row_points(rows).items() if len(points) > 1}
    figures = []
    for kind, points in drawn.items():
        label, title = AGAINST[kind]
        figures.append(figure(scatter(title, points, label, "nats a token"), f"<b>{title}.</b>"))
    return [*figures, key_of(drawn["products"])] if figures else []


def key_of(points: list[Point]) -> str:
    """Numbers, names and losses of the points of figures, in their colours, as a list of HTML."""
    items = ""
    for point in points:
        loss = f"{point.y:.4f}" + (f" ± {point.error:.4f}" if point.error else "")
        colour = f'style="color:var(--c{point.kind % N_COLOURS})"'
        items += f"<li {colour}>{html.escape(point.label)} <span>{loss}</span></li>"
    return f'<div class="key"><p><b>Key.</b> Validation loss in nats a token.</p><ol>{items}</ol></div>'


def run_facts(run: Run) -> str:
    """What a run was, in one paragraph of HTML."""
    get = lambda key: setting({"config": run.config}, key)
    kind, meta = str(get("ffn.kind")), run.data
    if kind in ("tree", "random_tree"):
        kind += (
            f", routing {get('ffn.routing')}, P={get('ffn.n_trees')} D={get('ffn.depth')} "
            f"W={get('ffn.node_width')}, {get('ffn.activation')} at site {get('ffn.act_site')}, "
            f"balancing {get('ffn.balance_rate')}"
        )
    elif kind == "leaf":
        kind += (
            f", router {get('ffn.router')}, {get('ffn.top_k')} of {get('ffn.n_experts')} experts of "
            f"{get('ffn.expert_width')} units, gates {get('ffn.gate_norm')}, dense start "
            f"{get('ffn.dense_start')}, balancing {get('ffn.balance_rate')}"
        )
    last = of_split(run, "valid", "loss")[1][-1:]
    parts = (
        kind,
        f"{get('model.n_layers')} layers of width {get('model.width')}, context {get('model.max_seq_len')}",
        f"{get('train.steps')} steps of {get('train.batch_size')} sequences, lr {get('optim.lr')}",
        f"seed {get('seed')}; corpus {meta.get('corpus')} (sha256 {str(meta.get('sha256'))[:12]})",
        *(f"validation loss {loss:.4f}" for loss in last),
    )
    return f"<p><b>{html.escape(run.name)}</b>: {html.escape('; '.join(parts))}.</p>"


def run_commands(run: Run) -> str:
    """The commands that made a run, and on what, as HTML; empty where that is not known."""
    starts = run.origin.get("starts", [])
    if not starts:
        return ""
    said = [f"from step {start['step']}, commit {start['commit']}: {start['command']}" for start in starts]
    said.append(f"{starts[-1]['device']}, {', '.join(map(' '.join, starts[-1]['versions'].items()))}")
    return f"<p>{html.escape(run.name)}:</p><pre>{html.escape(chr(10).join(said))}</pre>"
