"""Every example runs, and those that train learn."""

import json
import pathlib
import runpy

import jax
import pytest

from tree_ffn import ACTIVATIONS

ROOT = pathlib.Path(__file__).parent.parent / "examples"


@pytest.fixture(autouse=True)
def tables_as_they_were(monkeypatch):
    """Examples add entries to tables."""
    from tree_ffn.tree.leaf.routers import ROUTERS

    for table in (ACTIVATIONS, ROUTERS):
        for name in table:
            monkeypatch.setitem(table, name, table[name])
    yield
    for table in (ACTIVATIONS, ROUTERS):
        for name in [name for name in table if name in ("square", "cosine", "sigmoid")]:
            del table[name]


@pytest.mark.parametrize("name", sorted(path.name for path in ROOT.glob("*.py")))
def test_it_runs(name, capsys):
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):  # as users have it
        found = runpy.run_path(str(ROOT / name))["main"]()
    assert capsys.readouterr().out
    if isinstance(found, list):
        assert found[-1] < 0.5 * found[0]


@pytest.mark.parametrize("name", sorted(path.name for path in ROOT.glob("*.ipynb")))
def test_the_notebook_says_what_it_shows(name, capsys):
    """Its cells run in order, and print what stands under them."""
    space: dict = {}
    for cell in json.loads((ROOT / name).read_text())["cells"]:
        if cell["cell_type"] == "code":
            with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
                exec("".join(cell["source"]), space)
            shown = "".join("".join(output["text"]) for output in cell["outputs"])
            assert capsys.readouterr().out == shown
