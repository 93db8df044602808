"""Every knob of a run: declared once, as a field of the frozen spec that reads it.

A config has sections, and a section has the fields of specs: their first values are those here and the specs'
own, and what they mean stands in the specs' docstrings. A value of None is left open: it follows others until
it is set (`FOLLOWS`). configs/common.py makes a ConfigDict of `first_values`; without ml_collections,
`make_config` makes what `train` takes.

    python -m tree_ffn.config > docs/config.md
"""

import dataclasses
import difflib
import inspect
import re
import types
import typing
from collections.abc import Iterable
from typing import Any, NamedTuple

from tree_ffn.data.spec import CorpusSpec
from tree_ffn.errors import InputError
from tree_ffn.models.from_config import (
    NOT_OF_LEAVES,
    NOT_OF_MODELS,
    NOT_OF_TREES,
    FFNChoice,
    ModelChoice,
    check_set,
)
from tree_ffn.models.spec import InitSpec, ModelSpec
from tree_ffn.plain import Namespace, flat
from tree_ffn.training.finetune import FinetuneSpec, StartSpec
from tree_ffn.training.optimizer import OptimSpec
from tree_ffn.training.plan import TrainSpec, settled
from tree_ffn.training.sharding import MeshSpec
from tree_ffn.tree.leaf.spec import RECIPE, LeafSpec
from tree_ffn.tree.path.spec import TreeSpec
from tree_ffn.tree.shape import TreeShape


class Part(NamedTuple):
    """A spec in a section.

    Attributes:
      spec: its class.
      without: fields that no config says.
      of: which layers read it, for the table; "" is all.
    """

    spec: type
    without: tuple[str, ...] = ()
    of: str = ""


SECTIONS = {
    "model": (Part(ModelChoice), Part(ModelSpec, NOT_OF_MODELS)),
    "model.init": (Part(InitSpec),),
    "ffn": (
        Part(FFNChoice), Part(LeafSpec, NOT_OF_LEAVES, "leaf"), Part(TreeShape, of="tree"),
        Part(TreeSpec, NOT_OF_TREES, "tree"),
    ),
    "data": (Part(CorpusSpec),),
    "train": (Part(TrainSpec),),
    "optim": (Part(OptimSpec, ("steps",)),),
    "mesh": (Part(MeshSpec),),
}  # fmt: skip
FINETUNE = {"finetune": (Part(StartSpec), Part(FinetuneSpec))}  # of configs/finetune.py alone

# First values that are not the specs' own: the recommended layer, and a tree of about its size.
FIRST: dict[str, Any] = {f"ffn.{name}": value for name, value in RECIPE.items()}
FIRST |= {"ffn.n_trees": 1, "ffn.depth": 7, "ffn.node_width": None, "seed": 0}

FOLLOWS = {
    **dict.fromkeys(("model.n_layers", "model.width", "model.n_heads", "model.max_seq_len"), "of the preset"),
    "ffn.expert_width": "E / 128",
    "ffn.node_width": "E / 64",
    "optim.warmup_steps": "a share",
}
SEED = "of the first weights and of the order of the rows"


class Knob(NamedTuple):
    """A key of a config: its first value, its type, and what it means."""

    first: Any
    type: type
    doc: str


def knobs(sections: dict[str, tuple[Part, ...]] = SECTIONS) -> dict[str, Knob]:
    """All knobs by their dotted keys.

    Example:
      >>> knobs()["optim.clip_norm"]
      Knob(first=1.0, type=<class 'float'>, doc='largest global norm of the gradient; 0 does not clip.')
    """
    found = {"seed": Knob(FIRST["seed"], int, f"{SEED}.")} if sections is SECTIONS else {}
    for section, parts in sections.items():
        for part in parts:
            docs = _attributes(part.spec)
            for field in dataclasses.fields(part.spec):
                if field.name not in part.without:
                    key, doc = f"{section}.{field.name}", _of(part.of, docs[field.name])
                    found[key] = _merged(
                        found.get(key), Knob(_first(key, field), _type(part.spec, field), doc)
                    )
    return found


def first_values(sections: dict[str, tuple[Part, ...]] = SECTIONS) -> dict[str, Any]:
    """Every section with the first values of its keys, nested; None is left open."""
    values: dict[str, Any] = {}
    for key, knob in knobs(sections).items():
        *path, name = key.split(".")
        place = values
        for section in path:
            place = place.setdefault(section, {})
        place[name] = knob.first
    return values


def make_config(values: dict[str, Any] | None = None) -> Namespace:
    """The config of a run, from values by their dotted keys.

    Raises:
      InputError: a key is not known, or of `ffn` and read by no layer.

    Example:
      >>> config = make_config({"train.steps": 30, "data.files": "a.txt"})
      >>> config.train.steps, config.optim.warmup_steps, config.data.corpus
      (30, 3, 'files')
    """
    config = first_values()
    known = flat(config)
    for key, value in (values or {}).items():
        if key not in known:
            raise InputError(f"config: {unknown(key, known)}")
        *path, name = key.split(".")
        place = config
        for section in path:
            place = place[section]
        place[name] = value
    made = settled(config)
    check_set(values or (), made)
    return made


def unknown(key: str, known: Iterable[str]) -> str:
    """One sentence on a key that a config does not have.

    Example:
      >>> unknown("optim.learning_rate", ["optim.lr", "optim.b1"])
      'optim.learning_rate is no key of the config; the nearest is optim.lr.'
    """
    return f"{key} is no key of the config; the nearest is {_nearest(key, known)}."


def _nearest(key: str, known: Iterable[str]) -> str:
    """The known key that is most like `key`: called so, as its initials or longer anywhere, or nearly."""
    section, _, name = key.rpartition(".")
    initials = "".join(part[:1] for part in name.split("_"))
    called = {other: other.rpartition(".")[2] for other in known}
    for same in (lambda other: other in (name, initials), lambda other: other.startswith(f"{name}_")):
        if found := [key for key, other in called.items() if same(other)]:
            return found[0]
    same = [other for other in known if section and other.startswith(f"{section}.")]
    return difflib.get_close_matches(key, same or known, n=1, cutoff=0.0)[0]


def _attributes(spec: type) -> dict[str, str]:
    """{field: what it means} of the part `Attributes` of a spec's docstring."""
    text = inspect.getdoc(spec) or ""
    block = re.search(r"^Attributes:\n((?:  .*\n?|\n)+)", text, re.M)
    found: dict[str, str] = {}
    for names, doc in re.findall(
        r"^  (\w[\w, ]*): ((?:.*\n?)(?:    .*\n?)*)", block[1] if block else "", re.M
    ):
        found |= dict.fromkeys(names.split(", "), " ".join(doc.split()))
    return found


def _first(key: str, field: dataclasses.Field) -> Any:
    if key in FIRST:
        return FIRST[key]
    return None if field.default is dataclasses.MISSING else field.default


def _type(spec: type, field: dataclasses.Field) -> type:
    """Of a key's values; of several, the last that is not None, as tuples are of `int | tuple[int, ...]`."""
    said = typing.get_type_hints(spec)[field.name]
    kinds = typing.get_args(said) if isinstance(said, types.UnionType) else (said,)
    kind = [kind for kind in kinds if kind is not type(None)][-1]
    return typing.get_origin(kind) or kind


def _of(layers: str, doc: str) -> str:
    return f"of {layers}: {doc}" if layers else doc


def _merged(known: Knob | None, knob: Knob) -> Knob:
    """A key that several specs have: the first value of the first of them."""
    return knob if known is None else known._replace(doc=f"{known.doc} {knob.doc}")


def page() -> str:
    """docs/config.md: a table of all knobs."""
    lines = [
        "# Every knob of a config", "",
        "Made by `python -m tree_ffn.config` from the specs that read them. A command line changes a key by",
        "`--config.KEY=VALUE`, a sweep and `tree_ffn.config.make_config` by its name.",
    ]  # fmt: skip
    for title, sections in (("A run", SECTIONS), ("Fine-tuning (`configs/finetune.py`)", FINETUNE)):
        lines += ["", f"## {title}", "", "| key | first value | what it is |", "|---|---|---|"]
        for key, knob in knobs(sections).items():
            first = FOLLOWS[key] if knob.first is None else f"`{knob.first}`" if knob.first != "" else ""
            lines.append(f"| `{key}` | {first} | {knob.doc.replace('|', chr(92) + '|')} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    print(page(), end="")
