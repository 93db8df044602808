"""What a leaf layer computes, as one frozen and hashable value."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from tree_ffn.errors import InputError, check_choice, check_number, check_positive_int
from tree_ffn.tree import chosen
from tree_ffn.tree.activations import ACTIVATIONS, activation
from tree_ffn.tree.leaf.routers import GATE_NORMS, ROUTERS, rectangle

# What we recommend, but for W, which is E / 128 (see `tree_ffn.recipe`).
RECIPE = {"n_experts": 512, "top_k": 16, "gate_norm": "rms", "dense_start": 0.2}


@dataclasses.dataclass(frozen=True, kw_only=True)
class LeafSpec:
    """X experts of W units, of which a token uses K.

        F = X W, of a pruned layer n_kept W;    A = K W

    Attributes:
      n_experts: X, how many there are.
      expert_width: W, the units of an expert.
      top_k: K, how many experts a token uses.
      router: what scores the experts. `tree`: they are the leaves of P full binary trees, an expert's score
        is the sum of the log probabilities of the decisions above it, and a beam of K finds the chosen.
        `softmax`: a row of weights an expert, and the K best; this is the mixture of experts.
        `product_keys`: experts stand in a rectangle, and their rows and columns have a softmax each.
        `hash`: one expert by the token's id. `random`: as `softmax`, never trained.
      n_trees: P, of `tree`, at most K; X / P is a power of two.
      gate_norm: the gates of the chosen are their probabilities, as they are (`none`), over their sum
        (`l1`), over the root of the sum of their squares (`l2`), or of the mean of their squares (`rms`).
      balance_rate: step by which the choice, not the gate, is moved against the load; 0: it is not.
      dense_start: share of the training in which experts that are not chosen still add something: all of
        themselves at first, less and less, then nothing. 0: they never do.
      activation: a name of `ACTIVATIONS`.
      n_kept: how many experts are left of a pruned layer (see `leaf.pruned`); 0: all.

    Raises:
      InputError: names the field, its value and what is allowed.

    Example:
      >>> spec = LeafSpec(n_experts=512, expert_width=6, top_k=16)
      >>> spec.total_units, spec.active_units, spec.depth, spec.routers_asked
      (3072, 96, 9, 95)
    """

    n_experts: int
    expert_width: int
    top_k: int
    router: str = "tree"
    n_trees: int = 1
    gate_norm: str = "l2"
    balance_rate: float = 0.0
    dense_start: float = 0.0
    activation: str = "gelu"
    n_kept: int = 0

    def __post_init__(self):
        for field in ("n_experts", "expert_width", "top_k", "n_trees", "n_kept"):
            check_positive_int(field, getattr(self, field), least=0 if field == "n_kept" else 1)
            object.__setattr__(self, field, int(getattr(self, field)))  # of NumPy's too
        check_choice("router", self.router, ROUTERS)
        check_choice("gate_norm", self.gate_norm, GATE_NORMS)
        check_choice("activation", self.activation, ACTIVATIONS)
        check_number("balance_rate", self.balance_rate, least=0)
        check_number("dense_start", self.dense_start, least=0)
        if self.dense_start > 1:
            raise InputError(f"dense_start: {self.dense_start!r} is not allowed; use a number from 0 to 1.")
        self._check_kept()
        self._check_router()
        self._check_choice()

    def _check_kept(self):
        if self.n_kept > self.n_experts:
            raise InputError(
                f"n_kept: {self.n_kept} is not allowed; there are n_experts = {self.n_experts} to keep."
            )
        if self.n_kept == self.n_experts:  # one layer, one value
            object.__setattr__(self, "n_kept", 0)
        if self.top_k > self.kept_experts:
            most = f"n_kept = {self.n_kept}" if self.n_kept else f"n_experts = {self.n_experts}"
            raise InputError(f"top_k: {self.top_k} is not allowed; a token can use at most {most}.")

    def _check_router(self):
        """Options that are not in force are refused: equal layers have equal specs."""
        router, size = ROUTERS[self.router], self.n_experts // self.n_trees
        if router.trees and (self.n_experts % self.n_trees or size & (size - 1)):
            raise InputError(
                f"n_experts: {self.n_experts} is not allowed with n_trees = {self.n_trees}; use n_trees "
                "times a power of two."
            )
        if not router.trees and self.n_trees != 1:
            raise InputError(
                f"n_trees: {self.n_trees} cannot be used with router {self.router!r}, which has none; use 1."
            )
        if self.top_k < self.n_trees:
            raise InputError(
                f"n_trees: {self.n_trees} is not allowed with top_k = {self.top_k}, by which trees are "
                f"searched from all their roots on; use at most {self.top_k}."
            )
        if self.gate_norm != "none" and self.top_k == 1:
            raise InputError(
                f"gate_norm: {self.gate_norm!r} cannot be used with top_k 1, whose gate would always be 1; "
                "use 'none'."
            )
        if router.by_id and (self.top_k, self.balance_rate, self.n_kept) != (1, 0, 0):
            raise InputError(
                f"router: {self.router!r} cannot be used with top_k {self.top_k}, balance_rate "
                f"{self.balance_rate!r} and n_kept {self.n_kept}; an id names one expert for good: use 1, 0 "
                "and 0."
            )

    def _check_choice(self):
        """The same, where little or nothing is left to choose."""
        if self.n_experts == 1 and self.router != "tree":
            raise InputError(
                f"router: {self.router!r} cannot be used with n_experts 1, which needs none; use 'tree'."
            )
        if self.router == "product_keys" and rectangle(self.n_experts)[0] == 1:
            raise InputError(
                f"n_experts: {self.n_experts} is not allowed with router 'product_keys', whose rectangle "
                "would be a line; use a number that is no prime, or router 'softmax'."
            )
        if self.balance_rate and self.top_k == self.n_experts:
            raise InputError(
                f"balance_rate: {self.balance_rate!r} cannot be used with top_k = n_experts = "
                f"{self.n_experts}, where every token uses all; use 0."
            )
        if self.n_trees < self.n_experts:
            return
        if self.gate_norm == "rms":
            raise InputError(
                f"gate_norm: 'rms' cannot be used with n_trees = n_experts = {self.n_experts}, where gates "
                "are 1 as they are; use 'none'."
            )
        if self.dense_start and self.gate_norm == "none":
            raise InputError(
                f"dense_start: {self.dense_start!r} cannot be used with n_trees = n_experts = "
                f"{self.n_experts} and gate_norm 'none', where gates are always 1; use 0."
            )

    @property
    def depth(self) -> int:
        """D of the trees: decisions above an expert."""
        return (self.n_experts // self.n_trees).bit_length() - 1

    @property
    def kept_experts(self) -> int:
        """Experts that there are: X, of a pruned layer n_kept."""
        return self.n_kept or self.n_experts

    @property
    def total_units(self) -> int:
        """F."""
        return self.kept_experts * self.expert_width

    @property
    def active_units(self) -> int:
        """A."""
        return self.top_k * self.expert_width

    @property
    def act(self):
        """The activation, a function."""
        return activation(self.activation)

    def runs(self, params: dict, ids: jax.Array) -> list[tuple[jax.Array, int]]:
        """Where the units of experts stand in [F, ...]: (first rows int32 [..., 1], rows of a run)."""
        return [((self.row(params, ids) * self.expert_width)[..., None], self.expert_width)]

    def unit_gates(self, params: dict, ids_TK: jax.Array, gates_TK: jax.Array) -> jax.Array:
        """Gates of all experts that there are, 0 where they are not chosen: [T, X].

        Args:
          params: the layer's arrays.
          ids_TK: int32, the chosen experts.
          gates_TK: float32, their gates.
        """
        return chosen.put(gates_TK, self.row(params, ids_TK), self.kept_experts)

    def row(self, params: dict, ids: jax.Array) -> jax.Array:
        """Where experts stand in the arrays of units."""
        if not self.n_kept:
            return ids
        row = jnp.take(params["kept_row"], ids, mode="clip")
        return jnp.clip(row, 0, self.n_kept - 1)  # a block of `grouped` that stays empty names any expert

    @property
    def router_rows(self) -> int:
        """Rows of the router, trained or frozen."""
        return ROUTERS[self.router].rows(self.n_experts, self.n_trees)

    @property
    def balanced(self) -> int:
        """Numbers that move against the load: one a decision of trees, of other routers one an expert."""
        return self.router_rows if ROUTERS[self.router].trees else self.n_experts

    @property
    def router_params(self) -> tuple[str, ...]:
        """Names of what a router trains: its rows' weights, and the biases of trees."""
        router = ROUTERS[self.router]
        return ("w_router", *(["b_router"] if router.trees else [])) if router.trained else ()

    @property
    def routers_asked(self) -> int:
        """Rows that the definition asks for a token: of trees those of the nodes that a beam keeps."""
        if not ROUTERS[self.router].trees:
            return self.router_rows
        return sum(min(self.n_trees * 2**level, self.top_k) for level in range(self.depth))

    @property
    def after_start(self) -> "LeafSpec":
        """The same layer, its dense start over: to train on after it, or to differentiate at inference."""
        return dataclasses.replace(self, dense_start=0.0)

    def leak_at(self, done: jax.Array | float) -> jax.Array:
        """The gate of experts that are not chosen when a share `done` of the training is over: float32.

            leak_at(d) = max(0, 1 - d / dense_start)

        Args:
          done: share of the training that is over, from 0 to 1.

        Raises:
          InputError: the layer has no dense start, or `done` is no share: what is traced is not looked at.
        """
        if not self.dense_start:
            raise InputError(f"done: the layer {self} has no dense start; leave it out.")
        known = np.float32(0) if isinstance(done, Tracer) else np.asarray(done)
        if not ((known >= 0) & (known <= 1)).all():
            raise InputError(
                f"done: {done} is not allowed; use the share of the training that is over, 0 to 1."
            )
        return jnp.maximum(0.0, 1.0 - jnp.asarray(done, jnp.float32) / self.dense_start)
