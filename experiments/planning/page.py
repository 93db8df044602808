"""A plan as the terminal and the HTML page show it: a sentence, tables, and what is assumed."""

import html
import re
import textwrap
from typing import Any, NamedTuple

from experiments.common.provenance import public_command
from experiments.planning.chips import chip_of
from experiments.planning.choices import Choice
from experiments.planning.compiled_step import REACHED, by_kind, run_of
from experiments.reporting import html_page
from experiments.reporting.render import Table

UNKNOWN = (
    "How much of its peaks the chip reaches with this model. A few steps, rented for minutes, say it.",
    "Whether what is sent really overlaps with computing; without, a step takes the sum of both.",
    "Validation, checkpoints, the start, text that comes late, hosts that fail: none is in the days.",
)


class Page(NamedTuple):
    """Everything that a plan says.

    Attributes:
      title: what was planned.
      how: the mesh, and what else was compiled.
      summary: whether it fits, and how long the training takes.
      tables: memory, what is sent, operations, time, what was tried.
      notes: what is assumed, and what a plan cannot know.
    """

    title: str
    how: str
    summary: str
    tables: list[Table]
    notes: list[str]

    def text(self) -> str:
        """As a terminal shows it."""
        tables = [as_text(table) for table in self.tables]
        notes = [
            textwrap.fill(note, 110, initial_indent="  - ", subsequent_indent="    ") for note in self.notes
        ]
        return "\n\n".join(
            [f"{self.title}\n{self.how}\n{self.summary}", *tables, "\n".join(["Assumptions", *notes])]
        )

    def html(self) -> str:
        """As a file for a browser."""
        notes = "".join(f"<li>{html_page.rich(note)}</li>" for note in self.notes)
        return html_page.page(self.title, [
            f"<p>{html.escape(self.how)}</p><p><b>{html.escape(self.summary)}</b></p>",
            *map(html_page.table_html, self.tables), f"<h2>Assumptions</h2><ul>{notes}</ul>",
            f"<pre>{html.escape(public_command())}</pre>",
        ])  # fmt: skip


def page(figures: dict[str, Any], tokens: float, tried: list[Choice]) -> Page:
    """A plan.

    Args:
      figures: of `compile_step`.
      tokens: of the whole training.
      tried: choices, the recommended one last; empty without a search.
    """
    mesh = ", ".join(f"{axis} {size}" for axis, size in figures["mesh"].items())
    how = (
        f"{mesh}; remat {figures['remat']}; {figures['grad_accum_steps']} microbatches; grad_sync "
        f"{figures['grad_sync']}; compiled in {figures['compile_s']:.0f} s of a processor"
    )
    title = f"Training step for {figures['devices']} x {figures['device']}"
    tables = [memory(figures), sent(figures), operations(figures)]
    if "step_s" in figures:
        tables.append(times(figures, tokens))
    if tried:
        tables.append(choices(tried, tokens))
    return Page(title, how, summary(figures, tokens), tables, notes(figures))


def summary(figures: dict, tokens: float) -> str:
    """Whether a step fits, who says so, and how long the training takes."""
    chip, run = chip_of(figures["device"]), run_of(figures, tokens)
    used = most_gb(figures)
    if chip is None:
        return f"{used:.2f} GB a device; how much it has, and how fast it is, is not known here."
    who = "its compiler says" if figures["device"].startswith("TPU") else "by its size"
    limit = "computing" if figures["compute_s"] >= figures["network_s"] else "sending"
    return (
        f"It fits, {who}: {used:.2f} of {chip.memory_gb:g} GB a device. {tokens / 1e9:,.1f} G tokens take "
        f"{run['days']:,.2f} days, {run['chip_hours']:,.0f} chip-hours, limited by {limit}{slower(figures)}."
    )


def most_gb(figures: dict) -> float:
    """GB of a device that are in use at a time; all together where its compiler does not say it."""
    return figures["peak_gb"] or figures["argument_gb"] + figures["temporary_gb"]


def slower(figures: dict) -> str:
    """How much longer a step takes by the compiler's cycles, where it does."""
    times = figures.get("compiler_s", 0.0) / figures["step_s"]
    return f"; {times:.1f} times as long by the compiler's cycles" if times > 1.05 else ""


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
        "temporaries": figures["temporary_gb"],
        "all of these": all_gb,
    } | ({"most at a time": figures["peak_gb"]} if figures["peak_gb"] else {})
    cells = [[name, f"{size:.3f}", share(size)] for name, size in kinds.items()]
    text = "By the compiler's account. Temporaries: activations, gradients, gathered weights and all else."
    return _table("Memory of a device", text, ["", "GB", "share"], cells)


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
        [f"days for {tokens / 1e9:,.1f} G tokens", f"{run['days']:,.2f}"],
        ["chip-hours", f"{run['chip_hours']:,.0f}"],
    ]
    return _table("Time", "By arithmetic, if computing and sending overlap.", ["", ""], cells)


def choices(tried: list[Choice], tokens: float) -> Table:
    """What a search has tried, the recommended last."""
    cells = []
    for one in tried:
        way = [one.remat, str(one.microbatches), one.sync, str(one.parts)]
        if one.figures is None:
            cells.append([*way, _needed(one.said), "", ""])
            continue
        values = one.figures | run_of(one.figures, tokens)
        known = [f"{values[name]:.2f}" if name in values else "" for name in ("step_s", "days")]
        cells.append([*way, f"{most_gb(values):.2f} GB fits", *known])
    text = (
        "In turn, until one fits, which is recommended: first what sends least, of that the fewest "
        "microbatches, and of those what recomputes least; model: mesh.model."
    )
    head = ["remat", "microbatches", "grad_sync", "model", "memory", "s a step", "days"]
    return _table("What was tried", text, head, cells)


def notes(figures: dict) -> list[str]:
    """What a plan takes for granted, and what it cannot know."""
    chip = chip_of(figures["device"])
    if chip is None:
        return list(UNKNOWN)
    return [
        f"Peaks are the maker's: {chip.tflops:g} TFLOP/s in bfloat16, {chip.sends_gb:g} GB/s along an axis "
        f"of the mesh. {REACHED:.0%} of each is reached.",
        "All units of a layer are computed, as in a dense start and by masked execution. Memory's bandwidth "
        "is in the compiler's cycles alone; Pallas kernels and collectives are not in them.",
        *(f"Not known: {note[0].lower()}{note[1:]}" for note in UNKNOWN),
    ]


def _needed(said: str) -> str:
    """The GiB that a compiler asked for, and those that there are, where it says both."""
    found = re.findall(r"([\d.]+)G", said)
    return f"{found[0]} of {found[1]} GiB" if len(found) == 2 else "too much"


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
