"""What the compiler says about a training step, of any size, before anything is allocated."""

import dataclasses
import importlib.util
import os
import time

import jax
import jax.numpy as jnp

from experiments.reporting import record
from tree_ffn.data.tokenizers import load_tokenizer
from tree_ffn.errors import InputError
from tree_ffn.models.cost import model_flops
from tree_ffn.models.from_config import model_spec_from_config
from tree_ffn.training import sharding
from tree_ffn.training.compiled import compile_programs
from tree_ffn.training.plan import Plan, check_trainable, optim_spec, resolved, train_spec

UNITS = {
    "argument_gb": "GB", "temporary_gb": "GB", "xla_tflop": "TFLOP", "step_tflop": "TFLOP", "compile_s": "s",
}  # fmt: skip


# libtpu, asked for a topology where there is no TPU: it looks for no cloud, and writes no log files.
ALONE = {"TPU_SKIP_MDS_QUERY": "1", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1", "TPU_LOG_DIR": "disabled"}


def devices_of(topology: str) -> list:
    """The TPU chips of a slice that need not be here, such as v5e:2x4 or v5p:2x2x2.

    Raises:
      InputError: libtpu is not installed, or knows no such topology.
    """
    from jax.experimental import topologies

    for name, value in ALONE.items():
        os.environ.setdefault(name, value)
    if importlib.util.find_spec("libtpu") is None:
        raise InputError("--topology: the compiler for TPUs is missing; pip install 'tree_ffn[tpu]'.")
    try:
        return topologies.get_topology_desc(topology, platform="tpu").devices
    except RuntimeError as error:
        raise InputError(
            f"--topology: {topology!r} is not known to libtpu; use a name such as v5e:2x4, v5p:2x2x2 or "
            "v6e:2x4."
        ) from error


def compile_step(config, devices: list | None = None) -> dict[str, float | str]:
    """Lowers and compiles the training step of a config; reads no text.

    Args:
      config: the run's config; its data section needs no text, only the tokenizer.
      devices: for which it is compiled, e.g. `devices_of` a topology; None: those at hand.

    Returns:
      device, what one is called; of one device: argument_gb (state and batch), temporary_gb (activations,
      gradients and what else the step needs beside), xla_tflop (XLA's count, in which the body of a loop,
      over layers or microbatches, counts once); of all devices: step_tflop (3 x forward of every token, by
      arithmetic, of active units only); devices, compile_s.

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
    mesh = sharding.make_mesh(config.mesh.data, config.mesh.model, devices)
    train.fit(mesh)
    # A plan without a corpus: compiling asks for none.
    programs = compile_programs(Plan(model, optim, train, None, mesh, config.seed))
    rows = sharding.batch_sharding(mesh)
    batch = jax.ShapeDtypeStruct((train.batch_size, model.max_seq_len + 1), jnp.int32, sharding=rows)
    usage = jax.eval_shape(programs.scorer.empty_usage)
    began = time.perf_counter()
    with jax.set_mesh(mesh):
        lowered = programs.train_step.lower(programs.abstract, usage, batch)
    compiled = _fitting(lowered)
    # The products with padding rows of the embedding are made too.
    padded = dataclasses.replace(model, vocab_size=model.vocab_rows)
    memory, cost = compiled.memory_analysis(), compiled.cost_analysis()
    assert memory is not None, "this backend reports no memory"
    return {
        "device": mesh.devices.flat[0].device_kind,
        "devices": mesh.size,
        "argument_gb": memory.argument_size_in_bytes / 1e9,
        "temporary_gb": memory.temp_size_in_bytes / 1e9,
        "xla_tflop": (cost or {}).get("flops", 0.0) / 1e12,
        "step_tflop": 3 * model_flops(padded) * train.batch_size * model.max_seq_len / 1e12,
        "compile_s": time.perf_counter() - began,
    }


def _fitting(lowered: jax.stages.Lowered) -> jax.stages.Compiled:
    try:
        return lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        said = str(error).splitlines()[0].removeprefix("RESOURCE_EXHAUSTED: ").rstrip(".")
        raise InputError(
            f"--compile: the step does not fit its devices ({said}); use more of them, more "
            "train.grad_accum_steps, or model.remat."
        ) from error


def page(figures: dict[str, float | str]) -> str:
    """The figures as text."""
    n, device = figures["devices"], figures["device"]
    return "\n".join((
        f"training step, compiled for {n:.0f} x {device} in {figures['compile_s']:.0f} s; nothing allocated",
        f"  arguments           {figures['argument_gb']:10.3f} GB a device: state and batch",
        f"  temporaries         {figures['temporary_gb']:10.3f} GB a device: activations, gradients, ...",
        f"  operations, by XLA  {figures['xla_tflop']:10.3f} TFLOP a device; the body of a loop counts once",
        f"  by arithmetic       {figures['step_tflop']:10.3f} TFLOP in all: active units, 3 x forward",
    ))  # fmt: skip


def record_step(path: str, figures: dict[str, float | str], *, table: str, row: str, config) -> None:
    """Appends the figures to a results file; the config says for how many devices."""
    known = resolved(config)
    known["data"] = {"tokenizer": load_tokenizer(config.data.tokenizer).name}
    known["devices"] = figures["devices"]
    kind = str(figures["device"])
    # The devices at hand are called as in all rows (`provenance.device_name`).
    device = None if kind == jax.devices()[0].device_kind else kind.lower().replace(" ", "_")
    for metric, unit in UNITS.items():
        record.append_result(
            path, table=table, row=row, metric=metric, value=figures[metric], unit=unit, seed=None,
            config=known, device=device,
        )  # fmt: skip
