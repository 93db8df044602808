"""What the layers of a recorded run cost: F, and products all in; those of layers that are gone too.

A layer that is computed today says so itself (`tree_ffn.models.ffn`). Of the others the arithmetic is here:
they are read from the configs of rows and never built.
"""

import statistics
from typing import Any, NamedTuple

from tree_ffn.models.ffn import products, total_units
from tree_ffn.models.from_config import ffn_spec, layer_kinds
from tree_ffn.plain import namespace
from tree_ffn.upgrades import is_gone, units_of_paths


class Cost(NamedTuple):
    """Units of a layer, F, and dot products of E numbers that a token needs in it, routing counted."""

    total: float
    products: float


def cost(row: dict) -> Cost | None:
    """Mean over the layers of a row's model; None where its config does not say what they are.

    Example:
      >>> ffn = {"kind": "narrow", "width": 96, "activation": "gelu"}
      >>> cost({"config": {"model": {"n_layers": 8}, "ffn": ffn}})
      Cost(total=96.0, products=192.0)
    """
    ffn, model = row["config"].get("ffn", {}), row["config"].get("model", {})
    if "activation" not in ffn:
        return None
    if is_gone(ffn):
        return None if model.get("layers") else gone(ffn)
    kinds = layer_kinds(model.get("layers", ""), model["n_layers"], ffn["kind"])
    section: Any = namespace(ffn)
    specs = [ffn_spec(section, kind) for kind in kinds]
    return Cost(*(statistics.fmean(map(count, specs)) for count in (total_units, products)))


def gone(ffn: dict) -> Cost:
    """F and 2 A + routers of a layer as the last commit had them that computes it.

    Experts: X W units, K W of them active, X routers of grouped ones, X - P where they were the best of all
    leaves of P trees. P trees of depth D whose first H decisions are a hash's: sum over the levels of P W_l
    active units and of P 2^l W_l in all, S shared ones in both. Where nodes only decided (`silent`), W_l had
    one row less. A search of beam B asked min(2^l, B) nodes of each level that was no hash's; of those, the
    D - H on the path are units already where first units decide.
    """
    if ffn["kind"] in ("moe", "leaf"):
        width = ffn["expert_width"] or units_of_paths(ffn)[1] // ffn["top_k"]
        n_trees = ffn.get("leaf_trees", ffn["n_trees"]) if ffn["kind"] == "leaf" else 0
        return Cost(ffn["n_experts"] * width, 2 * ffn["top_k"] * width + ffn["n_experts"] - n_trees)
    router = "frozen" if ffn["kind"] == "random_tree" else ffn["router"]
    hashed = ffn["depth"] if ffn["kind"] == "hash_tree" else ffn["hash_levels"]
    total, active = units_of_paths({**ffn, "router": router, "hash_levels": hashed})
    beam = ffn["beam"] if ffn["kind"] == "tree" else 1
    decides = ffn["depth"] - hashed
    asked = sum(min(2**level, beam) for level in range(decides))
    on_path = decides if router == "first_unit" else 0
    return Cost(total, 2 * active + ffn["n_trees"] * (asked - on_path))
