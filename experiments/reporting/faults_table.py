"""The table of faults: what followed when something failed in a run or around it."""

from experiments.reporting.aggregate import block, origin
from experiments.reporting.render import Table

# How lines begin that say why a run ended or what it passed over.
ENDINGS = ("train.py:", "stopped by", "checkpoint:")


def faults(rows: list[dict]) -> Table:
    """A line a fault: what was done, exit codes, seconds until the last process had ended, its last words."""
    last = {row["row"]: row for row in rows}
    cells = []
    for name, row in last.items():
        fault = row["config"]["fault"]
        codes = ", ".join(map(str, fault["exit_codes"]))
        said = sorted(filter(None, fault["said"]), key=lambda line: line.startswith(ENDINGS))[-1]
        cells.append([f"`{name}`", fault["what"], f"`{said}`", codes, f"{row['value']:.1f}"])
    text = (
        "Real processes on CPU devices of one machine, which shared two cores. Each line was asserted: a "
        "fault that ends otherwise has no row. Exit codes in the order of the processes, negative ones by a "
        "signal; seconds from the fault, or from the start where nothing is hurt, to the end of the last "
        f"process; the heartbeat was 5 s. {origin(rows)}"
    )
    head = ["", "what has to follow", "last words", "exit codes", "seconds"]
    return block("Faults", text, head, cells, rows[-1], labels=4)
