"""Devices of slices that need not be here, for which XLA compiles all the same."""

import importlib.util
import os

import jax

from experiments.planning.chips import Slice, chip_of
from tree_ffn.errors import InputError

# libtpu, asked for a topology where there is no TPU: it looks for no cloud, and writes no log files.
ALONE = {"TPU_SKIP_MDS_QUERY": "1", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1", "TPU_LOG_DIR": "disabled"}


def devices_of(one: Slice) -> list:
    """The chips of a slice.

    Args:
      one: TPUs, which libtpu describes; or GPUs, which have to be here.

    Raises:
      InputError: libtpu is not installed, or the GPUs are not here.
    """
    if not one.topology:
        return _gpus_here(one)
    from jax.experimental import topologies

    for name, value in ALONE.items():
        os.environ.setdefault(name, value)
    if importlib.util.find_spec("libtpu") is None:
        raise InputError("--topology: the compiler for TPUs is missing; pip install 'tree_ffn[tpu]'.")
    return topologies.get_topology_desc(one.topology, platform="tpu").devices


def _gpus_here(one: Slice) -> list:
    here = [
        device for device in jax.devices() if getattr(chip_of(device.device_kind), "name", "") == one.chip
    ]
    if len(here) < one.chips:
        raise InputError(
            f"--topology: {one.chips} x {one.chip} are planned where they are, and {len(here)} are here; run "
            "plan there."
        )
    return here[: one.chips]
