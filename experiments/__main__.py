"""All programs by name: `tree-ffn train ...` is `python -m experiments.train ...`.

tree-ffn                    # the list
tree-ffn train --help
"""

import ast
import difflib
import pathlib
import runpy
import sys

# In the order in which they are met.
PROGRAMS = {
    "A model": ("train", "launch", "evaluate", "generate", "serve", "export", "import_model", "finetune"),
    "Data": ("prepare_data", "train_tokenizer", "join_words"),
    "Trees": ("convert", "prune", "oracle"),
    "Measurements": (
        "plan", "quickstart", "ablate", "tables", "report",
        "benchmark", "benchmark_models", "benchmark_peers", "benchmark_scoring",
    ),
}  # fmt: skip
NAMES = tuple(name for names in PROGRAMS.values() for name in names)


def main() -> None:
    """Runs the program that the first word names."""
    words = sys.argv[1:]
    if not words or words[0] in ("--help", "-h", "help"):
        print(listing())
        return
    if words[0] not in NAMES:
        near = difflib.get_close_matches(words[0], NAMES, n=1)
        meant = f" (did you mean {near[0]}?)" if near else ""
        known = ", ".join(NAMES)
        print(f"tree-ffn: {words[0]!r} is no program{meant}; use one of: {known}.", file=sys.stderr)
        sys.exit(2)
    sys.argv = words
    try:
        runpy.run_module(f"experiments.{words[0]}", run_name="__main__", alter_sys=True)
    except ModuleNotFoundError as error:
        extra = "serve" if words[0] in ("serve", "generate") else "train"
        asked = f"pip install 'tree_ffn[{extra}]'"
        print(f"tree-ffn: {words[0]} needs the package {error.name}; {asked} brings it.", file=sys.stderr)
        sys.exit(2)


def listing() -> str:
    """The programs, each with the first line of its file."""
    lines = ["tree-ffn PROGRAM --flag=value ...; every program has --help"]
    for title, names in PROGRAMS.items():
        lines += ["", f"{title}:", *(f"  {name:<18} {first_line(name)}" for name in names)]
    return "\n".join(lines)


def first_line(name: str) -> str:
    """What a program's file says first; it is not imported, which would take seconds."""
    text = (pathlib.Path(__file__).parent / f"{name}.py").read_text(encoding="utf-8")
    return (ast.get_docstring(ast.parse(text)) or "").partition("\n")[0]


if __name__ == "__main__":
    main()
