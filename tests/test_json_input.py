"""JSON of others: read, or refused in one sentence."""

import json

import pytest

from tree_ffn.errors import InputError
from tree_ffn.json_input import check_characters, other_encoding, parse_json, parse_object


def test_values_are_those_of_python():
    value = {"a": [1, 2.5, None, True, "né\ud83d\ude42"], "b": {"c": ""}}
    text = json.dumps(value)
    assert parse_json(text, "x") == parse_json(text.encode(), "x") == json.loads(text)
    assert parse_json("\ufeff" + text, "x") == parse_json(b"\xef\xbb\xbf" + text.encode(), "x")
    assert parse_json("[NaN, -Infinity, 1e999]", "x", finite=False)[1:] == [-float("inf"), float("inf")]
    assert parse_json('{"a": 1, "a": 2}', "x", pairs=list) == [("a", 1), ("a", 2)]


@pytest.mark.parametrize(
    "text, why",
    [
        ("", "expecting value at character 1"),
        ("{", "expecting property name enclosed in double quotes at character 2"),
        ('["a\nb"]', "invalid control character at character 4"),
        ("[1] 2", "extra data at character 5"),
        ("[" * 100_000 + "]" * 100_000, "it is nested too deeply"),
        ('{"a":' * 100_000, "it is nested too deeply"),
        ("[" + "1" * 5000 + "]", "it has a number of too many digits"),
        ("[NaN]", "NaN is no number of JSON"),
        ("[-Infinity]", "-Infinity is no number of JSON"),
        ("1e999", "it has a number that is too large"),
        (b'["\xff"]', "byte 2 is not UTF-8"),
        ("[1]".encode("utf-16"), "it is UTF-16, not UTF-8"),
    ],
)
def test_what_is_not_json_is_named(text, why):
    with pytest.raises(InputError) as caught:
        parse_json(text, "a.jsonl, line 3")
    assert str(caught.value) == f"a.jsonl, line 3 is not JSON that can be read: {why}."


def test_pairs_may_refuse():
    def refuse(pairs):
        raise ValueError("a name stands there twice")

    with pytest.raises(InputError, match=r"^x is not JSON that can be read: a name stands there twice\.$"):
        parse_json('{"a": 1}', "x", pairs=refuse)
    with pytest.raises(InputError, match=r"^x is no JSON object\.$"):
        parse_object('"a"', "x")


def test_halves_of_surrogate_pairs_are_named():
    check_characters("né🙂\x00", "x")
    for half in ("\ud83d", "\ude42"):
        with pytest.raises(InputError, match=rf"^x holds \\{ascii(half)[2:-1]}, half of a surrogate pair"):
            check_characters(f"a {half} b", "x")


def test_encodings_by_their_marks():
    for encoding in ("utf-16-le", "utf-16-be", "utf-32-le", "utf-32-be"):
        assert other_encoding("\ufefftext".encode(encoding)) == encoding[:6].upper()
    assert other_encoding(b"\xef\xbb\xbftext") is other_encoding(b"") is None
