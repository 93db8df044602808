"""A request whose scores overflow gets one error in JSON; those beside it get their answers."""

import concurrent.futures
import json

import httpx
import pytest

from experiments.common.loaded import Loaded
from tests.experiments.serving.conftest import served
from tests.inference.test_not_finite import HOT, hot_model
from tree_ffn.data.tokenizers import load_tokenizer

BAD = {"prompt": [3, HOT, 4], "max_tokens": 5, "logprobs": 2, "echo": True}
HEALTHY = {"prompt": [5, 6, 7, 8], "max_tokens": 5, "logprobs": 2, "temperature": 0}


@pytest.fixture(scope="module")
def http():
    spec, variables = hot_model("leaf", vocab_size=257, max_seq_len=32)
    model = Loaded(spec, variables, load_tokenizer("bytes"), [], {}, "hot").for_decoding()
    with served(model) as (_, address), httpx.Client(base_url=address, timeout=120) as client:
        yield client


def strict(text: str):
    def refuse(name):
        raise AssertionError(name)

    return json.loads(text, parse_constant=refuse)


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("fields", [{}, {"logprobs": None, "echo": False}, {"prompt": [[5], [3, HOT]]}])
def test_one_error_and_healthy_neighbours(http, stream, fields):
    text_of = lambda answer: answer.json()["choices"][0]["text"]
    alone = text_of(http.post("/v1/completions", json=HEALTHY))
    with concurrent.futures.ThreadPoolExecutor(3) as pool:
        ask = lambda body: pool.submit(http.post, "/v1/completions", json=body)
        before, bad, after = ask(HEALTHY), ask({**BAD, **fields, "stream": stream}), ask(HEALTHY)
    assert text_of(before.result()) == text_of(after.result()) == alone
    answer = bad.result()
    if stream:
        assert answer.status_code == 200 and "[DONE]" not in answer.text
        events = [strict(line.removeprefix("data: ")) for line in answer.text.split("\n\n") if line]
        error = events[-1]["error"]
        assert not any("error" in event for event in events[:-1])
    else:
        assert answer.status_code == 500
        error = strict(answer.text)["error"]
    assert (error["type"], error["code"]) == ("server_error", "not_finite")
    assert "the model's scores are NaN or infinite" in error["message"]
