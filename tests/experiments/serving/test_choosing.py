"""The fields that choose tokens and end texts, as OpenAI's client sends them."""

import functools

import pytest

from tests.experiments.serving.conftest import CONTEXT
from tree_ffn.inference.batching import Batch, Request
from tree_ffn.inference.penalties import Penalties
from tree_ffn.inference.sampling import Sampling

openai = pytest.importorskip("openai", reason="the client openai is not installed; the extra dev brings it")
END = 256
GREEDY = {"temperature": 0, "logprobs": 0}


@pytest.fixture(scope="module")
def create(address):
    with openai.OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0) as client:
        yield functools.partial(client.completions.create, model="tiny")


def made_by(model, request):
    a_batch, tokens = Batch(model.spec, model.variables), []
    a_batch.add(request)
    while len(a_batch):
        tokens += [made.token for made in a_batch.step()]
    return tokens


@pytest.mark.parametrize(
    "fields, extra",
    [
        ({"presence_penalty": 2.0}, {}),
        ({"frequency_penalty": -2}, {}),
        ({"logit_bias": {"97": 4, "98": -100.0, "256": -100}}, {}),
        ({}, {"repetition_penalty": 1.7}),
        ({}, {"min_p": 0.9}),
    ],
)
def test_answers_follow_the_fields(create, model, fields, extra):
    known = fields | extra
    biases = tuple(sorted((int(token), float(bias)) for token, bias in known.get("logit_bias", {}).items()))
    penalties = Penalties(
        **{name: value for name, value in known.items() if name.endswith("penalty")}, logit_bias=biases
    )
    rule, plain = Sampling(temperature=0.1, min_p=known.get("min_p", 0.0)), Sampling(temperature=0.1)
    tokens = made_by(model, Request((97, 97, 98), 40, rule, 5, penalties=penalties))
    asked = {"prompt": [97, 97, 98], "max_tokens": 40, "temperature": 0.1, "seed": 5}
    choice = create(**asked, **fields, extra_body=extra).choices[0]
    until = tokens.index(END) if END in tokens else 40
    assert choice.text == model.tokenizer.decode(tokens[:until])
    assert tokens != made_by(model, Request((97, 97, 98), 40, plain, 5))  # else the field would not be tested


def test_a_stop_token_ends_the_text_and_is_listed(create, model):
    asked = {"prompt": [97], "max_tokens": 9, **GREEDY, "logit_bias": {"256": -100}}
    tokens = made_by(
        model, Request((97,), 9, Sampling(greedy=True), penalties=Penalties(logit_bias=((256, -100.0),)))
    )
    place = next(i for i in range(1, 9) if tokens[i] not in tokens[:i])
    for extra in ({}, {"stream": True}):
        answer = create(**asked, **extra, extra_body={"stop_token_ids": [tokens[place]]})
        pieces = [piece.choices[0] for piece in answer] if extra else [answer.choices[0]]
        assert "".join(piece.text for piece in pieces) == model.tokenizer.decode(tokens[:place])
        assert pieces[-1].finish_reason == "stop"
        assert sum(len(piece.logprobs.tokens) for piece in pieces) == place + 1


@pytest.mark.parametrize("ignore", [False, True])
def test_the_end_token_can_be_ignored(create, ignore):
    answer = create(
        prompt="a", max_tokens=4, **GREEDY, logit_bias={"256": 100}, extra_body={"ignore_eos": ignore}
    )
    choice = answer.choices[0]
    assert choice.finish_reason == ("length" if ignore else "stop") and choice.text == ""
    assert answer.usage.completion_tokens == (4 if ignore else 1)


@pytest.mark.parametrize("most, n_kept", [(5, 5), (1, 1), (-1, CONTEXT - 8), (CONTEXT, 81)])
def test_a_prompt_is_cut_where_it_is_asked_for(create, most, n_kept):
    """On the left; what stands before every text stays before it, if another token has room."""
    text = "".join(chr(97 + i % 26) for i in range(200 if most == -1 else 80))
    asked = {"max_tokens": 8, "temperature": 0, "echo": True}
    extra = {"truncate_prompt_tokens": most}
    found = create(prompt=text, **asked, extra_body=extra)
    ids = [END, *text.encode()]
    wanted = [*ids[:1], *ids[len(ids) - n_kept + 1 :]] if n_kept > 1 else ids[-1:]
    assert found.usage.prompt_tokens == n_kept
    assert found.choices[0].text == create(prompt=wanted, **asked).choices[0].text
    assert create(prompt=ids, **asked, extra_body=extra).choices[0].text == (
        create(prompt=ids[-n_kept:], **asked).choices[0].text
    )
