"""Devices of slices that need not be here, for which XLA compiles all the same."""

import importlib.util
import os

import jax

from experiments.planning.chips import Slice, chip_of
from tree_ffn.errors import InputError

# libtpu, asked for a topology where there is no TPU: it looks for no cloud, writes no log files, and does not
# complain of what it did not find; the topology is the one that it is asked for, whatever stands here.
ALONE = {
    "TPU_SKIP_MDS_QUERY": "1", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1", "TPU_LOG_DIR": "disabled",
    "TPU_WORKER_HOSTNAMES": "localhost", "TPU_ACCELERATOR_TYPE": "v5litepod-16",
}  # fmt: skip
# What XLA asks of a GPU for which it compiles; the H200's, as its maker states it.
H200 = """
gpu_device_info {
  cuda_compute_capability { major: 9 minor: 0 } core_count: 132 fpus_per_core: 128 clock_rate_ghz: 1.98
  device_memory_size: 151397597184 memory_bandwidth: 4800000000000 l2_cache_size: 52428800
  threads_per_warp: 32 threads_per_block_limit: 1024 threads_per_core_limit: 2048
  shared_memory_per_block: 49152 shared_memory_per_block_optin: 232448 shared_memory_per_core: 233472
  registers_per_core_limit: 65536 registers_per_block_limit: 65536
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
}
platform_name: "CUDA" device_description_str: "NVIDIA H200" dnn_version_info { major: 9 minor: 10 }
"""


def devices_of(one: Slice) -> list:
    """The chips of a slice: those that are here, or their like.

    A GPU that is not here is compiled for by JAX's plugin for CUDA, without the tuning of kernels that XLA
    does by trying them, and without this project's own kernels.

    Raises:
      InputError: the compiler is not installed.
    """
    name = lambda device: getattr(chip_of(device.device_kind), "name", "")
    here = [device for device in jax.devices() if name(device) == one.chip]
    if one.chip == "h200" and len(here) >= one.chips:
        return here[: one.chips]
    from jax.experimental import topologies

    if one.chip == "h200":
        if not any(importlib.util.find_spec(f"jax_cuda{version}_plugin") for version in (12, 13)):
            raise InputError("--topology: the compiler for GPUs is missing; pip install 'tree_ffn[cuda]'.")
        shape = f"1x1x{one.chips}"
        return topologies.get_topology_desc("", platform="cuda", topology=shape, target_config=H200).devices
    for variable, value in ALONE.items():
        os.environ.setdefault(variable, value)
    if importlib.util.find_spec("libtpu") is None:
        raise InputError("--topology: the compiler for TPUs is missing; pip install 'tree_ffn[tpu]'.")
    return topologies.get_topology_desc(one.topology, platform="tpu").devices
