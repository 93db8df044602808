"""Makes the checkpoints of tests/huggingface/fixtures/: what transformers writes and what it computes.

    python -m tests.huggingface.make_pretrained_fixtures [DIRECTORY]

Used with Python 3.11, torch 2.13.0 (CPU), transformers 5.24.0, numpy 2.4.6; jax is not needed. Every
parameter is random (norm scales around 1, nothing 0), from NumPy's generator, so the weights come out the
same again. Beside each checkpoint stands expected.npz: `tokens` int32 [B, C]; `logits` float32 [B, C, V]
and the attention's `keys` float32 [layers, B, H, C, K], computed by transformers in float32 from the
weights as stored. Keys are there because a bias of all keys alike changes no attention weight: no logits
could show that it was read.
"""

import pathlib
import shutil
import sys

import numpy as np

FIXTURES = pathlib.Path(__file__).parent / "fixtures"

GPT2 = {"vocab_size": 61, "n_positions": 12, "n_embd": 16, "n_layer": 2, "n_head": 2, "eos_token_id": 60,
        "bos_token_id": 60}  # fmt: skip
OPT = {"vocab_size": 61, "max_position_embeddings": 12, "hidden_size": 16, "num_hidden_layers": 2,
       "num_attention_heads": 2, "ffn_dim": 40}  # fmt: skip

# name: (config class, its fields, how it is stored)
CASES = {
    "gpt2_gelu_new": ("GPT2Config", GPT2, {}),
    "gpt2_gelu": ("GPT2Config", GPT2 | {"activation_function": "gelu", "n_inner": 40}, {}),
    "gpt2_relu": ("GPT2Config", GPT2 | {"activation_function": "relu", "layer_norm_epsilon": 1e-2}, {}),
    # Without the language model's prefix, as the oldest files of the family are.
    "gpt2_base_float16": (
        "GPT2Config", GPT2 | {"activation_function": "gelu_pytorch_tanh"}, {"dtype": "float16", "base": True}
    ),
    "opt_relu": ("OPTConfig", OPT | {"word_embed_proj_dim": 16}, {}),
    "opt_base_bfloat16": (
        "OPTConfig", OPT | {"activation_function": "gelu"}, {"dtype": "bfloat16", "base": True}
    ),
    "opt_sharded": ("OPTConfig", OPT, {"max_shard_size": 12_000}),
}  # fmt: skip


def make(directory: pathlib.Path, name: str) -> None:
    """Writes one checkpoint and what it computes into `directory`/`name`."""
    import torch
    import transformers

    config_class, fields, storage = CASES[name]
    config = getattr(transformers, config_class)(**fields)
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    rng = np.random.default_rng(list(name.encode()))
    fill(model, rng)
    model = model.to(getattr(torch, storage.get("dtype", "float32")))
    path = directory / name
    shutil.rmtree(path, ignore_errors=True)
    saved = model.base_model if storage.get("base") else model
    saved.save_pretrained(path, max_shard_size=storage.get("max_shard_size", "1GB"))
    (path / "generation_config.json").unlink(missing_ok=True)
    tokens = rng.integers(0, config.vocab_size, (2, 12))
    np.savez_compressed(path / "expected.npz", tokens=tokens.astype(np.int32), **outputs(model, tokens))


def fill(model, rng: np.random.Generator) -> None:
    """Random values in place of the usual first ones, which are 0 and 1 in biases and norms."""
    import torch

    for path, parameter in model.named_parameters():
        is_norm = "ln_" in path or "layer_norm" in path
        mean, std = (1.0, 0.2) if is_norm and path.endswith("weight") else (0.0, 0.3)
        value = mean + std * rng.standard_normal(tuple(parameter.shape))
        parameter.data = torch.from_numpy(value.astype(np.float32))
    model.tie_weights()


def outputs(model, tokens: np.ndarray) -> dict:
    """{logits, keys}: the model's own in float32."""
    import torch

    with torch.no_grad():
        out = model.float()(torch.from_numpy(tokens), use_cache=True)
    keys = np.stack([layer.keys.numpy() for layer in out.past_key_values.layers])
    return {"logits": out.logits.numpy(), "keys": keys}


if __name__ == "__main__":
    for case in CASES:
        make(pathlib.Path(sys.argv[1]) if sys.argv[1:] else FIXTURES, case)
