"""/v1/completions as the client of OpenAI sees it: the answers are the model's own."""

import concurrent.futures
import functools

import numpy as np
import pytest

from tests.experiments.serving.conftest import CONTEXT
from tests.models.kinds import forward
from tree_ffn.inference import batching
from tree_ffn.inference.sampling import Sampling

openai = pytest.importorskip("openai", reason="the client openai is not installed; the extra dev brings it")
END = 256


@pytest.fixture(scope="module")
def client(address):
    with openai.OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0) as client:
        yield client


@pytest.fixture(scope="module")
def create(client):
    return functools.partial(client.completions.create, model="tiny")


@pytest.fixture(scope="module")
def log_p_of(model):
    """Of ids: log p of all tokens at each place but the first, float64, by the plain forward pass."""
    apply = forward(model.spec)

    def log_p(ids):
        padded = np.zeros((1, CONTEXT), np.int32)
        padded[0, : len(ids)] = ids
        logits = np.asarray(apply(model.variables, padded)[0][0, : len(ids) - 1], np.float64)
        return logits - np.log(np.exp(logits).sum(-1, keepdims=True))

    return log_p


@pytest.mark.parametrize("kind, max_tokens", [("text", 0), ("texts", 3), ("ids", 1), ("lists of ids", 0)])
def test_echo_scores_are_the_model_s(create, model, log_p_of, kind, max_tokens):
    """A text follows what the model's texts begin with; ids are taken as they are."""
    texts = ["a tree", "é", "x" * 14] if kind == "texts" else ["a tree"]
    ids = [model.tokenizer.encode(text).tolist() for text in texts]
    prompt = {"text": texts[0], "texts": texts, "ids": ids[0], "lists of ids": [*ids, [END, 7]]}[kind]
    prompts = {"ids": ids, "lists of ids": prompt}.get(kind, [[END, *one] for one in ids])
    answer = create(prompt=prompt, echo=True, logprobs=2, max_tokens=max_tokens, temperature=0)
    assert [choice.index for choice in answer.choices] == list(range(len(prompts)))
    for choice, ids in zip(answer.choices, prompts):
        new = batching.generate(model.spec, model.variables, [ids], 3, Sampling(greedy=True))[0][:max_tokens]
        log_p, lists = log_p_of(ids + new), choice.logprobs
        places = np.arange(len(log_p))
        assert choice.text == model.tokenizer.decode(ids + new) and choice.finish_reason == "length"
        assert lists.token_logprobs[0] is None and lists.top_logprobs[0] is None
        np.testing.assert_allclose(lists.token_logprobs[1:], log_p[places, (ids + new)[1:]], atol=1e-5)
        for own, token, top, log_p_V in zip(
            lists.token_logprobs[1:], lists.tokens[1:], lists.top_logprobs[1:], log_p
        ):
            assert top[token] == own and len(top) in (2, 3)
            likeliest = sorted(top.values(), reverse=True)[:2]
            np.testing.assert_allclose(likeliest, np.sort(log_p_V)[:-3:-1], atol=1e-5)
    n_read, n_made = sum(map(len, prompts)), max_tokens * len(prompts)
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (n_read, n_made)


def test_offsets_and_names_of_tokens(create):
    lists = create(prompt="né!", echo=True, logprobs=0, max_tokens=0).choices[0].logprobs
    assert lists.tokens == ["<|endoftext|>", "n", "bytes:\\xc3", "bytes:\\xa9", "!"]
    assert lists.text_offset == [0, 0, 1, 1, 2] and lists.top_logprobs[1:] == [{}] * 4


def test_the_end_token_ends_the_text_and_is_listed(create, model):
    """With a seed that makes it, found by asking the model itself."""
    rule = Sampling(temperature=1.9)
    first = batching.generate(model.spec, model.variables, [[5, 6]] * 2048, 1, rule)
    asked = {"prompt": [5, 6], "seed": first.index([END]), "temperature": 1.9, "max_tokens": 4}
    choice = create(**asked, logprobs=0, echo=True).choices[0]
    assert choice.finish_reason == "stop" and choice.logprobs.tokens[2:] == ["<|endoftext|>"]
    assert choice.text == model.tokenizer.decode([5, 6])


SAMPLED = {"temperature": 1.5, "top_p": 0.9, "max_tokens": 12}


def test_together_as_alone(create):
    prompts = ["a", "ab" * 4, "", "tree", "x" * 14, "12345"]
    ask = lambda i: create(prompt=prompts[i], seed=i, **SAMPLED).choices[0].text
    alone = [ask(i) for i in range(6)]
    with concurrent.futures.ThreadPoolExecutor(6) as pool:
        assert list(pool.map(ask, range(6))) == alone
    assert len(set(alone)) == 6


def test_n_choices_are_those_of_the_next_seeds(create):
    texts = [create(prompt="a", seed=7 + i, **SAMPLED).choices[0].text for i in range(3)]
    answer = create(prompt=["a", "a"], seed=7, n=2, **SAMPLED)
    assert [choice.text for choice in answer.choices] == texts[:2] * 2 and texts[0] != texts[1]
    assert answer.usage.prompt_tokens == 4
    answers = [create(prompt="a", **SAMPLED).choices[0].text for _ in range(3)]  # without a seed
    assert len(set(answers)) > 1


def test_a_stream_has_the_same_text_and_scores(create):
    asked = {"prompt": ["né", "x"], "seed": 3, "logprobs": 1, "echo": True, **SAMPLED}
    whole = create(**asked)
    texts, tokens, reasons, usages = ["", ""], [[], []], [None, None], []
    for piece in create(**asked, stream=True, stream_options={"include_usage": True}):
        usages.append(piece.usage)
        for choice in piece.choices:
            assert reasons[choice.index] is None
            texts[choice.index] += choice.text
            tokens[choice.index] += zip(choice.logprobs.tokens, choice.logprobs.token_logprobs)
            reasons[choice.index] = choice.finish_reason
    assert texts == [choice.text for choice in whole.choices]
    assert reasons == [choice.finish_reason for choice in whole.choices]
    for found, choice in zip(tokens, whole.choices):
        names, values = zip(*found)
        assert list(names) == choice.logprobs.tokens and values[0] is None
        np.testing.assert_allclose(values[1:], choice.logprobs.token_logprobs[1:], atol=1e-5)
    assert usages[-1] == whole.usage and set(usages[:-1]) == {None}


def test_text_ends_before_a_stop(create):
    text = create(prompt="tree", seed=5, **SAMPLED).choices[0].text
    stop = text[4:6]
    for extra in ({}, {"stream": True}):
        answer = create(prompt="tree", seed=5, stop=["never there", stop], logprobs=1, **SAMPLED, **extra)
        choices = [c for piece in (answer if extra else [answer]) for c in piece.choices]
        assert "".join(choice.text for choice in choices) == text[: text.index(stop)]
        assert choices[-1].finish_reason == "stop"
        offsets = [offset for choice in choices for offset in choice.logprobs.text_offset]
        assert all(offset < text.index(stop) for offset in offsets)


def test_models(client, create):
    assert [one.id for one in client.models.list()] == ["tiny"]
    assert client.models.retrieve("tiny").id == "tiny"
    with pytest.raises(openai.NotFoundError, match="'gpt' is not served here"):
        client.models.retrieve("gpt")
    with pytest.raises(openai.NotFoundError, match="use 'tiny'"):
        create(model="gpt", prompt="x")
    with pytest.raises(openai.BadRequestError, match="at most 91"):
        create(prompt="tree", max_tokens=92)
