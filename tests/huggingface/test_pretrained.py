"""Checkpoints of transformers: the same scores, every tensor counts, and back bit for bit.

The fixtures are made by make_pretrained_fixtures.py.
"""

import functools
import json
import pathlib
import re
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.huggingface.make_pretrained_fixtures import CASES, FIXTURES, make
from tests.models.kinds import KINDS, model_spec, random_variables
from tree_ffn.errors import InputError
from tree_ffn.huggingface import pretrained
from tree_ffn.huggingface.checkpoint_files import open_files
from tree_ffn.inference.decode import init_cache
from tree_ffn.models import DenseSpec, Transformer
from tree_ffn.models.safetensors_file import FLOATS, write

TOLERANCE = 1e-5


def expected(name):
    """tokens, logits, keys: NpzFile reads no pickles."""
    with np.load(FIXTURES / name / "expected.npz") as file:
        return {key: file[key] for key in file.files}


@functools.cache
def compiled(spec):
    return jax.jit(Transformer(spec).apply)


def difference(model, name) -> float:
    """Largest difference in logits and in the keys of every layer."""
    wanted = expected(name)
    cache = init_cache(model.spec, *wanted["tokens"].shape)
    logits, _, cache = compiled(model.spec)(model.variables, jnp.asarray(wanted["tokens"]), cache)
    keys = np.concatenate([run.k for run in cache.runs])
    return max(np.abs(logits - wanted["logits"]).max(), np.abs(keys - wanted["keys"]).max())


def read_all(directory):
    files = open_files(str(directory))
    return {name: files.read(name) for name in files.entries}


def rewrite(directory, tensors, config=None):
    """A copy of a checkpoint's config with other tensors, in one file."""
    directory.mkdir(exist_ok=True)
    shapes = {name: (tensor.dtype.name, tensor.shape) for name, tensor in tensors.items()}
    write(str(directory / "model.safetensors"), shapes, lambda name: tensors[name])
    if config is not None:
        (directory / "config.json").write_text(json.dumps(config))


def config_of(name):
    return json.loads((FIXTURES / name / "config.json").read_text())


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("param_dtype", ["float32", "keep"])
def test_scores_and_keys_are_those_of_transformers(name, param_dtype):
    model = pretrained.load(str(FIXTURES / name), param_dtype=param_dtype)
    stored = CASES[name][2].get("dtype", "float32")
    assert model.spec.param_dtype == (stored if param_dtype == "keep" else "float32")
    assert {leaf.dtype.name for leaf in jax.tree.leaves(model.variables)} == {model.spec.param_dtype}
    assert difference(model, name) <= TOLERANCE
    logits, _ = compiled(model.spec)(model.variables, jnp.asarray(expected(name)["tokens"]))
    np.testing.assert_allclose(logits, expected(name)["logits"], rtol=0, atol=TOLERANCE)


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_every_tensor_counts(name, tmp_path):
    """Moving the values of any one tensor moves scores or keys far beyond the tolerance."""
    tensors, rng = read_all(FIXTURES / name), np.random.default_rng(0)
    for changed in tensors:
        offset = 0.1 * rng.standard_normal(tensors[changed].shape)
        moved = (tensors[changed].astype(np.float64) + offset).astype(tensors[changed].dtype)
        rewrite(tmp_path, tensors | {changed: moved}, config_of(name))
        assert difference(pretrained.load(str(tmp_path)), name) > 100 * TOLERANCE, changed


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("param_dtype", ["float32", "keep"])
def test_back_bit_for_bit(name, param_dtype, tmp_path):
    """Also through an origin that was JSON in between; a file in one piece is the same file."""
    model = pretrained.load(str(FIXTURES / name), param_dtype=param_dtype)
    origin = json.loads(json.dumps(model.origin))
    shard_bytes = 12_000 if name == "opt_sharded" else 10**9
    pretrained.save(str(tmp_path / "back"), model.spec, model.variables, origin, shard_bytes=shard_bytes)
    ours, theirs = read_all(tmp_path / "back"), read_all(FIXTURES / name)
    assert ours.keys() == theirs.keys()
    for key, tensor in theirs.items():
        assert ours[key].dtype == tensor.dtype and ours[key].tobytes() == tensor.tobytes(), key
    assert json.loads((tmp_path / "back" / "config.json").read_text()) == config_of(name)
    if name == "opt_sharded":
        assert len(list((tmp_path / "back").glob("*.safetensors"))) > 1
    else:
        same = [(path / "model.safetensors").read_bytes() for path in (tmp_path / "back", FIXTURES / name)]
        assert same[0] == same[1]


def test_a_second_copy_of_the_token_table_is_checked_and_kept(tmp_path):
    tensors = read_all(FIXTURES / "opt_relu")
    table = tensors["model.decoder.embed_tokens.weight"]
    rewrite(tmp_path / "a", tensors | {"lm_head.weight": table}, config_of("opt_relu"))
    model = pretrained.load(str(tmp_path / "a"))
    assert difference(model, "opt_relu") <= TOLERANCE
    pretrained.save(str(tmp_path / "back"), model.spec, model.variables, model.origin)
    assert read_all(tmp_path / "back").keys() == tensors.keys() | {"lm_head.weight"}
    rewrite(tmp_path / "a", tensors | {"lm_head.weight": table + 1})
    with pytest.raises(InputError, match="lm_head.weight in .* differs from the token embeddings"):
        pretrained.load(str(tmp_path / "a"))


def test_masks_of_old_files_are_left_out(tmp_path):
    masks = {"h.0.attn.bias": np.ones((1, 1, 12, 12), np.float32), "h.1.attn.masked_bias": np.float32([-1e4])}
    tensors = read_all(FIXTURES / "gpt2_base_float16")
    rewrite(tmp_path, {**tensors, **masks}, config_of("gpt2_base_float16"))
    assert difference(pretrained.load(str(tmp_path)), "gpt2_base_float16") <= TOLERANCE


def test_tensors_of_two_dtypes(tmp_path):
    tensors = read_all(FIXTURES / "opt_relu")
    wide = {name: value.astype("float16") if "fc1" in name else value for name, value in tensors.items()}
    rewrite(tmp_path / "a", wide, config_of("opt_relu"))
    with pytest.raises(InputError, match="^param_dtype: 'keep' is not possible .* float16 and float32"):
        pretrained.load(str(tmp_path / "a"), param_dtype="keep")
    model = pretrained.load(str(tmp_path / "a"))
    pretrained.save(str(tmp_path / "back"), model.spec, model.variables, model.origin)
    back = read_all(tmp_path / "back")
    for name, value in wide.items():
        np.testing.assert_array_equal(back[name], value.astype("float32"))


def test_a_vocabulary_with_rows_to_spare_and_fewer_positions(tmp_path):
    """Ids beyond the tokenizer's are not scored, their rows stay; cut positions are gone."""
    model = pretrained.load(str(FIXTURES / "opt_relu"), vocab_size=58, max_seq_len=9)
    assert (model.spec.vocab_size, model.spec.vocab_rows, model.spec.max_seq_len) == (58, 61, 9)
    wanted = expected("opt_relu")
    tokens = jnp.asarray(np.minimum(wanted["tokens"], 57)[:, :9])
    full = pretrained.load(str(FIXTURES / "opt_relu"))
    logits, reference = (compiled(one.spec)(one.variables, tokens)[0] for one in (model, full))
    assert logits.shape[-1] == 58
    np.testing.assert_allclose(logits, reference[:, :, :58], atol=TOLERANCE)
    pretrained.save(str(tmp_path / "back"), model.spec, model.variables, model.origin)
    back, before = read_all(tmp_path / "back"), read_all(FIXTURES / "opt_relu")
    positions = "model.decoder.embed_positions.weight"
    np.testing.assert_array_equal(back.pop(positions), before.pop(positions)[:11])
    for name, value in before.items():
        np.testing.assert_array_equal(back[name], value)
    assert pretrained.load(str(tmp_path / "back")).spec.max_seq_len == 9
    # OPT's own numbers: 50,265 tokens in 50,272 rows are a multiple of 8.
    spec = model_spec(KINDS["dense"], vocab_size=50_265, vocab_multiple=8)
    assert spec.vocab_rows == 50_272


@pytest.mark.parametrize("family", pretrained.FAMILIES)
def test_a_model_of_ours_in_their_format(family, tmp_path):
    """Written and read again: the same model; padding rows, never trained, are not given away."""
    spec = model_spec(DenseSpec(24, "relu"), DenseSpec(24, "relu"), vocab_multiple=16)
    variables = random_variables(spec)
    pretrained.save(str(tmp_path), spec, variables, family=family)
    model = pretrained.load(str(tmp_path))
    assert (model.spec.vocab_size, model.spec.vocab_rows) == (23, 23)
    tokens = jnp.asarray(np.random.default_rng(0).integers(0, 23, (2, 16)), jnp.int32)
    ours, theirs = (
        compiled(spec)(variables, tokens)[0], compiled(model.spec)(model.variables, tokens)[0]
    )  # fmt: skip
    np.testing.assert_allclose(ours, theirs, atol=1e-6)
    if family == "opt":
        assert not read_all(tmp_path)["model.decoder.embed_positions.weight"][:2].any()


@pytest.mark.parametrize(
    "ffns, fields, words",
    [
        (("hard",), {}, "format: gpt2 has equal dense layers only"),
        (("leaf", "dense"), {}, "format: gpt2 has equal dense layers only"),
        (("dense", "narrow"), {}, "format: gpt2 has equal dense layers only"),
        (("dense",), {"family": "llama"}, "family: 'llama' is not known; use one of: gpt2, opt"),
        (("dense",), {"dtype": "float64"}, "dtype: 'float64' is not known"),
    ],
)
def test_models_that_the_formats_have_no_word_for(ffns, fields, words, tmp_path):
    spec = model_spec(*(KINDS[kind] for kind in ffns))
    with pytest.raises(InputError, match=f"^{re.escape(words)}"):
        pretrained.save(str(tmp_path / "a"), spec, random_variables(spec), **fields)
    assert not (tmp_path / "a").exists()


def test_other_words_that_are_missing(tmp_path):
    odd = model_spec(DenseSpec(8, "silu"))
    with pytest.raises(InputError, match="one of the activations gelu, gelu_tanh, relu, not 'silu'"):
        pretrained.save(str(tmp_path / "a"), odd, random_variables(odd))
    loose = model_spec(DenseSpec(8, "relu"), norm_eps=1e-3)
    with pytest.raises(InputError, match="opt has norm_eps 1e-05"):
        pretrained.save(str(tmp_path / "a"), loose, random_variables(loose), family="opt")
    model = pretrained.load(str(FIXTURES / "opt_relu"))
    pretrained.save(str(tmp_path / "a"), model.spec, model.variables, model.origin)
    with pytest.raises(InputError, match="holds config.json already; name another directory"):
        pretrained.save(str(tmp_path / "a"), model.spec, model.variables, model.origin)


def test_values_are_rounded_on_request_only(tmp_path):
    model = pretrained.load(str(FIXTURES / "gpt2_base_float16"))
    model.variables["params"]["ln_f"]["scale"][0] = 1 / 3  # as training would
    with pytest.raises(InputError, match="ln_f.weight has values that float16, the dtype of the checkpoint"):
        pretrained.save(str(tmp_path / "a"), model.spec, model.variables, model.origin)
    assert not list((tmp_path / "a").iterdir())
    pretrained.save(str(tmp_path / "b"), model.spec, model.variables, model.origin, dtype="float16")
    pretrained.save(str(tmp_path / "c"), model.spec, model.variables, model.origin, dtype="float32")
    assert read_all(tmp_path / "c")["ln_f.weight"][0] == np.float32(1 / 3)
    model.variables["params"]["ln_f"]["scale"][0] = 1e6
    with pytest.raises(InputError, match="ln_f.weight has values beyond the range of float16"):
        pretrained.save(str(tmp_path / "d"), model.spec, model.variables, model.origin, dtype="float16")
    pretrained.save(str(tmp_path / "d"), model.spec, model.variables, model.origin, dtype="float32")
    with pytest.raises(InputError, match="^param_dtype: ln_f.weight has values beyond the range of float16"):
        pretrained.load(str(tmp_path / "d"), param_dtype="float16")


@pytest.fixture
def copied(tmp_path):
    shutil.copytree(FIXTURES / "opt_relu", tmp_path / "opt")
    return tmp_path / "opt"


def change(directory: pathlib.Path, **values):
    config = json.loads((directory / "config.json").read_text()) | values
    (directory / "config.json").write_text(json.dumps(config))


@pytest.mark.parametrize(
    "values, words",
    [
        ({"model_type": "llama"}, "model_type in .*: 'llama' is not known; use one of: gpt2, opt"),
        ({"model_type": ["opt"]}, r"model_type in .*: \['opt'\] is not known"),
        ({"do_layer_norm_before": False}, "do_layer_norm_before in .*: False .*OPT-350m.* is not supported"),
        ({"word_embed_proj_dim": 8}, "word_embed_proj_dim in .*: 8 .*OPT-350m.* only hidden_size = 16 is"),
        ({"_remove_final_layer_norm": True}, "_remove_final_layer_norm in .*: True is not supported"),
        ({"enable_bias": False}, "enable_bias in .*: False is not supported; only True is"),
        ({"tie_word_embeddings": False}, r"config.json; missing: lm_head.weight\.$"),
        ({"activation_function": "swish"}, "activation_function in .*: 'swish' is not known; use one of:"),
        ({"hidden_size": None}, "hidden_size in .*: None is not allowed; use a whole number"),
        ({"ffn_dim": "40"}, "ffn_dim in .*: '40' is not allowed; use a whole number"),
        ({"num_hidden_layers": 10**12}, "num_hidden_layers in .*: 1000000000000 layers cannot be in"),
        ({"num_attention_heads": 3}, "width: 16 is not allowed; it must be a multiple of n_heads = 3"),
        ({"vocab_size": 10**9}, r"another shape: .*embed_tokens.weight \[61, 16\] for \[1000000000,"),
        ({"max_position_embeddings": 99}, r"another shape: .*embed_positions.weight \[14, 16\] for \[101,"),
        ({"num_hidden_layers": 3}, r"missing: model.decoder.layers.2.fc1.bias, .* and 8 more\.$"),
        ({"num_hidden_layers": 1}, r"not known: model.decoder.layers.1.fc1.bias, .* and 8 more\.$"),
    ],
)  # fmt: skip
def test_configs_that_do_not_fit_are_refused(copied, values, words):
    change(copied, **values)
    with pytest.raises(InputError, match=words) as error:
        pretrained.load(str(copied))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "fields, words",
    [
        ({"max_seq_len": 13}, "max_seq_len: 13 is not allowed; the checkpoint has 12 positions"),
        ({"max_seq_len": 0}, "max_seq_len: 0 is not allowed"),
        ({"vocab_size": 62}, "vocab_size: 62 is not allowed; the checkpoint has 61 rows"),
        ({"param_dtype": "int8"}, "param_dtype: 'int8' is not known; use one of: float32,"),
    ],
)
def test_arguments_that_do_not_fit_are_refused(fields, words):
    with pytest.raises(InputError, match=f"^{words}"):
        pretrained.load(str(FIXTURES / "opt_relu"), **fields)


def test_all_wrong_tensors_are_listed_at_once(tmp_path):
    tensors = read_all(FIXTURES / "gpt2_gelu")
    del tensors["transformer.ln_f.bias"]
    tensors["score.weight"] = np.ones((2, 16), np.float32)
    tensors["transformer.h.0.ln_1.weight"] = np.ones((17,), np.float32)
    rewrite(tmp_path, tensors, config_of("gpt2_gelu"))
    with pytest.raises(InputError) as error:
        pretrained.load(str(tmp_path))
    assert str(error.value).endswith(
        "missing: transformer.ln_f.bias; not known: score.weight; "
        "of another shape: transformer.h.0.ln_1.weight [17] for [16]."
    )


def test_tensors_of_whole_numbers_are_refused(copied):
    with open(copied / "model.safetensors", "r+b") as file:
        text = file.read()
        at = text.index(b'"F32"', text.index(b"layers.0.fc1.bias"))
        file.seek(at)
        file.write(b'"I32"')
    with pytest.raises(InputError, match=r"no floats: model.decoder.layers.0.fc1.bias I32\.$"):
        pretrained.load(str(copied))


def test_pickles_are_refused_unread(copied):
    (copied / "model.safetensors").rename(copied / "pytorch_model.bin")
    for path in (copied, copied / "pytorch_model.bin"):
        with pytest.raises(InputError, match="pytorch_model.bin' is a pickle, .*; convert it to safetensors"):
            pretrained.load(str(path))
    (copied / "pytorch_model.bin").rename(copied / "weights.txt")
    with pytest.raises(InputError, match="has neither model.safetensors nor model.safetensors.index.json"):
        pretrained.load(str(copied))
    with pytest.raises(InputError, match="is not a directory"):
        pretrained.load(str(copied / "none"))


@pytest.mark.parametrize(
    "weight_map, words",
    [
        (None, "weight_map in .* is not allowed"),
        ({"a": "../model.safetensors"}, "weight_map in .* is not allowed"),
        ({"a": "model.bin"}, "weight_map in .* is not allowed"),
        ({"a": "none.safetensors"}, "none.safetensors' cannot be read: No such file"),
        ({"a": "model-00003-of-00003.safetensors"}, "do not agree about a, model.decoder.layers.1.fc2.bias"),
    ],
)
def test_an_index_that_leads_astray(tmp_path, weight_map, words):
    shutil.copytree(FIXTURES / "opt_sharded", tmp_path / "opt")
    index = tmp_path / "opt" / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": weight_map}))
    with pytest.raises(InputError, match=words):
        pretrained.load(str(tmp_path / "opt"))


@pytest.mark.parametrize("text", ["", "[]", "{", "[" * 10**5, '"' + "x" * 17_000_000 + '"', "\xff"])
def test_a_config_that_is_no_json_object(copied, text):
    (copied / "config.json").write_text(text, encoding="latin-1")
    with pytest.raises(InputError, match=r"config.json' is (no JSON object|not JSON|larger than)"):
        pretrained.load(str(copied))


@pytest.mark.parametrize("name", CASES)
def test_transformers_gives_the_fixtures_and_reads_what_we_write(name, tmp_path):
    """Where torch is installed: the committed fixtures are what the script makes."""
    pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    make(tmp_path, name)
    for key, value in expected(name).items():
        with np.load(tmp_path / name / "expected.npz") as file:
            np.testing.assert_allclose(file[key], value, rtol=0, atol=1e-6)
    made, committed = read_all(tmp_path / name), read_all(FIXTURES / name)
    assert made.keys() == committed.keys()
    for key, tensor in made.items():
        assert tensor.tobytes() == committed[key].tobytes(), key

    model = pretrained.load(str(FIXTURES / name))
    fresh = {"family": "opt"} if name.startswith("opt") else {}
    pretrained.save(str(tmp_path / "fresh"), model.spec, model.variables, **fresh)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "fresh", local_files_only=True)
    import torch

    with torch.no_grad():
        logits = theirs(torch.from_numpy(expected(name)["tokens"].astype(np.int64))).logits.numpy()
    np.testing.assert_allclose(logits, expected(name)["logits"], rtol=0, atol=TOLERANCE)


def test_the_formats_dtypes_are_those_that_a_model_may_store():
    from tree_ffn.models.spec import STORED_DTYPES

    assert set(FLOATS.values()) == set(STORED_DTYPES)


@pytest.mark.parametrize(
    "damage, words",
    [
        ({"config": None}, "origin: it lacks the config"),
        ({"family": "bert"}, "family: 'bert' is not known"),
        ({"dtype": "int8"}, "dtype: 'int8' is not known"),
        ({"skipped": "AAAA"}, "pretrained: the 2 rows before position 0 .* are damaged"),
        ({"skipped": "?"}, "pretrained: the 2 rows before position 0 .* are damaged"),
    ],
)
def test_a_damaged_origin(damage, words, tmp_path):
    model = pretrained.load(str(FIXTURES / "opt_relu"))
    with pytest.raises(InputError, match=f"^{words}"):
        pretrained.save(str(tmp_path / "a"), model.spec, model.variables, model.origin | damage)
    assert not list(tmp_path.rglob("*.*"))


def test_training_refuses_what_only_imports_may_store():
    from configs.default import get_config
    from tree_ffn.models.from_config import model_spec_from_config

    config = get_config()
    config.model.param_dtype = "float16"
    with pytest.raises(
        InputError, match="^model.param_dtype: 'float16' is not known; use one of: float32, bf"
    ):
        model_spec_from_config(config, 257)
