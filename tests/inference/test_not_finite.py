"""Scores that are NaN or infinite never become a token, a probability or a likelihood; they fail alone."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest

from tests.models.kinds import KINDS, forward, model_spec, random_variables
from tree_ffn.errors import NotFinite
from tree_ffn.inference import batching, decode, scoring
from tree_ffn.inference.batching import Batch, Request
from tree_ffn.inference.sampling import NO_TOKEN, Sampling, keys, rules, sample

GREEDY, PLAIN = Sampling(greedy=True), Sampling()
HOT = 21  # the token that the models below cannot read
HEALTHY, BAD = ((1, 2, 3), (7,), (4, 5, 6, 7, 8)), (3, HOT, 4)


def hot_model(kind="dense", **fields):
    """A model that overflows where it reads `HOT`, and that never takes it for likely."""
    spec = model_spec(KINDS[kind], **fields)
    variables = random_variables(spec)
    embed = variables["params"]["embed"]
    # The last norm's bias makes the scores of HOT, which are finite, the lowest of all.
    rows, bias = embed["tokens"], jnp.zeros(spec.width).at[0].set(50.0)
    hot = jnp.zeros(spec.width).at[0].set(-1e30)
    ln_f = {"scale": variables["params"]["ln_f"]["scale"] * 0.1, "bias": bias}
    params = {**variables["params"], "embed": {**embed, "tokens": rows.at[HOT].set(hot)}, "ln_f": ln_f}
    return spec, {**variables, "params": params}


@pytest.mark.parametrize("rule", [GREEDY, PLAIN, Sampling(top_k=2, top_p=0.5)])
def test_a_row_of_scores_that_are_none_has_no_token(rule):
    good = [0.0, 5.0, 1.0]
    none = [[0.0, np.nan, 1.0], [np.inf, 0.0, 1.0], [-np.inf] * 3]
    rows = [good, *none, [-np.inf, 5.0, -np.inf], [-3e38, 3e38, 0.0]]

    def choose(rows):
        n = len(rows)
        return sample(jnp.asarray(rows), keys([3] * n), jnp.zeros(n, jnp.int32), rules([rule] * n)).tolist()

    found = choose(rows)
    assert found[1:4] == [NO_TOKEN] * 3
    assert found[0] == choose([good])[0] and found[4:] == [1, 1]


LIKE_OTHERS = ("dense", "straight_through", "hard", "leaf_softmax")


@pytest.mark.parametrize(
    "kind",
    ["pruned"] + [pytest.param(kind, marks=pytest.mark.slow) for kind in ("leaf", *LIKE_OTHERS)],
)
def test_one_request_fails_alone(kind):
    spec, variables = decode.for_decoding(*hot_model(kind))
    assert np.isfinite(forward(spec)(variables, np.asarray([HEALTHY[0]]))[0]).all()
    alone = [batching.generate(spec, variables, [one], 5, GREEDY)[0] for one in HEALTHY]
    requests = [Request(ids, 5, GREEDY) for ids in (HEALTHY[0], BAD, *HEALTHY[1:])]
    a_batch, made = Batch(spec, variables), {one: [] for one in requests}
    for one in requests:
        a_batch.add(one)
    while len(a_batch):
        for event in a_batch.step():
            made[event.request].append(event)
    (failed,) = made.pop(requests[1])
    assert failed.last and failed.token is None
    assert "token 1 after a prompt of 3: the model's scores are NaN or infinite" in str(failed.failed)
    assert [[event.token for event in its] for its in made.values()] == alone
    assert not any(event.failed for its in made.values() for event in its)


def test_a_request_that_overflows_under_way_fails_then():
    """Position 6 cannot be read; a shorter neighbour never comes there."""
    spec, variables = decode.for_decoding(*hot_model(max_seq_len=16))
    positions = variables["params"]["embed"]["positions"]
    variables["params"]["embed"]["positions"] = positions.at[6, 0].set(1e30)
    long, short = Request((1, 2, 3, 4), 8, PLAIN), Request((5,), 4, PLAIN)
    a_batch, made = Batch(spec, variables), {long: [], short: []}
    a_batch.add(long)
    a_batch.add(short)
    while len(a_batch):
        for event in a_batch.step():
            made[event.request].append(event)
    assert [bool(event.failed) for event in made[long]] == [False, False, False, True]
    assert "token 4 after a prompt of 4" in str(made[long][-1].failed)
    assert [bool(event.failed) for event in made[short]] == [False] * 4


@pytest.mark.parametrize("n_tokens", [0, 1])
def test_scores_of_a_prompt_are_numbers_or_none(n_tokens):
    spec, variables = decode.for_decoding(*hot_model())
    a_batch = Batch(spec, variables)
    requests = [Request(ids, n_tokens, GREEDY, scored=True, n_top=2) for ids in (BAD, HEALTHY[2])]
    for one in requests:
        a_batch.add(one)
    bad, good = a_batch.step()
    assert bad.failed and bad.prompt is None and bad.scores is None
    assert not good.failed and good.prompt is not None and good.prompt.is_finite
    with pytest.raises(NotFinite, match="prompt of 3"):
        bad.checked()


def test_likelihoods_are_numbers_or_none():
    spec, variables = hot_model()
    pairs = [((1, 2), (3, 4)), ((5,), (6, 7, 8))]
    assert all(np.isfinite(one.log_likelihood) for one in scoring.score(spec, variables, pairs))
    with pytest.raises(NotFinite, match="^pair 1: continuation of 2 tokens: "):
        scoring.score(spec, variables, [*pairs[:1], ((5,), (HOT, 7))])


@pytest.mark.parametrize("leaf", ["tokens", "w_out"])
@pytest.mark.parametrize("value", [1e30, np.nan, np.inf])
def test_weights_that_are_too_large(leaf, value):
    """Also where a norm would divide by infinity, and give every token the same scores."""
    spec = dataclasses.replace(model_spec(KINDS["dense"]), dtype="bfloat16")
    variables = random_variables(spec)
    of = variables["params"]["embed"] if leaf == "tokens" else variables["params"]["run_0"]["ffn"]
    of[leaf] = of[leaf] * value
    with pytest.raises(NotFinite, match="token 1 after a prompt of 2"):
        batching.generate(spec, variables, [[1, 2]], 3, PLAIN)
    with pytest.raises(NotFinite, match="pair 0"):
        scoring.score(spec, variables, [((1, 2), (3,))])
