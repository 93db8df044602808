"""Granularity: what experts of W units cost and are worth, of one F and one A; a table and a picture.

Times are of rows of the table `granularity`, losses of those of `quality_attempts` whose layers have the same
F and A.
"""

from experiments.reporting.aggregate import block, by_seed, groups, middle, origin, setting, spread
from experiments.reporting.drawing import Panel, Series, panels
from experiments.reporting.render import Table
from experiments.reporting.speed_tables import speed_name, timed

TITLE = "What experts of more or fewer units cost, and are worth"
CAPTION = (
    "Layers of one F = 4 E and one A = E / 8, beside one dense layer of F units in the same run: what they "
    "cost, by the fastest implementation, and the losses of models with such layers. Lower is better. W may "
    "be any divisor of A. Experts stand behind one tree, or behind as many as the odd factors of X multiply "
    "to: three at E = 768 and W = 1 or 2. A GPU's kernels for few tokens take K up to 16, there W from 6 on."
)
# What makes lines of losses comparable but for granularity, and the names of their curves.
DESIGN = (
    "ffn.router", "ffn.gate_norm", "ffn.dense_start", "ffn.balance_rate", "optim.lr", "optim.b2",
    "optim.weight_decay", "model.init.w_out", "train.steps", "data.sha256",
)  # fmt: skip
STEPS = {"forward": "use", "train": "training step"}
# (metric, what a curve's name says of it, style of the curve)
METRICS = (("time_ms", "", "-"), ("memory_mb", ": memory", "--"), ("energy_mj", ": energy", ":"))


def designs(rows: list[dict], quality: list[dict]) -> dict[tuple, dict[int, list[dict]]]:
    """{design: {W: rows of its loss}} of layers as large as the timed ones, of designs with several W.

    Args:
      rows: of the table granularity.
      quality: of all tables.
    """
    sizes = {(sizes[0] * sizes[1], sizes[2] * sizes[1]) for sizes in map(_timed_sizes, rows)}
    found = [
        row for row in quality
        if (row["table"], row["metric"]) == ("quality_attempts", "val_loss") and _sizes(row) in sizes
    ]  # fmt: skip
    lines = groups(found, lambda row: tuple(str(setting(row, key)) for key in DESIGN))
    width = lambda row: setting(row, "ffn.expert_width")
    by_width = {design: groups(line, width) for design, line in lines.items()}
    return {design: of_design for design, of_design in by_width.items() if len(of_design) > 1}


def _timed_sizes(row: dict) -> list:
    return [setting(row, f"spec.{name}") for name in ("n_experts", "expert_width", "top_k")]


def _sizes(row: dict) -> tuple[int, int] | None:
    """F and A of a trained leaf layer."""
    ffn = row["config"].get("ffn", {})
    if ffn.get("kind") != "leaf":
        return None
    return ffn["n_experts"] * ffn["expert_width"], ffn["top_k"] * ffn["expert_width"]


def quality_by_width(rows: list[dict], quality: list[dict]) -> list[Table]:
    """The table of losses by W, if there are any.

    Args:
      rows: of the table granularity.
      quality: of all tables.
    """
    cells, used = [], []
    for of_design in designs(rows, quality).values():
        for width, line in of_design.items():
            get, used = lambda key, line=line: str(setting(line[-1], key)), used + line
            losses = by_seed(line, "val_loss").values()
            names = ", ".join(f"`{name}`" for name in dict.fromkeys(row["row"] for row in line))
            cells.append([
                get("ffn.router"), get("ffn.gate_norm"), get("optim.lr"), str(width), get("ffn.top_k"), names,
                spread(losses), str(len(losses)),
            ])  # fmt: skip
    if not used:
        return []
    text = (
        "Validation loss of models whose layers have as many units, F and A, as the timed ones. Lines of one "
        "router, gates and learning rate differ in nothing else; of others neither the rate nor the output "
        f"weights were tuned alike. {origin(used)}"
    )
    head = ["router", "gates", "lr", "W", "K", "row", "val loss", "seeds"]
    return [block("Quality by units of an expert", text, head, cells, used[-1], labels=3)]


def picture(rows: list[dict], quality: list[dict]) -> str:
    """The `charts`, side by side, as SVG.

    Args:
      rows: of the table granularity.
      quality: of all tables.
    """
    ticks = sorted({_timed_sizes(row)[1] for row in rows})
    return panels(TITLE, charts(rows, quality), "W, units of an expert", ticks)


def charts(rows: list[dict], quality: list[dict]) -> list[Panel]:
    """Losses, then a panel a device: times, memory and energy as multiples of the dense layer's.

    Args:
      rows: of the table granularity.
      quality: of all tables.
    """
    curves = []
    for design, of_design in designs(rows, quality).items():
        means = [middle(list(by_seed(line, "val_loss").values()))[0] for line in of_design.values()]
        curves.append(Series(f"{design[0].replace('_', ' ')}, gates {design[1]}", list(of_design), means))
    drawn = [Panel("Quality", "validation loss, nats a token", curves)] if curves else []
    for line in groups(rows, timed).values():
        device, dtype, _, kernels, _ = timed(line[0])
        name = f"{device}, {dtype}" + (", make kernels" if kernels else "")
        drawn.append(Panel(name, "multiple of dense's", device_curves(line), level=1.0))
    return drawn


def device_curves(rows: list[dict]) -> list[Series]:
    """Of each pass and number of tokens: time, memory in training, energy, by the fastest implementation."""
    curves = []
    of_run = lambda row: (speed_name(row)[3], speed_name(row)[1])
    for colour, ((direction, tokens), line) in enumerate(groups(rows, of_run).items()):
        what = f"{STEPS.get(direction, direction)}, {tokens:,} token{'s' if tokens > 1 else ''}"
        by_width = {W: ratios(mine) for W, mine in groups(line, lambda row: _timed_sizes(row)[1]).items()}
        for metric, said, style in METRICS:
            found = {W: values[metric] for W, values in by_width.items() if metric in values}
            if found and (metric, direction) != ("memory_mb", "forward"):
                curves.append(Series(what + said, list(found), list(found.values()), colour, style))
    return curves


def ratios(rows: list[dict]) -> dict[str, float]:
    """{metric: the layer's, by its fastest implementation, over dense's} of rows of one W, pass and T."""
    figures = {name: {row["metric"]: row["value"] for row in line}
               for name, line in groups(rows, lambda row: speed_name(row)[-1]).items()}  # fmt: skip
    dense = figures.pop("dense")
    best = min(figures.values(), key=lambda of_one: of_one["time_ms"])
    known = best.keys() & dense.keys()
    return {metric: best[metric] / dense[metric] for metric, *_ in METRICS if metric in known}
