"""Layers to time: one of some width, for some tokens, in some pass; and the dense layers beside it."""

import dataclasses
import functools

import jax
import jax.numpy as jnp

from experiments.benchmarks.timing import Timed, Variant, ceilings
from tree_ffn import recipe
from tree_ffn.errors import InputError, check_choice
from tree_ffn.models.ffn import apply_ffn, ffn_flops, init_ffn, products, separate_routers
from tree_ffn.tree import LeafSpec, TreeShape, TreeSpec, activation

SHAPES = ("wide", "narrow", "leaf", "mixture")
PASSES = ("forward", "train", "start")
USAGES = ("uniform", "skewed", "one_leaf")
# Of routers' biases, by which the experts are used as after a training: entropy .84, 7.6 % of them never
# (docs/results/quality_attempts.md).
UNEVEN = 0.8


@dataclasses.dataclass(frozen=True)
class Case:
    """One row: a layer of some width, a number of tokens, a pass."""

    width: int
    n_tokens: int
    spec: LeafSpec | TreeSpec
    direction: str
    dtype: str

    @property
    def name(self) -> str:
        if isinstance(spec := self.spec, LeafSpec):
            layer = f"X{spec.n_experts}_W{spec.expert_width}_K{spec.top_k}_{spec.router}"
        else:
            layer = f"P{spec.shape.n_trees}_W{spec.shape.node_width}"
        return f"d{self.width}_T{self.n_tokens}_{layer}_{self.direction}"

    def layers(self) -> int:
        """Length of the chain: enough for 128 MiB of dense weights, at most 32 layers.

        On an accelerator for 4 GiB: what a call costs there is some layers of few tokens.
        """
        layer_bytes = 2 * self.spec.total_units * self.width * jnp.dtype(self.dtype).itemsize
        most = 32 if self.n_tokens <= 16 else 4 if self.n_tokens <= 256 else 1
        room = 2**27 if jax.default_backend() == "cpu" else 2**32
        return max(1, min(most, room // layer_bytes))

    def passes(self) -> int:
        """How often a call goes through the chain: of few tokens often, or a GPU would wait for its host."""
        few = jax.default_backend() != "cpu" and self.n_tokens <= 16
        return max(1, 64 // self.layers()) if few else 1


def layer_spec(shape_name: str, width: int, depth: int, routing: str, act: str) -> LeafSpec | TreeSpec:
    """A layer with A = E / 8: the paper's, of one tree or many; `tree_ffn.recipe`; or a flat mixture.

    Args:
      shape_name: one of --shapes.
      width: E.
      depth: of trees of paths.
      routing: of trees of paths.
      act: the activation.
    """
    check_choice("--shapes", shape_name, SHAPES)
    if width % 128:
        raise InputError(f"--widths: {width} is not allowed; use a multiple of 128.")
    if shape_name == "leaf":
        return dataclasses.replace(recipe(width), activation=act)
    if shape_name == "mixture":
        return LeafSpec(
            n_experts=128,
            expert_width=width // 32,
            top_k=4,
            router="softmax",
            gate_norm="rms",
            activation=act,
        )
    n_trees, node_width = (1, width // 64) if shape_name == "wide" else (width // 64, 1)
    return TreeSpec(TreeShape(n_trees, depth, node_width), routing=routing, activation=act)


def granular_spec(width: int, expert_width: int, act: str) -> LeafSpec:
    """A leaf layer with F = 4 E and A = E / 8 whose experts have W units: X = 4 E / W, K = E / (8 W).

    It has one tree where X is a power of two, else as many as X has odd factors in a product.

    Args:
      width: E.
      expert_width: W, a divisor of E / 8.
      act: the activation.

    Example:
      >>> [granular_spec(768, W, "gelu").n_trees for W in (1, 2, 3, 6, 12, 24, 48, 96)]
      [3, 3, 1, 1, 1, 1, 1, 1]
    """
    if width % 128 or (width // 8) % expert_width:
        raise InputError(
            f"--expert_widths: {expert_width} is not allowed at --widths={width}; use divisors of E / 8, E a "
            "multiple of 128."
        )
    n_experts, top_k = 4 * width // expert_width, width // 8 // expert_width
    return LeafSpec(
        n_experts=n_experts,
        expert_width=expert_width,
        top_k=top_k,
        n_trees=n_experts // (n_experts & -n_experts),
        gate_norm="rms" if top_k > 1 else "none",
        activation=act,
    )


def layer_variant(case: Case, implementation: str, usage: str) -> Variant:
    """The sparse layer of a case, by one implementation.

    Args:
      case: what is timed.
      implementation: how the layer is computed.
      usage: how unevenly experts or paths are used, one of --usage.
    """

    def init(key):
        params = init_ffn(key, case.spec, case.width, param_dtype=case.dtype)
        if usage == "skewed" and isinstance(case.spec, LeafSpec):
            bias_R = jax.random.normal(jax.random.fold_in(key, 1), params["b_router"].shape)
            return params | {"b_router": (UNEVEN * bias_R).astype(case.dtype)}
        if usage != "uniform":  # z is about normal here, so a threshold is a quantile of the decisions
            params["threshold"] += {"skewed": 0.84, "one_leaf": 1e9}[usage]
        return params

    spec, leak = case.spec.after_start if isinstance(case.spec, LeafSpec) else case.spec, None
    if case.direction == "start":
        leak = jnp.float32(0.5)
    return Variant(implementation, init, lambda p, x: apply_ffn(p, x, spec, implementation, leak=leak)[0])


def dense_variants(case: Case, units: int, name: str) -> list[Variant]:
    """Four weight layouts of one two-layer perceptron; forward on a CPU its two products by OpenBLAS, too.

    Args:
      case: what is timed.
      units: of the perceptron.
      name: dense or narrow; the layout is appended.
    """
    act = activation(case.spec.activation)
    shapes = {"EF": (case.width, units), "FE": (units, case.width)}
    variants = []
    for layout_in in shapes:
        for layout_out in shapes:

            def init(key, layout_in=layout_in, layout_out=layout_out):
                k_in, k_out = jax.random.split(key)
                return {
                    "w_in": jax.random.normal(k_in, shapes[layout_in], case.dtype) * case.width**-0.5,
                    "b_in": jnp.zeros(units, case.dtype),
                    "w_out": jax.random.normal(k_out, shapes[layout_out], case.dtype) * units**-0.5,
                    "b_out": jnp.zeros(case.width, case.dtype),
                }

            def apply(p, x_TE, layout_in=layout_in, layout_out=layout_out):
                z = jnp.einsum(f"TE,{layout_in}->TF", x_TE, p["w_in"]) + p["b_in"][None]
                return jnp.einsum(f"TF,{layout_out}->TE", act(z), p["w_out"]) + p["b_out"][None]

            variants.append(Variant(f"{name}[{layout_in},{layout_out}]", init, apply))
    if jax.default_backend() == "cpu" and (case.direction, case.dtype) == ("forward", "float32"):
        products = lambda p, x_TE: (x_TE @ p["w_in"]) @ p["w_out"]  # NumPy has no fast activation
        variants.append(Variant(f"{name}[openblas]", variants[1].init, products, eager=True))
    return variants


def check_outputs(case: Case, implementations: list[str], usage: str, key) -> None:
    """Refuses to time implementations whose outputs differ from the masked one's.

    Args:
      case: what is timed.
      implementations: those to compare.
      usage: as in `layer_variant`.
      key: of weights and inputs.
    """
    params = layer_variant(case, "masked", usage).init(key)
    x = jax.random.normal(key, (case.n_tokens, case.width), jnp.float32).astype(case.dtype)
    run = functools.partial(jax.jit(apply_ffn, static_argnums=(2, 3)), params, x, case.spec)
    y_ref, info_ref = run("masked")
    bound = 1e-3 if case.dtype == "float32" else 3e-2
    for implementation in implementations:
        y, info = run(implementation)
        same = jnp.all(info.leaf_TP == info_ref.leaf_TP, axis=1)
        error = jnp.linalg.norm(jnp.where(same[:, None], (y - y_ref).astype(jnp.float32), 0.0))
        error = float(error / jnp.linalg.norm(y_ref.astype(jnp.float32)))
        if float(jnp.mean(same)) < 0.98 or not error < bound:
            agree = f"{float(jnp.mean(same)):.2%} same leaves"
            raise RuntimeError(f"{case.name}: {implementation} differs from masked by {error:.2g} ({agree})")


def floor_seconds(case: Case) -> float:
    """Least time: bytes of the active weights and tokens, or operations of the active units, and routers."""
    bandwidth, rate = ceilings(case.dtype)
    spec, item = case.spec, jnp.dtype(case.dtype).itemsize
    units = min(spec.total_units, case.n_tokens * spec.active_units)
    stored = spec.router_rows if isinstance(spec, LeafSpec) else 0  # units decide in trees
    routers = min(stored, case.n_tokens * separate_routers(spec))
    forward_bytes = item * case.width * (2 * units + routers + 2 * case.n_tokens)
    forward_ops = case.n_tokens * ffn_flops(spec, case.width)
    if case.direction == "start":
        forward_ops += 4 * case.n_tokens * case.width * (spec.total_units - spec.active_units)
    if case.direction == "forward":
        return max(forward_bytes / bandwidth, forward_ops / rate)
    # Backward: reads weights and both cotangents again, writes all weight gradients.
    train_bytes = 2 * forward_bytes + item * case.width * (2 * spec.total_units + stored + 2 * case.n_tokens)
    return max(train_bytes / bandwidth, 3 * forward_ops / rate)


def fastest(timed: list[Timed], name: str) -> Timed:
    """The fastest layout of a dense layer."""
    return min((t for t in timed if t.name.startswith(f"{name}[")), key=lambda t: t.median)


def compared(timed: list[Timed]) -> list[Timed]:
    """Dense and narrow in their fastest layouts, and all implementations."""
    layouts = dict.fromkeys(t.name.partition("[")[0] for t in timed if "[" in t.name)
    return [*(fastest(timed, name) for name in layouts), *(t for t in timed if "[" not in t.name)]


def figures(timed: list[Timed], floor: float) -> dict[str, dict]:
    """{variant: {metric: value}} of what is `compared`.

    Ratios are how many times as fast as dense and, where it was timed, narrow; floor: seconds.
    """
    shown = compared(timed)
    baselines = {t.name.partition("[")[0]: t.median for t in shown if "[" in t.name}
    return {
        t.name: {"time_ms": 1e3 * t.median}
        | {f"ratio_to_{name}": median / t.median for name, median in baselines.items()}
        | {"floor_share": floor / t.median}
        | ({} if (memory := t.memory()) is None else {"memory_mb": memory / 2**20})
        | ({} if t.joules is None else {"energy_mj": 1e3 * t.joules})
        for t in shown
    }


def what(case: Case, variant: str) -> dict:
    """A case and a variant, as rows of results name them."""
    return {
        "variant": variant,
        "width": case.width,
        "tokens": case.n_tokens,
        "dtype": case.dtype,
        "direction": case.direction,
        "spec": dataclasses.asdict(case.spec),
        "products": products(case.spec),
    }
