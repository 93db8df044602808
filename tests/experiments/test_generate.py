"""The program that makes text, run as users run it."""

import gzip
import json
import os
import re
import subprocess
import sys

import numpy as np
import pytest

from experiments.common.prompts import read_prompts
from tests.experiments.programs import call
from tests.models.kinds import KINDS, model_spec, random_variables
from tree_ffn.models import export


def generate(repository, *flags):
    env = {**os.environ, "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-m", "experiments.generate", *flags]
    return subprocess.run(command, cwd=repository, env=env, capture_output=True, text=True, timeout=300)


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    directory = tmp_path_factory.mktemp("exported")
    spec = model_spec(KINDS["leaf"], vocab_size=257, max_seq_len=64)
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
    first = generate(repository, *flags)
    assert first.returncode == 0, first.stderr
    assert first.stdout == made(*flags)
    text = first.stdout.rstrip("\n")
    assert text.startswith("tree") and len(text) == 16 and text.isalpha()
    assert re.search(r"[\d,.]+ tokens/s; compiled in [\d.]+ s$", first.stderr.strip())


@pytest.mark.parametrize(
    "flags, words",
    [
        (["--export={}", "--tokens=99"], "tokens: 99 new tokens after a prompt of 1 do not fit"),
        (["--export={}/none"], "cannot be read: No such file"),
        (["--export={}", "--top_p=2"], "top_p: 2.0 is not allowed"),
    ],
)
def test_mistakes_get_one_sentence(exported, flags, words):
    outcome = call("generate", *(flag.format(exported) for flag in flags))
    assert outcome.code == 2 and outcome.out == ""
    assert words in outcome.err and len(outcome.err.splitlines()) == 1


def test_a_mistake_of_a_process(repository):
    result = generate(repository, "--prompt=x")
    assert result.returncode == 2 and result.stdout == ""
    assert "--workdir or --export: give one of them" in result.stderr
    assert len(result.stderr.splitlines()) == 1


def made(*flags):
    """What the program prints, run in this process."""
    outcome = call("generate", *flags)
    assert outcome.code == 0, outcome.err
    return outcome.out


@pytest.mark.slow
def test_several_prompts_are_continued_as_each_alone(exported, tmp_path):
    prompts = ["tree", "leaf and branch and root", "née"]
    flags = (f"--export={exported}", "--tokens=9", "--top_k=5", "--seed=3")
    alone = [made(*flags, f"--prompt={prompt}").removesuffix("\n") for prompt in prompts]
    lines = tmp_path / "prompts.txt"
    lines.write_text("\n".join(prompts) + "\n")
    objects = tmp_path / "prompts.jsonl"
    objects.write_text(
        "".join(json.dumps(v) + "\n" for v in (prompts[0], *({"prompt": p} for p in prompts[1:])))
    )
    assert made(*flags, f"--prompts={lines}") == "\n\n".join(alone) + "\n"
    to = tmp_path / "texts.jsonl"
    assert made(*flags, f"--prompts={objects}", f"--to={to}", "--rows=2") == ""
    found = [json.loads(line) for line in to.read_text().splitlines()]
    assert [one["prompt"] + one["text"] for one in found] == alone
    assert [one["prompt"] for one in found] == prompts


def test_the_text_ends_before_a_stop(exported):
    flags = (f"--export={exported}", "--tokens=20", "--top_k=5", "--seed=3", "--prompt=tree")
    text = made(*flags).removesuffix("\n")
    stop = text[9:12]
    assert made(*flags, "--stop=none", f"--stop={stop}") == text[: 4 + text[4:].index(stop)] + "\n"


@pytest.mark.parametrize(
    "flags, content, words",
    [
        (
            ["--prompts={}/p.jsonl"],
            '"a"\n{',
            "{}/p.jsonl, line 2 is not JSON that can be read: expecting property name",
        ),
        (["--prompts={}/p.jsonl"], '{"text": "a"}', "{}/p.jsonl, line 1 has no text"),
        (["--prompts={}/p.txt"], "a\n\nb", "{}/p.txt, line 2 has no text"),
        (["--prompts={}/p.txt"], "", "{}/p.txt has no lines"),
        (["--prompts={}/p.txt"], b"\xff", "{}/p.txt: byte 0 is not UTF-8"),
        (["--prompts={}/none.txt"], "", "{}/none.txt: cannot be read"),
        (["--prompts={}/p.txt", "--prompt=b"], "a", "--prompt and --prompts: give one of them"),
        (["--prompts={}/p.txt", "--to={}/none/t.jsonl"], "a", "--to: '{}/none/t.jsonl' cannot be written"),
        (["--prompts={}/p.jsonl"], '"\\ud800"', "{}/p.jsonl, line 1 holds \\ud800, half of a surrogate pair"),
        (["--stop="], "", "--stop: '' is not allowed"),
        (["--rows=0"], "", "--rows: 0 is not allowed"),
        (["--seed=-1"], "", "seed: -1 is not allowed"),
    ],
)
def test_mistakes_in_prompts_get_one_sentence(exported, tmp_path, flags, content, words):
    for name in ("p.txt", "p.jsonl"):
        (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    outcome = call("generate", f"--export={exported}", *(flag.format(tmp_path) for flag in flags))
    assert outcome.code == 2 and outcome.err.count("\n") == 1
    assert words.replace("{}", str(tmp_path)) in outcome.err and outcome.out == ""


@pytest.mark.parametrize(
    "name, content",
    [
        ("p.txt", "\ufeffone\r\ntwo né\n"),
        ("p.txt.gz", gzip.compress(b"one\ntwo n\xc3\xa9", mtime=0)),
        ("p.jsonl", '\ufeff"one"\n\n{"prompt": "two né", "id": NaN}\n'),
        ("p.ndjson", '{"prompt": "one"}\r\n"two né"'),
        ("p.JSON", '["one",\n {"prompt": "two né"}]'),
    ],
)
def test_prompts_of_every_kind(tmp_path, name, content):
    (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    assert read_prompts(tmp_path / name) == ["one", "two né"]


def test_scores_that_are_no_numbers_make_no_text(exported, tmp_path):
    spec, variables, config = export.load(exported)
    variables["params"]["embed"]["tokens"] = variables["params"]["embed"]["tokens"] * np.float32(1e30)
    export.save(str(tmp_path / "large"), spec, variables, config["tokenizer"])
    to = tmp_path / "texts.jsonl"
    for flags in ([], ["--greedy"], ["--prompt=b", f"--to={to}"]):
        outcome = call("generate", f"--export={tmp_path / 'large'}", "--prompt=a", *flags)
        assert outcome.code == 2 and outcome.out in ("a", "")
        assert "token 1 after a prompt of 1: the model's scores are NaN or infinite" in outcome.err
        assert len(outcome.err.splitlines()) == 1
    assert "prompt 0: token 1" in outcome.err
    to.write_text("what was there\n")
    assert call("generate", f"--export={tmp_path / 'large'}", "--prompt=a", f"--to={to}").code == 2
    assert to.read_text() == "what was there\n"
