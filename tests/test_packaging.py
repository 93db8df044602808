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


def lines(name):
    """Requirement lines of a file, with those of the files it includes."""
    for line in (ROOT / name).read_text().splitlines():
        line = line.split("#")[0].strip()
        if line.startswith("-r "):
            yield from lines(line.removeprefix("-r "))
        elif line:
            yield line


def requirements(name):
    return [Requirement(line) for line in lines(name)]


def pins(version):
    pinned = [line.split("==") for line in lines(f"constraints-{version}.txt")]
    return {canonicalize_name(name): number for name, number in pinned}


@pytest.mark.parametrize("version", ["3.11", "3.12"])
@pytest.mark.parametrize("name", sorted(path.name for path in ROOT.glob("requirements*.txt")))
def test_constraints_pin_a_version_that_the_requirement_allows(name, version):
    pinned = pins(version)
    for requirement in requirements(name):
        number = pinned.get(canonicalize_name(requirement.name))
        if number is None:  # the accelerators' own wheels
            assert name in ("requirements-cuda.txt", "requirements-tpu.txt"), requirement
        else:
            assert requirement.specifier.contains(number), requirement


@pytest.mark.parametrize("name", sorted(path.name for path in ROOT.glob("requirements*.txt")))
def test_every_requirement_has_a_floor_and_a_ceiling(name):
    for requirement in requirements(name):
        assert {spec.operator for spec in requirement.specifier} == {">=", "<"}, requirement


@pytest.mark.parametrize("version", ["3.11", "3.12"])
def test_constraints_name_no_place(version):
    for line in lines(f"constraints-{version}.txt"):
        assert re.fullmatch(r"[A-Za-z0-9._-]+==[A-Za-z0-9.+!]+", line), line


def test_the_package_asks_for_what_requirements_say():
    everything = {requirement.name: str(requirement) for requirement in requirements("requirements.txt")}
    for line in PROJECT["dependencies"]:
        requirement = Requirement(line)
        assert str(requirement) == everything[requirement.name]


def test_requirements_name_the_same_ranges():
    everything = {requirement.name: str(requirement) for requirement in requirements("requirements-dev.txt")}
    for requirement in requirements("requirements-serve.txt"):
        assert str(requirement) == everything[requirement.name]


def test_text_is_made_without_what_serve_leaves_out():
    served = {requirement.name for requirement in requirements("requirements-serve.txt")}
    dropped = {requirement.name for requirement in requirements("requirements.txt")} - served
    modules = sorted(name.replace("-", "_").replace("orbax_checkpoint", "orbax") for name in dropped)
    code = f"import sys\nfor name in {modules}: sys.modules[name] = None\nimport experiments.generate"
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
