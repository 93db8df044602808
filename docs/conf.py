"""How Sphinx makes the site: `make docs` writes build/docs/index.html."""

import re

project = "tree_ffn"
copyright = author = "the authors of tree_ffn"
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx.ext.apidoc"]
exclude_patterns = ["modules/modules.rst"]
html_theme = "furo"
html_title = "tree_ffn"
html_static_path, html_css_files = ["site.css"], ["site.css"]
myst_heading_anchors = 3  # links such as layer.md#pruning
smartquotes = False  # --flags keep both dashes
default_role = "code"  # `x` in docstrings
# One page a package, made anew by every build; docs/modules is not committed.
apidoc_modules = [
    {"path": "../tree_ffn", "destination": "modules", "module_first": True, "automodule_options": ["members"]}
]
autodoc_default_options = {
    "ignore-module-all": True
}  # what a package re-exports is described where it is defined
autodoc_inherit_docstrings = False
autodoc_member_order = "bysource"
napoleon_use_ivar = True


def literal_blocks(app, what, name, obj, options, lines):
    """Reads docstrings as they are meant: an indented block is literal; |, * and a last _ are no markup."""
    blocks = []
    for block in "\n".join(lines).split("\n\n"):
        if block.startswith("    "):
            blocks += [] if blocks and blocks[-1].startswith("    ") else ["::"]
        elif ">>>" not in block:
            block = re.sub(r"(`[^`]*`)|([|*]|_(?!\w))", lambda m: m[1] or "\\" + m[2], block)
        blocks.append(block)
    lines[:] = "\n\n".join(blocks).split("\n")


def readme_is_the_index(app, docname, source):
    """Links to README lead to the page that it becomes."""
    source[0] = re.sub(r"(\]\((?:\.\./)*)\.\./README\.md", r"\1index.md", source[0])


def without_aliases(app, what, name, obj, skip, options):
    """Leaves out Python's own words on a NamedTuple's fields, which stand among its attributes."""
    return skip or (getattr(obj, "__doc__", None) or "").startswith("Alias for field")


def setup(app):
    app.connect("autodoc-process-docstring", literal_blocks, priority=400)  # before napoleon
    app.connect("source-read", readme_is_the_index)
    app.connect("autodoc-skip-member", without_aliases)
