"""The tables of quality: kinds of layers compared, the dynamics of trees, the plan of a large model."""

import statistics

from experiments.reporting.aggregate import (
    baseline,
    block,
    by_seed,
    gap_closed,
    groups,
    last_of,
    learning_rate,
    lines_of,
    machine,
    mean,
    origin,
    paired,
    rank,
    setting,
    spread,
    task,
    trained,
)  # fmt: skip
from experiments.reporting.costs import cost
from experiments.reporting.render import Table
from tree_ffn.errors import InputError

BITS = "bits_per_byte"

# The figure that stands for a task, the first of these that it has.
MAIN = ("acc_norm", "acc", "f1", "exact_match", "word_perplexity", "perplexity")
# Its pairs of endings differ little in length: models are compared by plain accuracy, as in OPT's paper.
PLAIN = ("piqa",)
# Standard errors above chance from which on a score of the dense model says something.
CLAIM = 3
# What has to agree before scores of one task may stand beside each other.
SAME_QUESTIONS = ("task_sha256", "data_sha256", "n", "limit", "lm_eval", "asked_sha256")
GAP = "Gap closed is `(narrow-x)/(narrow-dense)` of validation loss, seed by seed."

# Columns of the dynamics: metric, heading, how a mean over seeds is written. One that no row has is left out.
DYNAMICS = (
    ("dead_leaves", "dead leaves", ".1%"), ("leaf_entropy", "leaf entropy", ".2f"),
    ("constant_decisions", "constant", ".1%"), ("changed", "moved", ".1%"), ("right_share", "right", ".1%"),
    ("skew", "skew", ".2f"), ("working_units", "working units", ".1f"),
    ("ever_working", "ever working", ".1%"), ("gradient_right", "gradient right", ".1%"),
)  # fmt: skip


# Texts that models were scored on whole (see `texts`): name, heading, and what is shown of each: metric,
# heading, form.
OTHER_TEXTS = (
    ("novels", "novels", (("bits_per_byte", "bits per byte", ".4f"),)),
    ("wikipedia", "Wikipedia", (("bits_per_byte", "bits per byte", ".4f"),)),
    ("wikitext2", "WikiText-2", (("nats_per_word", "nats a word", ".4f"), ("word_ppl", "perplexity", ".1f"))),
    ("wikitext2_joined", "WikiText-2 joined", (("bits_per_byte", "bits per byte", ".4f"),)),
)


def gap_cell(lines: dict[str, list[dict]], name: str, metric: str = "val_loss") -> str:
    """Gap closed of a line: 1 and 0 at the two ends; empty without both of them.

    Args:
      lines: {name: rows} of the table.
      name: of the line.
      metric: the loss.
    """
    ends = {"dense": "1", "narrow": "0"}
    both = all(baseline(lines, kind) for kind in ends)
    end = next((end for kind, end in ends.items() if both and baseline(lines, kind) is lines[name]), None)
    return end or spread(gap_closed(lines, lines[name], metric), ".3f")


def kinds(rows: list[dict], title: str) -> Table:
    """A line a kind of layer: loss, gap closed, active share, use of the leaves."""
    lines = lines_of(rows)
    cells = []
    for name, line in lines.items():
        bits, loss = by_seed(line, BITS), by_seed(line, "val_loss")
        cells.append([
            f"`{name}`", spread(bits.values()), spread(loss.values()), gap_cell(lines, name),
            mean(line, "active_share", ".1%"), products(line), mean(line, "dead_leaves", ".1%"),
            mean(line, "leaf_entropy", ".2f"), learning_rate(line), str(len(bits)),
        ])  # fmt: skip
    text = (
        f"Kinds of layers compared: {task(rows)}. Held-out text; mean ± standard deviation over seeds. "
        f"{GAP} An active share is of a layer's own units. Products: dot products of the model's width that "
        f"a token needs in a layer, two a unit and one for every router that is no unit. {origin(rows)}"
    )
    head = ["", "bits per byte", "val loss", "gap closed", "active share", "products", "dead leaves"]
    title = f"{title}, {setting(rows[0], 'train.steps')} steps"
    return block(title, text, [*head, "leaf entropy", "lr", "seeds"], cells, last_of(lines), lines=lines)


def products(line: list[dict]) -> str:
    """Products all in: as recorded, of older rows by arithmetic; empty where the config does not say."""
    known = cost(line[-1])
    return mean(line, "products", ",.0f") or (f"{known.products:,.0f}" if known else "")


def other_texts(rows: list[dict], title: str) -> Table | None:
    """The same lines on texts that were neither trained on nor chosen by; None where there are none.

    Args:
      rows: of a table of `kinds`.
      title: of that table.
    """
    metrics = {row["metric"] for row in rows}
    texts = [text for text in OTHER_TEXTS if f"{text[0]}_loss" in metrics]
    if not texts:
        return None
    lines, cells, head = lines_of(rows), [], [""]
    for _, heading, shown in texts:
        head += [*(f"{heading}, {unit}" for _, unit, _ in shown), "gap closed", "seeds"]
    for name, line in lines.items():
        cells.append([f"`{name}`"])
        for text, _, shown in texts:
            seeds = by_seed(line, f"{text}_loss")
            cells[-1] += [
                spread(by_seed(line, f"{text}_{metric}").values(), form) for metric, _, form in shown
            ]
            cells[-1] += [gap_cell(lines, name, f"{text}_loss") if seeds else "", str(len(seeds))]
    said = (
        "Texts that nothing was chosen by, whole, every token once. Gap closed as above, of the text's own "
        "loss. WikiText-2's words are its 245,569, ends of line included; joined: its spacing undone "
        f"(`experiments/join_words.py`). {origin(rows)}"
    )
    return block(f"{title}: other texts", said, head, cells, last_of(lines), lines=lines)


def own(rows: list[dict]) -> Table:
    """A table of any name: as `kinds`, and how far each line ends from dense, seed by seed."""
    lines = lines_of(rows)
    table, dense = kinds(rows, rows[0]["table"]), by_seed(baseline(lines, "dense"), "val_loss")
    table.head.insert(3, "less dense")
    for cells, line in zip(table.cells, lines.values(), strict=True):
        cells.insert(3, spread(paired(lambda x, d: x - d, by_seed(line, "val_loss"), dense)))
    return table


def cpu_small(rows: list[dict]) -> Table:
    return kinds(rows, "Small comparison")


def quality_attempts(rows: list[dict]) -> Table:
    vocabulary = f"{setting(rows[0], 'data.vocab_size'):,} tokens"
    return kinds(rows, f"Attempts to close the gap, {machine(rows[0])}, {vocabulary}")


def quality_longer(rows: list[dict]) -> Table:
    return kinds(rows, f"Twice the training, {machine(rows[0])}")


def sized_text(row: dict) -> tuple:
    """Runs of one length, model and text."""
    return *trained(row), f"width {setting(row, 'model.width')}", str(setting(row, "data.sha256"))[:12]


def quality_transfer(rows: list[dict]) -> Table:
    return kinds(rows, f"Other widths and texts, width {setting(rows[0], 'model.width')}, {machine(rows[0])}")


def t1_small(rows: list[dict]) -> Table:
    return kinds(rows, f"Language modelling (T1), {machine(rows[0])}")


def asked(row: dict) -> tuple:
    """Questions asked on one device, as many of each task."""
    return machine(row), row["config"]["scored"]["limit"] or 0


def t3_small(rows: list[dict]) -> Table:
    """A line a model, a column a task: its main score and standard error; chance above.

    Scores of a task in which the dense model is no `CLAIM` standard errors above chance say nothing about the
    others: its line says so. Where nothing is known of chance (words to be found), it is 0.

    Raises:
      InputError: models were asked different questions.
    """
    lines = groups(rows, lambda row: row["row"])
    lines = dict(sorted(lines.items(), key=lambda item: (rank(item[1][0]), item[0])))
    tasks = groups(rows, lambda row: (row["config"]["scored"]["task"], row["config"]["scored"]["shots"]))
    columns, chances = [], []
    for (name, shots), found in tasks.items():
        _check_same_questions(found)
        stem, metrics = f"{name}_{shots}shot_", {row["metric"] for row in found}
        names = MAIN[1:] if name in PLAIN else MAIN
        main = next((metric for metric in names if stem + metric in metrics), None)
        if main is not None:
            columns.append((f"{name}, {shots}-shot {main}", stem + main))
            chance = [row["value"] for row in found if row["metric"] == f"{stem}{main}_chance"]
            chances.append(_number(chance[-1]) if chance else "")
    cells = [["chance", *chances]]
    if "dense" in lines:
        above = [_above(lines["dense"], metric) for _, metric in columns]
        cells.append(["`dense`, standard errors above", *above])
    for name, line in lines.items():
        cells.append([f"`{name}`", *(_score(line, metric) for _, metric in columns)])
    limits = sorted({row["config"]["scored"]["n"] for row in rows})
    text = (
        f"Questions answered (EleutherAI's harness {rows[-1]['config']['scored']['lm_eval']}), {limits[0]:,} "
        f"to {limits[-1]:,} a task: score ± its standard error over questions; with several seeds, mean ± "
        f"standard deviation over them. In brackets: the dense model is less than {CLAIM} standard errors "
        f"above chance, and no score of that column says anything. {origin(rows)}"
    )
    head = ["", *(title for title, _ in columns)]
    return block(f"Questions (T3), {machine(rows[0])}", text, head, cells, last_of(lines), lines=lines)


def _check_same_questions(rows: list[dict]) -> None:
    """Rows of one task and number of shots: its definition, data, prompts and harness have to be the same."""
    for row in rows[1:]:
        for key in SAME_QUESTIONS:
            one, other = (at["config"]["scored"].get(key) for at in (rows[0], row))
            if one != other:
                scored = row["config"]["scored"]
                raise InputError(
                    f"results: table t3_small, {scored['task']} {scored['shots']}-shot: {rows[0]['row']} and "
                    f"{row['row']} were asked different questions (scored.{key} is {one!r} and {other!r}); "
                    "score them alike."
                )


def _above(dense: list[dict], metric: str) -> str:
    """How far the dense model is above chance, in standard errors of one seed; in brackets below `CLAIM`."""
    score, chance, error = (
        statistics.fmean(by_seed(dense, metric + end).values() or [0.0]) for end in ("", "_chance", "_stderr")
    )
    if not error or metric.endswith("perplexity"):
        return ""
    above = (score - chance) / error
    return f"{above:.1f}" if above >= CLAIM else f"({above:.1f})"


def _score(line: list[dict], metric: str) -> str:
    """Mean and spread over seeds, or of one seed the score and its standard error."""
    values = list(by_seed(line, metric).values())
    if len(values) != 1:
        return spread(values, ".4f")
    errors = list(by_seed(line, f"{metric}_stderr").values())
    return _number(values[0]) + (f" ± {_number(errors[0])}" if errors else "")


def _number(value: float) -> str:
    return f"{value:.4f}" if abs(value) < 100 else f"{value:,.4g}"


def t4_small(rows: list[dict]) -> Table:
    """A line an activation, site and balance; the last validation's figures, means over the layers."""
    lines = lines_of(rows)
    shown = [column for column in DYNAMICS if any(row["metric"] == column[0] for row in rows)]
    with_gap = any(gap_cell(lines, name) for name in lines)
    cells = []
    for name, line in lines.items():
        loss = by_seed(line, "val_loss")
        gap = [gap_cell(lines, name)] if with_gap else []
        figures = [mean(line, metric, form) for metric, _, form in shown]
        row = [f"`{name}`", spread(loss.values()), *gap, *figures, learning_rate(line), str(len(loss))]
        cells.append(row)
    said = f" {GAP}" if with_gap else ""
    text = (
        f"Activation, its site and balancing: {task(rows)}. Validation loss in nats a token, mean ± standard "
        f"deviation over seeds; the other metrics are means over layers and seeds, at the end.{said} "
        "Constant: share of decisions at nodes that sent all one way; moved: tokens whose leaf is another "
        "than at the validation before; right: decisions that went right; skew: 0 where nodes halve their "
        "tokens; working units: those above 0.01, a token; ever working: for at least one token; gradient "
        f"right: share of the squared gradient that right children have. {origin(rows)}"
    )
    head = ["", "val loss", *(["gap closed"] if with_gap else []), *(title for _, title, _ in shown)]
    title = f"Dynamics (T4), {machine(rows[0])}, {setting(rows[0], 'train.steps')} steps"
    return block(title, text, [*head, "lr", "seeds"], cells, last_of(lines), lines=lines)
