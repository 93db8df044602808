"""Penalties, biases and what is kept, against float64 NumPy that follows their definitions."""

import chex
import jax
import numpy as np
import pytest

from tests.models.kinds import KINDS, forward, model_spec, random_variables
from tree_ffn.errors import InputError
from tree_ffn.inference import batching, decode
from tree_ffn.inference.batching import Batch, Request
from tree_ffn.inference.penalties import Penalties, changed, changes
from tree_ffn.inference.sampling import Sampling, kept, rules

V = 23


def softmax(scores):
    p = np.exp(scores - scores.max())
    return p / p.sum()


def changed_by_hand(scores, asked, read, made):
    """Bias, then repetition, frequency and presence, a token at a time."""
    scores = np.array(scores, np.float64)
    for token, bias in asked.logit_bias:
        scores[token] += bias
    for token in {*read, *made}:
        positive = scores[token] > 0
        scores[token] *= 1 / asked.repetition_penalty if positive else asked.repetition_penalty
    for token in set(made):
        scores[token] -= asked.frequency_penalty * list(made).count(token) + asked.presence_penalty
    return scores


def probabilities_by_hand(scores, rule):
    """Temperature, top_k, top_p, min_p."""
    p = softmax(np.array(scores, np.float64) / rule.temperature)
    if rule.top_k:
        p[np.argsort(-p)[rule.top_k :]] = 0
    p /= p.sum()
    order = np.argsort(-p)
    n_kept = 1 + np.searchsorted(np.cumsum(p[order]), rule.top_p) if rule.top_p < 1 else len(p)
    p[order[n_kept:]] = 0
    p[p < rule.min_p * p.max()] = 0
    return p / p.sum()


ASKED = [
    Penalties(),
    Penalties(presence_penalty=1.5),
    Penalties(frequency_penalty=-0.7),
    Penalties(repetition_penalty=1.8),
    Penalties(0.4, 0.3, 0.6, ((2, -100.0), (9, 5.5), (V - 1, 1.0))),
]
RULES = [
    Sampling(),
    Sampling(min_p=0.2),
    Sampling(temperature=0.6, min_p=0.1, top_k=5),
    Sampling(temperature=1.7, top_p=0.8, min_p=0.3, top_k=9),
    Sampling(min_p=1.0),
]


@pytest.mark.parametrize("asked", ASKED)
def test_the_distribution_is_the_one_defined(asked):
    rng = np.random.default_rng(3)
    scores_BV = rng.normal(0, 3, (len(RULES), V)).astype(np.float32)
    read, made = (1, 2, 3, 3), (3, 4, 4, 9, 4)
    rows = [(asked, read, made)] * len(RULES)
    found_BV = changed(scores_BV, changes(rows, V))
    found_BV = np.asarray(jax.nn.softmax(kept(found_BV, rules(RULES))))
    for scores, found, rule in zip(scores_BV, found_BV, RULES):
        wanted = probabilities_by_hand(changed_by_hand(scores, asked, read, made), rule)
        np.testing.assert_array_equal(found > 0, wanted > 0)
        np.testing.assert_allclose(found, wanted, atol=1e-5)


@pytest.mark.slow
def test_batches_follow_each_row_s_own_history():
    """Rows with and without penalties, joining and leaving, take what the plain forward pass says."""
    spec = model_spec(KINDS["dense"], max_seq_len=24)
    variables = random_variables(spec)
    apply, greedy = forward(spec), Sampling(greedy=True)
    prompts = ((1, 2, 3), (7, 7), (5,), (4, 9, 2, 11), (8, 1))
    new = [
        Request(prompt, 5 + i, greedy, n_top=0, penalties=asked)
        for i, (prompt, asked) in enumerate(zip(prompts, ASKED))
    ]
    a_batch = Batch(*decode.for_decoding(spec, variables), rows=3)
    found, waiting = {one: [] for one in new}, list(new)
    while waiting or len(a_batch):
        if waiting:
            a_batch.add(waiting.pop(0))
        for event in a_batch.step():
            found[event.request].append(event)
    for one in new:
        made: list[int] = []
        for event in found[one]:
            ids = [*one.prompt, *made]
            padded = np.zeros((1, 24), np.int32)
            padded[0, : len(ids)] = ids
            scores = np.asarray(apply(variables, padded)[0][0, len(ids) - 1], np.float64)
            made.append(int(np.argmax(changed_by_hand(scores, one.penalties, one.prompt, made))))
            assert event.token == made[-1]
            # What is told is the model's own.
            np.testing.assert_allclose(event.scores.log_p, np.log(softmax(scores)[event.token]), atol=1e-5)
    plain = batching.generate(spec, variables, prompts[1:], 5, greedy)
    assert any([e.token for e in found[one]][:5] != tokens for one, tokens in zip(new[1:], plain))


def test_other_penalties_need_no_other_program(monkeypatch):
    chex.clear_trace_counter()
    once = chex.assert_max_traces(decode.advance, n=1)
    monkeypatch.setattr(batching, "_advance", jax.jit(once, static_argnames=("spec",)))
    spec = model_spec(KINDS["dense"])
    a_batch = Batch(spec, random_variables(spec))
    for asked in ASKED[1:]:
        a_batch.add(Request((1, 2), 4, penalties=asked))
        while len(a_batch):
            a_batch.step()


@pytest.mark.parametrize(
    "fields",
    [
        {"presence_penalty": float("inf")},
        {"frequency_penalty": float("nan")},
        {"repetition_penalty": 0.0},
        {"repetition_penalty": float("nan")},
        {"logit_bias": ((-1, 1.0),)},
        {"logit_bias": ((1, float("nan")),)},
    ],
)
def test_bad_penalties_are_refused(fields):
    with pytest.raises(InputError, match=f"^{next(iter(fields))}: "):
        Penalties(**fields)


def test_a_bias_beyond_the_vocabulary_is_refused():
    request = Request((1,), 1, penalties=Penalties(logit_bias=((V, 1.0),)))
    with pytest.raises(InputError, match="^logit_bias: token 23 is not allowed; use 0 to 22"):
        request.check(model_spec(KINDS["dense"]))
