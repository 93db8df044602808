"""AdamW with a warm-up, a schedule, clipping, and weight decay by parameter name."""

import dataclasses
import functools
import math
import re
from typing import Any

import jax
import jax.numpy as jnp
import optax

from tree_ffn.errors import InputError, check_choice, check_positive_int
from tree_ffn.training.guards import skipping, with_master

SCHEDULES = ("cosine", "wsd", "constant")

# Which parameters decay, by name; the first row that matches a path decides,
# and a path that no row matches is an error. As in GPT-2's training, every
# matrix decays, embeddings, heads and positions too; biases and norms do not.
# Thresholds are not parameters and never come here.
DECAY_RULES: tuple[tuple[str, bool], ...] = (
    (r"(^|/)(bias|scale|b_(in|out|qkv|router))$", False),
    (r"(^|/)(tokens|head|positions|w_(in|out|qkv|router))$", True),
)


@dataclasses.dataclass(frozen=True)
class OptimSpec:
    """How weights are updated.

    Attributes:
      steps: length of the run, in optimizer steps; the schedule ends there.
      lr: highest learning rate.
      schedule: after the warm-up: `cosine` to the final rate; `wsd`, constant
        and then linear to the final rate; or `constant`.
      warmup_steps: how many steps the rate rises from 0, linearly.
      warmup_share: share of `steps` that are those where `warmup_steps` is left open.
      final_share: final rate / lr, of `cosine` and `wsd`.
      decay_share: share of `steps` that the decay of `wsd` takes.
      b1, b2, eps: of Adam.
      weight_decay: decoupled decay, multiplied by the learning rate.
      clip_norm: largest global norm of the gradient; 0 does not clip.
      skip_above: a step is left out whose loss or gradient norm is not finite, or so many standard deviations
        above the mean of the last 128 (6, say); 0: all are made, and one that is not finite ends the run.
      skip_at_most: so many left out in a row end the run.
      master_weights: the optimizer keeps weights in float32; those of `model.param_dtype` are these, rounded.
    """

    steps: int
    lr: float = 1e-3
    schedule: str = "cosine"
    warmup_steps: int | None = None
    warmup_share: float = 0.1
    final_share: float = 0.1
    decay_share: float = 0.2
    b1: float = 0.9
    b2: float = 0.95
    eps: float = 1e-8
    weight_decay: float = 0.1
    clip_norm: float = 1.0
    skip_above: float = 0.0
    skip_at_most: int = 10
    master_weights: bool = False

    def __post_init__(self):
        check_positive_int("train.steps", self.steps)
        check_choice("optim.schedule", self.schedule, SCHEDULES)
        if not 0 <= self.warmup_share <= 1:
            raise InputError(
                f"optim.warmup_share: {self.warmup_share!r} is not allowed; use a number from 0 to 1."
            )
        check_positive_int("optim.warmup_steps", self.warmup, least=0)
        check_positive_int("optim.skip_at_most", self.skip_at_most)
        if self.warmup > self.steps:
            raise InputError(
                f"optim.warmup_steps: {self.warmup} is not allowed; use at most train.steps = {self.steps}."
            )
        for field, good, rule in (
            ("lr", 0 < self.lr < math.inf, "a number above 0"),
            ("eps", self.eps > 0, "a number above 0"),
            ("b1", 0 <= self.b1 < 1, "a number of at least 0 and below 1"),
            ("b2", 0 <= self.b2 < 1, "a number of at least 0 and below 1"),
            ("final_share", 0 <= self.final_share <= 1, "a number from 0 to 1"),
            ("decay_share", 0 <= self.decay_share <= 1, "a number from 0 to 1"),
            ("weight_decay", self.weight_decay >= 0, "a number of at least 0"),
            ("skip_above", 0 <= self.skip_above < math.inf, "a number of at least 0 (0 skips nothing)"),
            ("clip_norm", self.clip_norm >= 0, "a number of at least 0 (0 does not clip)"),
        ):
            if not good:
                raise InputError(f"optim.{field}: {getattr(self, field)!r} is not allowed; use {rule}.")

    @property
    def warmup(self) -> int:
        """Steps of the warm-up."""
        return warmup_of(self.steps, self.warmup_share) if self.warmup_steps is None else self.warmup_steps


def warmup_of(steps: int, share: float) -> int:
    """Steps of the warm-up: a share of all, rounded down.

    Example:
      >>> warmup_of(50, 0.1), warmup_of(1, 0.1)
      (5, 0)
    """
    return math.floor(share * steps)


def with_warmup(config: dict[str, Any]) -> dict[str, Any]:
    """A config as plain values that says how many steps its warm-up takes."""
    optim, train = config.get("optim"), config.get("train")
    if not (isinstance(optim, dict) and isinstance(train, dict)) or optim.get("warmup_steps", 0) is not None:
        return config
    check_positive_int("train.steps", train["steps"])
    return {**config, "optim": {**optim, "warmup_steps": warmup_of(train["steps"], optim["warmup_share"])}}


@functools.cache
def learning_rate(spec: OptimSpec) -> optax.Schedule:
    """Learning rate as a function of the number of finished steps.

    With i finished steps, w = warmup, n = steps and f = final_share:

        i < w                lr (i + 1) / w
        cosine               lr (f + (1 - f) (1 + cos(pi (i - w) / (n - w))) / 2)
        wsd, last d steps    lr (f + (1 - f) (n - i) / d),  d = decay_share n
        otherwise            lr

    Where wsd's last d steps begin within the warm-up, both shares are taken.

    Source: cosine, Loshchilov & Hutter 2017 (arXiv 1608.03983); wsd, Hu et al.
    2024, MiniCPM (arXiv 2404.06395), with a linear end.
    """
    decay_steps = max(spec.decay_share * spec.steps, 1.0)
    cosine = optax.cosine_decay_schedule(1.0, max(spec.steps - spec.warmup, 1), spec.final_share)
    share = {
        "cosine": optax.join_schedules([optax.constant_schedule(1.0), cosine], [spec.warmup]),
        "wsd": optax.linear_schedule(1.0, spec.final_share, decay_steps, spec.steps - decay_steps),
        "constant": optax.constant_schedule(1.0),
    }[spec.schedule]
    first = max(spec.warmup, 1)
    rise = optax.linear_schedule(1.0 / first, 1.0, max(first - 1, 1))
    return lambda count: spec.lr * rise(jnp.float32(count)) * share(jnp.float32(count))


def decay_mask(params) -> dict:
    """Tree of booleans like `params`: True where `DECAY_RULES` says that a leaf decays.

    Raises:
      KeyError: no rule matches a leaf; name it in `DECAY_RULES`.

    Example:
      >>> decay_mask({"ffn": {"w_in": 0.0, "b_in": 0.0}})
      {'ffn': {'b_in': False, 'w_in': True}}
    """

    def decays(path, _):
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        for pattern, decay in DECAY_RULES:
            if re.search(pattern, name):
                return decay
        raise KeyError(f"no rule of DECAY_RULES matches the parameter {name}")

    return jax.tree_util.tree_map_with_path(decays, params)


@functools.cache
def make_optimizer(spec: OptimSpec) -> optax.GradientTransformationExtraArgs:
    """Clipping, Adam, decoupled decay by name, and the learning rate, in this order; and the spec's `guards`.

    Its `update` takes `loss`, by which steps are skipped.

    Source: AdamW, Loshchilov & Hutter 2019 (arXiv 1711.05101).
    """
    made = optax.chain(
        optax.clip_by_global_norm(spec.clip_norm) if spec.clip_norm else optax.identity(),
        optax.scale_by_adam(b1=spec.b1, b2=spec.b2, eps=spec.eps),
        optax.add_decayed_weights(spec.weight_decay, mask=decay_mask),
        optax.scale_by_learning_rate(learning_rate(spec)),
    )
    made = with_master(made) if spec.master_weights else made
    made = skipping(made, spec.skip_above) if spec.skip_above else made
    return optax.with_extra_args_support(made)
