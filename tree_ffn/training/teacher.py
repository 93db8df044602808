"""What fine-tuning has from a teacher, and the programs that are given it."""

import functools

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from tree_ffn.errors import InputError
from tree_ffn.models.dense import DenseSpec
from tree_ffn.models.layer_stacks import split_layers, stack_runs
from tree_ffn.models.spec import ModelSpec
from tree_ffn.training import optimizer, sharding
from tree_ffn.training.compiled import Programs, Scorer, compile_programs
from tree_ffn.training.finetune import FinetuneSpec, finetune_step, score_step
from tree_ffn.training.plan import Plan


def check_teacher(student: ModelSpec, teacher: ModelSpec, spec: FinetuneSpec) -> None:
    """Raises InputError unless a model can teach another."""
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
    """What `finetune_loss` is given: the teacher's variables, its dense layers in the student's runs."""
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
      teacher, variables: the teacher, where `spec.teacher`.

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
        functools.partial(
            finetune_step,
            model=plan.model,
            teacher=teacher,
            spec=spec,
            optimizer=optimizer.make_optimizer(plan.optim),
            schedule=optimizer.learning_rate(plan.optim),
            accumulation=plan.train.grad_accum_steps,
        ),
        in_shardings=(shardings, everywhere, rows, jax.tree.map(lambda leaf: leaf.sharding, given)),
        out_shardings=(shardings, everywhere, everywhere),
        donate_argnums=(0, 1),
    )
    return plain._replace(
        train_step=lambda state, usage, batch: compiled(state, usage, batch, given),
        scorer=Scorer(plan.model, plan.mesh, score_step),
        probe=plain.probe if spec.task == "lm" else None,
    )
