"""What its compiler says of a layer on a TPU that need not be here: operations, bytes, memory, cycles.

Nothing runs, so none of these is a time. The cycles are the compiler's own estimate, which nobody has
compared with a chip for these layers, and it has none of some parts of a program: rows that are read by
index, sorts, Pallas kernels and products of ragged groups. What those read and write stands beside it.
"""

import time

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from experiments.benchmarks.timing import Variant, Work
from experiments.planning.chips import slice_of
from experiments.planning.devices import devices_of
from experiments.reporting import record
from tree_ffn.errors import InputError
from tree_ffn.training import hlo

UNITS = {
    "executed_gflop": "GFLOP", "accessed_gb": "GB", "temporary_mb": "MiB", "mcycles": "Mcycles",
    "compile_s": "s", "unestimated_gb": "GB",
}  # fmt: skip


def chip(topology: str):
    """One chip of a slice of TPUs.

    Raises:
      InputError: there is no such slice, it is none of TPUs, or the compiler is not installed.
    """
    where = slice_of(topology)
    if not where.topology:
        raise InputError(f"--topology: {topology!r} is not allowed; use a slice of TPUs, such as v5e-4.")
    return devices_of(where)[0]


def figures(work: Work, variant: Variant, device) -> dict[str, float]:
    """Compiles a layer, forward or with its gradients, for one device.

    Args:
      work: the layer's width and dtype, the number of tokens, the pass.
      variant: the layer.
      device: as `chip` gives it.

    Returns:
      by the names of `UNITS`: operations; bytes read and written by all instructions together; temporaries;
      the compiler's cycles; bytes of what it has no cycles for; the processor's seconds.
    """
    mesh = Mesh(np.array([device]), ("data",), axis_types=(AxisType.Auto,))
    whole = NamedSharding(mesh, PartitionSpec())
    here = lambda tree: jax.tree.map(
        lambda one: jax.ShapeDtypeStruct(one.shape, one.dtype, sharding=whole), tree
    )
    params = here(jax.eval_shape(lambda: variant.init(jax.random.key(0))))
    x_TE = here(jax.ShapeDtypeStruct((work.n_tokens, work.width), work.dtype))
    began = time.process_time()
    with jax.set_mesh(mesh):
        if work.direction == "forward":
            compiled = jax.jit(variant.apply).lower(params, x_TE).compile()
        else:
            compiled = jax.jit(_with_gradients(variant.apply)).lower(params, x_TE, x_TE).compile()
    memory, text, cost = compiled.memory_analysis(), compiled.as_text(), compiled.cost_analysis()
    assert memory is not None and text is not None and cost is not None, "the compiler tells nothing"
    program = hlo.read(text)
    return {
        "executed_gflop": cost["flops"] / 1e9,
        "accessed_gb": cost["bytes accessed"] / 1e9,
        "temporary_mb": memory.temp_size_in_bytes / 2**20,
        "mcycles": hlo.cycles(program) / 1e6,
        "unestimated_gb": hlo.unestimated(program) / 1e9,
        "compile_s": time.process_time() - began,
    }


def _with_gradients(apply):
    def run(params, x_TE, dy_TE):
        y_TE, back = jax.vjp(apply, params, x_TE)
        return y_TE, back(dy_TE)

    return run


def write(path: str, row: str, found: dict[str, float], config: dict, device) -> None:
    """Appends the figures of one layer to a results file.

    Args:
      path: of the file.
      row: the layer's name.
      found: as `figures` gives them.
      config: what was compiled.
      device: for which.
    """
    kind = device.device_kind.lower().replace(" ", "_")
    record.append_rows(path, [
        record.make_row("layer_tpu", row, metric, value, None, config, UNITS[metric], kind)
        for metric, value in found.items()
    ])  # fmt: skip
