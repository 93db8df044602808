"""Says what the best decisions would be worth: leaves chosen by the loss itself, one layer at a time.

    python -m experiments.oracle --workdir=runs/tree
    python -m experiments.oracle --workdir=runs/tree --results=runs/oracle.jsonl --row=tree_straight_P2_W1

On a sample of held-out rows, the leaves of one layer are moved to where the loss is lower, round by round.
The other layers decide for themselves. The loss knows the next token, which no router does; compare with a
model whose decisions are random. Layers that are not whole trees are left out.
"""

import jax
import jax.numpy as jnp
from absl import flags

from experiments.common import cli, path_flags, starts
from experiments.reporting import record
from tree_ffn.analysis.oracle import Oracle, better_leaves, can_move
from tree_ffn.data.pipeline import valid_batches
from tree_ffn.errors import InputError, check_positive_int
from tree_ffn.training.plan import resolved

_WORKDIR = path_flags.define("workdir", None, "Directory of a training run.")
_STEP = flags.DEFINE_string("step", "best", "Checkpoint: best (by validation loss), latest, or a step.")
_TOKENIZER = path_flags.define_each("tokenizer", None, "Where the model's tokenizer is now, if it has moved.")
_CACHE_DIR = path_flags.define("cache_dir", None, "Where prepared rows are kept; as in the run by default.")
_ROWS = flags.DEFINE_integer("rows", 16, "Held-out rows of the model's context.")
_ROUNDS = flags.DEFINE_integer("rounds", 12, "Rounds of moves; a token moves in one tree a round.")
_RESULTS = path_flags.define_written("results", None, "Append the metrics to this results file (JSONL).")
_ROW = flags.DEFINE_string("row", None, "Name of the results rows, e.g. tree_straight_P2_W1.")


def main() -> None:
    if _WORKDIR.value is None:
        raise InputError("--workdir is missing; name the directory of a training run.")
    record.check_row_flag(_RESULTS.value, _ROW.value)
    for flag in (_ROWS, _ROUNDS):
        check_positive_int(f"--{flag.name}", flag.value)
    run, text = starts.with_text(
        starts.load(_WORKDIR.value, _STEP.value), tokenizer=_TOKENIZER.value, cache_dir=_CACHE_DIR.value
    )
    if len(text.valid) < _ROWS.value:
        raise InputError(
            f"--rows: {_ROWS.value} is not allowed; the held-out text has {len(text.valid)} rows."
        )
    judged = [layer for layer, ffn in enumerate(run.model.ffns) if can_move(ffn)]
    if not judged:
        raise InputError(
            f"--workdir: {_WORKDIR.value} has no layer of whole trees (ffn.kind 'tree' or 'random_tree') "
            "with the activation at the nodes; name a run that has."
        )
    rows_BC = jnp.asarray(next(iter(valid_batches(text.valid, _ROWS.value, 1))))
    print(f"{_ROWS.value * run.model.max_seq_len:,} held-out tokens, nats a token; leaves moved")
    print(f"{'':>9} {'own':>8} {'1 round':>8} {f'{_ROUNDS.value} rounds':>10} {'moved':>7}")
    found = {}
    with jax.set_mesh(run.mesh):
        for layer in judged:
            found[layer] = better_leaves(run.model, run.variables, rows_BC, layer, _ROUNDS.value)
            print(line(layer, found[layer]), flush=True)
    if _RESULTS.value:
        facts = {"rows": _ROWS.value, "rounds": _ROUNDS.value, "step": run.meta["step"]}
        record.append_figures(
            _RESULTS.value, figures(found), table="oracle", row=_ROW.value,
            config={**resolved(run.config), "oracle": facts}, data_meta=text.meta,
        )  # fmt: skip


def line(layer: int, oracle: Oracle) -> str:
    """A layer's line of the printed table."""
    own, first, last = oracle.losses[0], oracle.losses[1], oracle.losses[-1]
    return f"{f'layer {layer}':>9} {own:>8.4f} {first:>8.4f} {last:>10.4f} {oracle.moved:>7.1%}"


def figures(found: dict[int, Oracle]) -> dict[str, float]:
    """Figures of a results row: of the model, and of every layer by its number."""
    first = next(iter(found.values()))
    best = {f"oracle_loss/{layer}": oracle.losses[-1] for layer, oracle in found.items()}
    moved = {f"moved/{layer}": oracle.moved for layer, oracle in found.items()}
    return {"loss": first.losses[0]} | best | moved


if __name__ == "__main__":
    cli.run(main, prints=lambda: not _RESULTS.value)
