"""Writes requirements.txt, the research install, from pyproject.toml; with --check, says whether it is so.

It has the package's own requirements, those of its extras `train`, `data` and `report`, and chex for tests.
"""

import pathlib
import sys
import tomllib

ROOT = pathlib.Path(__file__).resolve().parent.parent
HEAD = """\
# Made from pyproject.toml by `make requirements`: what `make quickstart` installs; `make test` needs more.
"""


def made() -> str:
    """The text of requirements.txt."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    lines = [*project["dependencies"], *extras["train"], *extras["data"], *extras["report"]]
    lines += [line for line in extras["dev"] if line.startswith("chex")]
    return HEAD + "".join(f"{line}\n" for line in lines)


if __name__ == "__main__":
    path = ROOT / "requirements.txt"
    if "--check" not in sys.argv[1:]:
        path.write_text(made())
    elif path.read_text() != made():
        sys.exit("requirements.txt is out of date; run make requirements.")
