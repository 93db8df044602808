"""The pages of docs/results: one a topic, with its tables, and an index."""

from typing import NamedTuple

from experiments.reporting.render import Table, wrapped


class Topic(NamedTuple):
    """A page: its title, and a sentence that says what its tables answer."""

    title: str
    text: str


# In the order of the index. Their names are those that registry.by_topic gives to tables.
TOPICS = {
    "quickstart": Topic("Quickstart", "What `make quickstart` trains, on one machine."),
    "cpu_small": Topic("Small comparison", "All kinds of layers in a model that a CPU can train."),
    "t1_small": Topic("Language modelling (T1)", "All kinds of layers at one learning rate."),
    "quality_attempts": Topic("Attempts to close the gap", "Layers of T1's size, one line a design."),
    "quality_transfer": Topic("Other widths and texts", "The older recipe in other models than T1's."),
    "learning_rates": Topic("Learning rates", "The runs that learning rates were chosen by."),
    "oracle": Topic("Oracle routing", "How much lower the loss could be on better paths."),
    "t2_plan": Topic("Plan of 1.3B (T2)", "Memory and arithmetic of a model that was compiled, not trained."),
    "t3_small": Topic("Questions (T3)", "Accuracies on the tasks of lm-eval's harness."),
    "t4_small": Topic("Dynamics (T4)", "How paths are used during training, by activation and balancing."),
    "prune_small": Topic("Pruning", "What trained layers lose when rarely visited parts are removed."),
    "conversion": Topic("Conversion", "Dense layers that become trees, before and after fine-tuning."),
    "speed_layer_cpu": Topic("Speed of layers on CPUs", "One layer alone, by number of tokens."),
    "speed_layer_gpu": Topic("Speed of layers on GPUs", "One layer alone, by number of tokens."),
    "speed_programs": Topic(
        "Speed of training, scoring and answers", "Whole models: training, training steps alone, questions."
    ),
}
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
        pages[f"{name}.md"] = "\n\n".join([*head, *(table.markdown() for table in mine)]) + "\n"
    return pages
