"""Rows of configs/t4_cpu.py: four activations at the nodes, one behind the sum, balanced or not."""


def get_sweep():
    """The sweep as plain data."""
    balances = ["none", "sign"]
    return {
        "config": "configs/t4_cpu.py",
        "table": "t4_small",
        "rows": {
            "dense": {"set": {"routing": "dense"}},
            "narrow_A16": {"set": {"routing": "narrow"}},
        },
        "grids": [
            {
                "name": "tree_hard_P2_W1_{activation}_node_{balance}",
                "over": {"activation": ["gelu", "relu", "identity", "abs"], "balance": balances},
            },
            {
                "name": "tree_hard_P2_W1_gelu_sum_{balance}",
                "over": {"balance": balances},
                "set": {"site": "sum"},
            },
        ],
    }
