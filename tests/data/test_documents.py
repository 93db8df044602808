"""Cutting text into documents and segments, against the plain definition on the whole text."""

import pytest

from tree_ffn.data import documents as module
from tree_ffn.data.documents import documents, segments

END = "<|endoftext|>"
TEXTS = {
    "none": "one\ntwo\n",
    "empty": "",
    "between": f"one\n{END}\ntwo\n",
    "at both ends": f"{END}\none\n{END}\n",
    "last line unfinished": f"one\n{END}",
    "carriage returns": f"one\r\n{END}\r\ntwo\r\n{END}\r",
    "inside lines": f"one {END}\n{END} two\n {END}\n{END}{END}\n",
    "runs": f"{END}\n{END}\n\n{END}\none",
    "long lines": "x" * 50 + f"\n{END}\n" + "y" * 50 + END + "\n" + END + "\nz",
}


def by_definition(text: str) -> list[str]:
    """Documents of a text: the lines between lines that are exactly the end line."""
    found = [""]
    for line in text.splitlines(keepends=True):
        if line.rstrip("\r\n") == END:
            found.append("")
        else:
            found[-1] += line
    return found


def joined(pieces) -> list[str]:
    found = [""]
    for text, ends in pieces:
        found[-1] += text
        if ends:
            found.append("")
    assert found.pop() == ""
    return found


@pytest.mark.parametrize("size", [1, 2, 3, 7, 13, 14, 20, 1000])
@pytest.mark.parametrize("name", TEXTS)
def test_documents_do_not_depend_on_chunks(name, size):
    text = TEXTS[name]
    chunks = [text[i : i + size] for i in range(0, len(text), size)]
    assert joined(documents(chunks)) == by_definition(text)


@pytest.mark.parametrize("name", TEXTS)
def test_segments_keep_every_character_and_drop_empty_documents(name, monkeypatch):
    monkeypatch.setattr(module, "SEGMENT_CHARS", 8)
    found = list(segments(documents([TEXTS[name]])))
    assert joined((segment.text, segment.ends) for segment in found) == [
        d for d in by_definition(TEXTS[name]) if d
    ]
    assert all(0 < len(segment.text) <= 8 for segment in found)
    assert all((segment.key > 0) == segment.ends for segment in found)


def test_segments_are_cut_before_white_space(monkeypatch):
    monkeypatch.setattr(module, "SEGMENT_CHARS", 10)
    texts = [segment.text for segment in segments([("word one\nword two  \n\nthree fourfivesixseven", True)])]
    assert texts == ["word one", "\nword two", "  \n\nthree", " fourfives", "ixseven"]


def test_equal_documents_have_equal_keys_however_they_arrive():
    whole = list(segments([("some text", True), ("other", True), ("some text", True)]))
    parts = list(segments([("some", False), (" text", False), ("", True)]))
    assert whole[0].key == whole[2].key == parts[0].key != whole[1].key
