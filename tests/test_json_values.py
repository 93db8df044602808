"""JSON values from a stream, however it is cut."""

import itertools
import json
import tracemalloc

import pytest

from tree_ffn import json_input
from tree_ffn.errors import InputError
from tree_ffn.json_input import json_values

VALUES = [
    {"a": 'x\n"{[,é🙂', "b": [1, -2.5e3, None, True, False]},
    {},
    {"c": {"d": [[], {"e": "]}"}]}},
    "text",
]
FORMS = {
    "lines": "\n".join(map(json.dumps, VALUES)),
    "windows": "\ufeff" + "\r\n\r\n".join(map(json.dumps, VALUES)) + "\r\n",
    "array": json.dumps(VALUES),
    "indented": json.dumps(VALUES, indent=2, ensure_ascii=False) + "\n",
    "arrays": json.dumps(VALUES[:2]) + "[]\n [ ]" + json.dumps(VALUES[2:]),
    "indented objects": "\n".join(json.dumps(value, indent=1) for value in VALUES),
}


def cut(text, size):
    return [text[i : i + size] for i in range(0, len(text), size)]


@pytest.mark.parametrize("size", [1, 2, 3, 7, 16, 1000])
@pytest.mark.parametrize("form", FORMS)
def test_values_do_not_depend_on_parts(form, size):
    assert [value for _, value in json_values(cut(FORMS[form], size), "x")] == VALUES
    assert list(json_values([], "x")) == list(json_values([" \n"], "x")) == []


@pytest.mark.parametrize("size", [1, 5, 1000])
def test_lines(size):
    text = '\n{"a":\n1}\n\n{"b": "\\n"}\n'
    assert [line for line, _ in json_values(cut(text, size), "x")] == [2, 5]
    assert [line for line, _ in json_values(cut("[\n{},\n{}, {}\n]\n", size), "x")] == [2, 3, 3]


@pytest.mark.parametrize("size", [1, 4, 1000])
@pytest.mark.parametrize(
    "text, line",
    [
        ('{"a": 1}\n{"a"\n', 2), ('{"a": 1}\n{"a": "no end}\n', 2), ('{}\n{"a": tru}\n{}', 2),
        ("{}\nrubbish", 2),
        ("[{}\n{}]", 2), ("[{},\n]", 2), ("[{},\n{}", 2), ("[", 1), ("{}]", 1), ('{}\n{"a": "\\x"}', 2),
        ("{}\n" + "[" * 3 + "{" * 9, 2), ('{"a": "one\ntwo"}', 1),
    ],
)  # fmt: skip
def test_what_is_no_json_is_named(text, line, size):
    with pytest.raises(InputError, match=f"^x, line {line} is not JSON that can be read: ."):
        list(json_values(cut(text, size), "x"))


def test_a_large_array_is_not_held():
    element = json.dumps({"text": "x" * 1000})
    parts = itertools.chain(["["], itertools.repeat(f"{element},", 20_000), [f"{element}]"])
    tracemalloc.start()
    n = sum(1 for _ in json_values(parts, "x"))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert n == 20_001 and peak < 1e6


def test_a_value_that_is_too_long_is_refused(monkeypatch):
    monkeypatch.setattr(json_input, "MOST_CHARS", 1 << 20)
    with pytest.raises(InputError, match="^x, line 1 has a value of more than 1 Mi characters"):
        list(json_values(('{"a": "', *["x" * 1000] * 5000), "x"))
