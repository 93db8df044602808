"""Sequences that are continued together get what each would get alone."""

import jax
import numpy as np
import pytest

from tests.models.kinds import KINDS, forward, model_spec, random_variables
from tree_ffn.errors import InputError
from tree_ffn.inference import batching, decode, request
from tree_ffn.inference.batching import Batch, Request
from tree_ffn.inference.sampling import Sampling

PROMPTS = ((1, 2, 3), (7,), (4, 5, 6, 7, 8, 9, 10, 11, 3, 2, 1, 0, 14, 15, 16, 17, 18, 5), (22, 0))
RULES = (Sampling(greedy=True), Sampling(), Sampling(top_k=4, temperature=2.0), Sampling(top_p=0.7))


def model(*names, context=24):
    spec = model_spec(*(KINDS[name] for name in names), max_seq_len=context)
    return decode.for_decoding(spec, random_variables(spec))


def requests(n_tokens=5, longest=18, **fields):
    rows = enumerate(zip(PROMPTS, RULES))
    return [Request(prompt[:longest], n_tokens, rule, seed=i, **fields) for i, (prompt, rule) in rows]


def tokens_of(a_batch, new):
    """{request: its tokens}, all added at once."""
    for one in new:
        a_batch.add(one)
    found = {one: [] for one in new}
    while len(a_batch):
        for made in a_batch.step():
            found[made.request].append(made.token)
    return [found[one] for one in new]


def test_together_as_alone():
    spec, variables = model("straight_through", "leaf", context=16)
    new = requests(longest=11)
    alone = [tokens_of(Batch(spec, variables), [one])[0] for one in new]
    assert [len(tokens) for tokens in alone] == [5] * 4
    assert tokens_of(Batch(spec, variables, rows=2), new) == alone  # two wait
    greedy = batching.generate(spec, variables, [PROMPTS[0]], 5, Sampling(greedy=True))
    assert alone[0] == greedy[0]


def test_joining_and_leaving_changes_nothing_for_the_others():
    spec, variables = model("dense")
    new = requests(n_tokens=6)
    alone = [tokens_of(Batch(spec, variables), [one])[0] for one in new]
    a_batch, found = Batch(spec, variables), {one: [] for one in new}

    def step():
        for made in a_batch.step():
            found[made.request].append(made.token)

    a_batch.add(new[1])
    step()
    for one in (new[2], new[0]):
        a_batch.add(one)
    step()
    a_batch.drop(new[1])
    a_batch.add(new[3])
    a_batch.drop(new[3])  # before it was read
    while len(a_batch):
        step()
    assert [found[one] for one in new] == [alone[0], alone[1][:2], alone[2], []]
    assert a_batch.step() == []
    # The device is a step ahead of what is dropped; who comes next does not get it.
    a_batch.add(new[1])
    step()
    step()
    a_batch.drop(new[1])
    assert tokens_of(a_batch, [new[0]]) == [alone[0]]


def log_softmax(logits):
    logits = np.asarray(logits, np.float64)
    return logits - np.log(np.exp(logits).sum(-1, keepdims=True))


@pytest.mark.parametrize("most, lengths", [(request.MOST_SCORES, (2,)), (1, (0,))])
def test_scores_are_the_model_s_own(most, lengths, monkeypatch):
    monkeypatch.setattr(request, "MOST_SCORES", most)
    spec, variables = model("dense")
    for n_tokens in lengths:
        a_batch = Batch(spec, variables)
        new = requests(n_tokens, scored=True, n_top=3)
        for one in new:
            a_batch.add(one)
        made = {one: [] for one in new}
        while len(a_batch):
            for event in a_batch.step():
                made[event.request].append(event)
        for one, events in made.items():
            ids = [*one.prompt, *(e.token for e in events if e.token is not None)]
            assert len(ids) == len(one.prompt) + n_tokens
            padded = np.zeros((1, 24), np.int32)
            padded[0, : len(ids)] = ids
            logp = log_softmax(forward(spec)(variables, padded)[0])[0]
            parts = [
                events[0].prompt,
                *(jax.tree.map(lambda a: a[None], e.scores) for e in events if n_tokens),
            ]
            found = [np.concatenate(leaves) for leaves in zip(*parts)]
            positions = np.arange(len(ids) - 1)
            np.testing.assert_allclose(found[0], logp[positions, ids[1:]], atol=1e-5)
            np.testing.assert_array_equal(found[1], np.argsort(-logp[positions], axis=-1)[:, :3])
            np.testing.assert_allclose(found[2], -np.sort(-logp[positions], axis=-1)[:, :3], atol=1e-5)
            assert events[-1].last and not any(e.last for e in events[:-1])
            assert all(e.prompt is None for e in events[1:])


@pytest.mark.parametrize(
    "fields, words",
    [
        ({"prompt": ()}, "prompt: it has no tokens"),
        ({"prompt": (23,)}, "prompt: token 23 is not allowed"),
        ({"n_tokens": 0}, "tokens: 0 is not allowed"),
        ({"n_tokens": 24}, "tokens: 24 new tokens after a prompt of 1 do not fit"),
        ({"seed": -1}, "seed: -1 is not allowed"),
        ({"n_top": -1}, "n_top: -1 is not allowed"),
    ],
)
def test_requests_that_the_model_cannot_do(fields, words):
    spec, variables = model("dense")
    with pytest.raises(InputError, match=f"^{words}"):
        Batch(spec, variables).add(Request(**{"prompt": (1,), "n_tokens": 1} | fields))
    with pytest.raises(InputError, match="^rows: 0"):
        Batch(spec, variables, rows=0)
