"""The directory of a run: its config, whether a new config may go on in it, and runs of a changed model.

A run that begins with a changed model, a pruned one say, is no longer what its config says: the `meta` of its
checkpoints has an entry `model`. The config stays that of the run before, so the same command with the new
--workdir goes on training.
"""

import contextlib
import dataclasses
import json
import os
import re
import uuid
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath

from tree_ffn.errors import InputError
from tree_ffn.json_output import json_text
from tree_ffn.locks import only_writer
from tree_ffn.models.from_config import model_spec_from_config
from tree_ffn.models.spec import ModelSpec, spec_to_dict
from tree_ffn.paths import replacing, writing
from tree_ffn.plain import flat, namespace
from tree_ffn.training import bucket
from tree_ffn.training.checkpoint import Checkpoints
from tree_ffn.training.checkpoint_files import checkpoint_directory, steps_on_disk
from tree_ffn.training.optimizer import learning_rate, make_optimizer
from tree_ffn.training.plan import Plan, TrainSpec, check_trainable, differing_keys, optim_spec, resolved
from tree_ffn.training.restore import Restored, own_model
from tree_ffn.training.step import TrainState, leaks
from tree_ffn.upgrades import readable, stamped

# Data are compared by content: each host may have them elsewhere.
PLACES_OF_DATA = r"^data\.(files|valid_files|tfds_dir|cache_dir|workers)$"

# Keys that may change when a run is resumed: they say how and where it runs,
# not what it computes.
MAY_DIFFER = (
    r"^train\.(grad_accum_steps|grad_sync|log_every|eval_every|eval_batches|probe)$",
    r"^train\.(checkpoint_every|checkpoint_minutes|keep|keep_every|max_hours|compile_cache)$",
    r"^train\.(profile_at|wandb)$",
    r"^mesh\.",
    r"^model\.(remat|unroll)$",
    r"^ffn\.implementation$",
    PLACES_OF_DATA,
)

# These may change too, if every step already made stays as it was: its learning rate, and what leaked.
SCHEDULE_KEYS = {
    "train.steps", "optim.schedule", "optim.warmup_steps", "optim.final_share", "optim.decay_share",
}  # fmt: skip

# And before the first step, as in a run that begins with a pruned model, how it trains is still open.
BEFORE_THE_FIRST_STEP = r"^(train|optim)\."


def compared(config: dict, origin: dict) -> dict[str, dict]:
    """What has to be equal in all processes of a run: its config, but for where data are, and its code.

    Args:
      config: resolved.
      origin: of this process, as origin.json has it.
    """
    keys = {key: value for key, value in flat(config).items() if not re.search(PLACES_OF_DATA, key)}
    return {"config": keys, "code": {name: origin.get(name) for name in ("commit", "versions")}}


def open_workdir(workdir: str, config, train: TrainSpec, log=print) -> Checkpoints:
    """Checkpoints of a workdir that a run may begin or go on in; nothing else is written yet.

    Args:
      workdir: directory of the run; made if it is not there.
      config: of the run to start.
      train: says which checkpoints are kept.
      log: takes lines on checkpoints that are damaged.

    Raises:
      InputError: the workdir holds a run of another config (the message lists
        the keys that differ), or cannot be read or written.
    """
    # Before orbax opens it for writing, which removes what another process has not finished saving.
    steps = steps_on_disk(checkpoint_directory(workdir))
    known = read_config(workdir)
    if known is None and steps:  # a checkpoint says it too
        with Checkpoints(workdir) as checkpoints:
            known = checkpoints.meta(steps[-1]).get("config")
    if known is not None:
        check_same_config(workdir, known, stamped(resolved(config)), steps[-1] if steps else 0)
    checkpoints = Checkpoints(workdir, train.keep, train.keep_every)
    checkpoints.check_newest(log)
    return checkpoints


@contextlib.contextmanager
def unmade_if_empty(workdir: str) -> Iterator[None]:
    """At the end the directory of checkpoints that was made within and holds nothing goes again.

    It is opened before data are prepared, which takes long, so that one that cannot be written is refused
    first; data that cannot be used are known only then.
    """
    path = checkpoint_directory(workdir)
    new = not bucket.is_bucket(path) and not os.path.exists(path)
    try:
        yield
    finally:
        if new:
            with contextlib.suppress(OSError):  # not empty, or never made
                os.rmdir(path)


def check_same_config(workdir: str, known: dict, wanted: dict, step: int) -> None:
    """Raises InputError that lists the keys in which `wanted` may not differ from `known`.

    Args:
      workdir: for the message.
      known: resolved config of the run so far.
      wanted: resolved config to go on with.
      step: finished steps, over which both are compared (`same_past`).
    """
    changed = {
        key: values
        for key, values in differing_keys(known, wanted).items()
        if not any(re.search(pattern, key) for pattern in MAY_DIFFER)
    }
    if step == 0:
        changed = {key: values for key, values in changed.items() if not re.match(BEFORE_THE_FIRST_STEP, key)}
    if changed.keys() <= SCHEDULE_KEYS and same_past(known, wanted, step):
        return
    said = ", ".join(f"{key} ({was!r} there, {now!r} here)" for key, (was, now) in changed.items())
    raise InputError(
        f"workdir: {workdir} holds a run of another config; these keys differ: {said}; "
        "use its config, or another --workdir."
    )


def same_past(known: dict, wanted: dict, step: int) -> bool:
    """Whether the first `step` steps are alike: learning rates, and what leaks.

    Args:
      known: resolved config of the run so far.
      wanted: resolved config to go on with.
      step: finished steps.
    """
    made = np.arange(step, dtype=np.float32)
    old, new = (optim_spec(namespace(config)) for config in (known, wanted))
    return np.array_equal(learning_rate(old)(made), learning_rate(new)(made)) and np.array_equal(
        _leaked(known, made), _leaked(wanted, made)
    )


def _leaked(config: dict, made: np.ndarray) -> np.ndarray:
    """What leaked in each of the steps made, of the layers that leak: [layers, steps]."""
    if "finetune" in config:  # its model is not the config's, and dense starts are over
        return np.zeros((0, len(made)))
    model = model_spec_from_config(namespace(config), vocab_size=2)  # of any vocabulary
    done = np.minimum(made / np.float32(config["train"]["steps"]), 1)  # it may have been meant to end before
    return np.array([ffn.leak_at(done) for ffn in model.ffns if leaks(ffn)])


def check_same_data(workdir: str, known: dict, meta: dict) -> None:
    """Raises InputError unless a checkpoint's data facts are those of the prepared corpus.

    Args:
      workdir: for the message.
      known: `meta` of the corpus that the checkpoint was trained on.
      meta: of the corpus at hand.
    """
    for key in ("sha256", "tokenizer_sha256", "row_tokens", "splits"):
        if known.get(key) != meta.get(key):
            raise InputError(
                f"data: the run in {workdir} was trained on other data ({key} {known.get(key)!r} there, "
                f"{meta.get(key)!r} here); use the same corpus and tokenizer, or another --workdir."
            )


def read_json(workdir: str, name: str) -> dict | None:
    """A JSON file of the workdir; None where there is none.

    Raises:
      InputError: the file is no JSON object.
    """
    path = os.path.join(workdir, name)
    try:
        with bucket.reached(path, "read"):
            value = json.loads(epath.Path(path).read_text(encoding="utf-8"))
    except InputError:
        raise
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"workdir: {path} cannot be read ({error}).") from error
    if not isinstance(value, dict):
        raise InputError(f"workdir: {path} holds no JSON object.")
    return value


def read_config(workdir: str) -> dict | None:
    """The config of a run as it would be recorded now (see `upgrades`); None where there is none.

    Raises:
      InputError: the file is no JSON object, or the run uses an option that is gone.
    """
    known = read_json(workdir, "config.json")
    return None if known is None else readable(known, f"workdir: {workdir}")


def wandb_id(workdir: str) -> str:
    """By which W&B knows the run; made at its first start."""
    known = read_json(workdir, "wandb.json") or {"id": uuid.uuid4().hex[:16]}
    write_json(workdir, "wandb.json", known)
    return known["id"]


def add_origin(workdir: str, start: dict) -> None:
    """Appends a start of the run to origin.json: {"starts": [...]}.

    Args:
      workdir: directory of the run.
      start: its step, and where it comes from.

    Raises:
      InputError: the file cannot be read or written.
    """
    known = (read_json(workdir, "origin.json") or {}).get("starts", [])
    write_json(workdir, "origin.json", {"starts": [*known, start]})


def write_json(workdir: str, name: str, value: dict) -> None:
    """Writes a JSON file of the workdir as a whole, or not at all.

    Args:
      workdir: directory of the run; made if it is not there.
      name: of the file in it.
      value: of JSON's kinds.

    Raises:
      InputError: the workdir cannot be written.
    """
    path = os.path.join(workdir, name)
    text = json_text(value, path, indent=2)
    if bucket.is_bucket(path):  # where a file is there as a whole, or not at all
        with bucket.reached(path):
            epath.Path(path).write_text(text + "\n")
        return
    with writing(path):
        os.makedirs(workdir, exist_ok=True)
    with replacing(path) as file:
        file.write(text + "\n")


def begin_run(
    directory: str,
    source: Restored,
    model: ModelSpec,
    variables: dict,
    val_loss: float | None = None,
    **facts,
) -> None:
    """Writes a new run at step 0 whose weights are given: config, data facts, one checkpoint.

    Optimizer state is fresh (moments 0, step 0), so the schedule starts anew.

    Args:
      directory: workdir of the new run.
      source: the run whose config and data it has.
      model: the changed model.
      variables: its {"params", "routing"}.
      val_loss: what the best checkpoint is told by.
      **facts: JSON-like, kept in the `meta` of all its checkpoints.

    Raises:
      InputError: the directory cannot be written, or another process is writing there.
    """
    params, routing = (_arrays(variables.get(name, {})) for name in ("params", "routing"))
    optimizer = make_optimizer(optim_spec(source.config))
    state = TrainState(jnp.int32(0), params, routing, optimizer.init(params))
    config, data = stamped(source.meta["config"]), source.meta["data"]
    meta = {"config": config, "data": data, "model": spec_to_dict(model), **facts}
    with only_writer(directory):
        with Checkpoints(directory, source.config.train.keep) as checkpoints:
            checkpoints.save(state, meta, val_loss)
            checkpoints.wait()
        write_json(directory, "data.json", data)
        write_json(directory, "config.json", config)


def with_own_model(plan: Plan, checkpoints: Checkpoints) -> Plan:
    """The plan of a run, with the model that its checkpoints say where that is not the config's.

    How it is computed (`ffn.implementation`, `model.remat`, `model.unroll`) is still the config's.

    Raises:
      InputError: the model cannot be trained, or not by that implementation.
    """
    saved = own_model(checkpoints.meta()) if checkpoints.latest is not None else None
    if saved is None:
        return plan
    how = {name: getattr(plan.model, name) for name in ("implementation", "remat", "unroll")}
    model = dataclasses.replace(saved, **how)
    check_trainable(model, plan.optim)
    return plan._replace(model=model)


def kept_meta(checkpoints: Checkpoints) -> dict:
    """What later checkpoints of such a run have to say again: its model, and what it was made from."""
    meta = checkpoints.meta() if checkpoints.latest is not None else {}
    return {name: value for name, value in meta.items() if name not in ("config", "data", "step", "spent")}


def _arrays(tree):
    return jax.tree.map(jnp.asarray, tree)
