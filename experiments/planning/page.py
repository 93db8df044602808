"""A plan as tables, which the terminal and the HTML page show alike."""

import re
from typing import Any

from experiments.planning.chips import chip_of
from experiments.planning.choices import Choice
from experiments.planning.compiled_step import REACHED, by_kind, run_of
from experiments.reporting.render import Table

UNKNOWN = (
    "How much of its peaks the chip reaches with this model; the share above is assumed. A few steps, rented "
    "for minutes, say it.",
    "Whether what is sent really overlaps with computing; without, a step takes the sum of both.",
    "Validation, checkpoints, the start, text that comes late, hosts that fail: none is in the days.",
)


def title(figures: dict[str, Any]) -> str:
    """What was planned, in one line."""
    mesh = ", ".join(f"{axis} {size}" for axis, size in figures["mesh"].items())
    return (
        f"training step for {figures['devices']} x {figures['device']} ({mesh}; remat {figures['remat']}; "
        f"{figures['grad_accum_steps']} microbatches), compiled in {figures['compile_s']:.0f} s"
    )


def tables(figures: dict[str, Any], tokens: float, tried: list[Choice]) -> list[Table]:
    """Everything that a plan says.

    Args:
      figures: of `compile_step`.
      tokens: of the whole training.
      tried: choices, the recommended one last; empty without a search.
    """
    made = [memory(figures), sent(figures), operations(figures)]
    if "step_s" in figures:
        made.append(times(figures, tokens))
    return [*made, *([choices(tried, tokens)] if tried else []), assumptions(figures)]


def memory(figures: dict) -> Table:
    """Memory of one device by kind, and its share of what there is."""
    chip = chip_of(figures["device"])
    share = lambda size: f"{size / chip.memory_gb:.1%}" if chip else ""
    rest = figures["argument_gb"] - figures["weights_gb"] - figures["moments_gb"]
    all_gb = figures["argument_gb"] + figures["temporary_gb"]
    kinds = {
        "weights": figures["weights_gb"],
        "the optimizer's moments": figures["moments_gb"],
        "batch and counts": rest,
        "temporaries: activations, gradients, gathered weights": figures["temporary_gb"],
        "all of these": all_gb,
    } | ({"most at a time": figures["peak_gb"]} if figures["peak_gb"] else {})
    cells = [[name, f"{size:.3f}", share(size)] for name, size in kinds.items()]
    text = f"By the compiler's own account. {verdict(figures)}"
    return _table("Memory of a device", text, ["", "GB", "of the chip's"], cells)


def verdict(figures: dict) -> str:
    """That a step fits, and who says so."""
    chip = chip_of(figures["device"])
    if chip is None:
        return "How much such a device has is not known here."
    who = "by the compiler's own word" if figures["device"].startswith("TPU") else "by its size"
    return f"It fits, {who}: the device has {chip.memory_gb:g} GB."


def sent(figures: dict) -> Table:
    """What a device sends in a step, by kind and along which axis of the mesh."""
    cells = [
        [kind, " and ".join(axes) or "no axis", f"{times:,}", f"{size / 1e9:.3f}"]
        for (kind, axes), (times, size) in by_kind(figures["sent"]).items()
    ]
    cells.append(["all", "", "", f"{figures['sent_gb']:.3f}"])
    text = "Of one device in one step, read off the program: a loop counts as often as it runs."
    return _table("What devices send", text, ["", "along", "times", "GB"], cells, labels=2)


def operations(figures: dict) -> Table:
    """Operations of a step on all devices."""
    useful, executed = figures["step_tflop"], figures["executed_tflop"]
    cells = [
        ["useful: active units, 3 x forward", f"{useful:,.3f}", ""],
        ["executed: all units, and what is repeated", f"{executed:,.3f}", f"{useful / executed:.0%} useful"],
    ]
    return _table("Operations of a step", "By arithmetic, of all devices.", ["", "TFLOP", ""], cells)


def times(figures: dict, tokens: float) -> Table:
    """A step by each account, and the whole run."""
    chip, n = chip_of(figures["device"]), figures["devices"]
    assert chip is not None
    seconds = {
        f"computing, at {REACHED:.0%} of {chip.tflops:g} TFLOP/s": figures["compute_s"],
        f"sending, at {REACHED:.0%} of {chip.sends_gb:g} GB/s": figures["network_s"],
    }
    if "compiler_s" in figures:
        seconds["computing, by the compiler's cycles"] = figures["compiler_s"]
    seconds["a step, the longer of the first two"] = figures["step_s"]
    run = run_of(figures, tokens)
    of_peak = figures["step_tflop"] / figures["step_s"] / n / chip.tflops
    cells = [
        *([name, f"{value:.3f} s"] for name, value in seconds.items()),
        ["tokens a second", f"{figures['tokens_per_s']:,.0f}"],
        ["useful operations, of the peak", f"{of_peak:.0%}"],
        [f"days for {tokens / 1e9:,.1f} G tokens", f"{run['days']:.1f}"],
        ["chip-hours", f"{run['chip_hours']:,.0f}"],
    ]
    limit = "computing" if figures["compute_s"] >= figures["network_s"] else "sending"
    text = f"The step is limited by {limit}, if the two overlap."
    return _table("Time", text, ["", ""], cells)


def choices(tried: list[Choice], tokens: float) -> Table:
    """What a search has tried, the recommended last."""
    cells = []
    for one in tried:
        way = [one.remat, str(one.microbatches), str(one.parts)]
        if one.figures is None:
            cells.append([*way, f"{_needed(one.said)}does not fit", "", ""])
            continue
        all_gb = one.figures["argument_gb"] + one.figures["temporary_gb"]
        step = f"{one.figures['step_s']:.3f}" if "step_s" in one.figures else ""
        days = "".join(
            f"{days:.1f}" for days in [run_of(one.figures, tokens).get("days")] if days is not None
        )
        cells.append([*way, f"{all_gb:.2f} GB: recommended", step, days])
    text = "In turn, until one fits: what recomputes less first, and the fewest microbatches."
    return _table(
        "What was tried", text, ["remat", "microbatches", "mesh.model", "memory", "s a step", "days"], cells
    )


def assumptions(figures: dict) -> Table:
    """What a plan takes for granted, and what it cannot know."""
    chip = chip_of(figures["device"])
    taken = []
    if chip:
        taken = [
            f"Peaks as the maker states them: {chip.tflops:g} TFLOP/s in bfloat16, {chip.sends_gb:g} GB/s "
            f"along an axis of the mesh. {REACHED:.0%} of each is reached.",
            "All units of a layer are computed, as by masked execution; memory's own bandwidth is in the "
            "compiler's cycles alone, and Pallas kernels and collectives are not.",
        ]
    cells = [["assumed", line] for line in taken] + [["not known", line] for line in UNKNOWN]
    return _table("Assumptions, and what a plan cannot know", "", ["", ""], cells, labels=2)


def _needed(said: str) -> str:
    """The GiB that a compiler asked for, and those that there are, where it says both."""
    found = re.findall(r"([\d.]+)G", said)
    return f"{found[0]} of {found[1]} GiB: " if len(found) == 2 else ""


def _table(name: str, text: str, head: list[str], cells: list[list[str]], labels: int = 1) -> Table:
    return Table(name, text, head, cells, labels, ("",))


def as_text(table: Table) -> str:
    """A table in columns, as a terminal shows it."""
    plain = [[cell.replace("**", "") for cell in line] for line in [table.head, *table.cells]]
    widths = [max(len(line[i]) for line in plain) for i in range(len(table.head))]
    side = lambda i: "<" if i < table.labels else ">"
    lines = ["  ".join(f"{cell:{side(i)}{widths[i]}}" for i, cell in enumerate(line)) for line in plain]
    if not any(table.head):
        lines = lines[1:]
    body = "\n".join(f"  {line.rstrip()}" for line in lines)
    return "\n".join(filter(None, [table.title, table.text and f"  {table.text}", body]))
