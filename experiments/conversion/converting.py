"""Conversion of a model by several recipes: what each keeps, printed, recorded, and written as runs."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import jax

from experiments.reporting import record
from tree_ffn.conversion import calibration
from tree_ffn.conversion.convert import Kept, Recipe, convert_model, layer_for
from tree_ffn.data import PreparedCorpus
from tree_ffn.models.ffn import ffn_flops
from tree_ffn.training.evaluate import evaluate
from tree_ffn.training.plan import resolved
from tree_ffn.training.restore import Restored
from tree_ffn.training.sharding import shardings_for
from tree_ffn.training.workdir import begin_run
from tree_ffn.tree import LeafSpec


class Sizes(NamedTuple):
    """How much text is read.

    Attributes:
      tokens: of the training split, to calibrate on.
      held_out: tokens of the validation split that shares are measured on.
      batch_size: rows a batch.
      batches: of the validation split, to score; 0 is all.
    """

    tokens: int
    held_out: int
    batch_size: int = 16
    batches: int = 20


def convert_all(
    run: Restored, text: PreparedCorpus, recipes: Sequence[Recipe], sizes: Sizes, *,
    to: Mapping[Recipe, str] | None = None, results: str | None = None,
) -> None:  # fmt: skip
    """Converts a dense model by each recipe, all into the same layer, and prints the table.

    Args:
      run, text: of `starts.with_text`.
      recipes: how.
      sizes: how much text is read.
      to: {recipe: new directory} of the conversions that are written, as runs at step 0.
      results: file to append the figures to; None appends nothing.
    """
    inputs = calibration.ffn_inputs(run, [text.train], sizes.tokens, sizes.batch_size)
    held_out = calibration.ffn_inputs(run, [text.valid], sizes.held_out, sizes.batch_size)
    score = lambda run: evaluate(run, text, "valid", sizes.batch_size, sizes.batches)
    dense, layer = score(run), recipes[0].layer
    active, total = layer.active_units, layer.total_units
    print(
        f"{sizes.tokens:,} calibration tokens of {text.meta['corpus']}; dense loss {dense['loss']:.4f}; "
        f"{active:,} of {total:,} units active ({100 * active / total:.2f} %), with routers "
        f"{100 * arithmetic(run, recipes[0]):.2f} % of the dense layers' arithmetic"
    )
    print(head(len(run.model.ffns)), flush=True)
    found: list[Kept] = []
    for recipe in recipes:
        model, variables, found = convert_model(run.model, run.variables, inputs, held_out, recipe)
        variables = jax.device_put(variables, shardings_for(variables, run.mesh))
        figures = score(run._replace(model=model, variables=variables))
        figures = figures_of(found, figures, dense) | {"flops_share": arithmetic(run, recipe)}
        print(line(recipe.method, [share.layer for share in found], figures), flush=True)
        print(line(f"{recipe.method}/experts", [share.experts for share in found]), flush=True)
        facts = {**facts_of(recipe), "tokens": sizes.tokens}
        if results:
            config = {**resolved(run.config), "seed": recipe.seed, "convert": facts}
            record.append_figures(
                results, figures, table="conversion", row=row_of(recipe), config=config, data_meta=text.meta
            )
        if to and recipe in to:
            facts |= {"step": run.meta["step"]}
            begin_run(to[recipe], run, model, variables, figures["loss"], converted=facts)
    for name in ("oracle", "static"):  # as the last recipe's refits have them
        print(line(name, [getattr(share, name) for share in found]), flush=True)


def row_of(recipe: Recipe) -> str:
    """The name of a conversion's rows: how units were placed, and in what.

    Example:
      >>> row_of(Recipe(LeafSpec(n_experts=8, expert_width=2, top_k=3), "cluster", refits=3))
      'cluster_leaf_X8_W2_K3_refits3'
    """
    facts = facts_of(recipe)
    letters = {
        "n_trees": "P",
        "depth": "D",
        "n_experts": "X",
        "node_width": "W",
        "expert_width": "W",
        "top_k": "K",
    }
    sizes = {letters[name]: value for name, value in facts.items() if name in letters}
    if isinstance(sizes["W"], list):
        sizes["W"] = "-".join(map(str, sizes["W"] if len(set(sizes["W"])) > 1 else sizes["W"][:1]))
    if sizes.get("P") == 1 and "X" in sizes:
        del sizes["P"]
    shown = [f"{letter}{size}" for letter, size in sizes.items()]
    return "_".join([recipe.method, facts["router"], *shown, f"refits{recipe.refits}"])


def arithmetic(run: Restored, recipe: Recipe) -> float:
    """FLOPs a token of the sparse layers, routers among them, as a share of those of the dense ones."""
    flops = lambda specs: sum(ffn_flops(spec, run.model.width) for spec in specs)
    return flops(layer_for(spec, recipe) for spec in run.model.ffns) / flops(run.model.ffns)


def figures_of(found: list[Kept], score: dict, dense: dict) -> dict[str, float]:
    """Figures of a conversion, per layer where they have a number: kept/0, ..., and losses.

    Args:
      found: what each layer keeps.
      score: of the converted model.
      dense: score of the dense model.
    """
    figures = {"loss": score["loss"], "loss_rise": score["loss"] - dense["loss"]}
    for layer, share in enumerate(found):
        names = {"kept": share.layer, "kept_experts": share.experts, "kept_oracle": share.oracle}
        names |= {"kept_static": share.static}
        figures |= {f"{name}/{layer}": value for name, value in names.items()}
    return figures | {"active_share": score["active_share"]}


def facts_of(recipe: Recipe) -> dict:
    """A recipe as JSON values; `router` is `leaf`, or where decisions of paths are kept."""
    layer = recipe.layer
    if isinstance(layer, LeafSpec):
        router, names = "leaf", ("n_trees", "n_experts", "expert_width", "top_k", "gate_norm")
        sizes = {name: getattr(layer, name) for name in names}
    else:
        router, shape = "separate" if layer.router == "frozen" else "spent", layer.shape
        sizes = {"n_trees": shape.n_trees, "depth": shape.depth, "node_width": list(shape.widths)}
    how = {"method": recipe.method, "router": router, "refits": recipe.refits, "drop": recipe.drop,
           "seed": recipe.seed}  # fmt: skip
    return how | sizes


def head(n_layers: int) -> str:
    """The table's first line."""
    layers = " ".join(f"{f'layer {layer}':>9}" for layer in range(n_layers))
    return f"{'kept':<18} {layers} {'mean':>9} {'loss':>9} {'rise':>9}"


def line(name: str, shares: list[float], figures: dict | None = None) -> str:
    """A line of the table: shares of the layers' outputs and, of a conversion, its loss.

    Args:
      name: first cell.
      shares: one a layer; their mean is appended.
      figures: loss and its rise, of a conversion.
    """
    cells = " ".join(f"{share:>9.3f}" for share in [*shares, sum(shares) / len(shares)])
    losses = f" {figures['loss']:>9.4f} {figures['loss_rise']:>+9.4f}" if figures else ""
    return f"{name:<18} {cells}{losses}"
