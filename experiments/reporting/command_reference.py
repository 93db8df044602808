"""Writes the command reference from the programs' own help.

python -m experiments.reporting.command_reference > docs/cli.md
"""

import contextlib
import io
import pathlib
import runpy
import sys
from collections.abc import Iterator
from unittest import mock

from absl import flags

FOLDER = pathlib.Path(__file__).parent.parent
HEAD = """\
# Commands

Every program is a module: `python -m experiments.NAME --flag=value`, or `tree-ffn NAME --flag=value`.
`--help` prints what stands here.
A flag that is true or false is set by `--flag` and `--noflag`. Programs with `--config` also take
`--config.KEY=VALUE` for the keys of [the configuration](config.md). Exit codes: 0 done, 1 failed, 2 the
input is wrong, and one sentence says what."""
REPEATED = "; repeat this option to specify a list of values"  # absl adds it to what the help says itself


def programs() -> list[str]:
    """Names of the programs of experiments/: the files that start by `cli.run`."""
    found = sorted(FOLDER.glob("*.py"))
    return [path.stem for path in found if "\n    cli.run(main" in path.read_text(encoding="utf-8")]


def reference() -> str:
    """docs/cli.md."""
    return "\n\n".join([HEAD, *map(section, programs())]) + "\n"


def section(program: str) -> str:
    """What a program does, and a table of its flags."""
    argv0 = str(FOLDER / f"{program}.py")
    with without_flags(), mock.patch.object(sys, "argv", [argv0, "--help"]):
        with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.suppress(SystemExit):
            runpy.run_path(argv0, run_name="__main__")
        own = flags.FLAGS.flags_by_module_dict()[argv0]
    about = out.getvalue().split("\n\nFlags:\n")[0]
    lines = [line(flag) for flag in sorted(own, key=lambda flag: flag.name)]
    return "\n".join([f"## {program}", "", about, "", "| flag | default | |", "| --- | --- | --- |", *lines])


def line(flag: flags.Flag) -> str:
    """A flag as a line of the table."""
    text = " ".join((flag.help or "").split()).removesuffix(REPEATED)
    if choices := getattr(flag.parser, "enum_values", None):
        text = text.removeprefix(f"<{'|'.join(choices)}>: ")
        text += f" One of {', '.join(f'`{choice}`' for choice in choices)}."
    default = "" if flag.default is None else (flag.default_as_str or "").strip("'")
    return f"| `--{flag.name}` | {default and f'`{default}`'} | {escaped(text)} |"


def escaped(text: str) -> str:
    """A help text without letters that Markdown would take for markup."""
    return text.replace("|", "\\|").replace("*", "\\*").replace("<", "\\<")


@contextlib.contextmanager
def without_flags() -> Iterator[None]:
    """A time without the flags of programs, which share names; then those of before are there again."""
    registry = flags.FLAGS._flags()

    def taken() -> dict[str, flags.Flag]:
        module_of = lambda name: flags.FLAGS.find_module_defining_flag(name) or ""
        of_programs = lambda name: module_of(name).startswith(("experiments.", str(FOLDER)))
        # ml_collections adds a flag for every key of a config that a command line sets: `config.optim.lr`.
        return {name: registry.pop(name) for name in list(registry) if "." in name or of_programs(name)}

    before = taken()
    try:
        yield
    finally:
        taken()
        registry.update(before)


if __name__ == "__main__":
    print(reference(), end="")
