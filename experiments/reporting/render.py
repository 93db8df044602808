"""A table as it is printed: Markdown for docs/results, booktabs LaTeX for papers."""

import re
import textwrap
from typing import NamedTuple

WHOLE = {"break_long_words": False, "break_on_hyphens": False}
LATEX = {
    "\\": r"\textbackslash{}", "&": r"\&", "%": r"\%", "$": r"\$", "#": r"\#", "_": r"\_", "{": r"\{",
    "}": r"\}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "±": r"$\pm$",
    "²": r"\textsuperscript{2}", "<": r"\textless{}", ">": r"\textgreater{}",
}  # fmt: skip


class Table(NamedTuple):
    """Title, what the table is, head, a list of cells a line.

    Cells and text hold Markdown of two kinds, `code` and **bold**.

    Attributes:
      labels: columns of text, which stand left.
      commands: of each line, or of the last one alone.
    """

    title: str
    text: str
    head: list[str]
    cells: list[list[str]]
    labels: int
    commands: tuple[str, ...]

    def markdown(self) -> str:
        """A heading, the text and the table. Commands stand in the rows: each is of the commit beside it."""
        sides = ["---"] * self.labels + ["--:"] * (len(self.head) - self.labels)
        table = "\n".join(f"| {' | '.join(line)} |" for line in [self.head, sides, *self.cells])
        return f"## {self.title}\n\n{wrapped(self.text)}\n\n{table}"

    def latex(self) -> str:
        """A table of the package booktabs; above each line, as a comment, the command that made it."""
        columns = "l" * self.labels + "r" * (len(self.head) - self.labels)
        commands = [f"% {command}" for command in self.commands]
        above = commands if len(commands) == len(self.cells) else []
        lines = []
        for number, cells in enumerate(self.cells):
            lines += above[number : number + 1] + [" & ".join(map(latex, cells)) + r" \\"]
        if not above:
            lines = [f"% The last line's command:\n{commands[-1]}", *lines]
        return "\n".join([
            r"\begin{table}", r"\centering", rf"\caption{{{latex(self.title)}. {latex(self.text)}}}",
            rf"\begin{{tabular}}{{{columns}}}", r"\toprule", " & ".join(map(latex, self.head)) + r" \\",
            r"\midrule", *lines, r"\bottomrule", r"\end{tabular}", r"\end{table}",
        ])  # fmt: skip


def wrapped(text: str) -> str:
    """A paragraph of Markdown in lines of at most 120 letters, words and links whole."""
    return textwrap.fill(text, 120, **WHOLE)


def latex(text: str) -> str:
    """Markdown of a cell as LaTeX.

    Example:
      >>> latex("`narrow_A96` **3.1%**")
      '\\\\texttt{narrow\\\\_A96} \\\\textbf{3.1\\\\%}'
    """
    text = "".join(LATEX.get(letter, letter) for letter in text)
    text = re.sub(r"`(.*?)`", r"\\texttt{\1}", text)
    return re.sub(r"\*\*(.*?)\*\*", r"\\textbf{\1}", text)
