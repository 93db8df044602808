"""experiments/join_words.py: WikiText's spacing undone."""

import lzma

import pytest

from experiments import join_words
from tests.experiments import programs


@pytest.mark.parametrize(
    ("spaced", "natural"),
    [
        (" = = Career = = ", "= = Career = ="),
        (" a guest @-@ starring role , 3 @.@ 5 % of 1 @,@ 000 ", "a guest-starring role, 3.5% of 1,000"),
        (' " One " and " Two " ; ( three ) ', '"One" and "Two"; (three)'),
        (" Teddy 's ship ; the boys ' ship isn 't here ", "Teddy's ship; the boys' ship isn't here"),
        (' an open " mark stays ', 'an open " mark stays'),
        ("", ""),
    ],
)
def test_a_line(spaced, natural):
    assert join_words.joined(spaced) == natural


def test_program_keeps_lines(tmp_path):
    source, target = tmp_path / "in.txt.xz", tmp_path / "out.txt"
    source.write_bytes(lzma.compress(b"\n = A = \n \n One , two . \n"))
    done = programs.call("join_words", f"--text={source}", f"--to={target}")
    assert done.code == 0 and "7 words between spaces are now 5" in done.out
    assert target.read_text() == "\n= A =\n\nOne, two.\n"

    again = programs.call("join_words", f"--text={source}", f"--to={target}")
    assert again.code == 2 and "exists" in again.err and target.read_text().endswith("two.\n")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ((), "--text is missing"),
        (("--text={here}/none.txt", "--to={here}/out.txt"), "cannot be read"),
        (("--text={here}/latin.txt", "--to={here}/out.txt"), "is not UTF-8"),
        (("--text={here}/ok.txt", "--to={here}/no/out.txt"), "cannot be written"),
    ],
)
def test_bad_input(tmp_path, arguments, said):
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9")
    (tmp_path / "ok.txt").write_text("fine")
    done = programs.call("join_words", *(word.format(here=tmp_path) for word in arguments))
    assert done.code == 2 and said in done.err and "Traceback" not in done.err
    assert not (tmp_path / "out.txt").exists()
