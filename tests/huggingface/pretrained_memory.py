"""What an import holds in memory: a synthetic sharded OPT checkpoint is written, imported and measured.

    python -m tests.huggingface.pretrained_memory --directory=PATH --size=1.3b --param_dtype=keep

Prints one JSON line: the model's bytes, the largest tensor's, the peak of what Python and NumPy allocated
during the import (tracemalloc), and the process's largest resident memory (with the pages of the file being
read, which the system may drop at any time). The files (2.6 GB for 1.3b) are removed.
"""

import argparse
import json
import math
import os
import resource
import shutil
import tracemalloc

import jax
import numpy as np

from tree_ffn.huggingface import pretrained
from tree_ffn.huggingface.checkpoint_files import INDEX
from tree_ffn.huggingface.families import FAMILIES, places
from tree_ffn.huggingface.family_config import config_from_spec
from tree_ffn.models import DenseSpec, ModelSpec
from tree_ffn.models.cost import abstract_variables
from tree_ffn.models.safetensors_file import write

# OPT's own sizes (facebook/opt-1.3b), and one for the tests.
SIZES = {
    "1.3b": ModelSpec(50_272, 2048, 2048, 24, 32, (DenseSpec(8192, "relu"),) * 24),
    "test": ModelSpec(6000, 64, 256, 12, 4, (DenseSpec(1024, "relu"),) * 12),
}


def make(directory: str, spec: ModelSpec, shard_bytes: int) -> int:
    """Writes a float16 checkpoint shard by shard; returns the bytes of its largest tensor."""
    os.makedirs(directory)
    wanted = places(FAMILIES["opt"], spec, spec.max_seq_len, spec.vocab_size)
    shapes = {"model.decoder." + name: ("float16", place.shape) for name, (place, _) in wanted.items()}
    shards: list[list[str]] = [[]]
    for name, (_, shape) in shapes.items():
        if sum(math.prod(shapes[key][1]) * 2 for key in shards[-1]) + math.prod(shape) * 2 > shard_bytes:
            shards.append([])
        shards[-1].append(name)
    where = {}
    for i, names in enumerate(shard for shard in shards if shard):
        file = f"model-{i + 1:05}.safetensors"
        value = lambda name: np.full(shapes[name][1], 0.01, np.float16)
        write(os.path.join(directory, file), {name: shapes[name] for name in names}, value, {"format": "pt"})
        where |= dict.fromkeys(names, file)
    with open(os.path.join(directory, INDEX), "w", encoding="utf-8") as file:
        json.dump({"weight_map": where}, file)
    with open(os.path.join(directory, "config.json"), "w", encoding="utf-8") as file:
        json.dump(config_from_spec("opt", spec, spec.vocab_size, "float16", None), file)
    return max(math.prod(shape) * 2 for _, shape in shapes.values())


def measure(directory: str, spec: ModelSpec, param_dtype: str) -> dict:
    """Imports a checkpoint; bytes."""
    # What jax loads and keeps when shapes are traced (4 MB, the same for every size) is there before.
    abstract_variables(spec)
    tracemalloc.start()
    before = tracemalloc.get_traced_memory()[0]
    model = pretrained.load(directory, param_dtype=param_dtype)
    peak = tracemalloc.get_traced_memory()[1] - before
    return {
        "model_bytes": sum(leaf.nbytes for leaf in jax.tree.leaves(model.variables)),
        "peak_bytes": peak,
        "largest_resident_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
    }


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--directory", required=True, help="Where the checkpoint is written; must not exist.")
    parser.add_argument("--size", choices=SIZES, default="test")
    parser.add_argument("--param_dtype", default="keep")
    parser.add_argument("--shard_bytes", type=int, default=1_000_000_000)
    arguments = parser.parse_args()
    spec = SIZES[arguments.size]
    largest = make(arguments.directory, spec, arguments.shard_bytes)
    try:
        figures = measure(arguments.directory, spec, arguments.param_dtype)
    finally:
        shutil.rmtree(arguments.directory)
    beyond = figures["peak_bytes"] - figures["model_bytes"]
    print(json.dumps({**figures, "largest_tensor_bytes": largest, "copies_beyond_model": beyond / largest}))


if __name__ == "__main__":
    main()
