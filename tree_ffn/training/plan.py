"""From a config to everything that a run needs, checked before any device work."""

import dataclasses
from typing import Any, NamedTuple

from jax.sharding import Mesh

from tree_ffn.data import CorpusSpec, PreparedCorpus, corpus_spec_from_config, load_tokenizer, prepare
from tree_ffn.data.spec import with_corpus
from tree_ffn.errors import InputError, check_choice, check_number, check_positive_int
from tree_ffn.models.from_config import keys_in_force, model_spec_from_config, with_sizes
from tree_ffn.models.spec import ModelSpec
from tree_ffn.paths import local_or_bucket
from tree_ffn.plain import Namespace, flat, namespace, plain
from tree_ffn.training import optimizer, sharding
from tree_ffn.training.extras import TRACED
from tree_ffn.training.gradients import SYNCS
from tree_ffn.training.optimizer import with_warmup
from tree_ffn.tree import PrunedSpec, TreeSpec
from tree_ffn.upgrades import is_gone

# So often, a text teaches nearly what as much new text would (Muennighoff et al. 2023, arXiv 2305.16264).
MANY_PASSES = 4


@dataclasses.dataclass(frozen=True)
class TrainSpec:
    """How long a run is and how often it does what; all counts are optimizer steps.

    Attributes:
      batch_size: rows a step, over all devices and microbatches.
      steps: how many optimizer steps the run has.
      grad_accum_steps: microbatches a step.
      grad_sync: how often devices along `mesh.data` exchange weights and gradients where a step has several
        microbatches: once a `step`, for which each holds the whole model's weights, a gradient and sums, 8
        bytes a parameter in bfloat16; or in each `microbatch`, layer by layer.
      log_every: steps between lines of metrics.
      eval_every: steps between validations; 0: with checkpoints only.
      eval_batches: batches of a validation; 0: the whole split.
      checkpoint_every: steps between checkpoints, each with a validation, so that `best` is known; 0: at
        the end only.
      checkpoint_minutes: after so many minutes without a checkpoint one more is saved, without a validation;
        0: by steps alone.
      probe: at validations of trees also measure gradients by node and units that work.
      keep: latest checkpoints kept, beside the best.
      keep_every: checkpoints of every so many steps are kept for good, too; a multiple of
        `checkpoint_every`. 0: none.
      max_hours: after so many hours the run saves and stops, unfinished, as SIGTERM stops it: less than a
        queue's limit. 0: it goes on to its end.
      profile_at: after so many steps the next 3 are traced by jax.profiler, into `profile/` of the workdir;
        0: none.
      wandb: the project of Weights & Biases to which metrics go, too; none: they do not.
      compile_cache: directory where compiled programs are kept for the next start; none: as
        JAX_COMPILATION_CACHE_DIR says.
    """

    batch_size: int = 32
    steps: int = 1000
    grad_accum_steps: int = 1
    grad_sync: str = "step"
    log_every: int = 20
    eval_every: int = 200
    eval_batches: int = 20
    checkpoint_every: int = 200
    checkpoint_minutes: float = 0.0
    probe: bool = True
    keep: int = 2
    keep_every: int = 0
    max_hours: float = 0.0
    profile_at: int = 0
    wandb: str = ""
    compile_cache: str = ""

    def __post_init__(self):
        for field in ("batch_size", "steps", "grad_accum_steps", "log_every", "keep"):
            check_positive_int(f"train.{field}", getattr(self, field))
        for field in ("eval_every", "eval_batches", "checkpoint_every", "keep_every", "profile_at"):
            check_positive_int(f"train.{field}", getattr(self, field), least=0)
        for field in ("checkpoint_minutes", "max_hours"):
            check_number(f"train.{field}", getattr(self, field), least=0)
        if self.profile_at and self.profile_at + TRACED > self.steps:
            raise InputError(
                f"train.profile_at: {self.profile_at} is not allowed; "
                f"use at most train.steps - {TRACED} = {self.steps - TRACED}, or 0."
            )
        if self.keep_every and self.keep_every % (self.checkpoint_every or self.keep_every + 1):
            raise InputError(
                f"train.keep_every: {self.keep_every} is not allowed; "
                f"use a multiple of train.checkpoint_every = {self.checkpoint_every}, or 0."
            )
        check_choice("train.grad_sync", self.grad_sync, SYNCS)
        object.__setattr__(self, "compile_cache", local_or_bucket(self.compile_cache, "train.compile_cache"))
        if self.batch_size % self.grad_accum_steps:
            raise InputError(
                f"train.batch_size: {self.batch_size} is not allowed; "
                f"use a multiple of train.grad_accum_steps = {self.grad_accum_steps}."
            )

    @property
    def microbatch(self) -> int:
        """Rows that are on the devices at a time, in training and in validation."""
        return self.batch_size // self.grad_accum_steps

    def passes(self, n_rows: int) -> float:
        """How often the run reads each of the training text's rows."""
        return self.steps * self.batch_size / n_rows

    def fit(self, mesh: Mesh) -> None:
        """Raises InputError unless every device along "data" gets equally many rows."""
        data = mesh.shape["data"]
        if self.microbatch % data:
            raise InputError(
                f"train.batch_size: {self.batch_size} is not allowed; a microbatch of {self.microbatch} rows "
                f"does not split over {data} devices (mesh.data)."
            )


def many_passes(passes: float, when: str = "will be") -> str | None:
    """One line on a text that is read more than `MANY_PASSES` times; None for fewer.

    Example:
      >>> many_passes(236.21)
      'the training text will be read 236.2 times: beyond 4 times, other text teaches more'
    """
    if passes <= MANY_PASSES:
        return None
    more = f"beyond {MANY_PASSES} times, other text teaches more"
    return f"the training text {when} read {passes:.1f} times: {more}"


def _fields(spec_class, section) -> dict[str, Any]:
    """The fields of a frozen spec that a config section has, as plain values."""
    names = [field.name for field in dataclasses.fields(spec_class)]
    return {name: getattr(section, name) for name in names if hasattr(section, name)}


def optim_spec(config) -> optimizer.OptimSpec:
    """OptimSpec of `config.optim` and `config.train.steps`."""
    return optimizer.OptimSpec(steps=config.train.steps, **_fields(optimizer.OptimSpec, config.optim))


def train_spec(config) -> TrainSpec:
    """TrainSpec of `config.train`."""
    return TrainSpec(**_fields(TrainSpec, config.train))


class Plan(NamedTuple):
    """A run, checked but not started."""

    model: ModelSpec
    optim: optimizer.OptimSpec
    train: TrainSpec
    corpus: CorpusSpec
    mesh: Mesh
    seed: int


def plan_run(config) -> Plan:
    """Everything of a config as frozen specs; no text is read.

    Raises:
      InputError: names the field, its value and what is allowed.
    """
    vocab_size = load_tokenizer(config.data.tokenizer).vocab_size
    train = train_spec(config)
    check_positive_int("seed", config.seed, least=0)
    model = model_spec_from_config(config, vocab_size)
    optim = optim_spec(config)
    check_trainable(model, optim)
    mesh = sharding.make_mesh(config.mesh.data, config.mesh.model)
    train.fit(mesh)
    return Plan(model, optim, train, corpus_spec_from_config(config), mesh, config.seed)


def check_trainable(model: ModelSpec, optim: optimizer.OptimSpec | None = None) -> None:
    """Raises InputError where a model can be applied, but not trained.

    Its implementation cannot differentiate a layer, or its weights are too coarse: in bfloat16 a norm's scale
    of 1 stays 1 at any update below 2^-8, and Adam's second moment comes to a halt, unless `optim` keeps
    weights of its own.
    """
    kept = optim is not None and optim.master_weights and model.param_dtype == "bfloat16"
    if model.param_dtype != "float32" and not kept:
        raise InputError(
            f"model.param_dtype: {model.param_dtype!r} is not allowed in training, where most updates of "
            "such weights would be lost; use 'float32' (model.dtype='bfloat16' still computes in bfloat16), "
            "or 'bfloat16' with optim.master_weights=True."
        )
    for layer, ffn in enumerate(model.ffns):
        if isinstance(ffn, PrunedSpec) and ffn.routing == "straight_through":
            raise InputError(
                f"model: layer {layer} is pruned and cannot be trained with ffn.routing='straight_through', "
                "whose gradient needs the units that are gone; train before pruning."
            )
    straight = any(isinstance(ffn, TreeSpec) and ffn.routing == "straight_through" for ffn in model.ffns)
    if straight and model.implementation not in (None, "masked"):
        raise InputError(
            f"ffn.implementation: {model.implementation!r} cannot train ffn.routing='straight_through'; "
            "use 'masked' or 'auto'."
        )


def prepare_data(config, model: ModelSpec, log=print) -> PreparedCorpus:
    """The corpus of `config.data`, cut into rows for `model`.

    Args:
      config: of a run; its section `data` is read.
      model: its context is the length of rows.
      log: takes lines on what is going on.
    """
    return prepare(corpus_spec_from_config(config), row_tokens=model.max_seq_len + 1, log=log)


def resolved(config) -> Any:
    """A config (ConfigDict, dict or Namespace) as plain JSON values; what follows other values has its own.

    This is what runs record.

    Example:
      >>> resolved({"train": {"steps": 50}, "optim": {"warmup_steps": None, "warmup_share": 0.1}})["optim"]
      {'warmup_steps': 5, 'warmup_share': 0.1}
    """
    return with_warmup(with_corpus(with_sizes(plain(config))))


def settled(config) -> Namespace:
    """`resolved`, with attributes: what a run computes with."""
    return namespace(resolved(config))


def _in_force(config: dict) -> dict:
    """A recorded config without the keys that nothing reads: with the others equal, runs are equal."""
    ffn, model, optim = (config.get(name) for name in ("ffn", "model", "optim"))
    if isinstance(optim, dict) and "warmup_steps" in optim:
        config = {**config, "optim": {name: optim[name] for name in optim if name != "warmup_share"}}
    if not (isinstance(ffn, dict) and "kind" in ffn) or is_gone(ffn):
        return config
    layers = model.get("layers", "") if isinstance(model, dict) else ""
    return {**config, "ffn": keys_in_force(ffn, str(layers))}


def differing_keys(old: dict, new: dict) -> dict[str, tuple]:
    """{key: (old value, new value)} of two recorded configs; a missing value is None.

    Keys that nothing reads do not count.
    """
    old, new = flat(_in_force(old)), flat(_in_force(new))
    keys = sorted(old.keys() | new.keys())
    return {key: (old.get(key), new.get(key)) for key in keys if old.get(key) != new.get(key)}
