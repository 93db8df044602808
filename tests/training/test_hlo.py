"""What programs on eight fake devices send, as the text of the compiled program has it."""

import functools

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import PartitionSpec as P

from tree_ffn.training import hlo
from tree_ffn.training.sharding import make_mesh

MESH = {"data": 4, "model": 2}
SIZE = 4 * 16 * 128  # bytes of an array [16, 128] of one device


def text_of(function) -> str:
    """A program of an array [16, 128] on every device."""
    mesh, rows = make_mesh(*MESH.values()), P(("data", "model"))
    run = jax.shard_map(function, mesh=mesh, in_specs=rows, out_specs=rows, check_vma=False)
    shape = jax.ShapeDtypeStruct((8 * 16, 128), jnp.float32)
    with jax.set_mesh(mesh):
        return jax.jit(run).lower(shape).compile().as_text() or ""


def sent_by(text: str, mesh: dict) -> list[hlo.Collective]:
    return hlo.collectives(hlo.read(text), mesh)


def looped(function, n: int):
    return lambda x: jax.lax.fori_loop(0, n, lambda _, x: function(x), x)


def added(axes):
    return lambda x: jnp.sin(jax.lax.psum(x, axes))


@pytest.mark.parametrize("axes, group", [(("data",), 4), (("model",), 2), (("data", "model"), 8)])
def test_an_axis_and_its_devices(axes, group):
    [found] = sent_by(text_of(added(axes)), MESH)
    assert found == hlo.Collective("all-reduce", SIZE, 1, axes, group)
    assert found.sent == 2 * SIZE * (group - 1) // group


def test_what_a_loop_sends_counts_as_often_as_it_runs():
    inner = looped(added("data"), 3)
    outer = looped(lambda x: added("model")(inner(x)), 5)
    found = {one.axes: (one.times, one.bytes) for one in sent_by(text_of(outer), MESH)}
    assert found == {("data",): (15, SIZE), ("model",): (5, SIZE)}


@pytest.mark.parametrize(
    "send, kind, size, sent",
    [
        (
            lambda x: jax.lax.all_gather(x, "data", tiled=True).reshape(4, 16, 128).sum(0),
            "all-gather", 4 * SIZE, 3 * SIZE,
        ),
        (
            lambda x: jnp.tile(jax.lax.psum_scatter(x, "data", tiled=True), (4, 1)),
            "reduce-scatter", SIZE // 4, 3 * SIZE // 4,
        ),
        (
            lambda x: jax.lax.ppermute(x, "data", [(0, 1), (1, 2), (2, 3), (3, 0)]),
            "collective-permute", SIZE, SIZE,
        ),
        (lambda x: jax.lax.all_to_all(x, "data", 0, 0, tiled=True), "all-to-all", SIZE, 3 * SIZE // 4),
    ],
)  # fmt: skip
def test_every_kind(send, kind, size, sent):
    found = [one for one in sent_by(text_of(send), MESH) if one.kind == kind]
    assert [(one.bytes, one.axes, one.sent) for one in found] == [(size, ("data",), sent)]


@pytest.mark.parametrize(
    "said, group",
    [
        ("replica_groups={{0,2,4,6},{1,3,5,7}}", [0, 2, 4, 6]),
        ("replica_groups=[4,2]<=[8]", [0, 1]),
        ("replica_groups=[2,4]<=[4,2]T(1,0)", [0, 2, 4, 6]),
        ("replica_groups=mesh['axis_0'=1,'axis_1'=4,'axis_2'=2] {'axis_1'}", [0, 2, 4, 6]),
        ("source_target_pairs={{0,0},{2,4},{4,6}}", [2, 4]),
        ("replica_groups={}", list(range(8))),
    ],
)
def test_forms_of_groups(said, group):
    assert hlo._first_group(f"%x = f32[8] all-reduce(%y), {said}, to_apply=%add", 8) == group


@functools.cache
def tpu_text() -> str:
    """Shaped as libtpu writes: a loop that its condition's constant ends, an overlapped gather, estimates."""
    return """HloModule jit_f

%piece.1 (p: f32[8]) -> f32[8] {
  %g.1 = bf16[4,256]{1,0:T(8,128)(2,1)} all-gather(%p), channel_id=7, replica_groups=[2,4]<=[4,2]T(1,0)
}

%piece.2 (p: f32[8]) -> f32[8] {
  %g.2 = bf16[4,256]{1,0:T(8,128)(2,1)} all-gather(%p), channel_id=7, replica_groups=[2,4]<=[4,2]T(1,0)
}

%body (p: (s32[], f32[8])) -> (s32[], f32[8]) {
  %a = f32[8]{0} fusion(%p), kind=kLoop, calls=%piece.1, backend_config={"estimated_cycles":"60"}
  %b = f32[8]{0} fusion(%p), kind=kLoop, calls=%piece.2, backend_config={"estimated_cycles":"40"}
}

%cond (p: (s32[], f32[8])) -> pred[] {
  %c = s32[]{:T(128)} constant(6)
  ROOT %lt = pred[] compare(%i, %c), direction=LT
}

ENTRY %main (x: f32[8]) -> f32[8] {
  %while.1 = (s32[], f32[8]) while(%t), condition=%cond, body=%body
  %s = (f32[2,3]{1,0}, f32[2,3]{1,0}, u32[]{:S(2)}) collective-permute-start(%t), source_target_pairs={{0,1}}
  %other = f32[8]{0} fusion(%p), backend_config={"window_config":{"estimated_cycles":"11"}}
  %rows = s32[2]{0} parameter(1)
  %read = f32[2,8]{1,0} fusion(%other, /*index=1*/%rows), "estimated_cycles":"9223372036854775807"
  %kernel = f32[8]{0} custom-call(%read), custom_call_target="tpu_custom_call"
  %buffer = f32[64]{0} custom-call(), custom_call_target="AllocateBuffer"
}
"""


def test_what_libtpu_writes():
    found = {one.kind: one for one in sent_by(tpu_text(), MESH)}
    assert found == {
        "all-gather": hlo.Collective("all-gather", 2 * 4 * 256, 6, ("data",), 4),
        "collective-permute": hlo.Collective("collective-permute", 24, 1, ("model",), 2),
    }
    program = hlo.read(tpu_text())
    assert hlo.cycles(program) == 611
    assert hlo.unestimated(program) == (32 + 8 + 64) + (
        64 + 32
    )  # what rows are read of, rows, result; kernel


def test_what_xla_writes_for_gpus():
    """The start of an overlapped reduce-scatter names its operands beside what it brings."""
    text = """ENTRY %main (x: f32[64]) -> f32[8] {
  %r = ((f32[64,2]{1,0}, f32[64]{0}), (f32[8,2]{1,0}, f32[8]{0})) reduce-scatter-start(%a, %b), \
replica_groups=[1,8]<=[8]
}
"""
    (one,) = sent_by(text, {"data": 8})
    assert one == hlo.Collective("reduce-scatter", 4 * (16 + 8), 1, ("data",), 8)
    assert one.sent == 7 * one.bytes
