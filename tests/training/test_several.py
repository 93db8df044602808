"""Training by two real processes: they compute what one computes, and stop and refuse as one."""

import io
import os
import signal
import sys

import jax
import numpy as np
import pytest

from tests.training.faults import FAULTS, kills_while_saving
from tests.training.outcomes import NotHere, Place
from tests.training.several import Several, losses
from tests.training.tiny import tiny_config
from tree_ffn.errors import InputError
from tree_ffn.training import distributed, last_words
from tree_ffn.training.checkpoint_files import steps_on_disk
from tree_ffn.training.loop import train
from tree_ffn.training.sharding import make_mesh, put_rows, rows_here


def test_two_processes_compute_what_one_computes(texts, tmp_path):
    """In two microbatches, whose gradients devices of both add up once a step."""
    flags = ("--config.train.steps=8", "--config.train.grad_accum_steps=2", "--config.train.probe=False")
    run = Several(2, tmp_path / "two", texts, *flags, devices=2)
    config = tiny_config(texts, steps=8, mesh__data=4, train__grad_accum_steps=2)
    train(config, str(tmp_path / "one"), log=lambda _: None, bar=False)
    assert run.wait() == [0, 0], run.said()
    one, two = losses(tmp_path / "one"), losses(tmp_path / "two")
    assert one.keys() == two.keys() and len(one) == 7
    np.testing.assert_allclose(list(two.values()), list(one.values()), rtol=1e-6)
    first, other = run.said()
    assert other == [] and "step 8: validation loss" in first[-2]
    assert steps_on_disk(str(tmp_path / "two" / "checkpoints")) == [6, 8]


@pytest.mark.slow
@pytest.mark.parametrize("launcher", ["srun", "mpirun"])
def test_a_signal_to_one_stops_both_at_the_same_step(launcher, texts, tmp_path):
    run = Several(2, tmp_path / "run", texts, "--config.train.steps=100000", launcher=launcher)
    run.until(lambda: run.steps() >= 4)
    told = run.send(1, signal.SIGTERM)
    assert run.wait(30) == [143, 143], (told, run.said())
    (step,) = {line.split("after step ")[1].split()[0] for lines in run.said() for line in lines[-1:]}
    assert steps_on_disk(str(run.workdir / "checkpoints"))[-1] == int(step)


@pytest.mark.slow
def test_processes_keep_what_they_have_compiled(texts, tmp_path):
    cache = tmp_path / "compiled"
    variables = {"JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0", "JAX_COMPILATION_CACHE_DIR": ""}
    run = Several(2, tmp_path / "run", texts, f"--config.train.compile_cache={cache}", variables=variables)
    assert run.wait() == [0, 0], run.said()
    assert any("train_step" in path.name for path in cache.iterdir())


def test_processes_that_differ_are_refused_and_named(texts, tmp_path):
    run = Several(2, tmp_path / "run", texts, of_one=(1, ["--config.optim.lr=0.5"], {}))
    assert run.wait(60) == [2, 2], run.said()
    said = (
        "train.py: process 1: config.optim.lr is 0.5, but 0.001 in process 0; start all with the same command"
    )
    assert all(line.startswith(said) for (line,) in run.said()), run.said()
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("data,model", [(8, 1), (4, 2), (2, 4), (1, 8)])
def test_rows_that_are_read_are_those_that_are_held(data, model):
    mesh, batch = make_mesh(data, model), np.arange(16 * 3).reshape(16, 3)
    here = rows_here(mesh, 16)
    array = put_rows(batch[here], here, 16, mesh)
    np.testing.assert_array_equal(array, batch)


@pytest.mark.parametrize("name,data,model", [("v5e-16", 16, 1), ("v5e-16", 4, 4), ("v5p-128", 64, 1)])
def test_rows_of_every_host_of_a_slice(name, data, model):
    """Orders of devices that are real: hosts hold squares of a slice, not lines."""
    pytest.importorskip("libtpu")
    from experiments.planning.chips import slice_of
    from experiments.planning.devices import devices_of

    mesh = make_mesh(data, model, devices_of(slice_of(name)))
    held = distributed_rows(mesh, 64)
    for process in {device.process_index for device in mesh.devices.flat}:
        assert rows_here(mesh, 64, process).tolist() == sorted(held[process])
    assert set().union(*held.values()) == set(range(64))


def distributed_rows(mesh, size: int) -> dict[int, set[int]]:
    """By the places of a process's devices in the mesh."""
    held, each = {}, size // mesh.shape["data"]
    for (place, _), device in np.ndenumerate(mesh.devices):
        held.setdefault(device.process_index, set()).update(range(place * each, (place + 1) * each))
    return held


ABORT = b"""step 3: all is well
E1130 14:01:51.427611    9765 coordination_service.cc:1549] [48] Use error polling: UNAVAILABLE: The \
following tasks are unhealthy (stopped sending heartbeats):
1
3
The tasks have crashed.
F1130 14:02:02.900179    9836 client.h:80] Terminating process because the JAX distributed service detected
*** Check failure stack trace: ***
    @     0x7fcd0d740634  absl::lts_20260107::log_internal::LogMessage::SendToLog()
"""


def test_an_abort_becomes_one_sentence_and_all_else_passes():
    out = io.BytesIO()
    last_words.pass_on(ABORT.splitlines(keepends=True), out, "train.py")
    well, lost = out.getvalue().decode().splitlines()
    assert well == "step 3: all is well" and lost.startswith("train.py: process 1, 3 of this run was lost;")
    no_abort, out = ABORT[: ABORT.index(b"F1130")], io.BytesIO()
    last_words.pass_on(no_abort.splitlines(keepends=True), out, "train.py")
    assert out.getvalue() == no_abort


def test_what_is_left_of_several_slices_is_dropped(monkeypatch):
    """JAX would take a coordinator that is gone for its own."""
    from jax._src.clusters.cloud_tpu_cluster import GkeTpuCluster

    monkeypatch.setenv("TPU_WORKER_HOSTNAMES", "localhost,other")
    monkeypatch.setenv("MEGASCALE_COORDINATOR_ADDRESS", "127.0.0.9:8080")
    monkeypatch.setenv("MEGASCALE_NUM_SLICES", "2")
    found = lambda: (GkeTpuCluster.get_coordinator_address(5, "1"), GkeTpuCluster.get_process_count())
    assert found() == ("127.0.0.9:1", 4)
    distributed.forget_slices()
    assert found() == ("localhost:1", 2)


@pytest.mark.parametrize("name", [distributed.COUNT, distributed.INDEX])
def test_a_number_that_is_none_is_named(monkeypatch, name):
    monkeypatch.setenv(name, "two")
    with pytest.raises(InputError, match=f"{name}: 'two' is not allowed"), distributed.started(5):
        pass


@pytest.mark.parametrize("address", ["", "host", "host:", ":1", "host:http"])
def test_an_address_that_is_none_is_named(monkeypatch, address):
    """Two processes that are announced without one would not wait for each other."""
    monkeypatch.setenv(distributed.ADDRESS, address)
    monkeypatch.setenv(distributed.COUNT, "2")
    said = f"{distributed.ADDRESS}: '{address}' is not allowed; use host:port of process 0."
    with pytest.raises(InputError, match=said), distributed.started(5):
        pass


def test_one_process_is_left_alone(monkeypatch):
    for variable in ("SLURM_STEP_NODELIST", "SLURM_NTASKS"):
        monkeypatch.setenv(variable, "1")
    before = os.fstat(2)
    with distributed.started(5):
        assert not jax.distributed.is_initialized() and os.path.samestat(before, os.fstat(2))
        assert distributed.texts_of_all("alone") == ["alone"] and sys.stdout.writable()


@pytest.mark.slow
@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.__name__)
def test_what_follows_a_fault(fault, tmp_path):
    more = {"kills": 3, "steps": 60} if fault is kills_while_saving else {}
    try:
        found = fault(Place(tmp_path), **more)
    except NotHere as reason:
        pytest.skip(str(reason))
    assert found.codes and found.seconds > 0  # each fault asserts what has to follow it
