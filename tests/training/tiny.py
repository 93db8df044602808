"""A model and a corpus that train in seconds."""

import pathlib
import random

import numpy as np

from configs import smoke
from tree_ffn.models.from_config import model_spec_from_config

WORDS = "the tree a leaf of path and root to node walks left right until it ends , . \n".split(" ")


def write_texts(directory: pathlib.Path) -> pathlib.Path:
    """A few files of words in random order."""
    random.seed(0)
    for number in range(12):
        text = " ".join(random.choices(WORDS, k=400))
        (directory / f"{number}.txt").write_text(text)
    return directory


def tiny_config(texts: pathlib.Path, kind="tree", steps=6, **changes):
    """configs/smoke.py on those files, without its probe; changes are written `optim__lr=1.0`."""
    config = smoke.get_config(f"kind={kind},steps={steps}")
    config.data.corpus, config.data.files = "files", f"{texts}/*.txt"
    config.data.cache_dir, config.data.workers = f"{texts}/cache", 0
    config.mesh.data = 1  # of the 8 fake devices
    config.train.probe = False  # its program takes as long to compile as a step's
    with config.unlocked():
        for name, value in changes.items():
            section, _, key = name.partition("__")
            if key:
                config[section][key] = value
            else:
                config[section] = value
    return config


def tiny_model(kind="tree", **changes):
    """The ModelSpec of `tiny_config`."""
    return model_spec_from_config(tiny_config(pathlib.Path("."), kind, **changes), vocab_size=257)


def random_batch(rows=8, context=32, seed=0):
    """int32 [B, C + 1]."""
    return np.random.default_rng(seed).integers(0, 257, (rows, context + 1)).astype(np.int32)
