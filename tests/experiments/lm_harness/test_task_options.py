"""How a task wants its answers made: the harness's own rules, and room for the question."""

import pytest

pytest.importorskip("lm_eval", reason="needs lm_eval; the extra eval brings it")

from lm_eval.api.instance import Instance  # pyright: ignore[reportMissingImports]
from lm_eval.models.utils import normalize_gen_kwargs  # pyright: ignore[reportMissingImports]

from experiments.common import loaded
from experiments.lm_harness.harness import HarnessModel
from experiments.lm_harness.task_options import read_options
from tree_ffn.errors import InputError


@pytest.mark.parametrize(
    "given",
    [
        {},
        {"max_new_tokens": 7},
        {"max_tokens": "7", "temperature": 0.0},
        {"max_completion_tokens": 7, "max_tokens": 8},
        {"max_new_tokens": 7, "max_gen_toks": 9, "max_completion_tokens": 2},
        {"temperature": 0.5, "top_p": 0.9, "top_k": 3, "until": "\n"},
        {"temperature": 0.5, "do_sample": False, "until": ["\n", "."]},
        {"temperature": 0.5, "do_sample": True},
    ],
)
def test_options_mean_what_they_mean_to_the_harness(given):
    ours, theirs = read_options(given, context=512), dict(normalize_gen_kwargs(given))
    assert ours.room(10, 512) == theirs["max_gen_toks"]
    assert not ours.sampling.greedy == theirs["do_sample"]
    assert ours.stops == theirs["until"]
    if theirs["do_sample"]:
        found = ours.sampling.temperature, ours.sampling.top_p, ours.sampling.top_k
        assert found == (theirs["temperature"], theirs.get("top_p", 1.0), theirs.get("top_k", 0))


def test_a_temperature_of_0_is_greedy_and_null_is_absent():
    assert read_options({"do_sample": True, "temperature": 0}, 64).sampling.greedy
    assert read_options({"temperature": None, "until": None, "max_gen_toks": None}, 64) == read_options(
        {}, 64
    )
    assert read_options({"until": ["", "x"], "num_beams": 1, "top_k": -1}, 64).stops == ["x"]


@pytest.mark.parametrize(
    "given, words",
    [
        ({"min_p": 0.1}, "min_p=0.1 is not supported; use max_gen_toks"),
        ({"max_length": 20}, "max_length=20 is not supported"),
        ({"num_beams": 4}, "num_beams=4 is not supported"),
        ({"temperature": "warm"}, "is not allowed .could not convert"),
        ({"temperature": float("nan")}, "is not allowed"),
        ({"temperature": 0.5, "top_p": 2}, "is not allowed .top_p: 2"),
        ({"top_k": "a"}, "is not allowed"),
        ({"do_sample": "yes"}, "is not allowed .do_sample: 'yes'"),
        ({"until": 5}, "is not allowed .until is a text"),
        ({"seed": -1}, "is not allowed .seed: -1"),
        ({"max_tokens": 128}, "max_tokens=128 leaves no room for a question in the model's context of 128"),
        ({"max_gen_toks": 127}, "leaves no room .*use 1 to 112"),
        ({"max_gen_toks": 0}, "max_gen_toks=0 leaves"),
    ],
)
def test_what_cannot_be_done_is_refused_by_name(given, words):
    with pytest.raises(InputError, match=f"^generation_kwargs: .*{words}"):
        read_options(given, context=128)


class Asked:
    """Notes what a model would be asked, each once."""

    def __init__(self):
        self.requests = {}

    def likelihoods(self, pairs, quiet):
        return [(0.0, False)] * len(pairs)

    def texts(self, asked, stops, quiet):
        self.requests |= {(one.prompt, one.n_tokens, one.seed): one for one in asked}
        return [""] * len(asked)


def asked_of(prompts, options, context):
    answerer = Asked()
    lm = HarnessModel(loaded.reader("bytes", context, []), answerer)
    instances = [Instance("generate_until", {}, (prompt, options), i) for i, prompt in enumerate(prompts)]
    lm.generate_until([instances[0], *instances], disable_tqdm=True)
    return lm, [(bytes(one.prompt).decode(), one.n_tokens) for one in answerer.requests.values()]


@pytest.mark.parametrize("context, room", [(40, 10), (128, 98), (257, 227), (512, 256)])
def test_a_question_has_room_where_the_task_names_no_number(context, room):
    question = "Q: what do roots drink, then?\n"
    lm, asked = asked_of([question], {"until": ["\n"]}, context)
    assert asked == [(question, room)] and lm.kept.cut == 0


def test_what_is_cut_is_counted():
    lm, asked = asked_of(["a" * 50 + "b" * 40, "short"], {"max_gen_toks": 24}, context=64)
    assert asked == [("b" * 40, 24), ("short", 24)]
    assert (lm.kept.prompts, lm.kept.tokens, lm.kept.cut, lm.kept.lost) == (3, 185, 2, 100)
    assert lm.kept.said.startswith("2 of 3 prompts lost their left end, 100 of 185 tokens (54.05%)")
    _, asked = asked_of(["a" * 50 + "b" * 56], {}, context=64)
    assert asked == [("b" * 56, 8)]  # an eighth is left for the answer


def test_contexts_of_likelihoods_are_counted_and_answers_that_do_not_fit_refused():
    lm = HarnessModel(loaded.reader("bytes", 16, []), Asked())
    ask = lambda context, answer: lm.loglikelihood(
        [Instance("loglikelihood", {}, (context, answer), 0)], disable_tqdm=True
    )
    ask("a" * 12, "b" * 5)
    assert lm.kept.cut == 0
    ask("a" * 13, "b" * 5)
    assert (lm.kept.cut, lm.kept.lost) == (1, 1)
    with pytest.raises(
        InputError, match="^answer: 'b+' has 17 tokens, which do not fit the model's context of"
    ):
        ask("a", "b" * 17)
    cut = lm.kept.cut
    lm.loglikelihood_rolling([Instance("loglikelihood_rolling", {}, ("c" * 50,), 0)], disable_tqdm=True)
    assert lm.kept.cut == cut  # windows read all


def test_a_question_that_is_asked_twice_is_sampled_twice():
    _, greedy = asked_of(["one", "two"], {}, context=64)
    _, sampled = asked_of(["one", "two"], {"temperature": 0.7}, context=64)
    assert [text for text, _ in greedy] == ["one", "two"]
    assert [text for text, _ in sampled] == ["one", "one", "two"]
