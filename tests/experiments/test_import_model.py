"""A checkpoint of transformers becomes an export, makes text, and goes back: by the programs."""

import json
import shutil
import sys
import types

import numpy as np
import pytest
from safetensors.numpy import save_file

from experiments.common import loaded
from tests.experiments.programs import call
from tests.huggingface.make_pretrained_fixtures import FIXTURES
from tests.models.kinds import KINDS, model_spec, random_variables
from tree_ffn.data import load_tokenizer
from tree_ffn.huggingface import pretrained
from tree_ffn.huggingface.checkpoint_files import open_files
from tree_ffn.models import DenseSpec, export

# The 61 ids of the fixtures: OPT's four special tokens first, then letters and their pairs.
LETTERS = [chr(c) for c in range(ord("a"), ord("z") + 1)]
VOCAB = ["<s>", "<pad>", "</s>", "<unk>", *LETTERS, "th", "he", "in", "er"]


@pytest.fixture
def checkpoint(tmp_path):
    """opt_relu with a tokenizer of its own: 34 tokens for 61 rows."""
    directory = tmp_path / "opt"
    shutil.copytree(FIXTURES / "opt_relu", directory)
    (directory / "vocab.json").write_text(json.dumps({token: i for i, token in enumerate(VOCAB)}))
    (directory / "merges.txt").write_text("#version: 0.2\nt h\nh e\ni n\ne r\n")
    (directory / "tokenizer_config.json").write_text('{"tokenizer_class": "GPT2Tokenizer"}')
    (directory / "chat_template.jinja").write_text("{{ messages[0].content }}")
    return directory


def test_in_text_and_back(checkpoint, tmp_path):
    to, back = tmp_path / "exported", tmp_path / "back"
    outcome = call("import_model", f"--from={checkpoint}", f"--to={to}", "--param_dtype=keep")
    assert outcome.code == 0 and "opt, 2 layers, width 16" in outcome.out, outcome.err
    spec, _, config = export.load(str(to))
    assert (spec.vocab_size, spec.vocab_rows) == (34, 61)
    assert config["tokenizer"] == "vocab.json,merges.txt" and config["meta"]["begins_with"] == [2]
    assert str(tmp_path) not in (to / "config.json").read_text()

    outcome = call("generate", f"--export={to}", "--prompt=the", "--tokens=4", "--seed=1")
    assert outcome.code == 0 and outcome.out.startswith("the"), outcome.err
    full = call("generate", f"--export={to}", "--prompt=the", "--tokens=10")
    # 12 positions: </s>, which begins OPT's texts, th and e, and 9 more.
    assert full.code == 2 and "10 new tokens after a prompt of 3 do not fit" in full.err

    outcome = call("export", f"--export={to}", f"--to={back}", "--format=hf")
    assert outcome.code == 0, outcome.err
    for name in ("config.json", "vocab.json", "merges.txt", "tokenizer_config.json", "chat_template.jinja"):
        assert json_or_text(back / name) == json_or_text(checkpoint / name)
    assert (back / "model.safetensors").read_bytes() == (checkpoint / "model.safetensors").read_bytes()


def json_or_text(path):
    return json.loads(path.read_text()) if path.suffix == ".json" else path.read_text()


def test_a_chat_template_comes_with_its_tokenizer(checkpoint, tmp_path):
    """Also where --tokenizer names files elsewhere; and the model knows where it is."""
    own, to = tmp_path / "own", tmp_path / "exported"
    own.mkdir()
    for name in ("vocab.json", "merges.txt", "chat_template.jinja"):
        (checkpoint / name).rename(own / name)
    named = f"--tokenizer={own}/vocab.json,{own}/merges.txt"
    outcome = call("import_model", f"--from={checkpoint}", f"--to={to}", named)
    assert outcome.code == 0, outcome.err
    assert (to / "chat_template.jinja").read_text() == "{{ messages[0].content }}"
    assert loaded.load(None, str(to)).files == str(to)


def test_a_template_that_git_lfs_has_not_fetched_is_named(checkpoint, tmp_path):
    (checkpoint / "chat_template.jinja").write_text("version https://git-lfs.github.com/spec/v1\nsize 2\n")
    outcome = call("import_model", f"--from={checkpoint}", f"--to={tmp_path / 'exported'}")
    assert outcome.code == 2 and "chat_template.jinja is a pointer of git-lfs" in outcome.err, outcome.err
    assert not (tmp_path / "exported" / "config.json").exists()


def test_without_a_tokenizer(tmp_path):
    to = tmp_path / "exported"
    outcome = call("import_model", f"--from={FIXTURES}/gpt2_gelu", f"--to={to}")
    assert outcome.code == 0 and "will need --tokenizer" in outcome.out
    assert export.load(str(to))[2]["meta"]["begins_with"] == []
    outcome = call("generate", f"--export={to}")
    assert outcome.code == 2 and "--tokenizer is missing; the model was imported without one" in outcome.err


def test_a_model_of_bytes_goes_there_and_back(tmp_path):
    spec = model_spec(DenseSpec(24, "gelu"), vocab_size=257)
    export.save(str(tmp_path / "ours"), spec, random_variables(spec))
    for arguments in (
        ["export", f"--export={tmp_path}/ours", f"--to={tmp_path}/hf", "--format=hf", "--family=gpt2"],
        ["import_model", f"--from={tmp_path}/hf", f"--to={tmp_path}/again", "--tokenizer=bytes"],
    ):
        outcome = call(*arguments)
        assert outcome.code == 0, outcome.err
    assert export.load(str(tmp_path / "again"))[0] == spec
    files = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("ours", "again")]
    assert files[0] == files[1]


@pytest.mark.parametrize(
    "change, flags, said",
    [
        ({}, ["--max_seq_len=13"], "max_seq_len: 13 is not allowed; the checkpoint has 12 positions"),
        ({}, ["--param_dtype=int4"], "param_dtype: 'int4' is not known"),
        ({}, ["--tokenizer=bytes"], "bytes has 257 tokens, which does not fit the 61 rows"),
        ({"eos_token_id": 60}, [], "ends a document with token 2, the model with 60; name the model's own"),
        ({"model_type": "bloom"}, [], "model_type in {}/config.json': 'bloom' is not known; use one of:"),
        ({"do_layer_norm_before": False}, [], "do_layer_norm_before in"),
    ],
)  # fmt: skip
def test_mistakes_get_one_sentence(checkpoint, tmp_path, change, flags, said):
    config = json.loads((checkpoint / "config.json").read_text()) | change
    (checkpoint / "config.json").write_text(json.dumps(config))
    outcome = call("import_model", f"--from={checkpoint}", f"--to={tmp_path}/x", *flags)
    assert outcome.code == 2 and outcome.err.count("\n") == 1
    assert said.replace("{}", f"'{checkpoint}") in outcome.err
    assert not (tmp_path / "x").exists() and outcome.out == ""


@pytest.mark.parametrize(
    "program, flags, said",
    [
        ("import_model", ["--to=x"], "--from is missing"),
        ("import_model", ["--from=x"], "--to is missing"),
        ("import_model", ["--from={}/none.bin", "--to={}/x"], "none.bin' is not a directory"),
        ("export", ["--export={}/trees", "--to={}/x"], "--format=hf writes another"),
        ("export", ["--export={}/trees", "--workdir=y", "--to={}/x"], "but not both"),
        ("export", ["--export={}/trees", "--to={}/x", "--format=hf"], "a model with trees, experts"),
    ],
)
def test_other_mistakes(tmp_path, program, flags, said):
    spec = model_spec(KINDS["hard"])
    export.save(str(tmp_path / "trees"), spec, random_variables(spec))
    outcome = call(program, *(flag.format(tmp_path) for flag in flags))
    assert outcome.code == 2 and outcome.err.count("\n") == 1 and said in outcome.err
    assert not (tmp_path / "x").exists()


def test_a_hub_name_is_fetched_without_pickles(checkpoint, tmp_path, monkeypatch):
    asked = {}

    def snapshot_download(name, **options):
        asked.update(options, name=name)
        return str(checkpoint)

    fake = types.SimpleNamespace(snapshot_download=snapshot_download)
    monkeypatch.setitem(sys.modules, "huggingface_hub", fake)
    outcome = call("import_model", "--from=facebook/opt-125m", f"--to={tmp_path}/x", "--revision=abc")
    assert outcome.code == 0, outcome.err
    assert asked == {
        "name": "facebook/opt-125m",
        "revision": "abc",
        "allow_patterns": ["*.safetensors", "*.json", "merges.txt", "chat_template.jinja"],
    }
    assert open_files(str(checkpoint)).entries.keys()
    np.testing.assert_equal(
        pretrained.load(str(checkpoint)).spec.width, export.load(f"{tmp_path}/x")[0].width
    )


def test_a_hub_that_does_not_answer(tmp_path, monkeypatch):
    def snapshot_download(name, **options):
        raise ConnectionError("no route to host\nmany lines")

    fake = types.SimpleNamespace(snapshot_download=snapshot_download)
    for module, said in (
        (fake, "does not give it (no route to host)"),
        (None, "needs the package huggingface_hub"),
    ):
        monkeypatch.setitem(sys.modules, "huggingface_hub", module)
        outcome = call("import_model", "--from=facebook/opt-125m", f"--to={tmp_path}/x")
        assert outcome.code == 2 and outcome.err.count("\n") == 1 and said in outcome.err


def import_and_load(checkpoint, to, *flags):
    outcome = call("import_model", f"--from={checkpoint}", f"--to={to}", *flags)
    assert outcome.code == 0, outcome.err
    return outcome.out, loaded.load(None, str(to))


def write(checkpoint, **files):
    for name, values in files.items():
        path = checkpoint / f"{name}.json"
        before = json.loads(path.read_text()) if path.exists() else {}
        path.write_text(json.dumps(before | values))


def test_tokens_of_a_fine_tuned_model(checkpoint, tmp_path):
    """An end of its own beside </s>, an added token, and a pad that the table has no row for."""
    write(
        checkpoint,
        config={"eos_token_id": [35, 2], "vocab_size": 61, "pad_token_id": 61},
        added_tokens={"<sep>": 34, "<|ending|>": 35, "<|pad|>": 61},
        special_tokens_map={"eos_token": "<|ending|>", "pad_token": "<|pad|>", "bos_token": "<s>"},
    )
    out, model = import_and_load(checkpoint, tmp_path / "x")
    assert "texts end with <|ending|> only; its files name [2] as ends too" in out
    assert (model.spec.vocab_size, model.spec.vocab_rows, model.tokenizer.end_id) == (36, 61, 35)
    assert model.begins_with == [0] and model.tokenizer.encode("a<sep>").tolist() == [4, 34]
    # Training from the export reads the same tokens: nothing but its files is asked.
    assert load_tokenizer(f"{tmp_path}/x/vocab.json,{tmp_path}/x/merges.txt").end_id == 35


def test_a_tokenizer_with_more_tokens_than_rows_gets_advice(checkpoint, tmp_path):
    write(checkpoint, added_tokens={"<new>": 61})
    outcome = call("import_model", f"--from={checkpoint}", f"--to={tmp_path}/x")
    assert outcome.code == 2 and outcome.err.count("\n") == 1
    assert "has 62 tokens, the model's table 61 rows; take the tokens from id 61 on out" in outcome.err
    assert "resize_token_embeddings" in outcome.err


def test_what_begins_a_text_is_the_tokenizers_word(checkpoint, tmp_path):
    write(checkpoint, tokenizer_config={"add_bos_token": False})
    assert import_and_load(checkpoint, tmp_path / "x")[1].begins_with == []
    write(checkpoint, tokenizer_config={"add_bos_token": True}, config={"bos_token_id": 60})
    outcome = call("import_model", f"--from={checkpoint}", f"--to={tmp_path}/y")
    assert outcome.code == 2 and "texts begin with token 60 (bos_token_id), the model has 34" in outcome.err


def test_damaged_weights_and_float64_are_said(checkpoint, tmp_path):
    tensors = {name: open_files(str(checkpoint)).read(name) for name in open_files(str(checkpoint)).entries}
    save_file(
        {name: value.astype(np.float64) for name, value in tensors.items()}, checkpoint / "model.safetensors"
    )
    assert (
        "36 tensors are float64; they were rounded to float32"
        in import_and_load(checkpoint, tmp_path / "x")[0]
    )
    tensors["model.decoder.layers.1.fc1.bias"][7] = np.nan
    save_file(tensors, checkpoint / "model.safetensors")
    outcome = call("import_model", f"--from={checkpoint}", f"--to={tmp_path}/y")
    assert outcome.code == 2 and "layers.1.fc1.bias in" in outcome.err and "is nan at [7]" in outcome.err
    assert not (tmp_path / "y").exists()
