"""The model of a run, without its optimizer, also while the run goes on."""

import os
import shutil
import tempfile
import time
from typing import NamedTuple

import jax
from jax.sharding import Mesh

from tree_ffn.errors import InputError
from tree_ffn.locks import in_use
from tree_ffn.models.cost import abstract_variables
from tree_ffn.models.finite import check_finite_variables
from tree_ffn.models.from_config import model_spec_from_config
from tree_ffn.models.spec import ModelSpec, spec_from_dict
from tree_ffn.paths import local_or_bucket
from tree_ffn.plain import Namespace, namespace
from tree_ffn.training.checkpoint import Checkpoints
from tree_ffn.training.checkpoint_files import checkpoint_directory
from tree_ffn.training.sharding import make_mesh, placed

# How often a step is looked up that is removed while it is copied.
TRIES = 40


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
    workdir = local_or_bucket(workdir, "workdir")
    if jax.process_count() > 1 or not in_use(workdir):  # of several processes, one of them may still hold it
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
        shapes = abstract_variables(model)
        abstract = placed({"params": shapes["params"], "routing": shapes.get("routing", {})}, mesh)
        variables = checkpoints.restore_variables(abstract, found)
        check_finite_variables(variables, f"{checkpoints.directory}/{found}")
        return Restored(config, model, variables, meta, mesh)


def own_model(meta: dict) -> ModelSpec | None:
    """The model of a checkpoint where it is not the config's: a pruned one, say (see `workdir.begin_run`)."""
    return spec_from_dict(meta["model"]) if "model" in meta else None


def copied_whole(step: str, to: str) -> bool:
    """Links or copies a checkpoint without its optimizer; False where it was being removed meanwhile.

    Raises:
      OSError: a file has gone, or there is no room.
    """
    before = _files(step)
    shutil.copytree(step, to, copy_function=_link_or_copy, ignore=shutil.ignore_patterns("optimizer"))
    return bool(before) and _files(step) == before


def _files(directory: str) -> set[str]:
    return {os.path.join(place, name) for place, _, names in os.walk(directory) for name in names}


def _link_or_copy(path: str, to: str) -> None:
    try:
        os.link(path, to)
    except OSError:  # another file system, or another's file
        shutil.copyfile(path, to)
