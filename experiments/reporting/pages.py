"""The pages of docs/results: one a topic, with its tables, and an index."""

from experiments.reporting.registry import TOPICS, Topic
from experiments.reporting.render import Table, wrapped

OWN = "Rows that `--table` or a sweep gave this name."
INDEX = """\
# Results

Every table comes from rows of `results/*.jsonl`, each with its config, seed, device, versions, commit and
command. `python -m experiments.tables --write` makes these pages from them, and a test compares.

Some rows are of layers that are gone: their names have `continuous`, `hash_tree`, `leak`, `beam2` or `G24`,
and [the log](../log.md) says why. Commit 30983ff is the last that computes them and reads their commands.
`..._leak100_20` began dense, for a fifth of the training. The texts are not in this repository. Any local
files work in their place; their rows then have another sha256."""


def pages_of(tables: list[tuple[str, Table]]) -> dict[str, str]:
    """{file name: Markdown} of all pages that have a table, index.md first.

    Args:
      tables: (topic, table), as `registry.by_topic` gives them.
    """
    topics = TOPICS | {name: Topic(name, OWN) for name, _ in tables if name not in TOPICS}
    found = {name: [table for topic, table in tables if topic == name] for name in topics}
    found = {name: mine for name, mine in found.items() if mine}
    listed = [f"- [{topics[name].title}]({name}.md): {topics[name].text}" for name in found]
    tree = "\n".join(["```{toctree}", ":hidden:", "", *found, "```"])
    parts = [INDEX, *(["\n".join(listed), tree] if found else [])]
    pages = {"index.md": "\n\n".join(parts) + "\n"}
    for name, mine in found.items():
        head = [f"# {topics[name].title}", wrapped(topics[name].text)]
        if caption := topics[name].picture:
            head += [f"![{topics[name].text}]({name}.svg)", wrapped(caption)]
        pages[f"{name}.md"] = "\n\n".join([*head, *(table.markdown() for table in mine)]) + "\n"
    return pages
