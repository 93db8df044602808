"""The table of plans: what compiling the training step of a large model says; nothing of it was run."""

from experiments.planning.chips import CHIPS, SLICES
from experiments.reporting.aggregate import block, groups, origin, setting
from experiments.reporting.render import Table

# (metric, heading, form)
COLUMNS = (
    ("argument_gb", "state, GB", ",.2f"), ("temporary_gb", "temporaries, GB", ",.2f"),
    ("peak_gb", "at a time, GB", ",.2f"), ("sent_gb", "sent, GB", ",.1f"),
    ("compute_s", "computing, s", ",.2f"), ("compiler_s", "by its compiler, s", ",.2f"),
    ("network_s", "sending, s", ",.2f"), ("days", "days", ",.2f"), ("chip_hours", "chip-hours", ",.0f"),
)  # fmt: skip


def planned(row: dict) -> tuple:
    """Plans of one size for one budget."""
    return setting(row, "model.width"), setting(row, "model.preset"), setting(row, "plan.tokens")


def plan(rows: list[dict]) -> Table:
    """A line a layer and slice."""
    lines = groups(rows, lambda row: (row["row"], row["device"], setting(row, "plan.slice")))
    cells = []
    for (name, _, slice_name), line in lines.items():
        values = {row["metric"]: row["value"] for row in line}
        get = lambda key, line=line: str(setting(line[0], key))
        figures = [f"{values[metric]:{form}}" if metric in values else "" for metric, _, form in COLUMNS]
        useful = f"{values['step_tflop'] / values['executed_tflop']:.0%}"
        once = ", grad_sync step" if get("train.grad_sync") == "step" and get("mesh.data") != "1" else ""
        how = [f"remat {get('model.remat')}{once}", get("train.grad_accum_steps")]
        cells.append([f"`{name}`", slice_name, *how, *figures[:6], useful, *figures[6:]])
    get = lambda key: setting(rows[0], key)
    tokens = rows[0]["config"]["plan"]["tokens"]
    slices = {row["config"]["plan"]["slice"] for row in rows} & SLICES.keys()  # not the devices at hand
    chips = {SLICES[name].chip for name in slices}
    room = ", ".join(f"{chip.memory_gb:g} ({chip.name})" for chip in CHIPS if chip.name in chips)
    text = (
        f"`plan` of {get('model.preset')}, {get('train.batch_size')} sequences of {get('model.max_seq_len')} "
        f"tokens a step, {tokens / 1e9:.1f} G tokens in all. Of one device: memory by the compiler's own "
        f"account, and how much of it is there at a time, of {room or 'what it has'}; GB that it sends in a "
        "step; seconds at half of the chip's peak and of its links, and by the compiler's own cycles, "
        "without collectives and flash attention. Useful: active units' share of executed operations. Days: "
        "of steps that take the longer of computing and sending. Where no grad_sync is named, gradients are "
        f"summed over devices in every microbatch. None was run. {origin(rows)}"
    )
    head = ["", "slice", "", "microbatches", *(title for _, title, _ in COLUMNS)]
    head.insert(10, "useful")
    return block(f"Plans of {get('model.preset')}", text, head, cells, rows[-1], labels=3, lines=lines)
