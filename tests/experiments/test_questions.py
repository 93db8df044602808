"""Question answering: scores equal to those of the harness's own backend, prompts, task files, mistakes."""

import importlib.util
import json
import re

import numpy as np
import pytest

from experiments import loaded, questions, task_files
from experiments.tasks import functions
from tests.experiments import make_harness_fixture, questions_data
from tests.experiments.make_harness_fixture import FIXTURE, SHOTS, TASKS
from tests.experiments.programs import call
from tree_ffn.errors import InputError
from tree_ffn.models import batch, export, pretrained, scoring
from tree_ffn.models.sampling import Sampling

EXPECTED = json.loads((FIXTURE / "expected.json").read_text())
needs_harness = pytest.mark.skipif(
    importlib.util.find_spec("lm_eval") is None, reason="lm_eval is not installed (requirements-eval.txt)"
)
needs_torch = pytest.mark.skipif(
    not all(map(importlib.util.find_spec, ("torch", "transformers", "lm_eval"))),
    reason="torch is not installed",
)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return questions_data.write(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """The fixture's checkpoint in our own form."""
    spec, variables, _ = pretrained.load(str(FIXTURE))
    directory = tmp_path_factory.mktemp("model") / "export"
    export.save(str(directory), spec, variables, str(FIXTURE / "tokenizer.json"))
    return directory


def test_scores_are_those_of_the_backend_of_transformers(exported):
    """Log-likelihoods within 1e-4 of PyTorch's, of contexts that fit and of some that lose their left end."""
    model = loaded.load(None, str(exported), str(FIXTURE / "tokenizer.json"))
    pairs = [(context, continuation) for context, continuation, *_ in EXPECTED["requests"]]
    found = scoring.score(model.spec, model.variables, pairs)
    wanted = [log_likelihood for _, _, log_likelihood, _ in EXPECTED["requests"]]
    np.testing.assert_allclose([one.log_likelihood for one in found], wanted, atol=1e-4, rtol=1e-6)
    assert [one.is_greedy for one in found] == [greedy for *_, greedy in EXPECTED["requests"]]
    assert any(len(context) + len(continuation) > 97 for context, continuation in pairs)


@needs_harness
def test_the_harness_gets_the_same_through_our_adapter(exported, data, tmp_path, monkeypatch):
    """Its requests, in its order; and the whole text in windows."""
    from experiments import harness

    asked, rolling = [], []
    plain, whole = harness.HarnessModel._loglikelihood_tokens, harness.HarnessModel.loglikelihood_rolling

    def record(self, requests, *args, **options):
        answers = plain(self, requests, *args, **options)
        asked.extend([*request[1:], *answer] for request, answer in zip(requests, answers))
        return answers

    def record_rolling(self, requests, *args, **options):
        rolling.extend(whole(self, requests, *args, **options))
        return rolling

    monkeypatch.setattr(harness.HarnessModel, "_loglikelihood_tokens", record)
    monkeypatch.setattr(harness.HarnessModel, "loglikelihood_rolling", record_rolling)
    model = loaded.load(None, str(exported), str(FIXTURE / "tokenizer.json"))
    for name in TASKS:
        planned = questions.plan([name], str(SHOTS.get(name, 0)), str(data))
        questions.answer(model, planned, data=str(data), cache=str(tmp_path), limit=None)
    assert [row[:2] for row in asked] == [row[:2] for row in EXPECTED["requests"]]
    np.testing.assert_allclose(
        [row[2] for row in asked], [row[2] for row in EXPECTED["requests"]], atol=1e-4, rtol=1e-6
    )
    np.testing.assert_allclose(rolling, [EXPECTED["rolling"]], rtol=1e-6)


@needs_torch
def test_the_fixture_is_what_its_script_makes(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
    make_harness_fixture.make(tmp_path / "made")
    made = json.loads((tmp_path / "made/expected.json").read_text())
    assert [row[:2] for row in made["requests"]] == [row[:2] for row in EXPECTED["requests"]]
    np.testing.assert_allclose(
        [row[2] for row in made["requests"]], [row[2] for row in EXPECTED["requests"]], rtol=1e-5
    )


PROMPTS = {
    ("arc_easy", 0): ("Question: What do bees make?\nAnswer:", " honey"),
    ("boolq", 0): ("Sun -- The Sun is a star.\nQuestion: is the sun a star?\nAnswer:", " no"),
    ("lambada_openai", 0): ("She opened the door and saw the", " cat"),
    ("piqa", 0): ("Question: dry a towel\nAnswer:", " drown it"),
    ("hellaswag", 0): ("Running: A girl ties her shoes. She", " runs."),
    ("hellaswag", 1): (
        "Baking: A man mixes dough. He bakes a loaf.\n\nRunning: A girl ties her shoes. She", " runs."
    ),
    ("webqs", 0): ("Question: where is the fox?\nAnswer:", " the"),
    ("nq_open", 0): "Answer these questions:\n\nQ: what is blue?\nA:",
    ("squad", 0): (
        "Title: Milk\n\nBackground: Milk is white. It comes from cows.\n\nQuestion: What is white?\n\nAnswer:"
    ),
}  # fmt: skip


@needs_harness
@pytest.mark.parametrize("task, shots", PROMPTS)
def test_prompts(task, shots, data, tmp_path):
    """As the harness's own definitions of these tasks (0.4.13) write them, on rows of our own."""
    from lm_eval.tasks import TaskManager

    [chosen] = task_files.choose([task])
    folder = task_files.prepare([chosen], str(data), str(tmp_path))
    made = TaskManager(include_path=folder, include_defaults=False).load([task])["tasks"][task]
    made.set_config(key="num_fewshot", value=shots)
    made.set_fewshot_seed(1234)
    made.build_all_requests(limit=1)
    arguments = made.instances[0].args
    wanted = PROMPTS[task, shots]
    assert (arguments if isinstance(wanted, tuple) else arguments[0]) == wanted


@needs_harness
def test_answers_are_the_greedy_continuation(exported, monkeypatch):
    from lm_eval.api.instance import Instance

    from experiments.harness import HarnessModel

    model = loaded.load(None, str(exported), str(FIXTURE / "tokenizer.json"))
    lm = HarnessModel(model.spec, model.variables, model.tokenizer)
    prompts = ["One", "and two", "Two", "Three and four"]
    ask = lambda **options: lm.generate_until(
        [
            Instance("generate_until", {}, (prompt, {"max_gen_toks": 9, **options}), i)
            for i, prompt in enumerate(prompts)
        ],
        disable_tqdm=True,
    )
    found = ask()
    for prompt, text in zip(prompts, found):
        ids = [int(i) for i in model.tokenizer.encode(prompt)]
        alone = batch.generate(model.spec, model.variables, [ids], 9, Sampling(greedy=True))
        assert text == model.tokenizer.decode(alone[0])
    stop = found[0][2:4]
    assert ask(until=[stop])[0] == found[0][: found[0].index(stop)]


@needs_harness
def test_the_program(exported, data, tmp_path):
    results = tmp_path / "rows.jsonl"
    outcome = call(
        "evaluate", f"--export={exported}", f"--tokenizer={FIXTURE / 'tokenizer.json'}",
        "--tasks=boolq,arc_easy,squad",
        f"--task_data={data}", f"--task_cache={tmp_path / 'cache'}",
        f"--results={results}", "--row=tiny", "--limit=2",
    )  # fmt: skip
    assert outcome.code == 0, outcome.err
    assert "boolq" in outcome.out and "0.5000" in outcome.out
    rows = {row["metric"]: row for row in map(json.loads, results.read_text().splitlines())}
    assert rows["boolq_0shot_acc_chance"]["value"] == 0.5
    assert rows["arc_easy_0shot_acc_chance"]["value"] == pytest.approx((1 / 4 + 1 / 3) / 2)
    assert rows["squad_0shot_f1"]["config"]["scored"]["task_sha256"]
    tables = call("tables", f"--results={results}")
    assert tables.code == 0 and "`tiny`" in tables.out, tables.err


def test_data_in_the_form_that_tasks_name(data, tmp_path):
    folder = task_files.prepare(
        task_files.choose(["piqa", "squad", "wikitext2", "boolq"]), str(data), str(tmp_path)
    )
    read = lambda name: [json.loads(line) for line in (tmp_path / name).read_text().split("\n") if line]
    assert read("piqa/valid.labelled.jsonl") == [{**questions_data.FILES["piqa/valid.jsonl"][0], "label": 1}]
    assert read("squad_v1.1/dev-v1.1.questions.jsonl") == [
        {"title": "Milk", "context": "Milk is white. It comes from cows.", "question": "What is white?",
         "answers": ["Milk"], "id": "m"}
    ]  # fmt: skip
    assert read("wikitext2/test.raw.whole.jsonl") == [{"text": questions_data.WHOLE}]
    # A line separator inside a string is no end of line.
    assert read("boolq/validation.jsonl") == questions_data.FILES["boolq/validation.jsonl"]
    text = (tmp_path / "tasks/piqa.yaml").read_text()
    assert folder == str(tmp_path / "tasks") and "DATA/" not in text and str(tmp_path) in text


def test_nothing_in_the_cache_is_removed(data, tmp_path):
    mine = tmp_path / "tasks/mine.txt"
    mine.parent.mkdir()
    mine.write_text("mine")
    task_files.prepare(task_files.choose(["piqa"]), str(data), str(tmp_path))
    assert mine.read_text() == "mine"
    with pytest.raises(InputError, match="--task_cache: .*mine.txt.* cannot be written"):
        task_files.prepare(task_files.choose(["piqa"]), str(data), str(mine))


def test_every_task_file_is_right():
    assert len(task_files.choose(["all"])) == 13


def test_squad_scores():
    score = lambda said: functions.squad_scores({"answers": ["the Red Fox", "fox"]}, [said])
    assert score("A red fox.") == {"exact_match": 1.0, "f1": 1.0}
    assert score("red") == {"exact_match": 0.0, "f1": pytest.approx(2 / 3)}
    assert score("") == {"exact_match": 0.0, "f1": 0.0}


def test_answers_that_begin_with_another_are_not_asked_for():
    assert functions.shortest_answers({"answers": ["b", "the den", "the", "a"]}) == ["a", "b", "the"]


GOOD = f"{task_files.TASKS}/arc_easy.yaml"


@pytest.mark.parametrize(
    "old, new, words",
    [
        ("output_type: multiple_choice\n", "", "line 2.: the file ends without the field 'output_type'"),
        ("  shots: 5\n", "", "line 2.: metadata lacks `shots`"),
        ("task: arc_easy", "task: arc easy", "line 1: task must be a name"),
        ("DATA/", "", "line 2: no data_files of the form DATA/"),
    ],
)
def test_task_files_that_lack_something(old, new, words, tmp_path):
    with open(GOOD, encoding="utf-8") as file:
        text = file.read()
    path = tmp_path / "mine.yaml"
    path.write_text(text.replace(old, new))
    with pytest.raises(InputError, match=f"mine.yaml, {words}"):
        task_files.choose(["mine"], str(tmp_path))


@pytest.mark.parametrize(
    "flags, words",
    [
        (("--tasks=arc",), "--tasks: 'arc' is not known; use one of: arc_challenge, arc_easy, boolq,"),
        (("--tasks=piqa", "--shots=two"), "--shots: 'two' is not allowed; use 0, 1, 2"),
        (("--tasks=triviaqa", "--shots=1"), "--shots: triviaqa has no examples for prompts"),
        (("--tasks=piqa", "--limit=0"), "--limit: 0 is not allowed"),
        (
            ("--tasks=openbookqa",),
            "openbookqa/test.jsonl .plain, .xz, .gz or .zst. is missing; openbookqa needs it",
        ),
        (("--tasks=piqa", "--export=absent"), "absent"),
    ],
)
@needs_harness
def test_mistakes_get_one_sentence(flags, words, exported, data, tmp_path):
    flags = (
        f"--export={exported}",
        f"--tokenizer={FIXTURE / 'tokenizer.json'}",
        f"--task_data={data}",
        *flags,
    )
    outcome = call("evaluate", f"--task_cache={tmp_path}", *flags)
    assert outcome.code == 2
    assert re.search(words, outcome.err), outcome.err


@pytest.mark.skipif(importlib.util.find_spec("lm_eval") is not None, reason="lm_eval is installed")
def test_without_the_harness_a_sentence_says_how_to_get_it(data):
    outcome = call("evaluate", "--export=any", "--tasks=piqa", f"--task_data={data}")
    assert outcome.code == 2 and "pip install -r requirements-eval.txt" in outcome.err
