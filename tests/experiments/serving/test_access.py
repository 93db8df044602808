"""Who may ask, and what is counted."""

import pytest

from tests.experiments.programs import call
from tests.experiments.serving.conftest import KEY

httpx = pytest.importorskip("httpx", reason="httpx is not installed; the extra dev brings it")


@pytest.fixture(scope="module")
def http(chatting):
    with httpx.Client(base_url=chatting, timeout=120) as client:
        yield client


def with_key(key):
    return {"Authorization": f"Bearer {key}"}


WRONG = [{}, with_key("wrong"), {"Authorization": "Bearer"}, {"Authorization": KEY}, with_key("é")]


@pytest.mark.parametrize("headers", WRONG)
def test_without_the_key_nothing_is_told(http, headers):
    headers = {name: value.encode() for name, value in headers.items()}
    for path in ("/v1/models", "/metrics", "/tokenizer_info"):
        assert http.get(path, headers=headers).status_code == 401
    for path in ("/v1/completions", "/v1/chat/completions", "/tokenize", "/detokenize"):
        answer = http.post(path, headers=headers, json={"prompt": "a"})
        assert answer.status_code == 401 and answer.headers["WWW-Authenticate"] == "Bearer"
        error = answer.json()["error"]
        assert (error["type"], error["code"]) == ("invalid_request_error", "invalid_api_key")
    assert http.get("/health", headers=headers).status_code == 200


def test_the_client_of_openai_sends_the_key(chatting):
    openai = pytest.importorskip("openai", reason="the client openai is not installed")
    for key, known in ((KEY, True), ("wrong", False)):
        with openai.OpenAI(base_url=f"{chatting}/v1", api_key=key, max_retries=0) as client:
            if known:
                assert client.models.list().data
            else:
                with pytest.raises(openai.AuthenticationError, match="API key is missing or wrong"):
                    client.models.list()


def counts(http):
    """{(name, labels): value} of /metrics."""
    parser = pytest.importorskip("prometheus_client.parser")
    answer = http.get("/metrics", headers=with_key(KEY))
    assert answer.headers["content-type"].startswith("text/plain; version=")
    samples = [s for family in parser.text_string_to_metric_families(answer.text) for s in family.samples]
    return {(s.name, tuple(sorted(s.labels.items()))): s.value for s in samples}


def test_what_is_counted(http):
    path = "/v1/completions"
    before = counts(http)
    asked = {"prompt": [97, 98], "max_tokens": 5, "n": 2, "logit_bias": {"256": -100}}
    for body, status in ((asked, 200), (asked | {"stream": True}, 200), ({"n": 0}, 400)):
        assert http.post(path, headers=with_key(KEY), json=body).status_code == status
    assert http.get("/none/such").status_code == 404
    now = counts(http)
    grown = lambda name, **labels: (
        now[f"tree_ffn_{name}", tuple(sorted(labels.items()))]
        - before.get((f"tree_ffn_{name}", tuple(sorted(labels.items()))), 0)
    )
    assert grown("requests_total", path=path, status="200") == 2
    assert grown("requests_total", path=path, status="400") == 1
    assert grown("requests_total", path="none", status="404") == 1
    assert grown("prompt_tokens_total") == 4 and grown("generation_tokens_total") == 20
    assert grown("request_seconds_count", path=path) == 3 and grown("first_token_seconds_count") == 4
    assert now["tree_ffn_sequences_running", ()] == now["tree_ffn_sequences_waiting", ()] == 0


@pytest.mark.parametrize("key", ["", "two words", "é", "a\nb"])
def test_keys_that_no_client_can_send(key, monkeypatch):
    outcome = call("serve", "--export=none", f"--api_key={key}")
    assert outcome.code == 2 and "--api_key: use at least one character" in outcome.err
    monkeypatch.setenv("TREE_FFN_API_KEY", key)
    outcome = call("serve", "--export=none")
    assert outcome.code == 2 and "TREE_FFN_API_KEY: use at least one character" in outcome.err
