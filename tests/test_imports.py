"""Who may import whom: lower layers import upper ones, never the reverse; heavy packages have one door."""

import ast
import functools
import subprocess
import sys
import textwrap

import pytest

import tree_ffn

# Each layer may import those before it (and itself).
LAYERS = ("tree", "models", "huggingface", "data", "inference", "training", "conversion", "analysis")
PROGRAMS = ("configs", "experiments", "tests")


@functools.cache
def sources(repository):
    """Python files of the project by path within it: {path: set of absolute module names it imports}."""
    found = {}
    for folder in ("tree_ffn", *PROGRAMS):
        for path in sorted((repository / folder).rglob("*.py")):
            found[path.relative_to(repository)] = imported(path.read_text())
    return found


def imported(text):
    """Modules named by any import statement of a file, those inside functions too."""
    names = set()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            names |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def roots(names):
    return {name.split(".")[0] for name in names}


def test_layers_import_upwards_only(repository):
    for path, names in sources(repository).items():
        if path.parts[0] == "tree_ffn" and len(path.parts) > 2:
            below = LAYERS[LAYERS.index(path.parts[1]) + 1 :]
            for name in names:
                parts = name.split(".")
                assert parts[0] != "tree_ffn" or len(parts) == 1 or parts[1] not in below, (
                    f"{path} imports {name}"
                )


def test_the_library_does_not_import_programs(repository):
    for path, names in sources(repository).items():
        if path.parts[0] == "tree_ffn":
            assert not roots(names) & set(PROGRAMS), path
        if path.parts[0] == "experiments":
            assert "tests" not in roots(names), path


def test_configs_import_ml_collections_the_knobs_and_each_other_only(repository):
    for path, names in sources(repository).items():
        if path.parts[0] == "configs":
            names = {name for name in names if not name.startswith("tree_ffn.config")}
            outside = roots(names) - {"ml_collections", "configs"} - set(sys.stdlib_module_names)
            assert not outside, f"{path} imports {outside}"


def test_the_library_has_no_flags(repository):
    for path, names in sources(repository).items():
        if path.parts[0] == "tree_ffn":
            assert not roots(names) & {"absl", "ml_collections"}, path


@pytest.mark.parametrize(
    "package, allowed",
    [
        ("orbax", {"tree_ffn/training/checkpoint.py"}),
        ("tensorflow", {"experiments/prepare_data.py"}),
    ],
)
def test_only_importer(package, allowed, repository):
    importers = {str(path) for path, names in sources(repository).items() if package in roots(names)}
    assert importers <= allowed


def test_the_layer_is_jax_alone(repository):
    for path, names in sources(repository).items():
        if path.parts[:2] == ("tree_ffn", "tree"):
            outside = roots(names) - {"jax", "numpy", "tree_ffn"} - set(sys.stdlib_module_names)
            assert not outside, f"{path} imports {outside}"


def test_no_file_is_called_utils(repository):
    assert not [path for path in sources(repository) if "util" in path.stem or path.stem == "helpers"]


def test_layer_and_models_work_without_the_training_packages():
    """In a process where those packages cannot be imported (flax itself needs absl)."""
    program = """
        import sys
        for name in ("ml_collections", "tensorflow", "tensorflow_datasets", "grain", "orbax", "optax",
                     "tokenizers", "safetensors", "tqdm", "tensorboardX"):
            sys.modules[name] = None
        import tree_ffn, tree_ffn.tree
        flax_free = not any(name.split(".")[0] == "flax" for name in sys.modules)
        from tree_ffn.inference import decode
        from tree_ffn.models import cost, export, from_config
        assert not {"configs", "experiments"} & set(sys.modules)
        print("without flax:", flax_free)
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(program)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "without flax: True"


def test_the_front_door(repository):
    """Every public name can be had, and comes from where type checkers look for it."""
    tree = ast.parse((repository / "tree_ffn/__init__.py").read_text())
    block = next(node for node in tree.body if isinstance(node, ast.If))
    seen = {alias.name: node.module for node in block.body for alias in node.names}
    assert seen == tree_ffn._HOME and len(set(tree_ffn.__all__)) == len(tree_ffn.__all__)
    for name in tree_ffn.__all__:
        assert getattr(tree_ffn, name) is not None and name in dir(tree_ffn)
    with pytest.raises(AttributeError, match="module 'tree_ffn' has no attribute 'mixture'"):
        tree_ffn.mixture  # noqa: B018
