"""What the compiler says about a training step, of any size, before anything is allocated."""

import dataclasses
import time

import jax
import jax.numpy as jnp

from experiments.reporting import record
from tree_ffn.data.tokenizers import load_tokenizer
from tree_ffn.models.cost import model_flops
from tree_ffn.models.from_config import model_spec_from_config
from tree_ffn.training import sharding
from tree_ffn.training.compiled import compile_programs
from tree_ffn.training.plan import Plan, check_trainable, optim_spec, resolved, train_spec

UNITS = {
    "argument_gb": "GB", "temporary_gb": "GB", "xla_tflop": "TFLOP", "step_tflop": "TFLOP", "compile_s": "s",
}  # fmt: skip


def compile_step(config) -> dict[str, float]:
    """Lowers and compiles the training step of a config for the devices at hand; reads no text.

    Args:
      config: the run's config; its data section needs no text, only the tokenizer.

    Returns:
      of one device: argument_gb (state and batch), temporary_gb (activations, gradients and what else
      the step needs beside), xla_tflop (XLA's count, in which the body of a loop, over layers or
      microbatches, counts once); of all devices: step_tflop (3 x forward of every token, by arithmetic,
      of active units only); devices, compile_s.

    Raises:
      InputError: a value of the config, or the mesh, is not allowed.

    Example:
      >>> from configs.smoke import get_config                        # doctest: +SKIP
      >>> compile_step(get_config())["devices"]                       # doctest: +SKIP
      1
    """
    model = model_spec_from_config(config, load_tokenizer(config.data.tokenizer).vocab_size)
    train, optim = train_spec(config), optim_spec(config)
    check_trainable(model)
    mesh = sharding.make_mesh(config.mesh.data, config.mesh.model)
    train.fit(mesh)
    # A plan without a corpus: compiling asks for none.
    programs = compile_programs(Plan(model, optim, train, None, mesh, config.seed))
    rows = sharding.batch_sharding(mesh)
    batch = jax.ShapeDtypeStruct((train.batch_size, model.max_seq_len + 1), jnp.int32, sharding=rows)
    usage = jax.eval_shape(programs.scorer.empty_usage)
    began = time.perf_counter()
    with jax.set_mesh(mesh):
        compiled = programs.train_step.lower(programs.abstract, usage, batch).compile()
    # The products with padding rows of the embedding are made too.
    padded = dataclasses.replace(model, vocab_size=model.vocab_rows)
    memory, cost = compiled.memory_analysis(), compiled.cost_analysis()
    assert memory is not None, "this backend reports no memory"
    return {
        "devices": float(mesh.size),
        "argument_gb": memory.argument_size_in_bytes / 1e9,
        "temporary_gb": memory.temp_size_in_bytes / 1e9,
        "xla_tflop": (cost or {}).get("flops", 0.0) / 1e12,
        "step_tflop": 3 * model_flops(padded) * train.batch_size * model.max_seq_len / 1e12,
        "compile_s": time.perf_counter() - began,
    }


def page(figures: dict[str, float]) -> str:
    """The figures as text."""
    n, device = figures["devices"], jax.devices()[0].device_kind
    return "\n".join((
        f"training step, compiled for {n:.0f} x {device} in {figures['compile_s']:.0f} s; nothing allocated",
        f"  arguments           {figures['argument_gb']:10.3f} GB a device: state and batch",
        f"  temporaries         {figures['temporary_gb']:10.3f} GB a device: activations, gradients, ...",
        f"  operations, by XLA  {figures['xla_tflop']:10.3f} TFLOP a device; the body of a loop counts once",
        f"  by arithmetic       {figures['step_tflop']:10.3f} TFLOP in all: active units, 3 x forward",
    ))  # fmt: skip


def record_step(path: str, figures: dict[str, float], *, table: str, row: str, config) -> None:
    """Appends the figures to a results file; the config says for how many devices."""
    known = resolved(config)
    known["data"] = {"tokenizer": load_tokenizer(config.data.tokenizer).name}
    known["devices"] = int(figures["devices"])
    for metric, unit in UNITS.items():
        record.append_result(
            path, table=table, row=row, metric=metric, value=figures[metric], unit=unit, seed=None,
            config=known,
        )  # fmt: skip
