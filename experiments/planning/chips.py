"""Chips that a run can be planned for: what they compute, hold and send, and what slices of them are called.

Numbers are peaks as the makers of the chips state them. None was measured here.
"""

from typing import NamedTuple

from tree_ffn.errors import InputError


class Chip(NamedTuple):
    """One kind of chip.

    Attributes:
      name: ours.
      kind: as JAX calls its devices.
      tflops: bfloat16 products, 1e12 operations a second at best.
      memory_gb: that a program can have, 1e9 bytes.
      sends_gb: 1e9 bytes a second that it sends along one axis of a mesh, both directions of a ring together.
      clock_ghz: of the cycles in which its compiler reckons, by its peak; 0: not known.
    """

    name: str
    kind: str
    tflops: float
    memory_gb: float
    sends_gb: float
    clock_ghz: float


class Slice(NamedTuple):
    """Chips that are rented together.

    Attributes:
      chips: how many; on a TPU v5p a name counts cores, two a chip.
      hosts: machines that they stand in, each a process of a run.
      topology: libtpu's name of their arrangement; "" of GPUs.
      chip: a name of `CHIPS`.
    """

    chips: int
    hosts: int
    topology: str
    chip: str


CHIPS = (
    Chip("v5e", "TPU v5 lite", 197, 16.9, 90, 1.5),
    Chip("v5p", "TPU v5", 459, 102.0, 180, 1.75),
    Chip("v6e", "TPU v6 lite", 918, 33.5, 180, 0),
    Chip("h200", "NVIDIA H200", 989, 141.0, 450, 0),
)
SLICES = {
    "v5e-4": Slice(4, 1, "v5e:2x2", "v5e"),
    "v5e-8": Slice(8, 1, "v5e:2x4", "v5e"),
    "v5e-16": Slice(16, 4, "v5e:4x4", "v5e"),
    "v5e-64": Slice(64, 16, "v5e:8x8", "v5e"),
    "v5e-256": Slice(256, 64, "v5e:16x16", "v5e"),
    "v5p-8": Slice(4, 1, "v5p:2x2x1", "v5p"),
    "v5p-16": Slice(8, 2, "v5p:2x2x2", "v5p"),
    "v5p-128": Slice(64, 16, "v5p:4x4x4", "v5p"),
    "v6e-8": Slice(8, 1, "v6e:2x4", "v6e"),
    "v6e-16": Slice(16, 4, "v6e:4x4", "v6e"),
    "v6e-256": Slice(256, 64, "v6e:16x16", "v6e"),
    "h200-1": Slice(1, 1, "", "h200"),
    "h200-8": Slice(8, 1, "", "h200"),
}


def slice_of(name: str) -> Slice:
    """A slice by the name under which it is rented.

    Raises:
      InputError: it is none of `SLICES`.

    Example:
      >>> slice_of("v5p-128")
      Slice(chips=64, hosts=16, topology='v5p:4x4x4', chip='v5p')
    """
    if name not in SLICES:
        raise InputError(f"--topology: {name!r} is not known; use one of {', '.join(SLICES)}.")
    return SLICES[name]


def chip_of(kind: str) -> Chip | None:
    """The chip that JAX calls so; None where it is none of ours, such as a CPU."""
    return next((chip for chip in CHIPS if kind.startswith(chip.kind)), None)
