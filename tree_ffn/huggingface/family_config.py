"""config.json of Hugging Face's GPT-2 and OPT: to a ModelSpec, and from one."""

from tree_ffn.errors import InputError, check_choice, check_positive_int
from tree_ffn.huggingface.families import ACTIVATIONS, FAMILIES, Family
from tree_ffn.models.dense import DenseSpec
from tree_ffn.models.spec import ModelSpec

TIED = "tie_word_embeddings"


def family_of(config: dict, path: str) -> Family:
    """The family that config.json names.

    Raises:
      InputError: an unknown `model_type`.
    """
    model_type = config.get("model_type")
    check_choice(f"model_type in {path!r}", model_type, tuple(FAMILIES))
    return FAMILIES[model_type]


def spec_from_config(config: dict, path: str, n_tensors: int) -> ModelSpec:
    """The model that a config.json describes, all rows of its vocabulary scored.

    Args:
      config: its values.
      path: where it stands, for errors.
      n_tensors: tensors that the checkpoint has: no more layers are believed.

    Raises:
      InputError: a structure that is not ours, by the name of its key; or a
        value that is missing or not allowed.
    """
    family = family_of(config, path)
    _check_structure(family, config, path)
    values = {}
    for field, key in family.keys.items():
        values[field] = value = config.get(key)
        if field == "ffn" and value is None and family is FAMILIES["gpt2"]:
            values[field] = 4 * values["width"]
        check_positive_int(f"{key} in {path!r}", values[field])
    if values["n_layers"] > n_tensors:
        raise InputError(
            f"{family.keys['n_layers']} in {path!r}: {values['n_layers']} layers cannot be in a "
            f"checkpoint of {n_tensors} tensors."
        )
    eps = config.get(family.eps_key, 1e-5) if family.eps_key else 1e-5
    if type(eps) not in (int, float) or not 0 < eps < 1:
        raise InputError(
            f"{family.eps_key} in {path!r}: {eps!r} is not allowed; use a number between 0 and 1."
        )
    name = config.get("activation_function", family.activation)
    check_choice(f"activation_function in {path!r}", name, tuple(ACTIVATIONS))
    ffn = DenseSpec(values.pop("ffn"), ACTIVATIONS[name])
    tied = config.get(TIED, True)
    check_choice(f"{TIED} in {path!r}", tied, (True, False))
    return ModelSpec(ffns=(ffn,) * values["n_layers"], norm_eps=float(eps), tied_head=bool(tied), **values)


def _check_structure(family: Family, config: dict, path: str):
    for key, wanted in family.fixed.items():
        if (value := config.get(key, wanted)) is not wanted:
            told = " (norms after the layers, as in OPT-350m)" if key == "do_layer_norm_before" else ""
            raise InputError(f"{key} in {path!r}: {value!r}{told} is not supported; only {wanted} is.")
    width = config.get("hidden_size")
    if width is not None and (inner := config.get("word_embed_proj_dim") or width) != width:
        raise InputError(
            f"word_embed_proj_dim in {path!r}: {inner!r} (embeddings of another width, as in "
            f"OPT-350m) is not supported; only hidden_size = {width!r} is."
        )


def config_from_spec(name: str, spec: ModelSpec, rows: int, dtype: str, original: dict | None) -> dict:
    """The config.json of a model in a family's format.

    Args:
      name: a key of `FAMILIES`.
      spec: the model.
      rows: rows of the token table.
      dtype: of the tensors.
      original: the config.json it was imported with: what it says beside
        sizes, activation and dtype is kept.

    Raises:
      InputError: the format has no word for the model.
    """
    family, ffn = FAMILIES[name], _the_ffn(name, spec)
    theirs = next(theirs for theirs, ours in ACTIVATIONS.items() if ours == ffn.activation)
    sizes = {key: getattr(spec, field) for field, key in family.keys.items() if field != "ffn"}
    new = {"vocab_size": rows, family.keys["ffn"]: ffn.width}
    if original is None or not spec.tied_head:
        new[TIED] = spec.tied_head
    if family.eps_key:
        new[family.eps_key] = spec.norm_eps
    if original is not None:
        if original.get("n_inner", 0) is None and ffn.width == 4 * spec.width:
            del new["n_inner"]  # as it was said before
        same = ACTIVATIONS.get(original.get("activation_function", family.activation)) == ffn.activation
        if not same:
            new["activation_function"] = theirs
        said_as = "torch_dtype" if "torch_dtype" in original else "dtype"
        return {**original, **sizes, **new, said_as: dtype}
    start = {"model_type": name, "architectures": [family.architecture], "activation_function": theirs}
    # transformers puts its own end tokens in where none are named; those need not be in our vocabulary.
    ends = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None}
    return {**start, **sizes, **new, **family.fixed, **ends, "torch_dtype": dtype}


def _the_ffn(name: str, spec: ModelSpec) -> DenseSpec:
    """The feed-forward layer that all layers have; InputError where the format has no word for the model."""
    dense = [ffn for ffn in spec.ffns if isinstance(ffn, DenseSpec)]
    if len(dense) != spec.n_layers or len(set(dense)) != 1:
        raise InputError(
            f"format: {name} has equal dense layers only, so a model with trees, experts or layers of "
            "several widths cannot be written in it."
        )
    if dense[0].activation not in ACTIVATIONS.values():
        names = ", ".join(sorted(set(ACTIVATIONS.values())))
        raise InputError(
            f"format: {name} is written with one of the activations {names}, not {dense[0].activation!r}."
        )
    if FAMILIES[name].eps_key is None and spec.norm_eps != 1e-5:
        raise InputError(
            f"format: {name} has norm_eps 1e-05, so a model with {spec.norm_eps!r} cannot be written."
        )
    return dense[0]
