"""What README and docs say can be done can be done: code runs, commands and links exist."""

import ast
import contextlib
import pathlib
import re
import shlex
from unittest import mock

import jax
import pytest
from absl import flags
from ml_collections import config_flags

import tree_ffn
from experiments.reporting.command_reference import programs, reference
from tree_ffn.config import page as config_page
from tree_ffn.training.plan import settled
from tree_ffn.tree import ACTIVATIONS, IMPLEMENTATIONS
from tree_ffn.tree.leaf.routers import GATE_NORMS, ROUTERS

ROOT = pathlib.Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]


def blocks(language):
    """Fenced blocks of one language, as (page name, text)."""
    found = []
    for page in PAGES:
        fenced = re.findall(rf"^```{language}\n(.*?)^```$", page.read_text(), re.M | re.S)
        found += [(page.name, text) for text in fenced]
    return found


def commands():
    """Lines of the `sh` blocks, continued lines joined, comments gone."""
    text = "\n".join(text for _, text in blocks("sh")).replace("\\\n", " ")
    return [line.strip() for line in text.splitlines() if line.split("#")[0].strip()]


def program_of(command):
    """(module, arguments) of a `python -m module ...` line, else None."""
    words = shlex.split(command, comments=True)
    while words and re.fullmatch(r"[A-Z_]+=\S*", words[0]):
        words.pop(0)
    if words[1:2] == ["-m"] and words[0].endswith("python"):
        return words[2], words[3:]
    return None


def known_flags(module):
    """Names that a program's source gives to absl or argparse flags, and those of absl.app."""
    source = (ROOT / (module.replace(".", "/") + ".py")).read_text()
    for group in ("launching/options", "common/text_flags"):
        if f"{pathlib.Path(group).name}.define(" in source:
            source += (ROOT / f"experiments/{group}.py").read_text()
    tree = ast.parse(source)
    names = {"help", "helpfull"}
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call):
            continue
        called = getattr(node.func, "attr", getattr(node.func, "id", ""))
        if node.args and isinstance(node.args[0], ast.Constant):
            if called.startswith(("DEFINE_", "define", "add_argument")):
                names.add(str(node.args[0].value).lstrip("-"))
    return names


@pytest.mark.parametrize("page,text", blocks("python"))
def test_python_blocks_run(page, text):
    tables = (ACTIVATIONS, IMPLEMENTATIONS, ROUTERS, GATE_NORMS)
    with contextlib.ExitStack() as stack:
        for table in tables:  # to which some add an entry
            stack.enter_context(mock.patch.dict(table))
        stack.enter_context(jax.numpy_rank_promotion("allow"))  # as users have it, and optax needs it
        stack.enter_context(jax.numpy_dtype_promotion("standard"))
        names = {"__name__": "example"}
        exec(compile(text, page, "exec"), names)  # any error fails the test
    assert names.keys() > {"__name__", "__builtins__"}  # what the block defines


@pytest.mark.parametrize("command", commands())
def test_commands_exist(command):
    if command.startswith("make "):
        target = command.split()[1]
        assert re.search(rf"^{target}:", (ROOT / "Makefile").read_text(), re.M), command
        return
    module, arguments = program_of(command)
    assert (ROOT / (module.replace(".", "/") + ".py")).is_file(), command
    known = known_flags(module)
    for argument in arguments:
        if argument.startswith("--"):
            name = re.split(r"[=.]", argument[2:])[0]
            assert name in known or name.removeprefix("no") in known, f"{module} has no flag --{name}"


@pytest.mark.parametrize("command", [line for line in commands() if "--config=" in line])
def test_configs_in_commands_load(command, monkeypatch):
    monkeypatch.chdir(ROOT)
    own = flags.FlagValues()
    config_flags.DEFINE_config_file("config", flag_values=own, lock_config=True)
    if command.startswith("make "):  # it hands values on
        command = "python -m make " + " ".join(word.partition("=")[2] for word in shlex.split(command)[2:])
    _, arguments = program_of(command)
    words = ["program", *(argument for argument in arguments if argument.startswith("--config"))]
    monkeypatch.setattr("sys.argv", words)  # where ml_collections looks for values to set
    own(words)
    assert settled(own["config"].value).model.width > 0


def test_links_lead_to_files():
    for page in PAGES:
        for target in re.findall(r"\]\(([^)#]+)[^)]*\)", page.read_text()):
            if "://" not in target:
                assert (page.parent / target).exists(), f"{page.name}: {target}"


def test_files_named_in_the_text_exist():
    text = "\n".join(page.read_text() for page in PAGES)
    for name in re.findall(r"\b(?:requirements[\w-]*|constraints-[\d.]+)\.txt", text):
        assert (ROOT / name).is_file(), name
    for name in re.findall(r"(?:configs|experiments|tests|tree_ffn)/[\w/]+\.py\b", text):
        assert (ROOT / name).is_file(), name


def test_numbers_of_readme_s_tables_stand_in_the_pages():
    """Those are made from rows, or say which rows they are of."""
    text = (ROOT / "README.md").read_text().split("## Is it faster?")[1].split("## Install")[0]
    pages = [*(ROOT / "docs" / "results").glob("*.md"), ROOT / "docs" / "quality.md"]
    known = set(re.findall(r"[\d.,]*\d", " ".join(page.read_text() for page in pages)))
    numbers = re.findall(r"\d+\.\d+", "".join(re.findall(r"^\|.*\|$", text, re.M)))
    assert len(numbers) > 10 and not set(numbers) - known


def test_the_legend_is_the_code_s():
    """Every letter of tree_ffn/__init__.py stands in README's table."""
    pairs = re.findall(r"(?:^|  )\s*([A-Z])  (\w+)", tree_ffn.__doc__, re.M)
    section = (ROOT / "README.md").read_text().split("## Letters")[1].split("\n## ")[0]
    cells = [cell.strip() for line in section.splitlines() if "|" in line for cell in line.split("|")]
    explained = dict(zip(cells[1::1], cells[2::1]))
    letters = {letter.strip() for cell in explained for letter in cell.split(",")}
    assert len(pairs) == 16 and {letter for letter, _ in pairs} <= letters


def test_every_public_name_stands_in_the_api_s_page():
    text = (ROOT / "docs" / "api.md").read_text().split("Everything,")[0]
    assert set(re.findall(r"`(\w+)(?:\(width\))?`", text)) == {"tree_ffn", *tree_ffn.__all__}


def test_the_page_of_knobs_is_made_from_the_specs():
    assert (ROOT / "docs/config.md").read_text() == config_page(), (
        "python -m tree_ffn.config > docs/config.md"
    )


def test_the_command_reference_is_what_programs_say():
    written = (ROOT / "docs" / "cli.md").read_text(encoding="utf-8")
    assert written == reference(), "run python -m experiments.reporting.command_reference > docs/cli.md"
    sources = {name: known_flags(f"experiments.{name}") for name in programs()}
    assert "train" in sources and "cli" not in sources
    for name, known in sources.items():
        section = written.split(f"\n## {name}\n")[1].split("\n## ")[0]
        assert set(re.findall(r"^\| `--(\w+)`", section, re.M)) == known - {"help", "helpfull"}, name
