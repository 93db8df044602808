"""Sizes of models by name: `--config.model.preset=opt_125m`.

Decoder sizes from 125M on are those of OPT (Zhang et al. 2022, arXiv 2205.01068, table 1); `opt_350m` is
pre-LN and 1024 wide throughout here. A layer has about 4 E feed-forward units in all of them.
"""

from tree_ffn.errors import check_choice

SIZES = ("n_layers", "width", "n_heads", "max_seq_len")

PRESETS = {
    "nano": (4, 128, 4, 128),  #         0.9 M parameters with bytes as tokens
    "micro": (6, 256, 4, 256),  #        4.9 M
    "mini": (9, 512, 8, 512),  #          29 M
    "opt_125m": (12, 768, 12, 2048),  #   87 M; 125 M with OPT's 50,272 tokens
    "opt_350m": (24, 1024, 16, 2048),  # 305 M
    "opt_1.3b": (24, 2048, 32, 2048),  # 1.2 G
    "opt_2.7b": (32, 2560, 32, 2048),  # 2.5 G
    "opt_6.7b": (32, 4096, 32, 2048),  # 6.5 G
}


def sizes_of(preset: str) -> dict[str, int]:
    """The sizes that a name stands for; '' is micro.

    Raises:
      InputError: the name is not known.

    Example:
      >>> sizes_of("nano")["width"]
      128
    """
    check_choice("model.preset", preset, (*PRESETS, ""))
    return dict(zip(SIZES, PRESETS[preset or "micro"]))
