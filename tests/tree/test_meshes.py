"""Programs for devices that this machine lacks."""

import jax
import jax.numpy as jnp
import pytest

from tree_ffn.models.attention import self_attention
from tree_ffn.tree import LeafSpec, leaf
from tree_ffn.tree.combine import fastest
from tree_ffn.tree.meshes import platform


@pytest.fixture(params=["cpu", "gpu", "tpu"])
def devices(request):
    """A platform, whose eight devices are those of the current mesh."""
    device = jax.sharding.AbstractDevice(f"a {request.param}", 1, request.param)
    mesh = jax.sharding.AbstractMesh((8,), ("data",), abstract_device=device)
    with jax.sharding.use_abstract_mesh(mesh):
        yield request.param


def test_the_platform_is_that_of_the_mesh(devices):
    assert platform() == devices


def test_without_a_mesh_it_is_that_of_jax():
    assert platform() == jax.default_backend()


def test_the_implementation_is_one_for_these_devices(devices):
    spec = LeafSpec(n_experts=64, expert_width=2, top_k=4)
    params = jax.eval_shape(lambda: leaf.init_params(jax.random.key(0), spec, 16))
    x = jax.ShapeDtypeStruct((4096, 16), jnp.bfloat16)
    assert fastest(params, x, spec) == ("grouped" if devices == "cpu" else "masked")


def test_attention_has_the_kernel_of_these_devices(devices):
    shape = jax.ShapeDtypeStruct((2, 128, 2, 16), jnp.bfloat16)
    if devices == "gpu":  # cuDNN is asked for, and not here
        with pytest.raises(RuntimeError, match="cuDNN"):
            jax.eval_shape(self_attention, shape, shape, shape)
    else:
        jaxpr = str(jax.make_jaxpr(self_attention)(shape, shape, shape))
        assert "cudnn" not in jaxpr and ("pallas_call" in jaxpr) == (devices == "tpu")
