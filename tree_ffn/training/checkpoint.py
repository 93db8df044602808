"""Checkpoints of a run: the only module that imports orbax.

A checkpoint holds two items, `model` (params and routing, so thresholds too)
and `optimizer` (step and optimizer state), and as JSON its `meta` (resolved
config, facts about the data; the model where it is not the config's). The data
state is the step: row order is a pure function of it.
"""

import logging
import os
import warnings
from collections.abc import Callable
from typing import Any

import jax
from etils import epath
from flax.traverse_util import flatten_dict, unflatten_dict
from orbax.checkpoint import v1 as ocp

from tree_ffn.errors import InputError, is_whole_number, reason
from tree_ffn.models.unread import check_unmoved, unread
from tree_ffn.training import bucket, distributed
from tree_ffn.training.checkpoint_files import checkpoint_directory, disk_error, steps_on_disk
from tree_ffn.training.sharding import placed
from tree_ffn.training.step import TrainState
from tree_ffn.training.structure import compare_leaves, leaves_of
from tree_ffn.upgrades import readable

# Ends the name of a checkpoint that another is to replace.
_REPLACED = ".replaced"

_policies = ocp.training.preservation_policies


class Damaged(InputError):
    """A checkpoint that cannot be read, though its name says that it is whole."""


class Checkpoints:
    """The checkpoints of a workdir; saving goes on in the background.

    Args:
      workdir: directory of the run; they lie in `checkpoints/`.
      keep: keeps this many of the latest, and the best by validation loss;
        None only reads, beside a run that may be writing.
      keep_every: and those of every so many steps; 0: no others.

    Raises:
      InputError: the directory cannot be written, or, to read, has no checkpoint.

    Example:
      >>> with Checkpoints(workdir, keep=2) as checkpoints:     # doctest: +SKIP
      ...     checkpoints.save(state, meta, val_loss=2.5)
      ...     state, meta = checkpoints.restore(abstract_state)
    """

    def __init__(self, workdir: str, keep: int | None = None, keep_every: int = 0):
        self.directory = checkpoint_directory(workdir)
        self._place = epath.Path(self.directory)
        with bucket.reached(workdir, "read"):
            if keep is None and not self._place.is_dir():
                raise InputError(
                    f"workdir: {workdir} has no checkpoints; name the --workdir of a training run."
                )
        logging.getLogger("absl").addFilter(_is_news)
        warnings.filterwarnings("ignore", "coroutine .* was never awaited", RuntimeWarning)
        best = _policies.BestN(
            get_metric_fn=_val_loss, reverse=True, n=1, keep_checkpoints_without_metrics=False
        )
        kept = [_policies.LatestN(keep), best]
        kept += [_policies.EveryNSteps(keep_every)] if keep_every else []
        try:
            with bucket.reached(workdir):
                self._orbax = ocp.training.Checkpointer(
                    self.directory,
                    preservation_policy=_policies.AnyPreservationPolicy(kept),
                    cleanup_tmp_directories=keep is not None,
                )
        except OSError as error:
            raise InputError(f"workdir: {self.directory} cannot be written ({error.strerror}).") from error

    def __enter__(self):
        return self

    def __exit__(self, kind, *_):
        # After an error the first message counts, not what closing says.
        if kind is None:
            self.close()
        else:
            try:
                self._orbax.close()
            except Exception:
                pass

    @property
    def steps(self) -> list[int]:
        """Steps with a whole checkpoint, ascending."""
        return [checkpoint.step for checkpoint in self._orbax.checkpoints]

    @property
    def latest(self) -> int | None:
        """The last of `steps`."""
        return self.steps[-1] if self.steps else None

    def is_scored(self, step: int) -> bool:
        """Whether the checkpoint of a step has its validation loss."""
        return any(checkpoint.step == step and checkpoint.metrics for checkpoint in self._orbax.checkpoints)

    @property
    def best(self) -> int | None:
        """The step with the lowest validation loss; the latest where none was measured."""
        measured = [c for c in self._orbax.checkpoints if c.metrics]
        return min(measured, key=lambda c: _val_loss(c.metrics)).step if measured else self.latest

    def save(self, state: TrainState, meta: dict, val_loss: float | None = None) -> None:
        """Starts to save `state`; `wait` or the next save says whether it arrived.

        A step that is saved already is not saved again, but with a `val_loss` that it lacks.

        Args:
          state: it may be donated as soon as this returns.
          meta: JSON-like facts; `config` and `data`.
          val_loss: what `best` goes by.

        Raises:
          InputError: the disk is full or cannot be written. Earlier checkpoints stay whole.
        """
        step = int(state.step)
        if step in self.steps and (val_loss is None or self.is_scored(step)):
            return
        items = {
            "model": state.variables,
            "optimizer": {"step": state.step, "opt_state": state.opt_state},
        }
        meta = {**meta, "step": step}
        metrics = None if val_loss is None else {"val_loss": float(val_loss)}
        save = lambda: self._orbax.save_checkpointables_async(
            step, items, metrics=metrics, custom_metadata=meta, force=True
        )
        if step not in self.steps:
            self._guard(save)
            return
        # Orbax would remove the old one first.
        self._rename(f"{step}", f"{step}{_REPLACED}")
        self._guard(save)
        self.wait()
        self._tidy()

    def wait(self) -> None:
        """Returns when the last save has arrived on disk.

        Raises:
          InputError: it did not.
        """
        self._guard(self._orbax.wait)

    def close(self) -> None:
        """Waits, then frees the threads."""
        self._guard(self._orbax.close)

    def meta(self, step: int | None = None) -> dict:
        """`meta` of the checkpoint of `step`, the latest by default; its config as it would be recorded now.

        Raises:
          InputError: the config uses an option that is gone.
        """
        step = self.latest if step is None else step
        saved: Any = self._orbax.checkpointables_metadata(step).custom_metadata
        if "config" not in (saved or {}):
            return saved or {}
        return {**saved, "config": readable(saved["config"], f"workdir: {os.path.dirname(self.directory)}")}

    def restore(self, abstract: TrainState, step: int | None = None) -> tuple[TrainState, dict]:
        """State and meta of a checkpoint, placed as `abstract` says.

        Args:
          abstract: shapes, dtypes and shardings; of any mesh.
          step: which one, the latest by default.

        Raises:
          InputError: the checkpoint is damaged, or has another structure, shape
            or dtype; the message names the first leaf that differs.
        """
        step = self.latest if step is None else step
        items = {
            "model": abstract.variables,
            "optimizer": {"step": abstract.step, "opt_state": abstract.opt_state},
        }
        found = self._load(step, items)
        return TrainState(**found["optimizer"], **found["model"]), self.meta(step)

    def restore_newest(self, abstract: TrainState, log: Callable[[str], object]) -> TrainState:
        """The state of the newest checkpoint that can be read; later ones are named and set aside.

        Args:
          abstract: as for `restore`.
          log: takes a line for every damaged checkpoint.

        Raises:
          InputError: none can be read, or as `restore`.
        """
        while True:
            damage, state = "", abstract
            try:
                state, _ = self.restore(abstract)
            except Damaged as error:
                damage = str(error)
            if not any(distributed.texts_of_all(damage)):  # one process may miss its part
                return state
            self._pass_over_newest(log)

    def check_newest(self, log: Callable[[str], object]) -> None:
        """Sets newest ones aside that do not say what they are, as `restore_newest` does with the others.

        Before, what was to be replaced when the run was killed gets its place back.
        """
        self._tidy()
        while self.steps and "config" not in self.meta():
            self._pass_over_newest(log)

    def _pass_over_newest(self, log: Callable[[str], object]) -> None:
        *others, step = self.steps
        path = f"{self.directory}/{step}"
        if not others:
            raise distributed.Refused(f"checkpoint: {path} cannot be read, and there is no other.")
        self._rename(f"{step}", f"{step}.damaged")
        log(f"checkpoint: {path} cannot be read; it is now {step}.damaged, and step {others[-1]} is used")

    def _tidy(self) -> None:
        """Removes checkpoints that were replaced; where nothing has taken a place yet, it is theirs again."""
        if distributed.is_first():
            for path in bucket.inside(self.directory):
                if path.suffix == _REPLACED and int(path.stem) in steps_on_disk(self.directory):
                    path.rmtree()
                elif path.suffix == _REPLACED:
                    path.rename(path.parent / path.stem)
        self._look_again()

    def _rename(self, name: str, to: str) -> None:
        if distributed.is_first():
            (self._place / name).rename(self._place / to)
        self._look_again()

    def _look_again(self) -> None:
        distributed.texts_of_all("")  # all wait for the first, which has changed what is there
        self._orbax.reload()

    def find(self, step: int | str) -> int:
        """The step that `best`, `latest` or a number names; a number may be in digits, as a flag gives it.

        Raises:
          InputError: there is no such checkpoint.
        """
        if not self.steps:
            raise InputError(f"workdir: {self.directory} has no whole checkpoint.")
        step = int(step) if isinstance(step, str) and is_whole_number(step) else step
        named = {"best": self.best, "latest": self.latest}
        found = named.get(step, step) if isinstance(step, str) else step
        if found not in self.steps:
            raise InputError(f"step: {step!r} has no checkpoint; use best, latest or one of {self.steps}.")
        return found

    def restore_variables(self, abstract: dict, step: int) -> dict:
        """The item `model` alone: {"params", "routing"}; arguments and errors as `restore`."""
        return self._load(step, {"model": abstract})["model"]

    def _load(self, step: int, items: dict) -> dict:
        """The items as their abstract trees say; the checkpoint has nothing else, but for `unread` arrays."""
        path, saved = f"{self.directory}/{step}", self._orbax.checkpointables_metadata(step).metadata
        self._check_items(path, saved, items)
        biases = unread(leaves_of(saved["model"]), leaves_of(items["model"]))
        for item, abstract in items.items():
            compare_leaves(path, saved[item], abstract, but=biases)
        if not biases:
            return self._loaded(step, items)
        mesh = jax.tree.leaves(items["model"])[0].sharding.mesh
        more = placed({name: jax.ShapeDtypeStruct(*leaf) for name, leaf in biases.items()}, mesh)
        both = unflatten_dict(flatten_dict(items["model"], sep="/") | more, sep="/")
        found = self._loaded(step, items | {"model": both})
        leaves = flatten_dict(found["model"], sep="/")
        check_unmoved({name: leaves[name] for name in biases}, path, "checkpoint")
        return found | {"model": _part(found["model"], items["model"])}

    def _loaded(self, step: int, items: dict) -> dict:
        """As `ocp` loads items, each process alone: where one cannot, the others need not wait for it."""
        me = jax.process_index()
        alone = ocp.options.MultiprocessingOptions(
            primary_host=me, active_processes={me}, barrier_sync_key_prefix=f"process_{me}"
        )
        try:
            with ocp.Context(multiprocessing_options=alone):
                return ocp.load_checkpointables(f"{self.directory}/{step}", items)
        except Exception as error:  # tensorstore has no one kind for what is torn
            raise Damaged(
                f"checkpoint: {self.directory}/{step} cannot be read, its files are damaged or missing; "
                "use another one by --step, or delete that directory."
            ) from error

    def _check_items(self, path: str, saved: dict, items: dict) -> None:
        for item in items:
            if saved.get(item) is None:  # orbax warns and goes on where it cannot read an item
                raise Damaged(
                    f"checkpoint: {path} cannot be read, its item {item!r} is damaged or missing; "
                    "use another one by --step, or delete that directory."
                )

    def _guard(self, action) -> None:
        """Runs `action`; says what a full or read-only disk means."""
        try:
            action()
        except Exception as error:
            in_bucket = bucket.is_bucket(self.directory)
            cause = disk_error(error) or (reason(error) if in_bucket else None)
            if cause is None:
                raise
            whole = "earlier checkpoints stay"
            if not in_bucket:
                # Orbax's list of steps has already lost those that the failed save was to replace.
                steps = steps_on_disk(self.directory)
                whole = f"checkpoints up to step {steps[-1]} are whole" if steps else "no checkpoint is whole"
            raise InputError(f"workdir: {self.directory} cannot be written ({cause}); {whole}.") from error


def _part(tree: dict, like: dict) -> dict:
    """What of a tree of dicts another has too."""
    return {
        name: _part(tree[name], sub) if isinstance(sub, dict) else tree[name] for name, sub in like.items()
    }


def _is_news(record: logging.LogRecord) -> bool:
    """False of what orbax warns of, and logs of failures with tracebacks in every thread: it raises them."""
    return not ("/orbax/" in record.pathname and (record.exc_info or record.levelno <= logging.WARNING))


def _val_loss(metrics: dict) -> float:
    return metrics["val_loss"]
