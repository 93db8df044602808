"""Decoding with a cache equals the full forward pass; sampling does what it says."""

import dataclasses
import sys

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.models.kinds import KINDS, forward, model_spec, random_variables
from tree_ffn.errors import InputError
from tree_ffn.inference import batching, decode
from tree_ffn.inference.sampling import Sampling, rules, sample
from tree_ffn.models import Transformer

TOKENS = jnp.asarray(np.random.default_rng(1).integers(0, 23, (2, 12)), jnp.int32)
GREEDY = Sampling(greedy=True)


SLOW = pytest.mark.slow
# A dense layer of fewer units, and layers that choose as another kind here does: the cache is attention's.
LIKE_OTHERS = ("narrow", "straight_through", "random_tree", "pruned_random_tree")
LIKE_OTHERS += ("leaf_softmax", "leaf_hash", "pruned_leaf")


@pytest.mark.parametrize(
    "kind", [pytest.param(kind, marks=SLOW if kind in LIKE_OTHERS else ()) for kind in KINDS]
)
def test_cache_equals_the_full_forward_token_by_token(kind):
    spec = model_spec(KINDS[kind], KINDS[kind])
    variables = random_variables(spec)
    expected, _ = forward(spec)(variables, TOKENS)
    spec, variables = decode.for_decoding(spec, variables)
    apply = forward(spec)
    logits, _, cache = apply(variables, TOKENS[:, :5], decode.init_cache(spec, 2, 12))
    parts = [logits]
    for c in range(5, 12):
        logits, _, cache = apply(variables, TOKENS[:, c : c + 1], cache)
        parts.append(logits)
    assert int(cache.length) == 12
    np.testing.assert_allclose(np.concatenate(parts, axis=1), expected, atol=1e-5)


def test_the_form_for_decoding_scores_alike_in_bfloat16():
    spec = model_spec(
        KINDS["straight_through"], KINDS["leaf_softmax"], dtype="bfloat16", implementation="masked"
    )
    variables = random_variables(spec)
    expected, _ = forward(spec)(variables, TOKENS)
    spec, variables = decode.for_decoding(spec, variables)
    ffn = variables["params"]["run_0"]["ffn"]
    assert ffn["w_in"].dtype == jnp.bfloat16 and ffn["b_in"].dtype == jnp.float32
    np.testing.assert_array_equal(forward(spec)(variables, TOKENS)[0], expected)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_greedy_text_is_that_of_the_full_forward(kind):
    spec = model_spec(KINDS[kind])
    variables = random_variables(spec)
    apply = forward(spec)
    tokens = np.zeros((2, 12), np.int32)  # the same shape at every length: what follows is not attended to
    tokens[:, :3] = TOKENS[:, :3]
    for c in range(3, 9):
        tokens[:, c] = np.argmax(apply(variables, tokens)[0][:, c - 1], axis=-1)
    new = batching.generate(spec, variables, TOKENS[:, :3], 6, GREEDY)
    np.testing.assert_array_equal(new, tokens[:, 3:9])


def test_decoding_compiles_one_step(monkeypatch):
    chex.clear_trace_counter()
    once = chex.assert_max_traces(decode.advance, n=1)
    monkeypatch.setattr(batching, "_advance", jax.jit(once, static_argnames=("spec",)))
    spec = model_spec(KINDS["hard"])
    variables = random_variables(spec)
    for length in (2, 3, 5):  # other prompts, the same step
        assert batching.generate(spec, variables, TOKENS[:, :length], 8, GREEDY)[1][7] >= 0


def test_generation_stops_at_the_stop_token_and_at_the_context():
    spec = model_spec(KINDS["dense"])
    variables = random_variables(spec)
    whole = batching.generate(spec, variables, TOKENS[:1, :4], 12, GREEDY)
    assert len(whole[0]) == 12  # 4 + 12 fill the context of 16
    stop = whole[0][2]
    first = whole[0].index(stop)
    stopped = batching.generate(spec, variables, TOKENS[:1, :4], 12, GREEDY, stop_id=stop)
    assert stopped == [whole[0][: first + 1]]


@pytest.mark.parametrize(
    "prompt, n_tokens, words",
    [
        ([[1] * 10], 7, "tokens: 7 new tokens after a prompt of 10 .* context of 16; use at most 6,"),
        ([[1] * 17], 1, "tokens: 1 new tokens after a prompt of 17 .* context of 16; use a shorter prompt"),
        ([[]], 1, "prompt: it has no tokens"),
        ([[1, 23]], 1, "prompt: token 23 is not allowed; use 0 to 22"),
        ([[-1, 2]], 1, "prompt: token -1 is not allowed"),
    ],
)
def test_bad_requests_are_refused(prompt, n_tokens, words):
    spec = model_spec(KINDS["dense"])
    with pytest.raises(InputError, match=f"^{words}"):
        decode.check_tokens(spec, prompt[0], n_tokens)


@pytest.mark.parametrize(
    "fields", [{"temperature": 0.0}, {"top_p": 0.0}, {"top_p": 1.5}, {"top_k": -1}, {"min_p": 1.5}]
)
def test_bad_sampling_is_refused(fields):
    with pytest.raises(InputError, match=f"^{next(iter(fields))}: "):
        Sampling(**fields)


def drawn(sampling, p, n=2000):
    """Frequencies of `n` draws from probabilities `p`."""
    logits_BV = jnp.broadcast_to(jnp.log(jnp.asarray(p))[None], (n, len(p)))
    key_B, place_B = jax.random.split(jax.random.key(0), n), jnp.zeros(n, jnp.int32)
    tokens = sample(logits_BV, key_B, place_B, rules([sampling] * n))
    return np.bincount(np.asarray(tokens), minlength=len(p)) / n


def test_sampling_draws_from_what_is_kept():
    p = np.asarray([0.1, 0.4, 0.2, 0.3], np.float32)
    np.testing.assert_allclose(drawn(Sampling(), p), p, atol=0.04)
    np.testing.assert_allclose(drawn(Sampling(top_k=2), p), [0, 4 / 7, 0, 3 / 7], atol=0.04)
    # 0.4 + 0.3 reach 0.6 with the second token; the others are cut.
    np.testing.assert_allclose(drawn(Sampling(top_p=0.6), p), [0, 4 / 7, 0, 3 / 7], atol=0.04)
    np.testing.assert_allclose(drawn(Sampling(top_p=0.01), p), [0, 1, 0, 0])
    np.testing.assert_allclose(drawn(Sampling(temperature=0.5), p), p**2 / np.sum(p**2), atol=0.04)
    assert drawn(Sampling(top_k=1), p)[1] == drawn(GREEDY, p)[1] == 1
    assert drawn(Sampling(temperature=1e-300), p)[1] == 1  # far below what float32 can hold


def test_the_seed_decides():
    spec = model_spec(KINDS["dense"])
    variables = random_variables(spec)
    texts = [batching.generate(spec, variables, TOKENS[:, :3], 8, Sampling(), seed=s) for s in (0, 0, 1)]
    np.testing.assert_array_equal(texts[0], texts[1])
    assert not np.array_equal(texts[0], texts[2])


def test_few_tokens_gather(monkeypatch):
    """A decode step of one sequence runs the gather execution when none is named."""
    combine = sys.modules["tree_ffn.tree.combine"]
    used = []

    def note(name, trees):
        return lambda *args: used.append(name) or trees(*args)

    wrapped = {name: note(name, trees) for name, trees in combine.IMPLEMENTATIONS.items()}
    monkeypatch.setattr(combine, "IMPLEMENTATIONS", wrapped)
    spec = dataclasses.replace(
        model_spec(KINDS["hard"]), max_seq_len=17
    )  # a spec that no other test has compiled
    variables = random_variables(spec)
    used.clear()
    cache = decode.init_cache(spec, 1, 16)
    jax.eval_shape(Transformer(spec).apply, variables, TOKENS[:1, :1], cache)
    assert set(used) == {"gather"}
