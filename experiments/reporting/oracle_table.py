"""The table of oracle routing: what leaves chosen by the loss itself would take off it."""

from experiments.reporting.aggregate import (
    block,
    by_seed,
    last_of,
    lines_of,
    machine,
    mean,
    origin,
    setting,
    spread,
    task,
)
from experiments.reporting.render import Table


def oracle(rows: list[dict]) -> Table:
    """A line a model: its loss on the sample, and with the leaves of one layer moved, mean of the layers."""
    lines, cells = lines_of(rows), []
    for name, line in lines.items():
        own, best = (by_seed(line, metric) for metric in ("val_loss", "oracle_loss"))
        falls = [own[seed] - best[seed] for seed in own if seed in best]
        losses = [spread(values) for values in (own.values(), best.values(), falls)]
        cells.append([f"`{name}`", *losses, mean(line, "moved", ".1%"), str(len(own))])
    said = rows[-1]["config"]["oracle"]
    text = (
        f"Leaves chosen by the loss itself in one layer at a time: {task(rows)}; {said['rows']} held-out "
        f"rows, {said['rounds']} rounds. Nats a token, mean of the layers. The loss knows the next token, "
        f"which no router does: a bound, not what routing loses. {origin(rows)}"
    )
    head = ["", "own leaves", "best found", "falls by", "leaves moved", "seeds"]
    title = f"Oracle routing, {machine(rows[0])}, {setting(rows[0], 'train.steps')} steps"
    return block(title, text, head, cells, last_of(lines), lines=lines)
