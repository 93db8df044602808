"""Damaged inputs by the thousand: each is done, or refused in one sentence, soon and in little memory."""

import bz2
import contextlib
import copy
import gzip
import json
import lzma
import pathlib
import random
import shutil
import signal
import time
from collections.abc import Iterator
from typing import Any

import pytest

from experiments.common import loaded
from experiments.serving import chat, completion
from experiments.serving.chat_template import ChatTemplate
from experiments.serving.refusal import Refusal
from tests.experiments.programs import Outcome, call
from tests.experiments.serving.conftest import TEMPLATE
from tree_ffn.errors import InputError
from tree_ffn.json_input import parse_json

MODEL = pathlib.Path(__file__).parent / "fixtures" / "harness" / "gpt2"
MOST_SECONDS, MOST_GROWTH = 10, 1 << 30
# What breaks readers: the first anywhere, the others in the place of any value.
BYTES = [
    b"", b"\0", b"\xff\xfe", b"\xef\xbb\xbf", b"\xed\xa0\x80", b"\xf0\x9f", b"\r", b"\n\n", b'"', b"\\",
    b"\\ud800", b",", b"[", b"]", b"{", b"}", b"NaN", b"-Infinity", b"1e999", b"null", b"-1", b"9" * 5000,
    b"[" * 20_000, b'{"a":' * 20_000, b"<|endoftext|>\n", "\u2028\u0301\u200d🌳".encode(),
    b"version https://git-lfs.github.com/spec/v1\n",
]  # fmt: skip
VALUES = [
    None, True, False, 0, 1, -1, 2, 7, 2**31, 2**63, 2**64, -(2**63), 10**4000, 0.5, -0.0, 1e308, "", "a",
    "\0", "\ud800", "<|endoftext|>", "🌳" * 9, "x" * 10_000, [], [[]], {}, {"": ""}, [0], ["a", None], "gpt2",
    "opt", "bytes", "%s", "{{",
]  # fmt: skip
NAMES = ["", "a", "text", "9" * 5000, "eos_token_id"]
PACKED = {
    "": lambda content: content, ".gz": gzip.compress, ".xz": lzma.compress, ".bz2": bz2.compress,
    ".lzma": lambda content: lzma.compress(content, lzma.FORMAT_ALONE),
}  # fmt: skip
TEXT = "The tree stands by the river.\nIts leaves fall, né 東 🙂.\n<|endoftext|>\n" * 9
LINES = [{"text": f"{i} {TEXT[:70]}", "n": i} for i in range(9)]
PROMPTS = ["The tree", {"prompt": "by the né"}]
BODIES = [
    {"prompt": "The tree", "max_tokens": 3, "temperature": 0.5, "top_p": 0.9, "top_k": 4, "min_p": 0.1,
     "n": 2, "seed": 1},
    {"prompt": [[65, 66], [67]], "max_tokens": 0, "echo": True, "logprobs": 2, "stop": ["a", "b"],
     "stop_token_ids": [3]},
    {"prompt": ["a", "b"], "logit_bias": {"65": 1}, "presence_penalty": 1, "frequency_penalty": -1,
     "stream": True, "stream_options": {"include_usage": True}, "repetition_penalty": 1.1,
     "truncate_prompt_tokens": 4, "best_of": 1},
    {"messages": [{"role": "system", "content": "Be"},
                  {"role": "user", "content": [{"type": "text", "text": "a"}]}],
     "max_completion_tokens": 4, "logprobs": True, "top_logprobs": 2, "tools": []},
]  # fmt: skip


def damaged(content: bytes, draw: random.Random) -> bytes:
    """Bytes with one to three faults."""
    for _ in range(draw.randint(1, 3)):
        a, b = sorted(draw.choices(range(len(content) + 1), k=2))
        b = min(b, a + draw.choice([0, 1, 4, 99, len(content)]))
        new = draw.choice([content[a:b] * 2, draw.randbytes(b - a), *draw.choices(BYTES, k=3)])
        content = content[:a] + new + content[b:]
    return content


def damaged_json(value: Any, draw: random.Random) -> Any:
    """A JSON value with one fault."""
    value = copy.deepcopy(value)
    places = list(_places(value))
    if not places or draw.random() < 0.05:
        return draw.choice(VALUES)
    holder, key = draw.choice(places)  # an object and a name, or an array and a place
    others = [one[place] for one, place in draw.choices(places, k=9)]
    new, how = copy.deepcopy(draw.choice([*VALUES, *others])), draw.randrange(6)
    if how == 0:
        del holder[key]
    elif how == 1 and isinstance(holder, list):
        holder.insert(key, new)
    else:
        holder[draw.choice(NAMES) if how == 1 else key] = new
    return value


def _places(value) -> Iterator[tuple[Any, Any]]:
    pairs = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in list(pairs):
        yield value, key
        yield from _places(inner)


def json_or_bytes(content: bytes, draw: random.Random) -> bytes:
    """JSON with a fault of its values, of its bytes, or of both."""
    if how := draw.randrange(3):
        value = damaged_json(json.loads(content), draw)
        content = json.dumps(value, ensure_ascii=draw.random() < 0.9).encode(errors="surrogatepass")
    return content if how == 1 else damaged(content, draw)


def lines(values: list, draw: random.Random) -> bytes:
    """JSON lines, one of which has a fault."""
    split = [json.dumps(value).encode() for value in values]
    i = draw.randrange(len(split))
    split[i] = json_or_bytes(split[i], draw)
    return b"\n".join(split)


def text(place, folder, draw, generates):
    return _trained_on(folder / "a.txt", TEXT.encode(), damaged, draw)


def json_lines(place, folder, draw, generates):
    return _trained_on(folder / "a.jsonl", LINES, lines, draw)


def _trained_on(path: pathlib.Path, content, damage, draw: random.Random) -> Outcome:
    """A tokenizer learns from a file whose text, packing or both have faults."""
    path, pack = draw.choice([(path.with_name(path.name + suffix), PACKED[suffix]) for suffix in PACKED])
    packed = pack(damage(content, draw))
    path.write_bytes(packed if draw.random() < 0.5 else damaged(packed * draw.randint(1, 2), draw))
    return call("train_tokenizer", f"--files={path}", "--vocab=300", f"--to={path}.json")


def imported(name: str, damage=json_or_bytes):
    """A checkpoint one of whose files has faults is imported, and makes text."""

    def run(place, folder, draw, generates):
        shutil.copytree(MODEL, folder / "in")
        path = folder / "in" / name
        path.write_bytes(damage(path.read_bytes(), draw))
        done = call("import_model", f"--from={folder / 'in'}", f"--to={folder / 'out'}")
        if done.code or not generates:
            return done
        return call("generate", f"--export={folder / 'out'}", "--greedy", "--tokens=2", "--prompt=The né🌳")

    return run


def safetensors(content: bytes, draw: random.Random) -> bytes:
    """A safetensors file with faults anywhere, or in a header or data whose lengths are right."""
    if draw.random() < 0.3:
        return damaged(content, draw)
    n = 8 + int.from_bytes(content[:8], "little")
    header, data = content[8:n], content[n:]
    if draw.random() < 0.5:
        header = json_or_bytes(header, draw)
    else:
        data = damaged(data, draw).ljust(len(data), b"\xff")[: len(data)]
    return len(header).to_bytes(8, "little") + header + data


def prompts(place, folder, draw, generates):
    path = folder / draw.choice(["a.jsonl", "a.txt", "a.json"])
    path.write_bytes(lines(PROMPTS, draw))
    return call("generate", f"--prompts={path}", f"--export={place / 'export'}", "--greedy", "--tokens=1")


def bodies(place, folder, draw, generates):
    """What the server does with a body before the model has it."""
    body = json_or_bytes(json.dumps(draw.choice(BODIES)).encode(), draw)
    model = loaded.reader("bytes", 64, [256])
    try:
        value = parse_json(body, "The body")
        if isinstance(value, dict) and "messages" in value:
            chat.parse(value, model, ChatTemplate(TEMPLATE, {}, "template"), "model", 8)
        else:
            completion.parse(value, model, "model", 8)
    except (Refusal, InputError) as error:
        return Outcome(2, "", f"{error}\n")
    return Outcome(0, "", "")


KINDS = {
    "text": text, "JSON lines": json_lines, "tokenizer": imported("tokenizer.json"),
    "tokenizer's words": imported("tokenizer_config.json"), "config": imported("config.json"),
    "weights": imported("model.safetensors", safetensors), "bodies": bodies,
}  # fmt: skip
OF_A_MODEL = {"prompts": prompts}


@contextlib.contextmanager
def bounded():
    """Raises where what is inside takes too much time, of the processor or at all, or memory (of Linux)."""

    def late(*_):
        raise TimeoutError("it does not end")

    before, start, handler = _memory("VmRSS"), time.process_time(), signal.signal(signal.SIGALRM, late)
    if before:
        pathlib.Path("/proc/self/clear_refs").write_text("5")  # VmHWM begins anew
    signal.alarm(6 * MOST_SECONDS)  # others may be at work on the same processor
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, handler)
    assert (seconds := time.process_time() - start) < MOST_SECONDS, seconds
    assert (growth := _memory("VmHWM") - before) < MOST_GROWTH, growth


def _memory(name: str) -> int:
    status = pathlib.Path("/proc/self/status")
    return int(status.read_text().split(f"{name}:")[1].split()[0]) << 10 if status.exists() else 0


def check(kind: str, seed: int, place: pathlib.Path, generates: bool = False) -> int:
    """Runs one input of a kind; returns its exit code."""
    folder = place / f"{kind} {seed}"
    folder.mkdir()
    with bounded():
        run = (KINDS | OF_A_MODEL)[kind]
        done = run(place, folder, random.Random(folder.name), generates)
    shutil.rmtree(folder)
    said = f"{kind}, seed {seed}: {done}"
    assert done.code in (0, 2) and "Traceback" not in done.err, said
    sentences = [line for line in done.err.splitlines(keepends=True) if "it/s]" not in line]
    assert done.code == 0 or (len(sentences) == 1 and sentences[0].endswith(".\n")), said
    return done.code


@pytest.mark.parametrize("kind", KINDS)
def test_damaged_inputs(kind, tmp_path):
    assert 2 in [check(kind, seed, tmp_path) for seed in range(6)]


@pytest.mark.slow
@pytest.mark.parametrize("kind", [*KINDS, *OF_A_MODEL])
def test_many_damaged_inputs(kind, tmp_path):
    flags = f"--export={tmp_path / 'export'}", "--greedy", "--tokens=2", "--prompt=The né🌳"
    assert call("import_model", f"--from={MODEL}", f"--to={tmp_path / 'export'}").code == 0
    assert call("generate", *flags).code == 0  # compiled before the first is timed
    assert {check(kind, seed, tmp_path, generates=True) for seed in range(230)} == {0, 2}
