"""Log-likelihoods of continuations: against the model's own scores, one pair at a time."""

import jax
import numpy as np
import pytest

from tests.models.kinds import KINDS, forward, model_spec, random_variables
from tree_ffn.errors import InputError
from tree_ffn.inference import scoring

SPEC = model_spec(KINDS["leaf"], KINDS["straight_through"])


@pytest.fixture(scope="module")
def variables():
    return random_variables(SPEC)


def alone(spec, variables, context, continuation):
    """The definition, in float64 from the logits of the one row."""
    read = [*context, *continuation][-spec.max_seq_len - 1 : -1]
    logits = logits_of(spec, variables, read)[len(read) - len(continuation) :]
    log_p = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
    total = sum(log_p[i, token] for i, token in enumerate(continuation))
    return total, all(log_p[i].argmax() == token for i, token in enumerate(continuation))


def logits_of(spec, variables, read):
    """After every token of one row, which is filled up to the context: one shape, as no token looks right."""
    row = np.zeros((1, spec.max_seq_len), np.int32)
    row[0, : len(read)] = read
    return np.asarray(forward(spec)(variables, row)[0][0, : len(read)], np.float64)


def some_pairs(rng, n):
    """Of all lengths, some too long for the context; some continuations are the likeliest."""
    sizes = rng.integers(1, SPEC.max_seq_len + 6, n), rng.integers(1, SPEC.max_seq_len - 3, n)
    return [tuple(rng.integers(0, SPEC.vocab_size, size).tolist() for size in pair) for pair in zip(*sizes)]


def test_scores_are_the_definition(variables, rng):
    pairs = some_pairs(rng, 24)
    for context, continuation in some_pairs(rng, 6):  # greedy ones
        continuation = []
        for _ in range(2):
            read = [*context, *continuation][-SPEC.max_seq_len :]
            continuation.append(int(logits_of(SPEC, variables, read)[-1].argmax()))
        if len(context) + 2 <= SPEC.max_seq_len:
            pairs.append((context, continuation))
    seen = []
    found = scoring.score(SPEC, variables, pairs, batch_tokens=64, progress=seen.append)
    wanted = [alone(SPEC, variables, *pair) for pair in pairs]
    np.testing.assert_allclose([one.log_likelihood for one in found], [w[0] for w in wanted], rtol=2e-5)
    assert [one.is_greedy for one in found] == [w[1] for w in wanted]
    assert sum(seen) == len(pairs) and any(w[1] for w in wanted) and not all(w[1] for w in wanted)


def test_more_targets_than_are_scored_at_once(variables, rng):
    pairs = some_pairs(rng, 60)
    assert sum(len(continuation) for _, continuation in pairs) > 2 * scoring.CHUNK
    found = scoring.score(SPEC, variables, pairs, batch_tokens=4096)
    wanted = [alone(SPEC, variables, *pair) for pair in pairs]
    np.testing.assert_allclose([one.log_likelihood for one in found], [w[0] for w in wanted], rtol=2e-5)
    assert [one.is_greedy for one in found] == [w[1] for w in wanted]


def test_of_equally_likely_tokens_the_first_is_greedy(variables):
    best = int(logits_of(SPEC, variables, [1, 2])[-1].argmax())
    twin = (best + 1) % SPEC.vocab_size
    tokens_VE = variables["params"]["embed"]["tokens"]
    twins = jax.tree.map(lambda leaf: leaf, variables)
    twins["params"]["embed"]["tokens"] = tokens_VE.at[twin].set(tokens_VE[best])
    found = scoring.score(SPEC, twins, [([1, 2], [best]), ([1, 2], [twin])])
    assert found[0].log_likelihood == found[1].log_likelihood
    assert [one.is_greedy for one in found] == [best < twin, twin < best]


def test_what_reads_the_same_tokens_is_read_once(variables, rng, monkeypatch):
    """All answers of one token after one context, and answers of which only the last token differs."""
    context = rng.integers(0, SPEC.vocab_size, 7).tolist()
    best = int(logits_of(SPEC, variables, context)[-1].argmax())
    pairs = [(context, [token]) for token in range(SPEC.vocab_size)] + [(context[:-2], context[-2:] + [best])]
    rows = []
    arrays = scoring._arrays
    monkeypatch.setattr(scoring, "_arrays", lambda batch, *shape: rows.extend(batch) or arrays(batch, *shape))
    found = scoring.score(SPEC, variables, pairs)
    assert len(rows) == 1
    wanted = [alone(SPEC, variables, *pair) for pair in pairs]
    np.testing.assert_allclose([one.log_likelihood for one in found], [w[0] for w in wanted], rtol=2e-5)
    assert [one.is_greedy for one in found] == [w[1] for w in wanted]
    assert [i for i, one in enumerate(found[:-1]) if one.is_greedy] == [best]


def test_what_runs_beside_a_row_changes_nothing(variables, rng):
    pairs = some_pairs(rng, 9)
    together = scoring.score(SPEC, variables, pairs, batch_tokens=160)
    one_by_one = [scoring.score(SPEC, variables, [pair], batch_tokens=160)[0] for pair in pairs]
    np.testing.assert_allclose(
        [one.log_likelihood for one in together], [one.log_likelihood for one in one_by_one], rtol=1e-6
    )


def test_few_shapes():
    rng = np.random.default_rng(0)
    sizes = list(zip(rng.integers(1, 513, 3000).tolist(), rng.integers(1, 40, 3000).tolist()))
    sizes = [(max(read, targets), targets) for read, targets in sizes]
    runs = list(scoring.batches(sizes, 512, 4096))
    assert sorted(i for rows, _ in runs for i in rows) == list(range(3000))
    # 32, 48, 64, 96 and so on to 512: the lengths alone decide.
    assert len({shape for _, shape in runs}) == len({length for _, (_, length, _) in runs}) == 9
    for rows, (n_rows, length, room) in runs:
        assert 0 < len(rows) <= n_rows and n_rows * length <= 4096
        assert all(sizes[i][0] <= length for i in rows) and sum(sizes[i][1] for i in rows) <= room


def test_hashed_experts_see_their_ids(rng):
    spec = model_spec(KINDS["leaf_hash"])
    values = random_variables(spec)
    values["routing"] = jax.tree.map(lambda salt: salt + 12345, values["routing"])
    pair = ([3, 1, 4], [1, 5])
    assert scoring.score(spec, values, [pair])[0].log_likelihood == pytest.approx(
        alone(spec, values, *pair)[0], rel=2e-5
    )


@pytest.mark.parametrize(
    "pair, words",
    [
        (([], [1]), "pair 1: its context or its continuation is empty"),
        (([1], []), "pair 1: its context or its continuation is empty"),
        (([1], [2] * 17), "pair 1: a continuation of 17 tokens does not fit the model's context of 16"),
        (([1], [23]), "pair 1: its ids are not all below the vocabulary's 23"),
        (([-1], [2]), "pair 1: its ids"),
    ],
)
def test_pairs_that_cannot_be(pair, words, variables):
    with pytest.raises(InputError, match=words):
        scoring.score(SPEC, variables, [([1], [2]), pair])
