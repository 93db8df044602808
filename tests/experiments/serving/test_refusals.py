"""What the server does not do, it refuses in OpenAI's form; what fails inside stays inside."""

import concurrent.futures
import functools
import json
import socket
import threading
import time

import pytest

from experiments.serving import body
from tests.experiments.serving.conftest import CAPACITY, MOST_BYTES
from tree_ffn.inference.batching import Request

httpx = pytest.importorskip("httpx", reason="httpx is not installed; the extra dev brings it")


def refused(answer, status):
    """The error of a refusal, whose form is checked."""
    assert answer.status_code == status, answer.text
    error = answer.json()["error"]
    assert set(error) == {"message", "type", "param", "code"} and error["message"].endswith(".")
    assert "\n" not in error["message"] and len(error["message"]) < 250
    assert "Traceback" not in answer.text and ".py" not in answer.text
    return error


@pytest.mark.parametrize(
    "body, field",
    [
        ({"prompt": []}, "prompt"),
        ({"prompt": [[]]}, "prompt"),
        ({"prompt": [["a"]]}, "prompt"),
        ({"prompt": ["a", 1]}, "prompt"),
        ({"prompt": {"a": 1}}, "prompt"),
        ({"prompt": [257]}, "prompt"),
        ({"prompt": [-1]}, "prompt"),
        ({"prompt": [10**40]}, "prompt"),
        ({"prompt": [True]}, "prompt"),
        ({"prompt": "\ud800"}, "prompt"),
        ({"prompt": "x" * 96}, "max_tokens"),
        ({"prompt": "x" * 90, "max_tokens": 6}, "max_tokens"),
        ({"prompt": ["a"] * 17}, "prompt"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": -1}, "max_tokens"),
        ({"max_tokens": "9"}, "max_tokens"),
        ({"max_tokens": 1.5}, "max_tokens"),
        ({"max_tokens": 10**30}, "max_tokens"),
        ({"temperature": -0.1}, "temperature"),
        ({"temperature": 2.1}, "temperature"),
        ({"temperature": True}, "temperature"),
        ({"top_p": 0}, "top_p"),
        ({"top_p": 1.1}, "top_p"),
        ({"top_k": -2}, "top_k"),
        ({"logprobs": 6}, "logprobs"),
        ({"logprobs": True}, "logprobs"),
        ({"n": 0}, "n"),
        ({"n": 17}, "n"),
        ({"n": 9, "prompt": ["a", "b"]}, "prompt"),
        ({"seed": 2**65}, "seed"),
        ({"seed": "x"}, "seed"),
        ({"stop": [""]}, "stop"),
        ({"stop": ["a"] * 33}, "stop"),
        ({"stop": 3}, "stop"),
        ({"stop": ["a", "\ud800"]}, "stop"),
        ({"temperature": 10**400}, "temperature"),
        ({"\ud800": 1}, "\ud800"),
        ({"suffix": functools.reduce(lambda inner, _: [inner], range(700), 1)}, "suffix"),
        ({"echo": 1}, "echo"),
        ({"stream": "yes"}, "stream"),
        ({"stream_options": {"include_usage": True}}, "stream_options"),
        ({"stream": True, "stream_options": {"other": True}}, "stream_options"),
        ({"stream": True, "stream_options": {"include_usage": 1}}, "stream_options"),
        ({"best_of": 2}, "best_of"),
        ({"best_of": 1, "n": 2}, "best_of"),
        ({"best_of": True}, "best_of"),
        ({"use_beam_search": True}, "use_beam_search"),
        ({"use_beam_search": 0}, "use_beam_search"),
        ({"tools": [{}]}, "tools"),
        ({"response_format": {"type": "json_object"}}, "response_format"),
        ({"min_tokens": 1}, "min_tokens"),
        ({"suffix": "x"}, "suffix"),
        ({"presence_penalty": 2.1}, "presence_penalty"),
        ({"frequency_penalty": "1"}, "frequency_penalty"),
        ({"repetition_penalty": 0}, "repetition_penalty"),
        ({"repetition_penalty": 10**400}, "repetition_penalty"),
        ({"min_p": -0.1}, "min_p"),
        ({"logit_bias": []}, "logit_bias"),
        ({"logit_bias": {"257": 1}}, "logit_bias"),
        ({"logit_bias": {"-1": 1}}, "logit_bias"),
        ({"logit_bias": {"05": 1}}, "logit_bias"),
        ({"logit_bias": {"\u0665": 1}}, "logit_bias"),
        ({"logit_bias": {"9" * 5000: 1}}, "logit_bias"),
        ({"logit_bias": {"\ud800": 1}}, "logit_bias"),
        ({"logit_bias": {"5": 101}}, "logit_bias"),
        ({"logit_bias": {"5": True}}, "logit_bias"),
        ({"logit_bias": {"5": None}}, "logit_bias"),
        ({"stop_token_ids": [257]}, "stop_token_ids"),
        ({"stop_token_ids": [True]}, "stop_token_ids"),
        ({"stop_token_ids": 3}, "stop_token_ids"),
        ({"ignore_eos": 1}, "ignore_eos"),
        ({"truncate_prompt_tokens": 0}, "truncate_prompt_tokens"),
        ({"truncate_prompt_tokens": -2}, "truncate_prompt_tokens"),
        ({"unknown": 1}, "unknown"),
    ],
)
def test_bad_fields(http, body, field):
    content = json.dumps({"prompt": "a"} | body)  # ASCII: also half of a surrogate pair gets through
    error = refused(http.post("/v1/completions", content=content), 400)
    assert (error["param"], error["type"]) == (field, "invalid_request_error")


@pytest.mark.parametrize(
    "content",
    [
        b"", b"[", b"\xff", b"[1]", b"null", b'{"temperature": NaN}', b'{"temperature": -Infinity}',
        b"[" * 9999, b"1" * 9999, b'{"temperature": 1e999}', '{"prompt": "a"}'.encode("utf-16"),
    ],
)  # fmt: skip
def test_bodies_that_are_no_objects(http, content):
    refused(http.post("/v1/completions", content=content), 400)


def test_large_bodies(http):
    content = b'{"prompt": "' + b"x" * MOST_BYTES + b'"}'
    refused(http.post("/v1/completions", content=content), 413)
    refused(http.post("/v1/completions", content=iter([content])), 413)  # its length not told


def test_other_addresses(http):
    refused(http.get("/none"), 404)
    refused(http.get("/v1/completions"), 405)
    assert http.get("/health").json() == {"status": "ok"}


def test_a_body_that_never_ends(address, monkeypatch):
    """One stops in its midst, one never stops: neither holds its connection."""
    monkeypatch.setattr(body, "MOST_SECONDS", 0.2)
    host, port = address.removeprefix("http://").split(":")
    head = f"POST /v1/completions HTTP/1.1\r\nHost: {host}\r\n"
    with socket.create_connection((host, int(port)), timeout=60) as connection:
        connection.sendall(f"{head}Content-Length: 99\r\n\r\n{{".encode())
        assert connection.recv(1000).startswith(b"HTTP/1.1 408")
    for address_head in (head, head.replace("completions", "none")):
        with socket.create_connection((host, int(port)), timeout=60) as connection:
            connection.sendall(f"{address_head}Transfer-Encoding: chunked\r\n\r\n".encode())
            with pytest.raises(OSError):  # the server has hung up
                for _ in range(10_000):
                    connection.sendall(b"1000\r\n" + b" " * 4096 + b"\r\n")


NULLS = ("seed", "stop", "n", "logprobs", "temperature", "top_p", "logit_bias", "stream_options",
         "max_tokens", "best_of", "suffix", "user", "tools", "response_format", "echo",
         "min_p", "guided_json")  # fmt: skip
NEUTRAL = [
    {"presence_penalty": 0.0, "frequency_penalty": 0, "repetition_penalty": 1.0, "min_p": 0.0},
    {"n": 3, "best_of": 3, "user": "me", "metadata": {"of": "mine"}, "suffix": "", "use_beam_search": False},
    {"top_k": -1, "stop": [], "stop_token_ids": [], "length_penalty": 1.0, "skip_special_tokens": True},
    {"tools": [], "tool_choice": "none", "response_format": {"type": "text"}, "store": False},
    {"stream_options": {"include_usage": False}, "min_tokens": 0, "logit_bias": {}},
    {"top_k": 0},
    {"add_generation_prompt": True, "continue_final_message": False, "chat_template_kwargs": {}},
    {"echo": False, "detokenize": True, "documents": []},
    dict.fromkeys(NULLS),
]  # fmt: skip


@pytest.mark.parametrize("fields", NEUTRAL, ids=lambda fields: next(iter(fields)))
def test_what_means_nothing_is_allowed(http, fields):
    """And changes nothing."""
    plain = {"prompt": "a", "temperature": 0, "seed": 5, "max_tokens": 2}
    texts = []
    for asked in (plain, fields | plain):
        answer = http.post("/v1/completions", json=asked)
        assert answer.status_code == 200, answer.text
        texts.append(answer.json()["choices"][0]["text"])
    assert texts[0] == texts[1]


class Gate:
    """Holds the device's thread until it is opened."""

    def __init__(self):
        self.reached, self.opened = threading.Event(), threading.Event()

    def __call__(self, made):
        self.reached.set()
        assert self.opened.wait(60)


def test_a_full_queue(engine, http):
    gate = Gate()
    ask = lambda: http.post("/v1/completions", json={"prompt": "a", "max_tokens": 1})
    engine.submit([Request((1,), 2) for _ in range(sum(CAPACITY.values()))], gate)
    assert gate.reached.wait(60)
    answer = ask()
    gate.opened.set()
    error = refused(answer, 429)
    assert error["code"] == "queue_full" and answer.headers["Retry-After"] == "1"
    while (answer := ask()).status_code == 429:
        pass
    assert answer.status_code == 200


@pytest.mark.parametrize("stream", [False, True])
def test_a_failure_inside_stays_inside(engine, http, stream, capsys):
    gate = Gate()
    body = {"prompt": "a", "max_tokens": 60, "temperature": 0, "stream": stream}
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        engine.submit([Request((1,), 2)], gate)
        assert gate.reached.wait(60)
        waiting = pool.submit(http.post, "/v1/completions", json=body)
        engine._batch.variables = {"params": {"a secret of the inside": None}}  # as if memory had failed
        with engine._changed:
            assert engine._changed.wait_for(lambda: engine._new, 60)
        gate.opened.set()
        answer = waiting.result(60)
    if stream:
        assert answer.status_code == 200 and answer.text.startswith('data: {"error"')
        assert "[DONE]" not in answer.text
    else:
        assert refused(answer, 500)["type"] == "server_error"
    assert "secret" not in answer.text and "Traceback" in capsys.readouterr().err
    assert http.get("/health").status_code == 200
    assert http.post("/v1/completions", json={"prompt": "a", "max_tokens": 1}).status_code == 200


@pytest.mark.parametrize("stream", [False, True])
def test_who_leaves_frees_its_rows(engine, address, stream, monkeypatch):
    """In the midst of an answer that would take seconds: each step waits a little."""
    batch, steps = engine._batch, []

    def slow_step(step=batch.step):
        time.sleep(0.05)
        steps.append(len(batch))
        return step()

    monkeypatch.setattr(batch, "step", slow_step)
    content = json.dumps({"prompt": ["a", "b"], "max_tokens": 90, "stream": stream}).encode()
    host, port = address.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port))) as connection:
        head = f"POST /v1/completions HTTP/1.1\r\nHost: {host}\r\nContent-Length: {len(content)}\r\n\r\n"
        connection.sendall(head.encode() + content)
        while len(steps) < 3:
            time.sleep(0.01)
        if stream:
            assert b"200 OK" in connection.recv(1000)
    left, deadline = len(steps), time.monotonic() + 60
    while engine._open or len(batch):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    assert len(steps) - left < 30 and steps[2] == 2  # 90 steps for who stays
