"""Prunes the trees, or experts, of a trained model by what calibration text visits, and says what that costs.

    python -m experiments.prune --workdir=runs/tree
    python -m experiments.prune --workdir=runs/tree --files='texts/*.txt.xz' --thresholds=0,1e-4,1e-2
    python -m experiments.prune --workdir=runs/tree --threshold=1e-4 --to=runs/pruned

A threshold is a share of the calibration tokens. A subtree that no more than this share visits is removed,
unless its sibling is removed and has fewer visits. An expert of a leaf layer that no more than this share
visits is removed, but the K that are chosen most stay. 0 removes what was never visited. Calibration text is
the run's training split, all of --files, or the training split of another corpus. The curve gives the loss on
the run's validation split for every threshold.

--to writes a new run at step 0: experiments/evaluate, generate and export read it by its --workdir. To train
it further, give the command of the run before with --workdir=NEW (config values of train and optim may
change): weights go on, the optimizer's moments and its schedule start anew.
"""

import contextlib
from typing import NamedTuple

import jax
from absl import flags

from experiments.common import cli, path_flags, text_flags
from experiments.reporting import record
from tree_ffn.analysis.prune import Calibration, calibrate, check_threshold, prune_model, tokens_needed
from tree_ffn.errors import InputError, check_positive_int
from tree_ffn.locks import new_directory
from tree_ffn.models import total_units
from tree_ffn.models.cost import sizes
from tree_ffn.models.spec import ModelSpec
from tree_ffn.training.evaluate import evaluate, other_corpus
from tree_ffn.training.plan import resolved
from tree_ffn.training.restore import Restored, restore_for_inference
from tree_ffn.training.sharding import shardings_for
from tree_ffn.training.workdir import begin_run

_WORKDIR = path_flags.define("workdir", None, "Directory of a training run.")
_STEP = flags.DEFINE_string("step", "best", "Checkpoint: best (by validation loss), latest, or a step.")
_CORPUS, _FILES, *_OTHERS, _TOKENIZER, _CACHE_DIR = text_flags.define(use="calibrate on")
_THRESHOLDS = flags.DEFINE_list(
    "thresholds", ["0", "1e-5", "1e-4", "1e-3", "1e-2", "1e-1", "1"], "Shares of the calibration tokens."
)
_TOKENS = flags.DEFINE_integer(
    "tokens",
    0,
    "Calibration tokens; 0 is 1,000 for each leaf of a tree, or expert: the least that is allowed.",
)
_BATCH_SIZE = flags.DEFINE_integer("batch_size", 16, "Rows a batch.")
_BATCHES = flags.DEFINE_integer("batches", 0, "Batches of held-out text to score; 0 is all.")
_STATIC = flags.DEFINE_bool(
    "static",
    False,
    "Write hard trees that are down to one path as a dense layer: equal to rounding, not to the bit.",
)
_THRESHOLD = flags.DEFINE_float("threshold", None, "The threshold of the model that --to gets.")
_TO = path_flags.define("to", None, "New directory for the model pruned by --threshold.")
_RESULTS = path_flags.define_written("results", None, "Append the metrics to this results file (JSONL).")
_ROW = flags.DEFINE_string("row", None, "Name of the results rows, e.g. tree_hard_P2_W1.")


class Point(NamedTuple):
    """A model of the curve; its threshold is None before pruning."""

    threshold: float | None
    model: ModelSpec
    figures: dict[str, float]


def main() -> None:
    thresholds = _checked_thresholds()
    with new_directory(_TO.value, "--to") if _TO.value else contextlib.nullcontext():
        _prune(thresholds)


def _prune(thresholds: list[float]) -> None:
    run = restore_for_inference(_WORKDIR.value, _STEP.value)
    tokens_needed(run.model)  # before any text is read: something can be pruned
    places = {flag.name: flag.value for flag in (_TOKENIZER, _CACHE_DIR)}
    other = {flag.name: flag.value for flag in (_CORPUS, _FILES, *_OTHERS)}
    held_out = other_corpus(run, **places)
    text = other_corpus(run, **other, **places) if any(other.values()) else held_out
    sources = [text.train, text.valid] if _FILES.value else [text.train]
    calibration = calibrate(run, sources, _TOKENS.value, _BATCH_SIZE.value)
    print(f"{calibration.tokens:,} calibration tokens of {text.meta['corpus']}", flush=True)

    points = curve(run, held_out, calibration, thresholds)
    print("\n" + table(points))
    if _RESULTS.value:
        append_results(run, points, calibration, text.meta, held_out.meta)
    if _TO.value:
        write_run(run, held_out, calibration)


def _checked_thresholds() -> list[float]:
    """The thresholds of the curve; all flags are looked at before anything is loaded."""
    if _WORKDIR.value is None:
        raise InputError("--workdir is missing; name the directory of a training run.")
    record.check_row_flag(_RESULTS.value, _ROW.value)
    if (_TO.value is None) != (_THRESHOLD.value is None):
        missing = "to" if _TO.value is None else "threshold"
        raise InputError(f"--{missing} is missing; --threshold and --to go together: which model, and where.")
    check_positive_int("--batches", _BATCHES.value, least=0)
    check_positive_int("--batch_size", _BATCH_SIZE.value)
    check_positive_int("--tokens", _TOKENS.value, least=0)
    if _THRESHOLD.value is not None:
        check_threshold(_THRESHOLD.value)
        if not _THRESHOLDS.present:
            return [_THRESHOLD.value]
    return sorted({_number(word) for word in _THRESHOLDS.value})


def _number(word: str) -> float:
    try:
        threshold = float(word)
    except ValueError:
        raise InputError(
            f"--thresholds: {word!r} is not a number; use shares from 0 to 1, e.g. 0,1e-4."
        ) from None
    check_threshold(threshold)
    return threshold


def curve(run: Restored, held_out, calibration: Calibration, thresholds: list[float]) -> list[Point]:
    """Figures of the model as it is, and pruned at every threshold.

    Args:
      run: the model.
      held_out: text on which it is scored.
      calibration: visits by which it is pruned.
      thresholds: ascending.
    """
    points = [_point(None, run, held_out, None)]
    for threshold in thresholds:
        model, variables = prune_model(run.model, run.variables, calibration, threshold, _STATIC.value)
        last = points[-1]
        if model == last.model:  # kept leaves only ever become fewer: as many are the same ones
            points.append(last._replace(threshold=threshold))
        else:
            pruned = run._replace(model=model, variables=placed(variables, run))
            points.append(_point(threshold, pruned, held_out, points[0]))
        figures = points[-1].figures
        print(
            f"threshold {threshold:g}: {figures['units_kept']:,} units, loss {figures['loss']:.4f} "
            f"({figures['loss_rise']:+.4f})",
            flush=True,
        )
    return points


def _point(threshold: float | None, run: Restored, held_out, whole: Point | None) -> Point:
    found = evaluate(run, held_out, "valid", _BATCH_SIZE.value, _BATCHES.value)
    units = sum(map(total_units, run.model.ffns))
    figures = {
        "loss": found["loss"],
        "bits_per_byte": found["bits_per_byte"],
        "loss_rise": found["loss"] - whole.figures["loss"] if whole else 0.0,
        "units_kept": units,
        "units_share": units / whole.figures["units_kept"] if whole else 1.0,
        "bytes": sizes(run.model)["bytes_weights"],
    }
    return Point(threshold, run.model, figures)


def placed(variables: dict, run: Restored) -> dict:
    """Variables on the run's mesh, by the table of shardings."""
    return jax.device_put(variables, shardings_for(variables, run.mesh))


def table(points: list[Point]) -> str:
    """The curve: one line a threshold."""
    lines = [
        f"{'threshold':>10} {'units kept':>12} {'share':>8} {'bytes':>14} {'loss':>8} {'rise':>8} "
        f"{'bits/byte':>10}   units of every layer"
    ]
    for point in points:
        f = point.figures
        said = "unpruned" if point.threshold is None else f"{point.threshold:g}"
        layers = " ".join(f"{total_units(ffn):,}" for ffn in point.model.ffns)
        lines.append(
            f"{said:>10} {f['units_kept']:>12,} {f['units_share']:>8.2%} {f['bytes']:>14,} {f['loss']:>8.4f} "
            f"{f['loss_rise']:>+8.4f} {f['bits_per_byte']:>10.4f}   {layers}"
        )
    return "\n".join(lines)


def append_results(run: Restored, points, calibration: Calibration, text_meta: dict, data_meta: dict) -> None:
    """One row a figure and threshold, of table prune_small.

    Args:
      run: the model.
      points: of `curve`.
      calibration: visits by which it was pruned.
      text_meta: of the calibration's text.
      data_meta: of the held-out text.
    """
    said = {"tokens": calibration.tokens, "sha256": text_meta["sha256"], "step": run.meta["step"]}
    for point in points:
        config = {
            **resolved(run.config),
            "prune": {"threshold": point.threshold, "static": _STATIC.value, **said},
        }
        names = {"table": "prune_small", "row": _ROW.value}
        record.append_figures(_RESULTS.value, point.figures, config=config, data_meta=data_meta, **names)


def write_run(run: Restored, held_out, calibration: Calibration) -> None:
    """The model pruned by --threshold as a run of its own.

    Args:
      run: the model.
      held_out: text on which it is scored.
      calibration: visits by which it is pruned.
    """
    model, variables = prune_model(run.model, run.variables, calibration, _THRESHOLD.value, _STATIC.value)
    pruned = run._replace(model=model, variables=placed(variables, run))
    train = run.config.train  # scored as training will score it, so that its best checkpoint is known
    score = evaluate(pruned, held_out, "valid", train.batch_size, train.eval_batches)
    facts = {"step": run.meta["step"], "threshold": _THRESHOLD.value, "tokens": calibration.tokens}
    begin_run(_TO.value, run, model, pruned.variables, score["loss"], pruned=facts)
    print(f"\n{_TO.value}: a run at step 0, validation loss {score['loss']:.4f}")


if __name__ == "__main__":
    cli.run(main, prints=lambda: not (_TO.value or _RESULTS.value))
