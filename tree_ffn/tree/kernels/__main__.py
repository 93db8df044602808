"""Builds the C++ part for this CPU and, with nvcc, the CUDA parts: python -m tree_ffn.tree.kernels."""

import argparse
import sys

from tree_ffn import streams
from tree_ffn.errors import InputError
from tree_ffn.tree import kernels
from tree_ffn.tree.kernels import cuda


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tree_ffn.tree.kernels", description=__doc__)
    parser.add_argument("--capability", default="", help="compute capability of the GPUs, such as 9.0")
    capability = parser.parse_args().capability
    try:
        if capability:
            cuda.check_capability(capability)
        print(f"{kernels.build()} is built; gather and the beams of trees use it on such CPUs.")
        for library in cuda.build(capability=capability) if capability or cuda.nvcc() else ():
            print(f"{library} is built; programs for such GPUs use it.")
    except InputError as error:
        print(error, file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    with streams.lasting(bool):
        sys.exit(main())
