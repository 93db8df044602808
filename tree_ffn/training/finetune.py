"""Fine-tuning of converted models: losses against a dense teacher, and layers that take over by degrees.

    loss = ce * nll + kl * KL(teacher || student) + ffn * mean over layers and rows of |y - d|^2 / |d|^2

nll and KL are means over the targets that count of a row, then over rows: a
question weighs the same whatever the length of its answer, and microbatches
change nothing. y is the output of a
feed-forward layer, d that of the teacher's dense layer for the same input, and

    y <- (1 - m) y + m d

is what the model goes on with; m is 0 at the end, and in every validation.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import NamedSharding, PartitionSpec

from tree_ffn.errors import InputError, check_choice, check_positive_int
from tree_ffn.models.dense import DenseSpec
from tree_ffn.models.layer_stacks import split_layers, stack_runs
from tree_ffn.models.spec import ModelSpec
from tree_ffn.models.transformer import Transformer, output_of, scores
from tree_ffn.training import optimizer, sharding
from tree_ffn.training.chunks import summed
from tree_ffn.training.compiled import Programs, Scorer, bound, compile_programs
from tree_ffn.training.losses import next_token_loss, row_mean, row_weights, token_losses
from tree_ffn.training.plan import Plan
from tree_ffn.training.sharding import path_name
from tree_ffn.training.step import TrainState, count_usage, tokens_of, train_step

TASKS, WEIGHTS, GRADUAL = ("lm", "qa"), ("all", "ffn"), ("none", "mix", "layers")


@dataclasses.dataclass(frozen=True)
class StartSpec:
    """What fine-tuning begins with.

    Attributes:
      start: directory of a run or of an export.
      step: of a run: best, latest or a number.
      teacher: the dense model, of a run or an export; `kl`, `ffn` and `gradual` need it.
      prompt_field: of `task=qa`: the field of JSON `data.files` that holds the prompt.
      answer_field: the same of the answer.
    """

    start: str = ""
    step: str = "best"
    teacher: str = ""
    prompt_field: str = "prompt"
    answer_field: str = "answer"


@dataclasses.dataclass(frozen=True)
class FinetuneSpec:
    """What is trained, and towards what.

    Attributes:
      task: `lm`, all tokens of text count; `qa`, those of answers.
      weights: which are trained: `all`, or those of the feed-forward layers, `ffn`.
      ce: weight of the cross-entropy.
      kl: weight of the divergence from the teacher's predictions.
      ffn: weight of the layers' distance from the teacher's dense layers.
      gradual: `mix`, the dense layers' share m falls from 1 to 0 in equal steps; `layers`, m of layer l
        of n is 1 before step l / n * gradual_steps and 0 from there on; `none`, m is 0.
      gradual_steps: of `mix` and `layers`: the step from which no dense layer is left.
    """

    task: str = "lm"
    weights: str = "all"
    ce: float = 1.0
    kl: float = 0.0
    ffn: float = 0.0
    gradual: str = "none"
    gradual_steps: int = 0

    def __post_init__(self):
        check_choice("finetune.task", self.task, TASKS)
        check_choice("finetune.weights", self.weights, WEIGHTS)
        check_choice("finetune.gradual", self.gradual, GRADUAL)
        check_positive_int("finetune.gradual_steps", self.gradual_steps, least=int(self.gradual != "none"))
        for field in ("ce", "kl", "ffn"):
            if not getattr(self, field) >= 0:
                raise InputError(
                    f"finetune.{field}: {getattr(self, field)!r} is not allowed; use a number of at least 0."
                )
        if not self.ce + self.kl + self.ffn > 0:
            raise InputError("finetune.ce: 0.0 is not allowed where kl and ffn are 0 too; there is no loss.")

    @property
    def beside(self) -> bool:
        """Whether the teacher's dense layers run beside the student's."""
        return self.ffn > 0 or self.gradual != "none"

    @property
    def teacher(self) -> bool:
        """Whether there has to be a teacher."""
        return self.kl > 0 or self.beside


def shares(spec: FinetuneSpec, step: jax.Array, n_layers: int) -> jax.Array:
    """m, the dense layer's share in the output of every layer at a step: float32 [layers].

    Args:
      spec: says how the dense layers go, and by which step.
      step: int32 scalar, finished steps.
      n_layers: how many layers the student has.

    Example:
      >>> spec = FinetuneSpec(gradual="layers", gradual_steps=100)
      >>> shares(spec, jnp.int32(60), 4).tolist()      # layers 0 to 2 are trees since steps 0, 25, 50
      [0.0, 0.0, 0.0, 1.0]
    """
    if spec.gradual == "none":
        return jnp.zeros(n_layers, jnp.float32)
    done = step.astype(jnp.float32) / spec.gradual_steps
    if spec.gradual == "mix":
        return jnp.full(n_layers, jnp.clip(1.0 - done, 0.0, 1.0))
    return (done < jnp.arange(n_layers, dtype=jnp.float32) / n_layers).astype(jnp.float32)


def read_rows(batch: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Tokens int32 [B, C + 1] of rows, and which targets count, bool [B, C]; of text, all do.

    Example:
      >>> tokens, counted = read_rows(jnp.array([[-5, -8, 7, 4]]))
      >>> tokens.tolist(), counted.tolist()
      ([[4, 7, 7, 4]], [[False, True, True]])
    """
    return jnp.where(batch < 0, -1 - batch, batch), batch[:, 1:] >= 0


def divergence(teacher_BCV: jax.Array, student_BCV: jax.Array) -> jax.Array:
    """KL(teacher || student) of every position, in nats: [B, C]. No gradient reaches the teacher."""
    t, s = jax.nn.log_softmax(jax.lax.stop_gradient(teacher_BCV)), jax.nn.log_softmax(student_BCV)
    return (jnp.exp(t) * (t - s)).sum(axis=-1)


def is_trained(path, spec: FinetuneSpec) -> bool:
    """Whether the leaf of `params` at a path of jax.tree_util is trained."""
    return spec.weights == "all" or "/ffn/" in path_name(path)


def finetune_loss(
    params, routing, rows, given: dict, step: jax.Array, *, model: ModelSpec, teacher: ModelSpec | None,
    spec: FinetuneSpec,
):  # fmt: skip
    """The loss in the head of this file of one batch, and (nll, infos).

    Args:
      params: of the student.
      routing: the same.
      rows: int32 [B, C + 1] of `read_rows`.
      given: {"teacher": its variables, if kl > 0; "beside": its dense layers by the student's runs, if
        `spec.beside`}.
      step: finished steps.
      model: what the student computes.
      teacher: what the teacher computes; None without one.
      spec: the losses.
    """
    tokens, counted_BC = read_rows(rows)
    held = lambda path, leaf: leaf if is_trained(path, spec) else jax.lax.stop_gradient(leaf)
    variables = {"params": jax.tree_util.tree_map_with_path(held, params), "routing": routing}
    if spec.beside:
        variables["beside"] = with_shares(given["beside"], shares(spec, step, model.n_layers), model)
    (x_BCE, infos), sown = Transformer(model).apply(variables, tokens[:, :-1], states=True, mutable=["gap"])
    head_RE, y_BCE = output_of(model, variables["params"], x_BCE)
    each, teacher_head_RE = {"targets": tokens[:, 1:], "weight": row_weights(counted_BC)}, None
    if spec.kl:
        assert teacher is not None
        teacher_BCE, _ = Transformer(teacher).apply(given["teacher"], tokens[:, :-1], states=True)
        teacher_head_RE, each["teacher"] = output_of(teacher, given["teacher"]["params"], teacher_BCE)
    of_scores = functools.partial(_loss_of_scores, model=model, teacher=teacher, spec=spec)
    loss, nll_BC = summed(of_scores, model, head_RE, y_BCE, each, teacher_head_RE)
    nll = row_mean(nll_BC, counted_BC)
    if spec.ffn:
        gaps = jax.tree.leaves(sown["gap"])
        loss += spec.ffn * sum(map(jnp.sum, gaps)) / model.n_layers
    return loss, (nll, infos)


def _loss_of_scores(student_BCR, each, teacher_head_RE, *, model, teacher, spec: FinetuneSpec):
    """What `chunks.summed` adds up: the losses of predictions, and the cross-entropies."""
    nll_BC = token_losses(student_BCR, each["targets"])
    loss_BC = spec.ce * nll_BC
    if spec.kl:
        teacher_BCR = scores(teacher, teacher_head_RE, each["teacher"])
        of_tokens = (leaf[..., : model.vocab_size] for leaf in (teacher_BCR, student_BCR))
        loss_BC += spec.kl * divergence(*of_tokens)
    return (loss_BC * each["weight"]).sum(), nll_BC


def with_shares(beside: dict, shares_L: jax.Array, model: ModelSpec) -> dict:
    """The dense layers with `share`, that of every layer of a run.

    Args:
      beside: the teacher's dense layers, {run_i: {"ffn": arrays [layers, ...]}}.
      shares_L: float32 [layers], of `shares`.
      model: the student: its runs say which layer is where.
    """
    new, first = {}, 0
    for i, (_, length) in enumerate(model.runs):
        new[f"run_{i}"] = {"ffn": {**beside[f"run_{i}"]["ffn"], "share": shares_L[first : first + length]}}
        first += length
    return new


def of_trained(
    optimizer: optax.GradientTransformationExtraArgs, spec: FinetuneSpec
) -> optax.GradientTransformationExtraArgs:
    """The optimizer without its updates of leaves that are not trained: they keep every bit."""

    def update(grads, state, params=None, **figures):
        updates, state = optimizer.update(grads, state, params, **figures)
        keep = lambda path, leaf: leaf if is_trained(path, spec) else -jnp.zeros_like(leaf)  # x + -0 is x
        return jax.tree_util.tree_map_with_path(keep, updates), state

    return optax.GradientTransformationExtraArgs(optimizer.init, update)


def finetune_step(
    state: TrainState, usage, rows, given: dict, *, model: ModelSpec, teacher: ModelSpec | None,
    spec: FinetuneSpec, optimizer: optax.GradientTransformation, **options,
):  # fmt: skip
    """`train_step` by `finetune_loss`, of the leaves that are trained.

    Args:
      state: before the step.
      usage: visit counts so far, as `step.empty_usage`.
      rows: int32 [B, C + 1] of `read_rows`.
      given: of the teacher, as `finetune_loss`.
      model: the student.
      teacher: what the teacher computes; None without one.
      spec: the losses, and which weights are trained.
      optimizer: of all weights.
      **options: of `train_step`.
    """

    def loss(params, rows):
        parts = {"model": model, "teacher": teacher, "spec": spec}
        return finetune_loss(params, state.routing, rows, given, state.step, **parts)

    trained = of_trained(optimizer, spec)
    return train_step(state, usage, rows, model=model, loss=loss, optimizer=trained, **options)


def score_step(variables: dict, usage, rows, n_rows: jax.Array | None = None, *, model: ModelSpec):
    """`step.eval_step` over the targets that count.

    Args:
      variables: {"params", "routing"} of the model.
      usage: visit counts so far.
      rows: int32 [B, C + 1] of `read_rows`.
      n_rows: int32 scalar, how many rows count, from the first; None: all.
      model: the model.
    """
    tokens, counted_BC = read_rows(rows)
    _, nll_BC, infos = next_token_loss(model, variables, tokens)
    nll, usage = row_mean(nll_BC, counted_BC, n_rows), count_usage(usage, infos, tokens_of(rows, n_rows))
    return nll, usage, tuple(info.leaf_TP for info in infos)


def check_teacher(student: ModelSpec, teacher: ModelSpec, spec: FinetuneSpec) -> None:
    """Raises InputError unless a model can teach another.

    Args:
      student: the model that is trained.
      teacher: the model it learns from.
      spec: says what it learns of the teacher.
    """
    same = ("vocab_size", "max_seq_len") + (("width", "n_layers") if spec.beside else ())
    for name in same:
        here, there = getattr(student, name), getattr(teacher, name)
        if here != there:
            raise InputError(
                f"finetune.teacher: its {name} is {there}, the student's {here}; use its dense model."
            )
    for layer, (ffn, own) in enumerate(zip(teacher.ffns, student.ffns)):
        if spec.beside and not (isinstance(ffn, DenseSpec) and ffn.activation == own.activation):
            raise InputError(
                f"finetune.teacher: layer {layer} is not a dense one with the student's activation; "
                "use the model that was converted."
            )


def given_by(student: ModelSpec, teacher: ModelSpec, variables: dict, spec: FinetuneSpec) -> dict:
    """What `finetune_loss` is given: the teacher's variables, its dense layers in the student's runs.

    Args:
      student: the model that is trained.
      teacher: the model it learns from.
      variables: {"params", "routing"} of the teacher.
      spec: says what of the teacher is needed.
    """
    variables = jax.tree.map(np.asarray, jax.device_get(variables))
    given = {"teacher": variables} if spec.kl else {}
    if spec.beside:
        layers = [layer["params"]["ffn"] for layer in split_layers(teacher, variables)]
        given["beside"] = {name: {"ffn": run} for name, run in stack_runs(student, layers).items()}
    return given


def compile_finetuning(
    plan: Plan, spec: FinetuneSpec, teacher: ModelSpec | None = None, variables: dict | None = None
) -> Programs:
    """`compile_programs` of a run of fine-tuning: its step has the teacher's arrays as one more argument.

    Args:
      plan: the run; its model is the student.
      spec: the losses.
      teacher: what the teacher computes, where `spec.teacher`.
      variables: its {"params", "routing"}.

    Raises:
      InputError: it cannot teach this student.
    """
    given = {}
    if spec.teacher:
        assert teacher is not None and variables is not None
        check_teacher(plan.model, teacher, spec)
        given = given_by(plan.model, teacher, variables, spec)
    given = jax.device_put(given, sharding.shardings_for(given, plan.mesh))
    plain = compile_programs(plan)  # compiles at first use: what is replaced costs nothing
    shardings = jax.tree.map(lambda leaf: leaf.sharding, plain.abstract)
    everywhere, rows = NamedSharding(plan.mesh, PartitionSpec()), sharding.batch_sharding(plan.mesh)
    compiled = jax.jit(
        bound(
            finetune_step,
            model=plan.model,
            teacher=teacher,
            spec=spec,
            optimizer=optimizer.make_optimizer(plan.optim),
            schedule=optimizer.learning_rate(plan.optim),
            accumulation=plan.train.grad_accum_steps,
            sync=plan.train.grad_sync,
        ),
        in_shardings=(shardings, everywhere, rows, jax.tree.map(lambda leaf: leaf.sharding, given)),
        out_shardings=(shardings, everywhere, everywhere),
        donate_argnums=(0, 1),
    )
    return plain._replace(
        train_step=lambda state, usage, batch: compiled(state, usage, batch, given),
        late=None,
        scorer=Scorer(plan.model, plan.mesh, score_step),
        probe=plain.probe if spec.task == "lm" else None,
    )
