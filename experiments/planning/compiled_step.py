"""What the compiler says of a training step, of any size, before anything is allocated."""

import dataclasses
import importlib.util
import os
import time
from typing import Any

import jax
import jax.numpy as jnp

from experiments.planning.chips import chip_of
from experiments.reporting import record
from tree_ffn.data.tokenizers import load_tokenizer
from tree_ffn.errors import InputError
from tree_ffn.models.cost import dense_counterpart, model_flops
from tree_ffn.models.from_config import model_spec_from_config
from tree_ffn.training import hlo, sharding
from tree_ffn.training.compiled import compile_programs
from tree_ffn.training.plan import Plan, check_trainable, optim_spec, resolved, train_spec

UNITS = {
    "argument_gb": "GB", "temporary_gb": "GB", "peak_gb": "GB", "sent_gb": "GB", "step_tflop": "TFLOP",
    "executed_tflop": "TFLOP", "compute_s": "s", "network_s": "s", "compiler_s": "s", "step_s": "s",
    "days": "days", "chip_hours": "h", "compile_s": "s",
}  # fmt: skip
REACHED = 0.5  # of a chip's peak by its products, and of its links: an assumption
PASSES = {"none": 3, "dots": 3, "full": 4}  # forward passes' worth of a step's products, by model.remat


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


class DoesNotFit(InputError):
    """The step needs more memory than its devices have."""


def compile_step(config, devices: list | None = None) -> dict[str, Any]:
    """Lowers and compiles the training step of a config; reads no text.

    Args:
      config: the run's config; its data section needs no text, only the tokenizer.
      devices: for which it is compiled, e.g. `devices_of` a topology; None: those at hand.

    Returns:
      device, what one is called; devices, how many; mesh, remat and grad_accum_steps as they were compiled;
      of one device: argument_gb (state and batch), temporary_gb (activations, gradients and what else the
      step needs beside), peak_gb, sent_gb and sent (`hlo.Collective`s); of all devices: step_tflop (3 x
      forward of every token, of active units only) and executed_tflop (of all units, and what is computed
      again), by arithmetic; compile_s. Where the chip is known (`chips`) the times of `reckoned` too.

    Raises:
      DoesNotFit: by the compiler's own word.
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
    tokens, memory, text = (
        train.batch_size * model.max_seq_len,
        compiled.memory_analysis(),
        compiled.as_text(),
    )
    assert memory is not None and text is not None, "this backend tells nothing of its programs"
    tokens, program = train.batch_size * model.max_seq_len, hlo.read(text)
    sent = hlo.collectives(program, dict(mesh.shape))
    figures = {
        "device": mesh.devices.flat[0].device_kind,
        "devices": mesh.size,
        "mesh": dict(mesh.shape),
        "remat": model.remat,
        "grad_accum_steps": train.grad_accum_steps,
        "argument_gb": memory.argument_size_in_bytes / 1e9,
        "temporary_gb": memory.temp_size_in_bytes / 1e9,
        "peak_gb": getattr(memory, "peak_memory_in_bytes", 0) / 1e9,
        "sent": sent,
        "sent_gb": sum(one.sent for one in sent) / 1e9,
        "step_tflop": 3 * model_flops(padded) * tokens / 1e12,
        "executed_tflop": PASSES[model.remat] * model_flops(dense_counterpart(padded)) * tokens / 1e12,
        "compile_s": time.perf_counter() - began,
    }
    return figures | reckoned(figures, tokens, train.steps, hlo.cycles(program))


def reckoned(figures: dict, tokens: int, steps: int, cycles: float) -> dict[str, float]:
    """Times by arithmetic, at `REACHED` of the chip's peaks: compute_s, network_s, step_s, days, chip_hours.

    A step takes the longer of the two, if all that is sent can be sent meanwhile. compiler_s is the TPU
    compiler's own estimate of what it fused, without collectives and Pallas kernels.

    Args:
      figures: of `compile_step`.
      tokens: of a step.
      steps: of the training.
      cycles: `hlo.cycles`.
    """
    chip = chip_of(figures["device"])
    if chip is None:
        return {}
    compute = figures["executed_tflop"] / figures["devices"] / (REACHED * chip.tflops)
    network = figures["sent_gb"] / (REACHED * chip.sends_gb)
    step = max(compute, network)
    found = {"compute_s": compute, "network_s": network, "step_s": step, "tokens_per_s": tokens / step}
    if chip.clock_ghz and cycles:
        found["compiler_s"] = cycles / chip.clock_ghz / 1e9
    days = steps * step / 86400
    return found | {"days": days, "chip_hours": 24 * days * figures["devices"]}


def _fitting(lowered: jax.stages.Lowered) -> jax.stages.Compiled:
    try:
        return lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        said = str(error).splitlines()[0].removeprefix("RESOURCE_EXHAUSTED: ").rstrip(".")
        raise DoesNotFit(
            f"the step does not fit its devices ({said}); use more of them, more train.grad_accum_steps, or "
            "model.remat."
        ) from error


def page(figures: dict[str, Any]) -> str:
    """The figures as text."""
    mesh = ", ".join(f"{axis} {size}" for axis, size in figures["mesh"].items())
    lines = [
        f"training step for {figures['devices']} x {figures['device']} ({mesh}; remat {figures['remat']}; "
        f"{figures['grad_accum_steps']} microbatches), compiled in {figures['compile_s']:.0f} s",
        f"  state and batch     {figures['argument_gb']:10.3f} GB a device",
        f"  temporaries         {figures['temporary_gb']:10.3f} GB a device: activations, gradients, ...",
        f"  useful operations   {figures['step_tflop']:10.3f} TFLOP in all: active units, 3 x forward",
        f"  executed            {figures['executed_tflop']:10.3f} TFLOP: all units, and what is repeated",
        f"  sent                {figures['sent_gb']:10.3f} GB a device",
        *(
            f"    {kind:<18}{times:>6} times {size / 1e9:10.3f} GB along {' and '.join(axes) or 'no axis'}"
            for (kind, axes), (times, size) in by_kind(figures["sent"]).items()
        ),
    ]
    if "step_s" in figures:
        own = f", {figures['compiler_s']:.3f} s by its compiler" if "compiler_s" in figures else ""
        run = f"{figures['days']:.1f} days, {figures['chip_hours']:,.0f} chip-hours"
        lines += [
            f"  computing           {figures['compute_s']:10.3f} s at {REACHED:.0%} of the peak{own}",
            f"  sending             {figures['network_s']:10.3f} s at {REACHED:.0%} of the links",
            f"  a step, overlapped  {figures['step_s']:10.3f} s, {figures['tokens_per_s']:,.0f} tokens/s",
            f"  the whole run       {run}",
        ]
    return "\n".join(lines)


def by_kind(sent: list[hlo.Collective]) -> dict[tuple, tuple[int, int]]:
    """{(kind, axes): (how often, bytes sent by a device)}, most bytes first."""
    found: dict[tuple, tuple[int, int]] = {}
    for one in sent:
        times, size = found.get((one.kind, one.axes), (0, 0))
        found[one.kind, one.axes] = times + one.times, size + one.sent
    return dict(sorted(found.items(), key=lambda item: -item[1][1]))


def record_step(path: str, figures: dict[str, Any], *, table: str, row: str, config) -> None:
    """Appends the figures to a results file; the config says for how many devices."""
    known = resolved(config)
    known["data"] = {"tokenizer": load_tokenizer(config.data.tokenizer).name}
    known["devices"] = figures["devices"]
    kind = str(figures["device"])
    # The devices at hand are called as in all rows (`provenance.device_name`).
    device = None if kind == jax.devices()[0].device_kind else kind.lower().replace(" ", "_")
    for metric, unit in UNITS.items():
        if metric in figures:
            record.append_result(
                path, table=table, row=row, metric=metric, value=figures[metric], unit=unit, seed=None,
                config=known, device=device,
            )  # fmt: skip
