"""Checkpoints of a run: the only module that imports orbax.

A checkpoint holds two items, `model` (params and routing, so thresholds too)
and `optimizer` (step and optimizer state), and as JSON its `meta` (resolved
config, facts about the data; the model where it is not the config's). The data
state is the step: row order is a pure function of it.
"""

import logging
import os
import shutil
import tempfile
import time
from typing import Any, NamedTuple

import jax
from flax.traverse_util import flatten_dict, unflatten_dict
from jax.sharding import Mesh
from orbax.checkpoint import v1 as ocp

from tree_ffn.errors import InputError, is_whole_number
from tree_ffn.locks import in_use
from tree_ffn.models.finite import check_finite_variables
from tree_ffn.models.from_config import model_spec_from_config
from tree_ffn.models.spec import ModelSpec, spec_from_dict
from tree_ffn.models.transformer import Transformer
from tree_ffn.models.unread import check_unmoved, unread
from tree_ffn.paths import local
from tree_ffn.plain import Namespace, namespace
from tree_ffn.training.disk import checkpoint_directory, copied_whole, disk_error, steps_on_disk
from tree_ffn.training.leaves import compare_leaves, leaves_of
from tree_ffn.training.sharding import make_mesh, placed
from tree_ffn.training.step import TrainState
from tree_ffn.upgrades import readable

# How often a step is looked up that is removed while it is copied.
TRIES = 40

_policies = ocp.training.preservation_policies


class Checkpoints:
    """The checkpoints of a workdir; saving goes on in the background.

    Args:
      workdir: directory of the run; they lie in `checkpoints/`.
      keep: keeps this many of the latest, and the best by validation loss;
        None only reads, beside a run that may be writing.

    Raises:
      InputError: the directory cannot be written, or, to read, has no checkpoint.

    Example:
      >>> with Checkpoints(workdir, keep=2) as checkpoints:     # doctest: +SKIP
      ...     checkpoints.save(state, meta, val_loss=2.5)
      ...     state, meta = checkpoints.restore(abstract_state)
    """

    def __init__(self, workdir: str, keep: int | None = None):
        self.directory = checkpoint_directory(workdir)
        if keep is None and not os.path.isdir(self.directory):
            raise InputError(f"workdir: {workdir} has no checkpoints; name the --workdir of a training run.")
        logging.getLogger("absl").addFilter(_is_news)
        best = _policies.BestN(
            get_metric_fn=_val_loss, reverse=True, n=1, keep_checkpoints_without_metrics=False
        )
        try:
            self._orbax = ocp.training.Checkpointer(
                self.directory,
                preservation_policy=_policies.AnyPreservationPolicy([_policies.LatestN(keep), best]),
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
        self._guard(
            lambda: self._orbax.save_checkpointables_async(
                step, items, metrics=metrics, custom_metadata=meta, force=True, overwrite=step in self.steps
            )
        )

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
            return saved
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
            return self._orbax.load_checkpointables(step, items)
        mesh = jax.tree.leaves(items["model"])[0].sharding.mesh
        more = placed({name: jax.ShapeDtypeStruct(*leaf) for name, leaf in biases.items()}, mesh)
        both = unflatten_dict(flatten_dict(items["model"], sep="/") | more, sep="/")
        found = self._orbax.load_checkpointables(step, items | {"model": both})
        leaves = flatten_dict(found["model"], sep="/")
        check_unmoved({name: leaves[name] for name in biases}, path, "checkpoint")
        return found | {"model": _part(found["model"], items["model"])}

    def _check_items(self, path: str, saved: dict, items: dict) -> None:
        for item in items:
            if saved.get(item) is None:  # orbax warns and goes on where it cannot read an item
                raise InputError(
                    f"checkpoint: {path} cannot be read, its item {item!r} is damaged or missing; "
                    "use another one by --step, or delete that directory."
                )

    def _guard(self, action) -> None:
        """Runs `action`; says what a full or read-only disk means."""
        try:
            action()
        except Exception as error:
            cause = disk_error(error)
            if cause is None:
                raise
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
    """False of a failure that orbax logs, with its traceback, in every thread: it is raised too."""
    return not (record.exc_info and "/orbax/" in record.pathname)


class Restored(NamedTuple):
    """A trained model, ready to be applied.

    Attributes:
      config: the run's config, with attributes.
      model: what `Transformer` takes.
      variables: {"params", "routing"}.
      meta: `config`, `data`, `step` as saved.
      mesh: where the variables are.
    """

    config: Namespace
    model: ModelSpec
    variables: dict
    meta: dict
    mesh: Mesh


def restore_for_inference(workdir: str, step: int | str = "best", mesh: Mesh | None = None) -> Restored:
    """The model of a run, without its optimizer.

    The run may go on meanwhile: where it removes the step that is read, `best` or `latest` is looked up anew.

    Args:
      workdir: of the run, finished or not.
      step: `best` by validation loss, `latest`, or a number, also in digits.
      mesh: where weights go; the first device alone by default.

    Raises:
      InputError: there is no such checkpoint (any more), its config makes another model, or a weight is not
        finite.

    Example:
      >>> run = restore_for_inference("runs/tree")                          # doctest: +SKIP
      >>> Transformer(run.model).apply(run.variables, tokens_BC)            # doctest: +SKIP
    """
    mesh = mesh or make_mesh(1, 1, jax.devices()[:1])
    workdir = local(workdir, "workdir")
    if not in_use(workdir):
        return _restore(workdir, step, mesh)
    with tempfile.TemporaryDirectory() as copy:
        found = _copy(workdir, step, copy)
        return _restore(copy, found, mesh)


def _copy(workdir: str, step: int | str, to: str) -> int:
    """Copies the model of a step out of reach of the run that may remove it meanwhile; returns the step.

    Orbax would print tracebacks of its threads for files that go while it reads them.
    """
    directory, place = checkpoint_directory(workdir), ""
    for _ in range(TRIES):
        try:
            with Checkpoints(workdir) as checkpoints:
                found = checkpoints.find(step)
            place = os.path.join(checkpoint_directory(to), str(found))
            if copied_whole(os.path.join(directory, str(found)), place):
                return found
        except InputError:
            raise
        except Exception as error:  # orbax has no one kind for a step that has gone
            if "No space left" in str(error):
                raise InputError(
                    f"TMPDIR: {to} has no room for the model, which is copied beside a run; name another."
                ) from error
        shutil.rmtree(place, ignore_errors=True)
        time.sleep(0.05)
    raise InputError(
        f"step: {step!r} of {workdir} is removed before it is read; let the run keep more (train.keep), name "
        "another step, or wait for its end."
    )


def _restore(workdir: str, step: int | str, mesh: Mesh) -> Restored:
    with Checkpoints(workdir) as checkpoints:
        found = checkpoints.find(step)
        meta = checkpoints.meta(found)
        config = namespace(meta["config"])
        model = own_model(meta) or model_spec_from_config(config, meta["data"]["vocab_size"])
        tokens_BC = jax.ShapeDtypeStruct((1, model.max_seq_len), "int32")
        shapes = jax.eval_shape(Transformer(model).init, jax.random.key(0), tokens_BC)
        abstract = placed({"params": shapes["params"], "routing": shapes.get("routing", {})}, mesh)
        variables = checkpoints.restore_variables(abstract, found)
        check_finite_variables(variables, f"{checkpoints.directory}/{found}")
        return Restored(config, model, variables, meta, mesh)


def own_model(meta: dict) -> ModelSpec | None:
    """The model of a checkpoint where it is not the config's: a pruned one, say (see `warm_start`)."""
    return spec_from_dict(meta["model"]) if "model" in meta else None


def _val_loss(metrics: dict) -> float:
    return metrics["val_loss"]
