"""Public functions of three parameters or more describe them; ruff's D417 sees that none is left out."""

import ast


def public_functions(node: ast.AST):
    """The functions and methods below a node whose names, and whose class's, begin with no underscore."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.FunctionDef | ast.ClassDef) and not child.name.startswith("_"):
            if isinstance(child, ast.ClassDef):
                yield from public_functions(child)
            else:
                yield child


def parameters(function: ast.FunctionDef) -> list[str]:
    found = function.args.posonlyargs + function.args.args + function.args.kwonlyargs
    return [argument.arg for argument in found if argument.arg not in ("self", "cls")]


def undescribed(text: str) -> list[str]:
    """Functions of a file without Args; of several methods of one name, the first describes all."""
    said, missing = set(), []
    for function in public_functions(ast.parse(text)):
        if "Args:" in (ast.get_docstring(function) or ""):
            said.add(function.name)
        elif len(parameters(function)) >= 3 and function.name not in said:
            missing.append(function.name)
    return missing


def test_functions_of_three_parameters_describe_them(repository):
    missing = {
        str(path.relative_to(repository)): names
        for folder in ("tree_ffn", "experiments")
        for path in sorted((repository / folder).rglob("*.py"))
        if (names := undescribed(path.read_text()))
    }
    assert not missing


def test_what_is_undescribed_is_found():
    text = 'def f(a, b, c):\n    """Adds."""\nclass A:\n    def g(self, a, b):\n        """Two."""\n'
    assert undescribed(text) == ["f"]
    assert undescribed(text.replace("Adds.", "Adds.\n\n    Args:\n      a: one.\n    ")) == []
