"""Old mixtures that balanced no load have biases that no layer reads: left out if 0, refused otherwise."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from tests.models.kinds import forward, model_spec, random_variables
from tree_ffn.errors import InputError
from tree_ffn.models import export
from tree_ffn.training.checkpoint import Checkpoints
from tree_ffn.training.sharding import make_mesh, placed
from tree_ffn.training.step import TrainState
from tree_ffn.tree import LeafSpec
from tree_ffn.upgrades import KEY

SPEC = model_spec(LeafSpec(n_experts=5, expert_width=3, top_k=2, router="softmax", gate_norm="l1"))
# The same layer as it was written down until version 4.
MIXTURE = {
    "kind": "moe", "n_experts": 5, "expert_width": 3, "top_k": 2, "renormalise": True, "balance_rate": 1e-3,
    "aux_weight": 0.01, "activation": "gelu", "router": "softmax", "expert_groups": 1, "gate_norm": 1,
    "leak": 0.0, "leak_share": 0.3,
}  # fmt: skip
BIAS = "routing/run_0/ffn/selection_bias"
MOVED = "is not 0 and moves the choice of a layer that balances no load; .* 30983ff"


def old_export(directory, balance, bias):
    """What a mixture of version 4 left: its bias stands beside the arrays of today."""
    export.save(directory, SPEC, random_variables(SPEC))
    weights, config = f"{directory}/model.safetensors", f"{directory}/config.json"
    save_file(load_file(weights) | {BIAS: np.float32([bias])}, weights)
    with open(config, encoding="utf-8") as file:
        values = json.load(file)
    values["model"] |= {KEY: 4, "ffns": [MIXTURE | {"balance": balance}]}
    with open(config, "w", encoding="utf-8") as file:
        json.dump(values, file)


@pytest.mark.parametrize("balance", ["none", "aux"])
def test_an_export_is_todays_layer(tmp_path, balance):
    old_export(str(tmp_path), balance, [0.0] * 5)
    spec, variables, _ = export.load(str(tmp_path))
    assert spec == SPEC and variables.keys() == {"params"}
    tokens = np.arange(12, dtype=np.int32).reshape(2, 6)
    wanted, _ = forward(SPEC)(random_variables(SPEC), tokens)
    np.testing.assert_array_equal(forward(spec)(variables, tokens)[0], wanted)


@pytest.mark.parametrize("bias", [[0, 0, 0, 0, 1e-3], [0, float("nan"), 0, 0, 0]])
def test_an_export_whose_bias_moved_its_choice_is_refused(tmp_path, bias):
    old_export(str(tmp_path), "none", bias)
    with pytest.raises(InputError, match=f"^export: {BIAS} of '.*model.safetensors' {MOVED}"):
        export.load(str(tmp_path))


def test_the_bias_of_a_layer_that_balances_stays(tmp_path):
    old_export(str(tmp_path), "bias", [1e-3, 0.0, 0.0, 0.0, -1e-3])
    spec, variables, _ = export.load(str(tmp_path))
    assert spec.ffns[0].balance_rate == 1e-3
    bias = variables["routing"]["run_0"]["ffn"]["selection_bias"]
    np.testing.assert_array_equal(bias, np.float32([[1e-3, 0.0, 0.0, 0.0, -1e-3]]))


def test_a_checkpoint(tmp_path):
    """To go on training, and its model alone; of a layer beside others, or the only one with a routing."""
    params, threshold = {"run_0": {"ffn": {"w_in": jnp.arange(6.0).reshape(1, 2, 3)}}}, jnp.ones((1, 2, 3))
    for step, (value, routing) in enumerate(
        [(0.0, {}), (0.0, {"run_1": {"ffn": {"threshold": threshold}}}), (1e-3, {})]
    ):
        old = {"run_0": {"ffn": {"selection_bias": jnp.full((1, 2), value)}}, **routing}
        state = TrainState(jnp.int32(step), params, routing, opt_state=())
        shapes = placed(jax.eval_shape(lambda: state), make_mesh(1, 1))  # noqa: B023 called at once
        with Checkpoints(str(tmp_path), keep=1) as checkpoints:
            checkpoints.save(state._replace(routing=old), {"data": {}})
            checkpoints.wait()
            if value:
                with pytest.raises(InputError, match=f"^checkpoint: {BIAS} of '.*/{step}' {MOVED}"):
                    checkpoints.restore(shapes)
                continue
            restored, _ = checkpoints.restore(shapes)
            alone = checkpoints.restore_variables(shapes.variables, step)
        assert jax.tree.structure(restored) == jax.tree.structure(state)
        jax.tree.map(np.testing.assert_array_equal, restored, state)
        jax.tree.map(np.testing.assert_array_equal, alone, state.variables)
