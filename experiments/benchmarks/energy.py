"""The energy that a GPU draws, by the counter of NVIDIA's management library, which comes with the driver."""

import ctypes
import os
import time
from collections.abc import Callable

import jax

LIBRARY = "libnvidia-ml.so.1"


def counter() -> Callable[[], float] | None:
    """What reads the joules that JAX's first GPU has drawn; None where none counts them.

    All of the board counts, idle or busy, so nothing else may run there.
    """
    if jax.default_backend() != "gpu":
        return None
    try:
        library = ctypes.CDLL(LIBRARY)
    except OSError:
        return None
    device, visible = ctypes.c_void_p(), os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")[0]
    if visible.startswith("GPU-"):
        find, name = library.nvmlDeviceGetHandleByUUID, visible.encode()
    else:
        find, name = library.nvmlDeviceGetHandleByIndex_v2, int(visible or 0)
    read = lambda millijoules: library.nvmlDeviceGetTotalEnergyConsumption(device, ctypes.byref(millijoules))
    if library.nvmlInit_v2() or find(name, ctypes.byref(device)) or read(ctypes.c_ulonglong()):
        return None

    def joules() -> float:
        drawn = ctypes.c_ulonglong()
        read(drawn)
        return drawn.value / 1e3

    return joules


def per_call(run: Callable[[], object], joules: Callable[[], float], seconds: float) -> float:
    """Joules of a call, over as many as fill the time: the counter moves a few times a second only.

    Args:
      run: makes some calls, and waits for none.
      joules: of `counter`.
      seconds: how long.
    """
    jax.block_until_ready(run())
    calls, start, before = 0, time.perf_counter(), joules()
    while time.perf_counter() - start < seconds:
        jax.block_until_ready([run() for _ in range(10)])
        calls += 10
    return (joules() - before) / calls
