"""Checkpoints as others save them: other names, shared and untied heads, other dtypes, damage."""

import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import save_file

from tests.huggingface.make_pretrained_fixtures import FIXTURES
from tests.huggingface.test_pretrained import config_of, read_all, rewrite
from tests.models.kinds import KINDS, forward, model_spec, random_variables
from tree_ffn.errors import InputError
from tree_ffn.huggingface import pretrained
from tree_ffn.inference import scoring
from tree_ffn.inference.batching import generate
from tree_ffn.inference.sampling import Sampling
from tree_ffn.models import DenseSpec, Transformer, cost, export

TABLES = {"gpt2_gelu_new": "transformer.wte.weight", "opt_relu": "model.decoder.embed_tokens.weight"}
TOKENS = jnp.asarray(np.random.default_rng(1).integers(0, 61, (2, 12)), jnp.int32)


def load(directory, tensors, name, metadata=None, **config):
    """What an import makes of tensors beside the config of a fixture, some of its values changed."""
    directory.mkdir(exist_ok=True)
    tensors = {key: np.ascontiguousarray(value) for key, value in tensors.items()}
    save_file(tensors, directory / "model.safetensors", metadata)
    (directory / "config.json").write_text(json.dumps(config_of(name) | config))
    return pretrained.load(str(directory))


def assert_same(model, name):
    plain = pretrained.load(str(FIXTURES / name))
    assert model.spec == plain.spec
    jax.tree.map(np.testing.assert_array_equal, model.variables, plain.variables)


@pytest.mark.parametrize("name", TABLES)
@pytest.mark.parametrize(
    "wrap",
    [
        lambda key: "module." + key,
        lambda key: "_orig_mod." + key,
        lambda key: "module._orig_mod." + key,
        lambda key: "model." + key,
        lambda key: key.replace(".1.", ".1._checkpoint_wrapped_module."),
        lambda key: key.removeprefix("transformer.").removeprefix("model.decoder."),
        lambda key: "base_model.model." + key,
    ],
)
def test_parts_that_wrappers_add_to_names_are_left_out(name, wrap, tmp_path):
    """And they do not come back: what is written is what transformers loads."""
    tensors = read_all(FIXTURES / name)
    model = load(tmp_path / "a", {wrap(key): value for key, value in tensors.items()}, name)
    assert_same(model, name)
    pretrained.save(str(tmp_path / "back"), model.spec, model.variables, model.origin)
    back = read_all(tmp_path / "back")
    assert set(back) in (set(tensors), {wrap(key) for key in tensors})
    assert not any("module" in key or "_orig" in key for key in back)


def test_two_tensors_for_one_place_are_refused(tmp_path):
    tensors = read_all(FIXTURES / "gpt2_gelu")
    again = {"module.transformer.ln_f.bias": tensors["transformer.ln_f.bias"]}
    with pytest.raises(InputError, match="module.transformer.ln_f.bias.* are two tensors for one place"):
        load(tmp_path, tensors | again, "gpt2_gelu")


@pytest.mark.parametrize("name, table", TABLES.items())
@pytest.mark.parametrize("wrapper", ["", "module."])
@pytest.mark.parametrize("said", ["nothing", "left out: written", "written: left out"])
def test_a_token_table_that_is_stored_as_the_head_only(name, table, wrapper, said, tmp_path):
    tensors = {wrapper + key: value for key, value in read_all(FIXTURES / name).items()}
    head = wrapper + "lm_head.weight"
    tensors[head] = tensors.pop(wrapper + table)
    aliases = {
        "nothing": {},
        "left out: written": {wrapper + table: head},
        "written: left out": {head: wrapper + table},
    }[said]
    model = load(tmp_path / "a", tensors, name, {"format": "pt", **aliases})
    assert_same(model, name)
    pretrained.save(str(tmp_path / "back"), model.spec, model.variables, model.origin)
    assert_same(pretrained.load(str(tmp_path / "back")), name)


def test_any_tensor_that_is_shared_is_written_once(tmp_path):
    tensors = read_all(FIXTURES / "gpt2_gelu")
    one, other = (f"transformer.h.{i}.mlp.c_fc.weight" for i in range(2))
    tensors[other] = tensors[one]
    both = load(tmp_path / "a", tensors, "gpt2_gelu")
    del tensors[other]
    with pytest.raises(InputError, match=f"missing: {other}"):
        load(tmp_path / "b", tensors, "gpt2_gelu")
    aliases = {other: one, "lm_head.weight": "transformer.wte.weight"}
    model = load(tmp_path / "b", tensors, "gpt2_gelu", aliases)
    jax.tree.map(np.testing.assert_array_equal, model.variables, both.variables)


def numpy_scores(model, head_VE):
    """The last norm and a head, in NumPy, of what a model's layers say of TOKENS."""
    states_BCE = np.asarray(Transformer(model.spec).apply(model.variables, TOKENS, states=True)[0])
    centred = states_BCE - states_BCE.mean(-1, keepdims=True)
    norm = model.variables["params"]["ln_f"]
    normed = centred / np.sqrt((centred**2).mean(-1, keepdims=True) + model.spec.norm_eps)
    return (normed * norm["scale"] + norm["bias"]) @ head_VE.T


@pytest.mark.parametrize("name", TABLES)
def test_a_head_of_its_own(name, tmp_path):
    """Scores are the head's, of the layers' states, which are the token table's; back bit for bit."""
    head = np.random.default_rng(0).standard_normal((61, 16)).astype(np.float32)
    tensors = read_all(FIXTURES / name) | {"lm_head.weight": head}
    model = load(tmp_path / "a", tensors, name, tie_word_embeddings=False)
    assert not model.spec.tied_head
    plain = pretrained.load(str(FIXTURES / name))
    scores = forward(model.spec)(model.variables, TOKENS)[0]
    np.testing.assert_allclose(scores, numpy_scores(plain, head), atol=2e-5)
    pretrained.save(str(tmp_path / "back"), model.spec, model.variables, model.origin)
    back = read_all(tmp_path / "back")
    assert back.keys() == tensors.keys()
    for key, value in tensors.items():
        np.testing.assert_array_equal(back[key], value)
    export.save(str(tmp_path / "ours"), model.spec, model.variables)
    spec, variables, _ = export.load(str(tmp_path / "ours"))
    assert spec == model.spec
    np.testing.assert_array_equal(forward(spec)(variables, TOKENS)[0], scores)


def test_a_head_is_its_own_only_where_it_differs(tmp_path):
    tensors = read_all(FIXTURES / "opt_relu")
    table = tensors["model.decoder.embed_tokens.weight"]
    with pytest.raises(InputError, match="missing: lm_head.weight"):
        load(tmp_path / "a", tensors, "opt_relu", tie_word_embeddings=False)
    model = load(tmp_path / "a", tensors | {"lm_head.weight": table}, "opt_relu", tie_word_embeddings=False)
    assert_same(model, "opt_relu")
    pretrained.save(str(tmp_path / "back"), model.spec, model.variables, model.origin)
    assert read_all(tmp_path / "back").keys() == tensors.keys() | {"lm_head.weight"}
    with pytest.raises(InputError, match="tie_word_embeddings in its config.json is not false; say so there"):
        load(tmp_path / "a", tensors | {"lm_head.weight": table + 1}, "opt_relu")
    with pytest.raises(InputError, match="tie_word_embeddings in .*: 'no' is not known"):
        load(tmp_path / "a", tensors, "opt_relu", tie_word_embeddings="no")


@pytest.mark.parametrize("family", pretrained.FAMILIES)
def test_a_model_of_ours_with_a_head_of_its_own(family, tmp_path):
    spec = model_spec(DenseSpec(24, "relu"), tied_head=False, vocab_multiple=16)
    variables = random_variables(spec)
    pretrained.save(str(tmp_path), spec, variables, family=family)
    model = pretrained.load(str(tmp_path))
    assert not model.spec.tied_head and model.spec.vocab_rows == 23
    tokens = TOKENS % 23
    np.testing.assert_allclose(
        forward(spec)(variables, tokens)[0], forward(model.spec)(model.variables, tokens)[0], atol=1e-6
    )
    tied = cost.sizes(model_spec(DenseSpec(24, "relu"), vocab_multiple=16))["parameters"]
    assert cost.sizes(spec)["parameters"] == tied + 32 * 16


def test_text_and_likelihoods_of_a_head_of_its_own():
    spec = model_spec(KINDS["hard"], tied_head=False)
    variables = random_variables(spec)
    ids = [3, 1, 4]
    [made] = generate(spec, variables, [ids], 4, Sampling(greedy=True))
    for token in made:
        logits = forward(spec)(variables, jnp.asarray([ids]))[0][0, -1]
        assert token == int(jnp.argmax(logits))
        [scored] = scoring.score(spec, variables, [(ids, [token])])
        np.testing.assert_allclose(scored.log_likelihood, jax.nn.log_softmax(logits)[token], rtol=1e-5)
        ids.append(token)


def test_an_export_that_is_older_than_untied_heads_is_tied(tmp_path):
    spec = model_spec(KINDS["dense"])
    export.save(str(tmp_path), spec, random_variables(spec))
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["model"].pop("tied_head") is True
    assert config["model"].pop("config_version")  # which older ones do not have
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert export.load(str(tmp_path))[0] == spec


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16", "float64"])
@pytest.mark.parametrize("value, said", [(np.nan, "nan"), (np.inf, "inf"), (-np.inf, "-inf")])
def test_values_that_are_no_finite_numbers_are_refused(dtype, value, said, tmp_path):
    tensors = read_all(FIXTURES / "gpt2_gelu")
    tensors = {key: tensor.astype(jnp.dtype(dtype)) for key, tensor in tensors.items()}
    bad = "transformer.h.1.mlp.c_fc.weight"
    tensors[bad][3, 5] = tensors[bad][7, 0] = value
    with pytest.raises(InputError) as error:
        load(tmp_path, tensors, "gpt2_gelu")
    assert f"{bad} in '{tmp_path}/model.safetensors' is {said} at [3, 5] (" in str(error.value)
    assert "(not finite: 2 of 640 values)" in str(error.value)


def test_an_export_with_such_a_value_is_refused(tmp_path):
    spec = model_spec(KINDS["hard"])
    variables = random_variables(spec)
    head = variables["params"]["embed"]["tokens"]
    variables["params"]["embed"]["tokens"] = head.at[2, 1].set(jnp.nan)
    export.save(str(tmp_path), spec, variables)
    with pytest.raises(InputError, match=r"^export: params/embed/tokens in '.*' is nan at \[2, 1\]"):
        export.load(str(tmp_path))


def test_float64_is_rounded_and_said(tmp_path):
    tensors = {key: value.astype(np.float64) for key, value in read_all(FIXTURES / "gpt2_gelu").items()}
    tensors["transformer.ln_f.bias"] += 1e-12
    model = load(tmp_path / "a", tensors, "gpt2_gelu")
    assert_same(model, "gpt2_gelu")
    assert model.origin["rounded"] == len(tensors) and model.origin["dtype"] == "float32"
    with pytest.raises(InputError, match="^param_dtype: 'keep' is not possible for .*, which holds float64;"):
        pretrained.load(str(tmp_path / "a"), param_dtype="keep")
    tensors["transformer.ln_f.bias"][0] = 1e60
    with pytest.raises(InputError, match="ln_f.bias has values beyond the range of float32; no dtype"):
        load(tmp_path / "a", tensors, "gpt2_gelu")


@pytest.mark.parametrize(
    "change, config, words",
    [
        (lambda value: value.astype(np.int8), {}, r"quantised weights \(transformer.h.0.*c_fc.weight I8\)"),
        (lambda value: value.astype(jnp.float8_e4m3fn), {}, r"\(transformer.h.0.mlp.c_fc.weight F8_E4M3\)"),
        (lambda value: value, {"quantization_config": {"bits": 4}}, "by its quantization_config"),
    ],
)
def test_quantised_weights_are_refused_by_name(change, config, words, tmp_path):
    tensors = read_all(FIXTURES / "gpt2_gelu")
    tensors["transformer.h.0.mlp.c_fc.weight"] = change(tensors["transformer.h.0.mlp.c_fc.weight"])
    with pytest.raises(InputError, match=words + ".* use the checkpoint that they were made from"):
        load(tmp_path, tensors, "gpt2_gelu", **config)


def test_packed_weights_are_refused_by_name(tmp_path):
    tensors = read_all(FIXTURES / "gpt2_gelu")
    weight = tensors.pop("transformer.h.0.mlp.c_fc.weight")
    tensors["transformer.h.0.mlp.c_fc.qweight"] = weight.astype(np.int32)
    with pytest.raises(InputError, match=r"quantised weights \(transformer.h.0.mlp.c_fc.qweight I32\)"):
        load(tmp_path, tensors, "gpt2_gelu")


@pytest.mark.parametrize("file", ["model.safetensors", "config.json", "pytorch_model.bin"])
def test_a_pointer_of_git_lfs_is_named(file, tmp_path):
    shutil.copytree(FIXTURES / "opt_relu", tmp_path / "opt")
    if file.endswith(".bin"):
        (tmp_path / "opt" / "model.safetensors").unlink()
    pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 548105171\n"
    (tmp_path / "opt" / file).write_text(pointer)
    with pytest.raises(InputError, match=f"{file}' is a pointer of git-lfs, not the file; fetch it"):
        pretrained.load(str(tmp_path / "opt"))


def test_one_tensor_in_two_shards_is_refused(tmp_path):
    shutil.copytree(FIXTURES / "opt_sharded", tmp_path / "opt")
    shards = sorted((tmp_path / "opt").glob("*.safetensors"))
    name = next(iter(read_all(tmp_path / "opt")))
    rewrite(tmp_path / "extra", {name: np.ones((2, 2), np.float32)})
    index = json.loads((tmp_path / "opt" / "model.safetensors.index.json").read_text())
    other = next(shard for shard in shards if shard.name != index["weight_map"][name])
    shutil.copy(tmp_path / "extra" / "model.safetensors", other)
    with pytest.raises(InputError, match="do not agree about"):
        pretrained.load(str(tmp_path / "opt"))
