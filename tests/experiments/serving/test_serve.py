"""The program that serves, run as users run it, and asked by lm-eval."""

import json
import os
import signal
import socket
import sys
import threading
import time

import pytest

from experiments import serving
from experiments.lm_harness import questions
from tests.experiments import questions_data
from tests.experiments.programs import call
from tree_ffn.inference import batching
from tree_ffn.inference.sampling import Sampling


def free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return one.getsockname()[1]


def interrupted_in_an_answer(port: int, signum: int, lines: list[str]) -> None:
    """Asks for a long answer, sends a signal to this process in its midst, and reads what still comes."""
    import httpx

    body = {"prompt": "a", "n": 30, "max_tokens": 90, "temperature": 0, "stream": True}
    url, client = f"http://127.0.0.1:{port}/v1/completions", httpx.Client(timeout=120)
    deadline = time.monotonic() + 120
    with client:
        while time.monotonic() < deadline:
            try:
                with client.stream("POST", url, json=body) as answer:
                    for line in filter(None, answer.iter_lines()):
                        if not lines:
                            os.kill(os.getpid(), signum)
                        lines.append(line)
                return
            except httpx.ConnectError:  # it does not listen yet
                time.sleep(0.05)


@pytest.mark.parametrize(
    "signum, grace, code", [(signal.SIGTERM, 60, 0), (signal.SIGINT, 0, 130), (signal.SIGUSR1, 60, 0)]
)
def test_a_signal_ends_the_server_and_no_answer_is_left_open(exported, signum, grace, code):
    for package in ("fastapi", "uvicorn", "httpx"):
        pytest.importorskip(package, reason=f"the server needs {package}; the extra dev brings it")
    port, lines = free_port(), []
    asking = threading.Thread(target=interrupted_in_an_answer, args=(port, signum, lines))
    asking.start()
    outcome = call("serve", f"--export={exported}", f"--port={port}", "--rows=1", f"--grace={grace}")
    asking.join()
    assert outcome.code == code, outcome.err
    assert outcome.out == f"tiny answers at http://127.0.0.1:{port}/v1/completions\n"
    assert outcome.err == "The server has ended; answers under way were ended, or given up.\n"
    if grace:  # the answer comes to its end
        assert lines[-1] == "data: [DONE]" and sum('"finish_reason": "' in line for line in lines) == 30
    else:
        error = json.loads(lines[-1].removeprefix("data: "))["error"]
        assert error["message"] == "The server is shutting down." and error["type"] == "server_error"


@pytest.mark.parametrize(
    "flags, words",
    [
        ([], "--workdir or --export: give one of them"),
        (["--export={}/none"], "cannot be read: No such file"),
        (["--export={}", "--rows=0"], "--rows: 0 is not allowed"),
        (["--export={}", "--port=99999"], "--port: 99999 of '127.0.0.1' cannot be listened at"),
        (["--export={}", "--host=256.1.1.1"], "of '256.1.1.1' cannot be listened at"),
    ],
)
def test_mistakes_get_one_sentence(tmp_path, flags, words):
    pytest.importorskip("fastapi", reason="the server needs fastapi; the extra serve brings it")
    outcome = call("serve", "--port=0", *(flag.format(tmp_path) for flag in flags))
    assert outcome.code == 2 and words in outcome.err and outcome.err.count("\n") == 1
    assert outcome.out == ""


def test_a_missing_package_is_named(monkeypatch):
    for name in [name for name in sys.modules if name.startswith("experiments.serving.")]:
        monkeypatch.delitem(sys.modules, name)  # imported anew, as by a new process
        monkeypatch.delattr(serving, name.split(".")[-1], raising=False)
    monkeypatch.setitem(sys.modules, "fastapi", None)
    outcome = call("serve", "--export=none")
    assert outcome.code == 2
    assert "serve: the package fastapi is missing; pip install 'tree_ffn[serve]'." in outcome.err


@pytest.mark.slow  # importing lm-eval alone takes seconds
@pytest.mark.filterwarnings("ignore")  # of lm-eval and what it imports
def test_lm_eval_gets_the_same_from_the_server_as_in_process(address, model, tmp_path, monkeypatch):
    """Its `local-completions` and our adapter, on the same tasks; and its texts are the library's."""
    pytest.importorskip("fastapi", reason="the server needs fastapi; the extra serve brings it")
    pytest.importorskip("lm_eval", reason="lm_eval is not installed (pip install 'tree_ffn[eval]')")
    for package in ("tenacity", "aiohttp"):
        pytest.importorskip(package, reason=f"lm-eval[api] needs {package} (the extra `eval`)")
    data, cache = questions_data.write(tmp_path / "data"), str(tmp_path / "cache")
    planned = questions.plan(["arc_easy", "boolq"], "0", str(data))
    from experiments.lm_harness.harness import HarnessModel

    in_process = recorded(HarnessModel, monkeypatch)
    # lm-eval asks a server for tokens without those that a model's texts begin with.
    plain = model._replace(begins_with=[])
    # The first two questions: a client cuts what is longer than the context to one token less than we do.
    wanted = questions.answer(plain, planned, data=str(data), cache=cache, limit=2)

    import lm_eval
    from lm_eval.api.instance import Instance
    from lm_eval.models.openai_completions import LocalCompletionsAPI
    from lm_eval.tasks import TaskManager

    over_http = recorded(LocalCompletionsAPI, monkeypatch)
    lm = LocalCompletionsAPI(
        base_url=f"{address}/v1/completions", model="tiny", max_length=96, batch_size=3, max_retries=1
    )
    assert lm.tokenizer_backend == "remote"
    found = lm_eval.simple_evaluate(
        model=lm, tasks=["arc_easy", "boolq"], num_fewshot=0, limit=2, bootstrap_iters=0,
        task_manager=TaskManager(include_path=f"{cache}/tasks", include_defaults=False),
    )  # fmt: skip
    assert {score.task for score in wanted} == {"arc_easy", "boolq"}
    for score in wanted:
        value = found["results"][score.task][f"{score.metric},none"]
        assert value == pytest.approx(score.value, abs=1e-4)
    assert over_http.keys() == in_process.keys() and len(over_http) == 11
    for pair, (log_likelihood, greedy) in over_http.items():
        assert log_likelihood == pytest.approx(in_process[pair][0], abs=1e-4)
        assert bool(greedy) == in_process[pair][1]

    options = {"until": ["never there"], "max_gen_toks": 8, "do_sample": False}
    asked = Instance("generate_until", {}, ("tree", options), 0, metadata=("task", 0, 1))
    [ids] = batching.generate(plain.spec, plain.variables, [list(b"tree")], 8, Sampling(greedy=True))
    assert lm.generate_until([asked]) == [plain.tokenizer.decode(ids)]


def recorded(kind: type, monkeypatch) -> dict:
    """What a model of the harness will answer: {(context's ids, continuation's ids): (log p, is greedy)}."""
    answered, ask = {}, kind._loglikelihood_tokens

    def ask_and_note(self, requests, **options):
        answers = ask(self, requests, **options)
        pairs = [(tuple(context), tuple(continuation)) for _, context, continuation in requests]
        answered.update(zip(pairs, answers, strict=True))
        return answers

    monkeypatch.setattr(kind, "_loglikelihood_tokens", ask_and_note)
    return answered
