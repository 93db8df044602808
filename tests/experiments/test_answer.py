"""Questions that one machine asks and another answers: the same answers as where both are one."""

import json
import re

import pytest

from experiments.common import loaded
from experiments.lm_eval import answering
from experiments.reporting.record import load_results
from experiments.tables import render
from tests.experiments import questions_data
from tests.experiments.lm_eval.test_questions import EXPECTED, needs_harness
from tests.experiments.programs import call
from tests.experiments.reporting.test_tables import cells
from tree_ffn.errors import InputError
from tree_ffn.inference.batching import Request
from tree_ffn.inference.sampling import Sampling

GREEDY = Sampling(greedy=True)


def question_file(path, model, answerer):
    answering.write_lines(str(path), answering.head_of(model), list(answerer.questions.values()), "ask")


def test_answers_come_back_as_the_model_gives_them(exported, tmp_path):
    """Through two files and the program; each question is asked once."""
    model = loaded.load(None, str(exported))
    pairs = [row[:2] for case in EXPECTED["opt"].values() for row in case.get("likelihoods", [])][:40]
    requests = [Request(tuple(model.prompt(text)), n, GREEDY) for text, n in (("One", 5), ("Two and", 9))]
    stops = [[], ["e", "\n"]]
    ask = answering.Asked()
    assert ask.likelihoods([*pairs, pairs[0]]) == [(0.0, False)] * (len(pairs) + 1)
    assert ask.texts(requests, stops) == ["", ""]
    unique = {(tuple(context), tuple(continuation)) for context, continuation in pairs}
    assert len(ask.questions) == len(unique) + len(requests)
    question_file(tmp_path / "asked.jsonl.xz", model, ask)
    files = f"--asked={tmp_path}/asked.jsonl.xz", f"--to={tmp_path}/answers.jsonl"
    results = f"--results={tmp_path}/rows.jsonl"
    outcome = call("answer", *files, f"--export={exported}", results, "--row=tiny")
    assert outcome.code == 0 and f"{len(unique) + 2:,} questions answered" in outcome.out, outcome.err
    (line,) = cells(render(f"{tmp_path}/rows.jsonl"), "`tiny`")
    tokens = sum(map(len, [part for pair in unique for part in pair] + [one.prompt for one in requests]))
    assert line[1:3] == [str(len(ask.questions)), f"{tokens:,}"]
    answers, own = answering.Answers.read(f"{tmp_path}/answers.jsonl"), answering.Answering(model)
    got, want = answers.likelihoods(pairs), own.likelihoods(pairs, quiet=True)
    assert [one[1] for one in got] == [one[1] for one in want]
    assert [one[0] for one in got] == pytest.approx([one[0] for one in want], abs=1e-4)
    assert answers.texts(requests, stops) == own.texts(requests, stops, quiet=True)
    assert answers.facts == json.loads(json.dumps(model.facts)) and answers.device == "cpu"
    with pytest.raises(InputError, match="has no answer to a question of this task"):
        answers.texts(requests, [["x"], []])


@needs_harness
@pytest.mark.filterwarnings("ignore")  # of what the harness imports
def test_scores_are_those_of_asking_the_model_itself(exported, tmp_path):
    data = questions_data.write(tmp_path / "data")
    tasks = [
        "--tasks=arc_easy,lambada_openai,squad,wikitext2", f"--task_data={data}",
        f"--task_cache={tmp_path}/cache",
    ]  # fmt: skip
    tokenizer = f"--tokenizer={exported}/tokenizer.json"
    model = loaded.load(None, str(exported))
    where = [f"--context={model.spec.max_seq_len}", f"--begins_with={','.join(map(str, model.begins_with))}"]

    def scores(*flags):
        outcome = call("evaluate", *tasks, *flags)
        assert outcome.code == 0, outcome.err
        return outcome.out

    assert "questions: " in scores(f"--ask={tmp_path}/asked.jsonl", tokenizer, *where)
    files = f"--asked={tmp_path}/asked.jsonl", f"--to={tmp_path}/answers.jsonl.xz"
    outcome = call("answer", *files, f"--export={exported}")
    assert outcome.code == 0, outcome.err
    results = [f"--results={tmp_path}/rows.jsonl", "--row=tiny"]
    scores(f"--answers={tmp_path}/answers.jsonl.xz", tokenizer, *results)
    scores(f"--export={exported}", *results)
    rows = load_results(str(tmp_path / "rows.jsonl"))
    by_file, by_model = rows[: len(rows) // 2], rows[len(rows) // 2 :]
    for key in ("table", "metric", "config_hash", "device"):
        assert [row[key] for row in by_file] == [row[key] for row in by_model]
    # Questions that are answered in another order meet others in their batches.
    values = [row["value"] for row in by_model]
    assert [row["value"] for row in by_file] == pytest.approx(values, rel=1e-5)


@pytest.mark.parametrize(
    "change, words",
    [
        ({"context": 7}, "--asked: context of the questions is 7, the model's "),
        ({"tokenizer_sha256": "0"}, "--asked: tokenizer_sha256 of the questions is '0'"),
        ({"begins_with": [5]}, r"--asked: begins_with of the questions is \[5\], the model's \[2\]"),
    ],
)
def test_questions_of_another_model_are_refused(change, words, exported, tmp_path):
    model = loaded.load(None, str(exported))
    question_file(tmp_path / "asked.jsonl", model, answering.Asked())
    head = json.loads((tmp_path / "asked.jsonl").read_text())
    (tmp_path / "asked.jsonl").write_text(json.dumps(head | change) + "\n")
    outcome = call("answer", f"--asked={tmp_path}/asked.jsonl", f"--export={exported}", f"--to={tmp_path}/x")
    assert outcome.code == 2
    assert re.search(words, outcome.err), outcome.err
    assert not (tmp_path / "x").exists()


def test_files_of_another_kind_are_named(tmp_path):
    path = tmp_path / "notes.jsonl"
    not_ours, no_json = ", line 1 is not what", ", line 1 is not JSON"
    cases = {
        "": " is not what",
        "no JSON\n": no_json,
        "[1]\n": not_ours,
        '{"facts": {}}\n': not_ours,
        "[" * 10**5: no_json,
    }
    for text, words in cases.items():
        path.write_text(text)
        with pytest.raises(InputError, match=rf"--answers: .*notes\.jsonl{words}"):
            answering.Answers.read(str(path))


PAIR = {"context": [1], "continuation": [2]}
PROMPT = {"prompt": [1], "n_tokens": 2, "stops": ["a"], "sampling": {"greedy": True}}


@pytest.mark.parametrize(
    "question",
    [
        PAIR | {"context": 1}, PAIR | {"continuation": ["2"]}, {"continuation": [2]}, {},
        PROMPT | {"prompt": "a"}, PROMPT | {"n_tokens": "2"}, PROMPT | {"stops": [""]},
        PROMPT | {"stops": None}, PROMPT | {"seed": 0.5}, PROMPT | {"sampling": None},
        PROMPT | {"sampling": {"beams": 2}}, PROMPT | {"sampling": {"top_p": "1"}},
    ],
)  # fmt: skip
def test_questions_that_are_none_name_their_line(question, tmp_path):
    head = {"context": 9, "tokenizer_sha256": "0", "begins_with": []}
    path = tmp_path / "asked.jsonl"
    path.write_text("\n".join(map(json.dumps, [head, PAIR, PROMPT])))
    assert answering.read_asked(str(path)) == (head, [PAIR, PROMPT])
    path.write_text("\n".join(map(json.dumps, [head, PAIR, question])))
    with pytest.raises(InputError, match=r"--asked: .*asked\.jsonl, line 3 is not what"):
        answering.read_asked(str(path))


@pytest.mark.parametrize(
    "row",
    [{}, {"key": "0"}, {"key": 0, "answer": ""}, {"key": "0", "answer": [1.0]}, {"key": "0", "answer": None}],
)
def test_answers_that_are_none_name_their_line(row, tmp_path):
    head = {"facts": {}, "asked": {"context": 9, "tokenizer_sha256": "0", "begins_with": []}}
    path = tmp_path / "answers.jsonl"
    for lines, n in (([head, {"key": "0", "answer": [-0.5, True]}, row], 3), ([head | {"asked": row}], 1)):
        path.write_text("\n".join(map(json.dumps, lines)))
        with pytest.raises(InputError, match=rf"--answers: .*answers\.jsonl, line {n} is not what"):
            answering.Answers.read(str(path))
