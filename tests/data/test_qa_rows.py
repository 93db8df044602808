"""Rows of questions: what is read, what counts, and what is refused."""

import json

import numpy as np
import pytest

from tree_ffn.data.qa_rows import prepare_questions, question_row
from tree_ffn.data.spec import CorpusSpec
from tree_ffn.errors import InputError


def write(path, *pairs, fields=("prompt", "answer")):
    path.write_text("".join(json.dumps(dict(zip(fields, pair))) + "\n" for pair in pairs))
    return path


def test_a_row():
    row = question_row(np.array([5, 6, 7]), np.array([8, 9]), end_id=0, row_tokens=9)
    assert row.tolist() == [-1, -6, -7, -8, 8, 9, 0, -1, -1]
    short = question_row(np.array([5, 6, 7]), np.array([8, 9]), end_id=0, row_tokens=6)
    assert short.tolist() == [-1, -7, -8, 8, 9, 0]  # a long prompt loses its beginning
    assert question_row(np.array([5]), np.array([8, 9]), 0, 4).tolist() == [-1, 8, 9, 0]


def test_files_and_splits(tmp_path):
    pairs = [(f"{n} and {n}?", str(2 * n)) for n in range(60)]
    path = write(tmp_path / "sums.jsonl", *pairs)
    spec = CorpusSpec(corpus="files", files=str(path), valid_share=0.25)
    data = prepare_questions(spec, 17, "prompt", "answer")
    assert len(data.train) + len(data.valid) == 60 and len(data.valid) > 3
    row = data.train.rows(np.array([0]))[0]
    text = data.tokenizer.decode(np.where(row < 0, -1 - row, row).tolist())
    prompt, answer = next(pair for pair in pairs if text.startswith(pair[0]))
    assert data.tokenizer.decode(row[row >= 0].tolist()) == answer and text == prompt + answer
    assert data.meta["splits"]["train"]["tokens"] + data.meta["splits"]["valid"]["tokens"] == sum(
        len(answer) + 1 for _, answer in pairs
    )
    held = write(tmp_path / "held.jsonl", ("1?", "2"), fields=("prompt", "answer"))
    spec = CorpusSpec(corpus="files", files=f"{tmp_path}/*.jsonl", valid_files=str(held))
    named = prepare_questions(spec, 17, "prompt", "answer")
    assert (len(named.train), len(named.valid)) == (60, 1)


@pytest.mark.parametrize(
    "line, said",
    [
        ('{"prompt": "a"}', "line 2: no texts under 'prompt' and 'answer'"),
        ('{"prompt": "a", "answer": ""}', "line 2: no texts under"),
        ('{"prompt": "a", "answer": 3}', "line 2: no texts under"),
        ("no", "line 2 is not JSON that can be read: expecting value at character 1"),
        ("[1]", "line 2: no texts under"),
        (
            '{"prompt": "a", "answer": "a long one indeed"}',
            "line 2: the answer has 17 tokens; .* has room for 15",
        ),
    ],
)
def test_lines_that_are_refused(tmp_path, line, said):
    path = tmp_path / "a.jsonl"
    path.write_text('{"prompt": "a", "answer": "b"}\n' + line + "\n")
    with pytest.raises(InputError, match=said):
        prepare_questions(CorpusSpec(corpus="files", files=str(path)), 17, "prompt", "answer")


def test_files_that_are_refused(tmp_path):
    ask = lambda **fields: prepare_questions(CorpusSpec(**fields), 17, "prompt", "answer")
    with pytest.raises(InputError, match="data.files: '' is not allowed with finetune.task='qa'"):
        ask()
    (tmp_path / "a.txt").write_text("x")
    with pytest.raises(InputError, match="is plain text; use JSON lines"):
        ask(corpus="files", files=f"{tmp_path}/a.txt")
    path = write(tmp_path / "a.jsonl", ("1?", "2"))
    with pytest.raises(InputError, match="no question is left for the split 'valid'"):
        ask(corpus="files", files=str(path), valid_share=1e-9)
