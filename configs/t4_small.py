"""The paper's dynamics at a scale that minutes allow: activation x site, balanced or not.

    python -m experiments.ablate --sweep=configs/sweeps/t4_small.py --workdir=runs/t4_small \\
        --results=results/t4_small.jsonl \\
        --set=data.files='TEXT/wikipedia2015/train_0[0-3].txt.xz,TEXT/novels/train_00.txt.xz' \\
        --set=data.valid_files=TEXT/wikipedia2015/valid.txt.xz \\
        --set=data.tokenizer=TEXT/tokenizers/gpt2/encoder.json.xz,TEXT/tokenizers/gpt2/vocab.bpe.xz
    python -m experiments.train --config=configs/t4_small.py:activation=relu,site=node,balance=sign \\
        --config.data.files=... --workdir=runs/relu           # one row

The paper claims that hard routing and an asymmetric activation at the nodes switch off unused paths as
training goes on, that moving the activation behind the sum keeps the trees balanced, and that balance is
not quality. Not known of its setting: the form of the second placement (here y = b_out + act(sum)), which
activations it compares, its trees, lengths, measures of balance, and all its values.

Here: the model, text and batches of configs/t1_small.py for 610 steps of 32,768 tokens (20 M); hard routing
with P=12, W=1, D=7: A = 96 of 3,060 units.

The learning rate, 1.5e-3, is the best of three with gelu at the nodes
(results/t1_small_tuning.jsonl); the sweep's grid (--tune) finds that of every activation and site.

Expected: docs/results/t4_small.md. A run takes one to three minutes on one H100, by the rates of the rows
of t1_small_tuning.
"""

from configs import common, t1_small

ROUTINGS = {
    "hard": "tree_hard_P12_W1",
    # The ends of the scale: dense with A and with F units.
    "narrow": "narrow_A96",
    "dense": "dense",
}
BALANCES = {"none": 0.0, "sign": 1e-3}  # steps of the thresholds
STEPS = {"full": 610, "tune": 153}


def get_config(arg=None):
    """Arguments: activation, site (node, sum), routing (of ROUTINGS), balance (none, sign), length, seed."""
    arg = common.parse_arg(
        arg, activation="gelu", site="node", routing="hard", balance="none", length="full", seed=0
    )
    common.check_known(arg, routing=ROUTINGS, balance=BALANCES, length=STEPS)
    config = t1_small.get_config(f"row={ROUTINGS[arg.routing]},seed={arg.seed}")
    config.ffn.activation, config.ffn.act_site = arg.activation, arg.site
    config.ffn.balance_rate = BALANCES[arg.balance]
    config.train.steps, config.train.eval_every = STEPS[arg.length], 50
    return config
