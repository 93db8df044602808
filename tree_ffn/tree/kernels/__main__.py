"""Builds the C++ part for this CPU and, with nvcc, the CUDA parts: python -m tree_ffn.tree.kernels."""

import sys

from tree_ffn import streams
from tree_ffn.errors import InputError
from tree_ffn.tree import kernels
from tree_ffn.tree.kernels import cuda


def main() -> int:
    try:
        print(f"{kernels.build()} is built; gather and the beams of trees use it on this machine's CPU.")
        for library in cuda.build() if cuda.nvcc() else ():
            print(f"{library} is built; programs for such GPUs use it.")
    except InputError as error:
        print(error, file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    with streams.lasting(bool):
        sys.exit(main())
