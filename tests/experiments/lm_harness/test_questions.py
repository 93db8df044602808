"""Question answering: scores equal to those of the harness's own backend, prompts, task files, mistakes."""

import importlib.util
import json
import re
from pathlib import Path

import numpy as np
import pytest

from experiments.lm_harness import questions, task_fields, task_files
from experiments.lm_harness.tasks import functions
from experiments.reporting import record
from tests.experiments import make_harness_fixture, questions_data
from tests.experiments.make_harness_fixture import CASES, FIXTURE, LIKELIEST, POSITIONS, WITH_EXAMPLES, named
from tests.experiments.programs import call
from tests.models.kinds import KINDS, model_spec, random_variables
from tree_ffn.errors import InputError, NotFinite
from tree_ffn.inference import batching, scoring
from tree_ffn.inference.sampling import Sampling
from tree_ffn.models import export

EXPECTED = {family: json.loads((FIXTURE / family / "expected.json").read_text()) for family in CASES}
needs_harness = pytest.mark.skipif(
    importlib.util.find_spec("lm_eval") is None,
    reason="lm_eval is not installed (pip install 'tree_ffn[eval]')",
)
needs_torch = pytest.mark.skipif(
    not all(map(importlib.util.find_spec, ("torch", "transformers", "lm_eval"))),
    reason="torch is not installed",
)
families = pytest.mark.parametrize("family", CASES)
# Every task once, with no example and with one by turns.
ALTERNATING = [
    (task, k) for task, k in CASES["opt"] if task not in WITH_EXAMPLES or WITH_EXAMPLES.index(task) % 2 == k
]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return questions_data.write(tmp_path_factory.mktemp("data"))


def assert_same_likelihoods(found, wanted):
    """[(tokens ..., log-likelihood, greedy)]: within 1e-4, and float32's rounding of a sum of thousands."""
    assert [row[:-2] for row in found] == [row[:-2] for row in wanted]
    np.testing.assert_allclose([row[-2] for row in found], [row[-2] for row in wanted], atol=1e-4, rtol=1e-7)
    assert [row[-1] for row in found] == [row[-1] for row in wanted]


@families
def test_scores_are_those_of_the_backend_of_transformers(family, models):
    """Of the same tokens, contexts that fit and some that lose their left end; this needs no harness."""
    _, model = models[family]
    wanted = [row for case in EXPECTED[family].values() for row in case.get("likelihoods", [])]
    found = scoring.score(model.spec, model.variables, [row[:2] for row in wanted])
    assert_same_likelihoods([[*row[:2], *one] for row, one in zip(wanted, found)], wanted)
    assert any(len(row[0]) + len(row[1]) > POSITIONS + 1 for row in wanted)
    assert any(row[3] for row in wanted) and not all(row[3] for row in wanted)


@needs_harness
@pytest.mark.parametrize(
    "family, cases",
    [
        pytest.param("opt", ALTERNATING, id="opt_alternating"),
        *(pytest.param(family, CASES[family], id=family, marks=pytest.mark.slow) for family in CASES),
    ],
)
def test_the_harness_gets_the_same_through_our_adapter(family, cases, models, data, tmp_path, monkeypatch):
    """Its requests in its order, with their tokens; windows of whole texts; answers; and every metric.

    Its answers take 256 tokens of any context, and questions that they leave no room for are cut: of those
    alone the room here is its own; ours leaves room for them (test_task_options.py).
    """
    from experiments.lm_harness import harness, task_options

    ours, cut_there = task_options.Options.room, []

    def room(options, prompt, context):
        theirs = options.n_tokens or task_options.MOST_NEW_TOKENS
        cut_there.append(prompt + theirs > context)
        return theirs if cut_there[-1] else ours(options, prompt, context)

    monkeypatch.setattr(task_options.Options, "room", room)
    recorder = make_harness_fixture.recording(harness.HarnessModel)
    monkeypatch.setattr(harness, "HarnessModel", recorder)
    _, model = models[family]
    for task, shots in cases:
        recorder.answers = answers = {}
        planned = questions.plan([task], str(shots), str(data))
        scores = questions.answer(model, planned, data=str(data), cache=str(tmp_path), limit=None)
        wanted = EXPECTED[family][named(task, shots)]
        assert_same_likelihoods(answers.get("likelihoods", []), wanted.get("likelihoods", []))
        assert answers.get("rolling", []) == pytest.approx(wanted.get("rolling", []), rel=1e-6)
        assert answers.get("generated") == wanted.get("generated")
        assert {one.metric: one.value for one in scores} == pytest.approx(wanted["scores"], rel=1e-5)
    assert False in cut_there and (family == "gpt2" or True in cut_there)
    lm = recorder(model)
    lm.answers = {}
    lm.loglikelihood(make_harness_fixture.likeliest(lm), disable_tqdm=True)
    assert_same_likelihoods(lm.answers["likelihoods"], EXPECTED[family][LIKELIEST]["likelihoods"])


@needs_torch
@pytest.mark.slow
def test_the_fixture_is_what_its_script_makes(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
    make_harness_fixture.make(tmp_path / "made")
    for family, wanted in EXPECTED.items():
        made = json.loads((tmp_path / "made" / family / "expected.json").read_text())
        assert made.keys() == wanted.keys()
        for name, case in wanted.items():
            assert_same_likelihoods(made[name].get("likelihoods", []), case.get("likelihoods", []))
            assert made[name].get("generated") == case.get("generated")


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


def our_task(name, data, cache):
    """A task of ours as the harness's object."""
    from lm_eval.tasks import TaskManager

    folder = task_files.prepare(task_files.choose([name]), str(data), str(cache))
    return TaskManager(include_path=folder, include_defaults=False).load([name])["tasks"][name]


@needs_harness
@pytest.mark.parametrize("task, shots", PROMPTS)
def test_prompts(task, shots, data, tmp_path):
    """As the harness's own definitions of these tasks (0.4.13) write them, on rows of our own."""
    made = our_task(task, data, tmp_path)
    made.set_config(key="num_fewshot", value=shots)
    made.set_fewshot_seed(1234)
    made.build_all_requests(limit=1)
    arguments = made.instances[0].args
    wanted = PROMPTS[task, shots]
    assert (arguments if isinstance(wanted, tuple) else arguments[0]) == wanted


# Our rows as the harness's own tasks have them: (its folder and file, row of ours -> row of its own).
LETTERS = "ABCDE"
labelled = lambda row: {"text": row["choices"], "label": list(LETTERS[: len(row["choices"])])}
with_letters = lambda row: {**row, "choices": labelled(row), "answerKey": LETTERS[row["gold"]]}
THEIRS = {
    "arc_challenge": ("arc/arc_challenge", with_letters),
    "arc_easy": ("arc/arc_easy", with_letters),
    "boolq": ("super_glue/boolq/default", lambda row: {**row, "label": int(row["answer"])}),
    "commonsense_qa": ("commonsense_qa/default", with_letters),
    "hellaswag": (
        "hellaswag/hellaswag",
        lambda row: {
            **dict(zip(("activity_label", "ctx_a", "ctx_b"), re.split(r": | (?=\w+$)", row["query"]))),
            "endings": row["choices"], "label": str(row["gold"]),
        },
    ),
    "lambada_openai": (
        "lambada/lambada_openai", lambda row: {"text": row["context"] + " " + row["continuation"]}
    ),
    "nq_open": ("nq_open/nq_open", lambda row: row),
    "openbookqa": (
        "openbookqa/openbookqa", lambda row: {**with_letters(row), "question_stem": row["question"]}
    ),
    "piqa": ("piqa/piqa", lambda row: row),
    "triviaqa": (
        "triviaqa/default",
        lambda row: {
            "question": row["context"].removeprefix("Question: ").removesuffix("?\nAnswer:"),
            "answer": {"aliases": row["aliases"]},
        },
    ),
    "webqs": ("webqs/webqs", lambda row: {"question": row["qText"], "answers": row["answers"]}),
}  # fmt: skip


def prompt_of(task, row, example=None):
    """The harness's prompt of a row after one example or none, and what it asks."""
    examples = [example] if example else []
    task.sampler.sample = lambda *_, **__: examples
    context = task.fewshot_context(row, num_fewshot=len(examples))
    requests = task.construct_requests(row, context, metadata=(task.config.task, 0, 1))
    requests = requests if isinstance(requests, list) else [requests]
    asked = [request.args[1] for request in requests]
    return context, [one["until"] if isinstance(one, dict) else one for one in asked]


@needs_harness
@pytest.mark.parametrize("name", THEIRS)
def test_prompts_and_metrics_are_those_of_the_harness(name, data, tmp_path):
    """Its own definitions, as installed, on the same rows in its own form."""
    import datasets
    import lm_eval
    from lm_eval.api.task import ConfigurableTask
    from lm_eval.tasks._yaml_loader import load_yaml

    file, convert = THEIRS[name]
    ours = our_task(name, data, tmp_path)
    rows = list(ours.eval_docs)
    theirs_rows = datasets.Dataset.from_list([convert(row) for row in rows])
    config = load_yaml(f"{lm_eval.__path__[0]}/tasks/{file}.yaml")
    config["custom_dataset"] = lambda **_: dict.fromkeys(("train", "validation", "test"), theirs_rows)
    theirs = ConfigurableTask(config=config)
    # HellaSwag's examples are whole texts here, LAMBADA has none; the harness (0.4.13) makes none of webqs.
    has_examples = name not in ("hellaswag", "lambada_openai", "webqs")
    letter = (lambda target: LETTERS[target]) if name == "commonsense_qa" else lambda target: target
    for mine, their in zip(rows, theirs.eval_docs, strict=True):
        assert prompt_of(ours, mine) == prompt_of(theirs, their)
        if has_examples:
            examples = rows[-1], theirs.eval_docs[len(rows) - 1]
            assert prompt_of(ours, mine, examples[0]) == prompt_of(theirs, their, examples[1])
        assert letter(ours.doc_to_target(mine)) == theirs.doc_to_target(their)
    for one, other in zip(ours.config.metric_list, theirs.config.metric_list, strict=True):
        assert all(one[key] == value for key, value in other.items())
    for field in ("output_type", "description", "fewshot_delimiter"):
        assert getattr(ours.config, field) == getattr(theirs.config, field), field
    assert (ours.config.filter_list is None) == (theirs.config.filter_list is None)


@needs_harness
def test_the_prompt_of_squad_is_that_of_the_harness(data, tmp_path):
    """Of its task for v2, the only one with questions about passages of SQuAD."""
    from lm_eval.tasks.squadv2.task import SQuAD2

    ours = our_task("squad", data, tmp_path)
    for row in ours.eval_docs:
        assert prompt_of(ours, row)[0] == SQuAD2.doc_to_text(ours, row)
        assert " " + row["answers"][0] == SQuAD2.doc_to_target(ours, {"answers": {"text": row["answers"]}})


@needs_harness
def test_answers_are_the_greedy_continuation(models):
    from lm_eval.api.instance import Instance

    from experiments.lm_harness.harness import HarnessModel

    model = models["opt"][1]
    lm = HarnessModel(model)
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
        ids = lm.tok_encode(prompt)
        assert ids[0] == 2  # </s>
        alone = batching.generate(model.spec, model.variables, [ids], 9, Sampling(greedy=True))
        assert text == model.tokenizer.decode(alone[0])
    stop = found[0][2:4]
    assert ask(until=[stop])[0] == found[0][: found[0].index(stop)]


@needs_harness
def test_the_program(exported, data, tmp_path):
    results = tmp_path / "rows.jsonl"
    outcome = call(
        "evaluate", f"--export={exported}", "--tasks=boolq,arc_easy,squad",
        f"--task_data={data}", f"--task_cache={tmp_path / 'cache'}",
        f"--results={results}", "--row=tiny", "--limit=2",
    )  # fmt: skip
    assert outcome.code == 0, outcome.err
    assert "boolq" in outcome.out and "0.5000" in outcome.out
    rows = {row["metric"]: row for row in record.load_results(str(results))}
    assert rows["boolq_0shot_acc_chance"]["value"] == 0.5
    assert rows["arc_easy_0shot_acc_chance"]["value"] == pytest.approx((1 / 4 + 1 / 3) / 2)
    scored = rows["squad_0shot_f1"]["config"]["scored"]
    assert (scored["shots"], scored["limit"], scored["n"]) == (0, 2, 1)
    assert scored["task_sha256"] and len(scored["asked_sha256"]) == len(scored["data_sha256"]) == 64
    tables = call("tables", f"--results={results}")
    assert tables.code == 0 and "`tiny`" in tables.out, tables.err


@needs_harness
def test_what_was_asked_has_a_hash_of_its_own(models, data, tmp_path):
    """Of rows, prompts and answers: other examples, another number of questions, other data change it."""

    def score(data, shots="0", limit=None):
        planned = questions.plan(["arc_easy"], shots, str(data))
        where = {"data": str(data), "cache": str(tmp_path / data.name)}
        return questions.answer(models["opt"][1], planned, **where, limit=limit)[0]

    changed = questions_data.write(tmp_path / "changed")
    path = next(changed.glob("arc_easy/test.jsonl*"))
    path.unlink()
    rows = questions_data.FILES["arc_easy/test.jsonl"]
    lines = [json.dumps({**row, "gold": 1}) + "\n" for row in rows]
    (changed / "arc_easy/test.jsonl").write_text("".join(lines))
    first, again, shots, fewer, other = (
        score(data), score(data), score(data, "1"), score(data, limit=1), score(changed)
    )  # fmt: skip
    assert first == again and first.data_sha256 == shots.data_sha256 != other.data_sha256
    assert len({one.asked_sha256 for one in (first, shots, fewer, other)}) == 4
    assert len({one.sha256 for one in (first, shots, fewer, other)}) == 1


SCORED = {
    "task": "piqa", "shots": 0, "limit": None, "n": 100, "lm_eval": "0.4.13", "task_sha256": "a" * 12,
    "asked_sha256": "b" * 64, "data_sha256": "c" * 64,
}  # fmt: skip


@pytest.mark.parametrize(
    "change, words",
    [
        ({}, ""),
        ({"shots": 1}, ""),  # another column
        ({"limit": 9}, ""),  # another table
        ({"task_sha256": "x"}, "scored.task_sha256 is 'aaaaaaaaaaaa' and 'x'"),
        ({"data_sha256": "x"}, "scored.data_sha256"),
        ({"asked_sha256": "x"}, "scored.asked_sha256"),
        ({"n": 99}, "scored.n is 100 and 99"),
        ({"lm_eval": "0.5"}, "scored.lm_eval"),
    ],
)
def test_models_that_were_asked_different_questions_have_no_table(change, words, tmp_path):
    for name, scored in {"dense": SCORED, "tree_hard": SCORED | change}.items():
        stem = f"piqa_{scored['shots']}shot_acc"
        for metric, value in ((stem, 0.5), (f"{stem}_stderr", 0.05), (f"{stem}_chance", 0.5)):
            record.append_result(
                f"{tmp_path}/r.jsonl", table="t3_small", row=name, metric=metric, value=value, seed=0,
                config={"scored": scored}, unit="1", command="python -m experiments.evaluate",
            )  # fmt: skip
    outcome = call("tables", f"--results={tmp_path}/r.jsonl")
    if words:
        assert outcome.code == 2 and outcome.err.count("\n") == 1
        assert "piqa 0-shot: dense and tree_hard were asked different questions" in outcome.err
        assert words in outcome.err
    else:
        assert outcome.code == 0 and "0.5000 ± 0.0500" in outcome.out, outcome.err


def test_which_tasks_say_something_stands_under_chance(tmp_path):
    """The dense model's distance to chance, in brackets below three standard errors."""
    scores = {"piqa": {"acc": 0.58, "acc_norm": 0.5}, "arc_easy": {"acc": 0.9, "acc_norm": 0.55}}
    layers = {"converted": {"convert": {}}, "dense": {"ffn": {"kind": "dense"}}}
    for name, layer in layers.items():
        for task, values in scores.items():
            for metric, score in values.items():
                stem = f"{task}_0shot_{metric}"
                for ending, value in (("", score), ("_stderr", 0.02), ("_chance", 0.5)):
                    record.append_result(
                        f"{tmp_path}/r.jsonl", table="t3_small", row=name, metric=stem + ending, value=value,
                        seed=0, config={**layer, "scored": {**SCORED, "task": task}}, unit="1",
                        command="python -m experiments.evaluate",
                    )  # fmt: skip
    lines = call("tables", f"--results={tmp_path}/r.jsonl").out.split("\n")
    rows = [line for line in lines if line.startswith("|")]
    assert rows[0] == "|  | arc_easy, 0-shot acc_norm | piqa, 0-shot acc |"
    assert rows[2:] == [
        "| chance | 0.5000 | 0.5000 |",
        "| `dense`, standard errors above | (2.5) | 4.0 |",
        "| `dense` | 0.5500 ± 0.0200 | 0.5800 ± 0.0200 |",
        "| `converted` | 0.5500 ± 0.0200 | 0.5800 ± 0.0200 |",
    ]


def test_data_in_the_form_that_tasks_name(data, tmp_path):
    folder = task_files.prepare(
        task_files.choose(["piqa", "squad", "wikitext2", "boolq"]), str(data), str(tmp_path)
    )
    read = lambda name: [json.loads(line) for line in (tmp_path / name).read_text().split("\n") if line]
    assert read("piqa/valid.labelled.jsonl") == [
        {**row, "label": label} for row, label in zip(questions_data.FILES["piqa/valid.jsonl"], (1, 0))
    ]
    assert read("squad_v1.1/dev-v1.1.questions.jsonl") == [
        {"title": "Milk", "context": "Milk is white. It comes from cows.", "question": "What is white?",
         "answers": ["Milk"], "id": "m"}
    ]  # fmt: skip
    assert read("wikitext2/test.raw.whole.jsonl") == [{"text": questions_data.WHOLE}]
    # A line separator inside a string is no end of line.
    assert read("boolq/validation.jsonl") == questions_data.FILES["boolq/validation.jsonl"]
    text = (tmp_path / "tasks/piqa.yaml").read_text()
    assert folder == str(tmp_path / "tasks") and "DATA/" not in text and str(tmp_path) in text


@pytest.mark.parametrize(
    "name, content, words",
    [
        ("valid-labels.lst", "0\nyes\n", r"valid-labels\.lst has the label 'yes', which is no whole number"),
        (
            "valid.jsonl",
            '{"goal": "a \\ud83d"}',
            r"jsonl, line 1 holds \\ud83d, half of a surrogate pair",
        ),
        ("valid.jsonl", "[" * 100_000, r"valid\.jsonl, line 1 is not JSON .* nested too deeply"),
        ("valid.jsonl", "\n3\n", r"valid\.jsonl, line 2: no JSON object"),
    ],
)
def test_data_that_cannot_be_read(name, content, words, tmp_path):
    folder = questions_data.write(tmp_path / "data") / "piqa"
    for path in folder.glob(f"{name}*"):
        path.unlink()
    (folder / name).write_text(content)
    with pytest.raises(InputError, match=f"^--task_data: .*{words}"):
        task_files.prepare(task_files.choose(["piqa"]), str(folder.parent), str(tmp_path / "cache"))


def test_data_and_tasks_may_begin_with_a_mark(tmp_path):
    folder = questions_data.write(tmp_path / "data") / "piqa"
    rows = "".join(json.dumps(row) + "\n" for row in questions_data.FILES["piqa/valid.jsonl"])
    for path in folder.glob("valid.jsonl*"):
        path.unlink()
    (folder / "valid.jsonl").write_text("\ufeff" + rows, encoding="utf-8")
    (tmp_path / "piqa.yaml").write_text("\ufeff" + (Path(task_files.TASKS) / "piqa.yaml").read_text())
    task_files.prepare(
        task_files.choose(["piqa"], str(tmp_path)), str(folder.parent), str(tmp_path / "cache")
    )
    assert len((tmp_path / "cache/piqa/valid.labelled.jsonl").read_text().splitlines()) == 2


def test_nothing_in_the_cache_is_removed(data, tmp_path):
    mine = tmp_path / "tasks/mine.txt"
    mine.parent.mkdir()
    mine.write_text("mine")
    task_files.prepare(task_files.choose(["piqa"]), str(data), str(tmp_path))
    assert mine.read_text() == "mine"
    with pytest.raises(InputError, match="--task_cache: .*mine.txt.* cannot be written"):
        task_files.prepare(task_files.choose(["piqa"]), str(data), str(mine))


def test_every_task_file_is_right():
    files = sorted(path.stem for path in Path(task_files.TASKS).glob("*.yaml"))
    assert [task.name for task in task_files.choose(["all"])] == files


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
        ("doc_to_choice: choices\n", "", "line 8: multiple_choice needs the field 'doc_to_choice'"),
        ("{{question}}", "{{question", "line 12: a {{ has no }}"),
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
    "task, file, field",
    [
        ("arc_easy", "arc_easy/train.jsonl", "choices"),
        ("arc_easy", "arc_easy/test.jsonl", "gold"),
        ("boolq", "boolq/validation.jsonl", "question"),
        ("piqa", "piqa/valid.jsonl", "sol2"),
        ("openbookqa", "openbookqa/test.jsonl", "question"),
    ],
)
def test_rows_that_lack_a_field(task, file, field, tmp_path):
    data = questions_data.write(tmp_path / "data")
    [path] = data.glob(f"{file}*")
    first, second, *others = questions_data.FILES[file]
    lacking = {name: value for name, value in second.items() if name != field}
    path.unlink()
    for line, rows in ((2, (first, lacking, *others)), (1, (lacking, first, *others))):
        (data / file).write_text("\n".join(map(json.dumps, rows)))
        with pytest.raises(InputError, match=f"{file}, line {line}: no field '{field}', which {task} needs"):
            task_files.prepare(task_files.choose([task]), str(data), str(tmp_path / "cache"))
        assert not (tmp_path / "cache").exists()


@pytest.mark.parametrize(
    "value, said",
    [
        (None, "is null"), (3, "is a number"), (["a", 3], "is a list of a number and text"),
        ("a", "is text"), ({"a": 1}, "is an object"), (True, "is true or false"),
    ],
)  # fmt: skip
def test_fields_of_another_kind_name_their_line(value, said):
    """The harness would write them into the prompt, as None."""
    field, needs = ("choices", "a list of text") if isinstance(value, str) else ("q", "text")
    text = 'doc_to_text: "{{q}}"\ndoc_to_choice: choices\n'
    rows = [{"q": "a?", "choices": ["a", "b"], "id": n} for n in range(3)]
    rows[2]["choices"] = []  # one of anything
    task_fields.check_rows([("x, line 1", row) for row in rows], "mine", text)
    rows = [rows[0] | {field: value}, *rows]
    with pytest.raises(InputError, match=f"^x, line 1: the field '{field}' {said}; mine needs {needs}, as"):
        task_fields.check_rows([(f"x, line {i + 1}", row) for i, row in enumerate(rows)], "mine", text)


@pytest.mark.parametrize(
    "value, needed",
    [
        ('"{{passage}}\\nQ: {{question}}?"', {"passage", "question"}),
        ('"{{answer|int}}"', {"answer"}),
        ("\"{{' ' + continuation}}\"", {"continuation"}),
        ('"{{[sol1, sol2]}}"', {"sol1", "sol2"}),
        ('"{{question.strip()}} A. {{choices[0]}}"', {"question", "choices"}),
        ("!function functions.all_answers", set()),
        ('"{% for x in y %}{{x}}{% endfor %}"', set()),
    ],
)
def test_fields_that_a_template_needs(value, needed):
    assert task_fields.asked_for(f"doc_to_text: {value}\n") == (needed, set())


@pytest.mark.parametrize(
    "flags, words",
    [
        (("--tasks=arc",), "--tasks: 'arc' is not known; use one of: arc_challenge, arc_easy, boolq,"),
        (("--tasks=piqa", "--shots=two"), "--shots: 'two' is not allowed; use 0, 1, 2"),
        (("--tasks=triviaqa", "--shots=1"), "--shots: triviaqa has no examples for prompts"),
        (("--tasks=piqa", "--limit=0"), "--limit: 0 is not allowed"),
        (
            ("--tasks=openbookqa", "--task_data=tests"),
            "openbookqa/test.jsonl .plain or packed. is missing; openbookqa needs it",
        ),
        (("--tasks=piqa", "--export=absent"), "absent"),
    ],
)
@needs_harness
def test_mistakes_get_one_sentence(flags, words, exported, data, tmp_path):
    flags = (
        f"--export={exported}",
        f"--task_data={data}",
        *flags,
    )
    outcome = call("evaluate", f"--task_cache={tmp_path}", *flags)
    assert outcome.code == 2
    assert re.search(words, outcome.err), outcome.err


@pytest.mark.skipif(importlib.util.find_spec("lm_eval") is not None, reason="lm_eval is installed")
def test_without_the_harness_a_sentence_says_how_to_get_it(data):
    outcome = call("evaluate", "--export=any", "--tasks=piqa", f"--task_data={data}")
    assert outcome.code == 2 and "pip install 'tree_ffn[eval]'" in outcome.err


@needs_harness
def test_scores_that_are_no_numbers_are_no_accuracy(models, data, tmp_path):
    model = models["gpt2"][1]
    embed = model.variables["params"]["embed"]
    large = {**model.variables["params"], "embed": {**embed, "tokens": embed["tokens"] * np.float32(1e30)}}
    model = model._replace(variables={**model.variables, "params": large})
    said = {"boolq": "boolq: pair 1: ", "squad": "squad: token 1 after", "wikitext2": "wikitext2: pair"}
    for task, words in said.items():
        planned = questions.plan([task], "0", str(data))
        with pytest.raises(NotFinite, match=f"^{words}.*the model's scores are NaN or infinite"):
            questions.answer(model, planned, data=str(data), cache=str(tmp_path), limit=1)


@needs_harness
def test_what_the_context_cuts_is_said_and_recorded(data, tmp_path):
    """And a task whose answers leave no room is refused before the first task is asked."""

    def ask(positions, *words):
        spec = model_spec(KINDS["leaf"], vocab_size=257, max_seq_len=positions)
        export.save(str(tmp_path / str(positions)), spec, random_variables(spec))
        return call(
            "evaluate", f"--export={tmp_path / str(positions)}", "--tasks=boolq,squad",
            f"--task_data={data}", f"--task_cache={tmp_path / 'cache'}", *words,
        )  # fmt: skip

    rows = tmp_path / "rows.jsonl"
    refused = ask(52, f"--results={rows}", "--row=tiny")
    assert refused.code == 2 and len(refused.err.splitlines()) == 1, refused.err
    assert "squad: generation_kwargs: max_gen_toks=48 leaves no room" in refused.err and not rows.exists()
    outcome = ask(64, f"--results={rows}", "--row=tiny", f"--json={tmp_path / 'scores.json'}")
    assert outcome.code == 0, outcome.err
    assert "squad, 0 shots: 1 of 1 prompts lost their left end" in outcome.out
    scores = json.loads((tmp_path / "scores.json").read_text())["scores"]
    assert [score["kept"]["cut"] for score in scores if score["task"] == "squad"][0] == 1
    scored = {
        row["config"]["scored"]["task"]: row["config"]["scored"] for row in record.load_results(str(rows))
    }
    assert scored["squad"]["kept"]["lost"] > 0
