"""The CUDA parts: compiled where there is an nvcc, and left to XLA where there is no GPU."""

import pathlib
import sys

import jax
import pytest

from tree_ffn.errors import InputError
from tree_ffn.tree.kernels import cuda
from tree_ffn.tree.kernels.__main__ import main

SOURCE = """
#include <cuda_runtime.h>

#include "xla/ffi/api/ffi.h"

namespace ffi = xla::ffi;

__global__ void Twice(const float* x, float* y) { y[threadIdx.x] = 2 * x[threadIdx.x]; }

static ffi::Error Run(cudaStream_t stream, ffi::Buffer<ffi::F32> x, ffi::ResultBuffer<ffi::F32> y) {
  Twice<<<1, x.element_count(), 0, stream>>>(x.typed_data(), y->typed_data());
  return ffi::Error::Success();
}

XLA_FFI_DEFINE_HANDLER_SYMBOL(TreeFfnTwice, Run,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::PlatformStream<cudaStream_t>>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Ret<ffi::Buffer<ffi::F32>>(),
                              {ffi::Traits::kCmdBufferCompatible});
"""


@pytest.fixture
def twice(tmp_path, monkeypatch):
    """The directory of a source, called twice, and of its library."""
    monkeypatch.setattr(cuda, "DIRECTORY", tmp_path)
    monkeypatch.setattr(cuda, "TARGETS", {"twice": {"tree_ffn_twice": "TreeFfnTwice"}})
    monkeypatch.delenv("TREE_FFN_KERNELS", raising=False)
    (tmp_path / "twice.cu").write_text(SOURCE)
    return tmp_path


needs_nvcc = pytest.mark.skipif(cuda.nvcc() is None, reason="needs NVIDIA's compiler, nvcc")


@pytest.mark.slow
@needs_nvcc
def test_a_source_is_compiled_once_for_hopper_where_no_gpu_is(twice, monkeypatch):
    said = []
    monkeypatch.setattr(cuda, "_capability_at_hand", lambda: None)
    (library,) = cuda.build(said.append)
    assert library == cuda.shared_object("twice", "9.0") and library.exists()
    assert said == ["nvcc made twice.cu for NVIDIA GPUs of compute capability 9.0."]
    assert cuda.build(said.append) == [library] and len(said) == 1
    assert cuda.shared_object("twice", "8.0") != library
    (twice / "twice.cu").write_text(SOURCE + "\n")
    assert not cuda.shared_object("twice", "9.0").exists()


@needs_nvcc
@pytest.mark.parametrize(
    "source, why", [("no C++", "error"), ("int TreeFfnThrice;", "it lacks TreeFfnTwice")]
)
def test_a_source_that_does_not_compile_is_named(twice, source, why):
    (twice / "twice.cu").write_text(source)
    with pytest.raises(InputError, match=rf"kernels: nvcc failed on twice.cu \(.*{why}"):
        cuda.build()
    assert [path.name for path in twice.iterdir()] == ["twice.cu"]


@needs_nvcc
@pytest.mark.slow
def test_what_is_wrong_on_the_gpu_is_removed(twice, monkeypatch):
    """Here, what has no Python file that could probe it."""
    monkeypatch.setattr(cuda, "_capability_at_hand", lambda: "9.0")
    with pytest.raises(InputError, match=r"kernels: twice.cu is wrong on this GPU \(ImportError: .*twice"):
        cuda.build()
    assert [path.name for path in twice.iterdir()] == ["twice.cu"]


def test_without_nvcc_a_sentence_says_so(twice, monkeypatch):
    monkeypatch.setattr(cuda, "NVCC", "no-nvcc")
    monkeypatch.setenv("PATH", "")
    with pytest.raises(InputError, match="no nvcc was found"):
        cuda.build()


def test_a_directory_that_is_not_there_is_named(twice, monkeypatch):
    monkeypatch.setattr(cuda, "nvcc", lambda: "nvcc")
    monkeypatch.setenv("TREE_FFN_KERNELS", str(twice / "none"))
    with pytest.raises(InputError, match="none cannot be written .*TREE_FFN_KERNELS"):
        cuda.build()


@pytest.mark.slow
@needs_nvcc
def test_gpus_elsewhere_are_named_by_their_capability(twice, monkeypatch):
    """What needs Hopper is not built for older ones."""
    monkeypatch.setattr(cuda, "TARGETS", cuda.TARGETS | {"experts": {}})
    (library,) = cuda.build(capability="8.0")
    assert library == cuda.shared_object("twice", "8.0") and library.exists()


@pytest.mark.parametrize("capability", ["90", "sm_90", "9.0a"])
def test_a_capability_that_is_none_is_named(capability, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["kernels", f"--capability={capability}"])
    assert main() == 2
    assert f"capability: {capability!r} is no compute capability" in capsys.readouterr().err


def test_a_program_for_the_cpu_has_none(twice):
    if jax.default_backend() != "cpu":
        pytest.skip("a GPU is at hand")
    cuda.is_loaded.cache_clear()
    assert not cuda.is_loaded("twice")


def test_every_source_has_targets_and_every_target_its_symbol():
    directory = pathlib.Path(cuda.__file__).parent
    assert {path.stem for path in directory.glob("*.cu")} == set(cuda.TARGETS)
    for name, targets in cuda.TARGETS.items():
        text = (directory / f"{name}.cu").read_text(encoding="utf-8")
        assert [symbol for symbol in targets.values() if f"SYMBOL({symbol}," not in text] == []
