"""Linen shells around the layer: feed-forward blocks of any kind and the decoder that holds them."""

from tree_ffn.models.dense import DenseSpec
from tree_ffn.models.ffn import (
    FFN,
    active_share,
    active_units,
    build_ffn,
    ffn_flops,
    ffn_params,
    total_units,
    update_routing,
)
from tree_ffn.models.spec import FFNSpec, InitSpec, ModelSpec, spec_from_dict, spec_to_dict
from tree_ffn.models.transformer import Transformer, unrolled, update_model_routing

__all__ = [
    "FFN",
    "DenseSpec",
    "FFNSpec",
    "InitSpec",
    "ModelSpec",
    "Transformer",
    "active_share",
    "active_units",
    "build_ffn",
    "ffn_flops",
    "ffn_params",
    "spec_from_dict",
    "spec_to_dict",
    "total_units",
    "unrolled",
    "update_model_routing",
    "update_routing",
]
