r"""The dense model of the demonstration of conversion: about 30 M parameters, good enough to be asked.

    python -m experiments.train --config=configs/demo_30m.py \
        --config.data.files='TEXT/wikipedia2015/train_0[0-3].txt.xz,TEXT/novels/train_00.txt.xz' \
        --config.data.valid_files=TEXT/wikipedia2015/valid.txt.xz \
        --config.data.tokenizer=TEXT/tokenizers/gpt2/encoder.json.xz,TEXT/tokenizers/gpt2/vocab.bpe.xz \
        --workdir=runs/demo/seed0/dense

`make convert-demo` converts it and trains the conversions further (docs/conversion.md has its values).

6 layers of width 384, context 512, GPT-2's BPE, F = 1,530: 30.2 M parameters, 19.5 M of them embeddings. The
text is that of configs/t1_small.py (44 M tokens), seen 2.2 times in 3,000 steps of 32,768 tokens.

The trees that fit: P = 3, D = 7, W = 2 have A = 48 of 1,530 units (3.1 %); with separate routers, whose
3 * 7 products a token are not counted in A, their arithmetic is 3.8 % of the dense layers'.
"""

from configs import common


def get_config(arg=None):
    """Arguments: steps, seed."""
    arg = common.parse_arg(arg, steps=3000, seed=0)
    config = common.base_config()
    config.seed = arg.seed

    model = config.model
    model.n_layers, model.width, model.n_heads, model.max_seq_len = 6, 384, 6, 512
    model.dtype = "bfloat16"
    model.vocab_multiple = 64

    config.ffn.kind, config.ffn.width = "dense", 1530  # F of the trees

    config.data.corpus = "named"

    # Microbatches: several processes share a GPU's memory, and scores of 50,304 tokens are large.
    config.train.batch_size, config.train.steps, config.train.grad_accum_steps = 64, arg.steps, 4
    config.train.eval_every, config.train.eval_batches = max(1, arg.steps // 6), 20
    config.train.checkpoint_every = 0  # at the end only

    config.optim.lr = 2e-3
    config.optim.warmup_share = 0.05
    config.optim.final_share = 0.05
    return config
