"""Frozen values that say what a model is: everything a forward pass needs but the weights."""

import dataclasses
import itertools

from tree_ffn.errors import InputError, check_choice, check_positive_int
from tree_ffn.models.dense import DenseSpec
from tree_ffn.tree import IMPLEMENTATIONS, LeafSpec, PrunedSpec, TreeShape, TreeSpec
from tree_ffn.upgrades import KEY, readable, stamped

FFNSpec = DenseSpec | LeafSpec | TreeSpec  # and PrunedSpec, a TreeSpec
FFN_CLASSES = {"dense": DenseSpec, "leaf": LeafSpec, "tree": TreeSpec, "pruned_tree": PrunedSpec}
DTYPES = ("float32", "bfloat16")
REMAT = ("none", "dots", "full")
STORED_DTYPES = (*DTYPES, "float16")  # imported weights may stay as they are; nothing computes in float16


@dataclasses.dataclass(frozen=True)
class InitSpec:
    """Scales of the initial weights; biases start at 0, norms at the identity.

    Attributes:
      embed: standard deviation of token and position embeddings.
      attn_in: query, key and value weights have std attn_in / sqrt(E).
      attn_out: the attention's output weights have std attn_out / sqrt(E).
      w_in: FFN input weights have std w_in / sqrt(E).
      w_out: FFN output weights have std w_out / sqrt(A), A the active units.
    """

    embed: float = 0.05
    attn_in: float = 1.0
    attn_out: float = 0.1
    w_in: float = 0.7
    w_out: float = 0.05

    def __post_init__(self):
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if not value >= 0:
                raise InputError(f"init.{field.name}: {value!r} is not allowed; use a number of at least 0.")


@dataclasses.dataclass(frozen=True)
class ModelSpec:
    """A pre-LN decoder (GPT-2 / OPT style): learned positions, one FFN spec per layer.

    Attributes:
      vocab_size: V.
      max_seq_len: C, the most positions the model can attend to.
      width: E, a multiple of n_heads.
      n_layers: how many layers.
      n_heads: H; K = E / H.
      ffns: the feed-forward layer of every layer, first to last.
      implementation: of tree layers: None (chosen by rule), `masked`,
        `gather` or `grouped`.
      dtype: of activations and matrix products, `float32` or `bfloat16`.
      param_dtype: of the stored weights, `float32`, `bfloat16` or `float16`; training needs `float32`,
        or `optim.master_weights` beside `bfloat16`.
      remat: what of a layer is computed again in the backward pass, for less memory: `none`, nothing, on TPUs
        no product and no attention; `dots`, all but products with weights; `full`, all, a third more time.
      norm_eps: epsilon of the layer norms.
      vocab_multiple: the embedding table has V rounded up to a multiple of so many rows (64 helps GPUs);
        the rows beyond V are never scored.
      tied_head: the token table is also the output head; without it the head is a table of its own.
      scan: run equal neighbouring layers as one `lax.scan` over stacked
        weights; without it every layer stands alone (see `unrolled`).
      unroll: layers that one turn of the loop over layers holds. More of them compile longer and
        run faster: the compiler then neither copies weights in nor saved activations out. 0: one on TPUs,
        whose compiler takes minutes for more, and 12 elsewhere.
      init: scales of the initial weights.

    Raises:
      InputError: names the field, its value and what is allowed.
    """

    vocab_size: int
    max_seq_len: int
    width: int
    n_layers: int
    n_heads: int
    ffns: tuple[FFNSpec, ...]
    implementation: str | None = None
    dtype: str = "float32"
    param_dtype: str = "float32"
    remat: str = "none"
    norm_eps: float = 1e-5
    vocab_multiple: int = 1
    tied_head: bool = True  # also of exports that are older than the field
    scan: bool = True
    unroll: int = 0
    init: InitSpec = InitSpec()

    def __post_init__(self):
        for field in (
            "vocab_size",
            "max_seq_len",
            "width",
            "n_layers",
            "n_heads",
            "vocab_multiple",
        ):
            check_positive_int(field, getattr(self, field))
        check_positive_int("unroll", self.unroll, least=0)
        if self.width % self.n_heads:
            raise InputError(
                f"width: {self.width} is not allowed; it must be a multiple of n_heads = {self.n_heads}."
            )
        if len(self.ffns) != self.n_layers:
            raise InputError(
                f"ffns: {len(self.ffns)} layers described, but n_layers is {self.n_layers}; make them equal."
            )
        check_choice("dtype", self.dtype, DTYPES)
        check_choice("param_dtype", self.param_dtype, STORED_DTYPES)
        check_choice("remat", self.remat, REMAT)
        if self.implementation is not None:
            check_choice("implementation", self.implementation, IMPLEMENTATIONS)
        check_choice("tied_head", self.tied_head, (True, False))
        if not self.norm_eps > 0:
            raise InputError(f"norm_eps: {self.norm_eps!r} is not allowed; use a number above 0.")

    @property
    def head_width(self) -> int:
        """K."""
        return self.width // self.n_heads

    @property
    def vocab_rows(self) -> int:
        """Rows of the embedding table: V rounded up to `vocab_multiple`."""
        return -(-self.vocab_size // self.vocab_multiple) * self.vocab_multiple

    @property
    def after_start(self) -> "ModelSpec":
        """The same model with the dense starts of its layers over."""
        over = (ffn.after_start if isinstance(ffn, LeafSpec) else ffn for ffn in self.ffns)
        return dataclasses.replace(self, ffns=tuple(over))

    @property
    def runs(self) -> tuple[tuple[FFNSpec, int], ...]:
        """(FFN spec, number of layers) of every run of equal neighbouring layers.

        Example:
          >>> narrow, wide = DenseSpec(width=4), DenseSpec(width=8)
          >>> spec = ModelSpec(9, 8, 4, n_layers=3, n_heads=1, ffns=(wide, narrow, narrow))
          >>> [(ffn.width, length) for ffn, length in spec.runs]
          [(8, 1), (4, 2)]
        """
        if not self.scan:
            return tuple((ffn, 1) for ffn in self.ffns)
        return tuple((ffn, len(list(group))) for ffn, group in itertools.groupby(self.ffns))


def kind_of(ffn: FFNSpec) -> str:
    """The name of a layer's class in `FFN_CLASSES`."""
    return next(kind for kind, cls in FFN_CLASSES.items() if cls is type(ffn))


def spec_to_dict(spec: ModelSpec) -> dict:
    """A ModelSpec as plain JSON values with their `config_version`; each FFN carries its `kind`."""
    values = dataclasses.asdict(spec)
    values["ffns"] = [{"kind": kind_of(ffn), **dataclasses.asdict(ffn)} for ffn in spec.ffns]
    return stamped(values)


def spec_from_dict(values: dict) -> ModelSpec:
    """The inverse of `spec_to_dict`, also of what an older version of the library wrote.

    Raises:
      InputError: a key is missing or unknown, a value is not allowed, or an option is gone.
    """
    values = {**readable(values, "model")}
    del values[KEY]
    values["init"] = _construct(InitSpec, "model.init", values.get("init", {}))
    values["ffns"] = tuple(_ffn_from_dict(ffn) for ffn in values.get("ffns", ()))
    return _construct(ModelSpec, "model", values)


def _ffn_from_dict(values):
    values = dict(values)
    kind = values.pop("kind", None)
    check_choice("ffns.kind", kind, FFN_CLASSES)
    if kind in ("tree", "pruned_tree"):
        shape = dict(values.get("shape", {}))
        if isinstance(shape.get("node_width"), list):
            shape["node_width"] = tuple(shape["node_width"])
        values["shape"] = _construct(TreeShape, "ffns.shape", shape)
    return _construct(FFN_CLASSES[kind], f"ffns ({kind})", values)


def _construct(cls, where, values):
    known = {field.name for field in dataclasses.fields(cls)}  # no default says what a file means
    for name in values:
        check_choice(f"{where}: field", name, sorted(known))
    if missing := sorted(known - set(values)):
        raise InputError(f"{where}: {', '.join(missing)} missing; a model needs each of them.")
    return cls(**values)
