"""A model as safetensors and config.json, and back, bit for bit."""

import json
import resource
import signal

import jax
import numpy as np
import pytest

from tests.models.kinds import KINDS, model_spec, random_variables
from tree_ffn.errors import InputError
from tree_ffn.models import export


@pytest.mark.parametrize("param_dtype", ["bfloat16", pytest.param("float32", marks=pytest.mark.slow)])
def test_back_bit_for_bit(tmp_path, param_dtype):
    spec = model_spec(*KINDS.values(), param_dtype=param_dtype, remat="full")
    variables = random_variables(spec)
    export.save(str(tmp_path / "new"), spec, variables, tokenizer="bytes", meta={"step": 7})
    loaded_spec, loaded, config = export.load(str(tmp_path / "new"))
    assert loaded_spec == spec
    assert (config["tokenizer"], config["meta"]) == ("bytes", {"step": 7})
    assert jax.tree.structure(loaded) == jax.tree.structure(variables)

    def same_bits(a, b):
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(np.asarray(a).view(np.uint8), np.asarray(b).view(np.uint8))

    jax.tree.map(same_bits, variables, loaded)
    assert sorted(path.name for path in (tmp_path / "new").iterdir()) == ["config.json", "model.safetensors"]


@pytest.fixture
def exported(tmp_path):
    spec = model_spec(KINDS["hard"])
    export.save(str(tmp_path), spec, random_variables(spec))
    return tmp_path


def test_an_export_may_be_replaced(exported):
    spec = model_spec(KINDS["dense"])
    export.save(str(exported), spec, random_variables(spec))
    assert export.load(str(exported))[0] == spec


def change(directory, **values):
    path = directory / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


@pytest.mark.parametrize(
    "damage, words",
    [
        (lambda d: (d / "config.json").unlink(), "config.json' cannot be read: No such file"),
        (lambda d: (d / "config.json").write_text("{"), "config.json' is not JSON that can be read"),
        (
            lambda d: (d / "config.json").write_text('{"model_type": "opt"}'),
            "config.json' is not a model of tree_ffn",
        ),
        (lambda d: change(d, version=9), "has version 9; this library reads 1"),
        (lambda d: change(d, model={"width": 3}), "missing; a model needs each of them"),
        (lambda d: (d / "model.safetensors").unlink(), "model.safetensors' is not there"),
        (
            lambda d: (d / "model.safetensors").write_bytes(b"PK\x03\x04 not tensors"),
            "cannot be read as safetensors",
        ),
        (
            lambda d: (d / "model.safetensors").write_bytes(
                b'\x3b\0\0\0\0\0\0\0{"a":{"dtype":"F8_E4M3","shape":[1],"data_offsets":[0,1]}} \0'
            ),
            "cannot be read as safetensors: .*float8_e4m3fn",
        ),
    ],
)
def test_foreign_and_damaged_files_are_refused(exported, damage, words):
    damage(exported)
    with pytest.raises(InputError, match=words) as error:
        export.load(str(exported))
    assert "\n" not in str(error.value)


def test_weights_of_another_model_are_refused(exported):
    other = model_spec(KINDS["hard"], width=32)
    change(exported, model=json.loads(json.dumps(export.spec_to_dict(other))))
    with pytest.raises(
        InputError, match=r"params/embed/positions .* is float32\[16, 16\]; .* float32\[16, 32\]"
    ):
        export.load(str(exported))


def test_a_foreign_directory_is_not_written_over(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "opt"}')
    spec = model_spec(KINDS["dense"])
    with pytest.raises(InputError, match="is not a model of tree_ffn"):
        export.save(str(tmp_path), spec, random_variables(spec))
    assert (tmp_path / "config.json").read_text() == '{"model_type": "opt"}'
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="cannot be written"):
        export.save(str(tmp_path / "file"), spec, random_variables(spec))


def test_a_full_disk_leaves_what_was_there(exported):
    before = {path.name: path.read_bytes() for path in exported.iterdir()}
    spec, limit = model_spec(KINDS["dense"]), resource.getrlimit(resource.RLIMIT_FSIZE)
    variables, handler = random_variables(spec), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (5_000, limit[1]))  # no file gets longer
    try:
        with pytest.raises(InputError, match="cannot be written: .*File too large"):
            export.save(str(exported), spec, variables)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
        signal.signal(signal.SIGXFSZ, handler)
    assert {path.name: path.read_bytes() for path in exported.iterdir()} == before


def test_others_may_read_an_export_as_any_file(tmp_path):
    spec = model_spec(KINDS["leaf"])
    export.save(str(tmp_path), spec, random_variables(spec))
    (tmp_path / "plain").touch()
    modes = {path.stat().st_mode for path in tmp_path.iterdir()}
    assert len(modes) == 1
