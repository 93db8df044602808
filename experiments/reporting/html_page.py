"""Pages of HTML: one file without scripts, with nothing from the network, for light, dark and print."""

import html
import os

from experiments.reporting.drawing import STYLE
from experiments.reporting.render import Table
from tree_ffn.errors import InputError

MARK = "<!-- a report of tree_ffn -->"
CSS = os.path.join(os.path.dirname(__file__), "report.css")


def check_target(path: str, flag: str) -> None:
    """Raises InputError where something else than such a page stands."""
    if not os.path.exists(path):
        return
    try:
        with open(path, encoding="utf-8") as file:
            ours = MARK in file.read(400)
    except (OSError, UnicodeDecodeError):
        ours = False
    if not ours:
        raise InputError(f"{flag}: {path} is there and is no report; name another file.")


def write(path: str, page: str, flag: str) -> None:
    """Writes a page.

    Args:
      path: of the file.
      page: its text.
      flag: that named the path.

    Raises:
      InputError: it cannot be written.
    """
    try:
        with open(path, "w", encoding="utf-8") as file:
            file.write(page)
    except OSError as error:
        raise InputError(f"{flag}: {path} cannot be written ({error.strerror}).") from error


def page(title: str, parts: list[str]) -> str:
    """A whole page.

    Args:
      title: of the page.
      parts: HTML, one below the other.
    """
    with open(CSS, encoding="utf-8") as file:
        style = STYLE + file.read()
    return "\n".join([
        "<!doctype html>", MARK, '<html lang="en"><head><meta charset="utf-8">',
        '<meta name="viewport" content="width=device-width,initial-scale=1">',
        '<meta name="color-scheme" content="light dark">',
        f"<title>{html.escape(title)}</title><style>{style}</style></head>",
        f"<body><h1>{html.escape(title)}</h1>", *parts, "</body></html>\n",
    ])  # fmt: skip


def table_html(table: Table) -> str:
    """A table of results."""
    side = lambda i: ' class="text"' if i < table.labels else ""
    cells = lambda tag, line: "".join(f"<{tag}{side(i)}>{rich(cell)}</{tag}>" for i, cell in enumerate(line))
    head = f"<thead><tr>{cells('th', table.head)}</tr></thead>" if any(table.head) else ""
    body = "".join(f"<tr>{cells('td', line)}</tr>" for line in table.cells)
    return (
        f'<h2>{rich(table.title)}</h2><div class="wide"><table>{head}<tbody>{body}</tbody></table></div>'
        f"<p>{rich(table.text)}</p>"
    )


def rich(text: str) -> str:
    """`code` and **bold** of a table's cells as HTML.

    Example:
      >>> rich("`a<b` **1**")
      '<code>a&lt;b</code> <b>1</b>'
    """
    text = html.escape(text)
    for mark, tag in (("`", "code"), ("**", "b")):
        parts = text.split(mark)
        text = "".join(f"<{tag}>{part}</{tag}>" if i % 2 else part for i, part in enumerate(parts))
    return text
