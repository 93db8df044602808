"""Undoes the spacing of WikiText's raw files.

    python -m experiments.join_words --text=wikitext2/test.raw.txt.xz --to=wikitext2_joined.txt

` Teddy 's film , a two @-@ part one .` becomes `Teddy's film, a two-part one.`

WikiText sets white space around punctuation, and marks as `@-@`, `@,@` and `@.@` where a word went on. A
model with a byte-pair vocabulary has seen no such text: ` ,` is another token than `,`, and hardly trained.
Scored beside the raw text, the joined one says how much of a loss is spacing. Words are then fewer than
WikiText's 245,569; compare nats a token or a byte.
"""

import os
import re
from pathlib import Path

from experiments.common import cli, path_flags
from tree_ffn.data.formats import read_text
from tree_ffn.errors import InputError

_TEXT = path_flags.define("text", None, "Text with WikiText's spacing: plain or packed.")
_TO = path_flags.define_written("to", None, "The file to write.")

# (what, by what), in this order; a line's double quotes are paired before them.
RULES = tuple(
    (re.compile(pattern), by)
    for pattern, by in (
        (r" @([-,.])@ ", r"\1"),
        (r" ([,.;:!?%)\]}])", r"\1"),
        (r"([(\[{$£€]) ", r"\1"),
        (r" '(s|t|re|ve|ll|d|m)\b", r"'\1"),
        (r"s ' ", "s' "),
    )
)
QUOTED = re.compile(r'" ([^"]*?) "')


def joined(line: str) -> str:
    """A line of WikiText as people write it.

    Example:
      >>> joined(' He had a guest @-@ starring role ( in 2000 ) on " The Bill " , Teddy \\'s 1 @,@ 000th . ')
      'He had a guest-starring role (in 2000) on "The Bill", Teddy\\'s 1,000th.'
    """
    line = QUOTED.sub(r'"\1"', line.strip())
    for pattern, by in RULES:
        line = pattern.sub(by, line)
    return line


def main() -> None:
    source, target = _TEXT.value, _TO.value
    for flag in (_TEXT, _TO):
        if not flag.value:
            raise InputError(f"--{flag.name} is missing; name a file, e.g. --{flag.name}=wikitext2.txt.")
    if os.path.exists(target):
        raise InputError(f"--to: {target!r} exists; name a new file.")
    text = read_text(Path(source), f"--text: {source}")
    whole = "\n".join(map(joined, text.split("\n")))
    try:
        Path(target).write_text(whole, encoding="utf-8")
    except OSError as error:
        raise InputError(f"--to: {target!r} cannot be written ({error.strerror}).") from error
    words = (len(content.split()) for content in (text, whole))
    print("{}: {:,} words between spaces are now {:,}".format(target, *words))


if __name__ == "__main__":
    cli.run(main)
