"""Processes beside each other: what each may take of the machine."""

import os

from experiments.common import processes


def test_processes_take_gpus_in_turns(monkeypatch):
    monkeypatch.delenv("XLA_PYTHON_CLIENT_MEM_FRACTION", raising=False)
    seen = [processes.Processes(4, ["0", "2"]).environment(slot) for slot in range(4)]
    assert [values["CUDA_VISIBLE_DEVICES"] for values in seen] == ["0", "2", "0", "2"]
    assert seen[0]["XLA_PYTHON_CLIENT_MEM_FRACTION"] == "0.45"  # two share each
    assert seen[0]["OPENBLAS_NUM_THREADS"] == os.environ.get("OPENBLAS_NUM_THREADS", "1")
    alone = processes.Processes(2, ["0", "1"]).environment(1)
    assert "XLA_PYTHON_CLIENT_MEM_FRACTION" not in alone
    all_see_all = processes.Processes(3, []).environment(2)
    assert all_see_all["XLA_PYTHON_CLIENT_MEM_FRACTION"] == "0.30"
