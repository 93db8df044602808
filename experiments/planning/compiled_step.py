"""What the compiler says of a training step, of any size, before anything is allocated."""

import dataclasses
import math
import time
from typing import Any

import jax
import jax.numpy as jnp

from experiments.planning.chips import chip_of
from tree_ffn.data.tokenizers import load_tokenizer
from tree_ffn.errors import InputError
from tree_ffn.models.cost import dense_counterpart, model_flops
from tree_ffn.models.from_config import model_spec_from_config
from tree_ffn.training import hlo, sharding
from tree_ffn.training.compiled import compile_programs
from tree_ffn.training.plan import Plan, check_trainable, optim_spec, train_spec

REACHED = 0.5  # of a chip's peak by its products, and of its links: an assumption
PASSES = {"none": 3, "dots": 3, "full": 4}  # forward passes' worth of a step's products, by model.remat

INSTEAD = "use more of them, more train.grad_accum_steps, model.remat, or train.grad_sync=microbatch."


class DoesNotFit(InputError):
    """The step needs more memory than its devices have."""


def compile_step(config, devices: list | None = None) -> dict[str, Any]:
    """Lowers and compiles the training step of a config; reads no text.

    Args:
      config: the run's config; its data section needs no text, only the tokenizer.
      devices: for which it is compiled, e.g. `devices_of` a slice; None: those at hand.

    Returns:
      device, what one is called; devices, how many; mesh, remat, grad_accum_steps and grad_sync as they were
      compiled;
      tokens of a step; of one device: weights_gb, moments_gb, argument_gb (both, counts and the batch),
      temporary_gb (activations, gradients and what else the step needs beside), peak_gb, sent_gb and sent
      (`hlo.Collective`s), compiler_cycles; of all devices: step_tflop (3 x forward of every token, of active
      units only) and executed_tflop (of all units, and what is computed again), by arithmetic; compile_s, of
      a processor. Where the chip is known (`chips`) the times of `reckoned` too.

    Raises:
      DoesNotFit: by the compiler's own word; of a GPU, by its size.
      InputError: a value of the config, or the mesh, is not allowed.

    Example:
      >>> from configs.smoke import get_config                        # doctest: +SKIP
      >>> compile_step(get_config())["devices"]                       # doctest: +SKIP
      1
    """
    model = model_spec_from_config(config, load_tokenizer(config.data.tokenizer).vocab_size)
    train, optim = train_spec(config), optim_spec(config)
    check_trainable(model, optim)
    mesh = sharding.make_mesh(config.mesh.data, config.mesh.model, devices)
    train.fit(mesh)
    # A plan without a corpus: compiling asks for none.
    programs = compile_programs(Plan(model, optim, train, None, mesh, config.seed))
    rows = sharding.batch_sharding(mesh)
    batch = jax.ShapeDtypeStruct((train.batch_size, model.max_seq_len + 1), jnp.int32, sharding=rows)
    usage = jax.eval_shape(programs.scorer.empty_usage)
    began = time.process_time()
    with jax.set_mesh(mesh):
        compiled = _fitting(programs.train_step.lower(programs.abstract, usage, batch))
    memory, text = compiled.memory_analysis(), compiled.as_text()
    assert memory is not None and text is not None, "this backend tells nothing of its programs"
    program = hlo.read(text)
    sent = hlo.collectives(program, dict(mesh.shape))
    # The products with padding rows of the embedding are made too.
    padded = dataclasses.replace(model, vocab_size=model.vocab_rows)
    tokens = train.batch_size * model.max_seq_len
    figures = {
        "device": mesh.devices.flat[0].device_kind,
        "devices": mesh.size,
        "mesh": dict(mesh.shape),
        "remat": model.remat,
        "grad_accum_steps": train.grad_accum_steps,
        "grad_sync": train.grad_sync,
        "tokens": tokens,
        "weights_gb": held(programs.abstract.variables),
        "moments_gb": held(programs.abstract.opt_state),
        "argument_gb": memory.argument_size_in_bytes / 1e9,
        "temporary_gb": memory.temp_size_in_bytes / 1e9,
        "peak_gb": getattr(memory, "peak_memory_in_bytes", 0) / 1e9,
        "sent": sent,
        "sent_gb": sum(one.sent for one in sent) / 1e9,
        "compiler_cycles": hlo.cycles(program),
        "step_tflop": 3 * model_flops(padded) * tokens / 1e12,
        "executed_tflop": PASSES[model.remat] * model_flops(dense_counterpart(padded)) * tokens / 1e12,
        "compile_s": time.process_time() - began,
    }
    _check_memory(figures, mesh)
    return figures | reckoned(figures)


def held(arrays) -> float:
    """GB of arrays on one device."""
    sizes = (math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
             for leaf in jax.tree.leaves(arrays))  # fmt: skip
    return sum(sizes) / 1e9


def reckoned(figures: dict) -> dict[str, float]:
    """Times of a step by arithmetic, at `REACHED` of the chip's peaks.

    compute_s, network_s, step_s, tokens_per_s; nothing where the chip is not known. A step takes the longer
    of the first two, if all that is sent can be sent meanwhile. compiler_s is the TPU compiler's estimate
    of what it fused, without collectives and Pallas kernels.

    Args:
      figures: of `compile_step`.
    """
    chip = chip_of(figures["device"])
    if chip is None:
        return {}
    compute = figures["executed_tflop"] / figures["devices"] / (REACHED * chip.tflops)
    network = figures["sent_gb"] / (REACHED * chip.sends_gb)
    step = max(compute, network)
    found = {"compute_s": compute, "network_s": network, "step_s": step}
    if chip.clock_ghz and figures["compiler_cycles"]:
        found["compiler_s"] = figures["compiler_cycles"] / chip.clock_ghz / 1e9
    return found | {"tokens_per_s": figures["tokens"] / step}


def run_of(figures: dict, tokens: float) -> dict[str, float]:
    """days and chip_hours of a training on so many tokens; none where times are not known."""
    if "tokens_per_s" not in figures:
        return {}
    hours = tokens / figures["tokens_per_s"] / 3600
    return {"days": hours / 24, "chip_hours": hours * figures["devices"]}


def _fitting(lowered: jax.stages.Lowered, options: dict | None = None) -> jax.stages.Compiled:
    try:
        return lowered.compile(options)
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" in str(error):
            said = str(error).splitlines()[0].removeprefix("RESOURCE_EXHAUSTED: ").rstrip(".")
            raise DoesNotFit(f"the step does not fit its devices ({said}); {INSTEAD}") from error
        if options is None and "output tile sizes" in str(error):
            # Without a GPU to try them on, XLA (jax 0.10.2) finds no tiles for some products' Triton kernels.
            return _fitting(lowered, {"xla_gpu_enable_triton_gemm": False})
        raise


def _check_memory(figures: dict, mesh) -> None:
    """Compilers for GPUs do not ask how much memory there is."""
    chip, needed = chip_of(figures["device"]), figures["argument_gb"] + figures["temporary_gb"]
    if chip and mesh.devices.flat[0].platform == "gpu" and needed > chip.memory_gb:
        raise DoesNotFit(
            f"the step does not fit its devices ({needed:.2f}G of {chip.memory_gb:g}G); {INSTEAD}"
        )


def by_kind(sent: list[hlo.Collective]) -> dict[tuple, tuple[int, int]]:
    """{(kind, axes): (how often, bytes sent by a device)}, most bytes first."""
    found: dict[tuple, tuple[int, int]] = {}
    for one in sent:
        times, size = found.get((one.kind, one.axes), (0, 0))
        found[one.kind, one.axes] = times + one.times, size + one.sent
    return dict(sorted(found.items(), key=lambda item: -item[1][1]))
