"""The program that makes text, run as users run it."""

import os
import subprocess
import sys

import numpy as np
import pytest

from tests.models.kinds import KINDS, model_spec, random_variables
from tree_ffn.models import export


def generate(repository, *flags):
    env = {**os.environ, "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-m", "experiments.generate", *flags]
    return subprocess.run(command, cwd=repository, env=env, capture_output=True, text=True, timeout=300)


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    directory = tmp_path_factory.mktemp("exported")
    spec = model_spec(KINDS["continuous"], vocab_size=257, context=64)
    variables = random_variables(spec)
    # Letters only, so that the text is easy to check: others are never the likeliest.
    tokens = np.asarray(variables["params"]["embed"]["tokens"]).copy()
    letters = np.arange(ord("a"), ord("z") + 1)
    tokens[letters] *= 20
    variables["params"]["embed"]["tokens"] = tokens
    export.save(str(directory), spec, variables)
    return str(directory)


def test_a_prompt_is_continued_alike_from_the_same_seed(repository, exported):
    flags = (f"--export={exported}", "--prompt=tree", "--tokens=12", "--top_k=5", "--seed=3")
    first, second = generate(repository, *flags), generate(repository, *flags)
    assert first.returncode == 0, first.stderr
    assert first.stdout == second.stdout
    text = first.stdout.rstrip("\n")
    assert text.startswith("tree") and len(text) == 16 and text.isalpha()
    assert "tokens/s" in first.stderr


@pytest.mark.parametrize(
    "flags, words",
    [
        (["--prompt=x"], "--workdir or --export: give one of them"),
        (["--export={}", "--tokens=99"], "tokens: 99 new tokens after a prompt of 1 do not fit"),
        (["--export={}/none"], "cannot be read: No such file"),
        (["--export={}", "--top_p=2"], "top_p: 2.0 is not allowed"),
    ],
)
def test_mistakes_get_one_sentence(repository, exported, flags, words):
    result = generate(repository, *(flag.format(exported) for flag in flags))
    assert result.returncode == 2
    assert words in result.stderr and len(result.stderr.splitlines()) == 1
    assert result.stdout == ""
