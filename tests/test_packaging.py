"""Requirements, constraints and metadata agree with one another."""

import pathlib
import re
import subprocess
import sys
import tomllib
import xml.etree.ElementTree as ElementTree

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import tree_ffn

ROOT = pathlib.Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


EXTRAS = PROJECT["optional-dependencies"]
NAMES = ["core", *EXTRAS]


def requirements(name):
    """Those of the package, `core`, or of an extra, with those of the extras that it names."""
    for line in PROJECT["dependencies"] if name == "core" else EXTRAS[name]:
        requirement = Requirement(line)
        if requirement.name == "tree_ffn":
            for extra in requirement.extras:
                yield from requirements(extra)
        else:
            yield requirement


def lines(version):
    return (ROOT / f"constraints-{version}.txt").read_text().splitlines()


def pins(version):
    pinned = [line.split("==") for line in lines(version) if line and not line.startswith("#")]
    return {canonicalize_name(name): number for name, number in pinned}


@pytest.mark.parametrize("version", ["3.11", "3.12"])
@pytest.mark.parametrize("name", NAMES)
def test_constraints_pin_a_version_that_the_requirement_allows(name, version):
    pinned = pins(version)
    for requirement in requirements(name):
        number = pinned.get(canonicalize_name(requirement.name))
        assert number is not None, requirement
        assert requirement.specifier.contains(number), requirement


@pytest.mark.parametrize("name", NAMES)
def test_every_requirement_has_a_floor_and_a_ceiling(name):
    for requirement in requirements(name):
        assert {spec.operator for spec in requirement.specifier} == {">=", "<"}, requirement


@pytest.mark.parametrize("version", ["3.11", "3.12"])
def test_constraints_name_no_place(version):
    for line in lines(version):
        assert line.startswith("#") or re.fullmatch(r"[A-Za-z0-9._-]+==[A-Za-z0-9.+!]+", line), line


def test_a_package_has_one_range():
    ranges = {}
    for name in NAMES:
        for requirement in requirements(name):
            ranges.setdefault(requirement.name, set()).add(str(requirement.specifier))
    assert not {name: found for name, found in ranges.items() if len(found) > 1}


def test_requirements_are_made_from_the_project():
    """And have every package that the research install is to have."""
    program = [sys.executable, ROOT / ".ci/requirements.py", "--check"]
    assert subprocess.run(program, check=False).returncode == 0
    named = {Requirement(line).name for line in (ROOT / "requirements.txt").read_text().splitlines()[1:]}
    assert named >= {
        "jax", "flax", "optax", "orbax-checkpoint", "tensorflow-datasets", "ml-collections", "chex",
    }  # fmt: skip


@pytest.mark.parametrize(
    "what, extras",
    [
        ("experiments.generate", ["serve"]),  # a machine that only makes text from an exported model
        ("tree_ffn.training.loop, tree_ffn.config, tree_ffn.conversion.convert", []),
    ],
)
def test_what_an_extra_leaves_out_is_not_imported(what, extras):
    needed = {requirement.name for name in ["core", *extras] for requirement in requirements(name)}
    dropped = {requirement.name for name in EXTRAS for requirement in requirements(name)} - needed
    modules = sorted(name.replace("-", "_") for name in dropped)
    code = f"import sys\nfor name in {modules}: sys.modules[name] = None\nimport {what}"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_versions_and_licence_agree():
    citation = (ROOT / "CITATION.cff").read_text()
    assert f"\nversion: {tree_ffn.__version__}\n" in citation
    assert f"\nlicense: {PROJECT['license']}\n" in citation
    assert "Apache License" in (ROOT / "LICENSE").read_text()[:200]


def test_the_picture_is_well_formed():
    root = ElementTree.parse(ROOT / "docs" / "layer.svg").getroot()
    assert root.tag.endswith("}svg") and root.find("{*}title").text
