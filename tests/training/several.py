"""Real processes that train one run together, on CPU devices of this machine."""

import contextlib
import json
import os
import pathlib
import random
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable

ROOT = pathlib.Path(__file__).parent.parent.parent
HEARTBEAT = 5
LAUNCHED_PORTS = 2**16 - 2**12  # from which JAX chooses by the number of the job
ENVIRONMENT = {"JAX_PLATFORMS": "cpu", "OPENBLAS_NUM_THREADS": "1"}


def free_port(lowest: int = 0) -> int:
    """A port that is free, of those from `lowest`; any by default."""
    for port in range(lowest, 2**16):
        with socket.socket() as found, contextlib.suppress(OSError):
            found.bind(("", port))
            return found.getsockname()[1]
    raise RuntimeError(f"no port from {lowest} on is free")


def announced(n: int, process: int, port: int, launcher: str) -> dict[str, str]:
    """The variables by which a process learns of the others: our own, or those that srun or mpirun sets."""
    job = port - LAUNCHED_PORTS
    if launcher == "srun":
        variables = {"JOB_ID": job, "STEP_NODELIST": "localhost", "NTASKS": n}
        variables |= {"PROCID": process, "LOCALID": process}
        return {f"SLURM_{name}": str(value) for name, value in variables.items()}
    if launcher == "mpirun":
        variables = {"SIZE": n, "RANK": process, "LOCAL_RANK": process}
        told = {f"OMPI_COMM_WORLD_{name}": str(value) for name, value in variables.items()}
        return told | {"OMPI_MCA_orte_hnp_uri": f"{job * 2**12}.0;tcp://127.0.0.1:41965"}
    return {
        "JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{port}", "JAX_NUM_PROCESSES": str(n),
        "JAX_PROCESS_ID": str(process),
    }  # fmt: skip


class Several:
    """`experiments.train` as `n` processes; what they print lies in LOGS/0, LOGS/1, ...

    Args:
      n: how many.
      workdir: of the run.
      texts: directory of its text, as `tiny.write_texts` makes it.
      *flags: of all processes; a run is configs/smoke.py.
      devices: of each process.
      of_one: (process, its more flags, its more environment).
      variables: more environment of all.
      before: words before the command, as of `faketime`.
      launcher: the environment is that of "srun" or "mpirun"; "": the one that our guide says.
    """

    def __init__(
        self, n: int, workdir: pathlib.Path, texts: pathlib.Path, *flags: str, devices: int = 1,
        of_one: tuple[int, list[str], dict[str, str]] = (0, [], {}), launcher: str = "",
        variables: dict[str, str] | None = None, before: tuple[str, ...] = (),
    ):  # fmt: skip
        self.workdir, self.processes, self.began = workdir, [], time.monotonic()
        self.logs = workdir.with_name(f"{workdir.name}.logs")
        self.logs.mkdir(exist_ok=True)
        common = [
            "--config=configs/smoke.py:kind=tree", "--config.data.workers=0", f"--heartbeat={HEARTBEAT}",
            f"--config.data.files={texts}/*.txt", f"--config.data.cache_dir={texts}/cache",
            f"--workdir={workdir}",
        ]  # fmt: skip
        environment = os.environ | ENVIRONMENT | {"JAX_NUM_CPU_DEVICES": str(devices)} | (variables or {})
        port = free_port(LAUNCHED_PORTS + random.randrange(2**11) if launcher else 0)
        for process in range(n):
            more, own = of_one[1:] if process == of_one[0] else ([], {})
            with open(self.logs / str(process), "w") as log:
                self.processes.append(
                    subprocess.Popen(
                        [*before, sys.executable, "-m", "experiments.train", *common, *flags, *more],
                        cwd=ROOT,
                        env=environment | announced(n, process, port, launcher) | own,
                        stdout=log,
                        stderr=log,
                    )  # fmt: skip
                )

    def wait(self, seconds: float = 240) -> list[int]:
        """Exit codes of all, in their order; those that do not end in time are killed (-9)."""
        deadline = time.monotonic() + seconds
        for process in self.processes:
            try:
                process.wait(max(0.1, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                process.kill()
        return [process.wait() for process in self.processes]

    def until(self, happens: Callable[[], object], seconds: float = 240) -> None:
        """Waits for something while all run."""
        deadline = time.monotonic() + seconds
        while not happens():
            ended = [process.poll() for process in self.processes]
            assert ended == [None] * len(ended) and time.monotonic() < deadline, (
                ended,
                [lines[-5:] for lines in self.said()],
            )
            time.sleep(0.01)

    def send(self, process: int, signum: int = signal.SIGKILL) -> float:
        """Sends one of them a signal; returns the time."""
        self.processes[process].send_signal(signum)
        return time.monotonic()

    def said(self) -> list[list[str]]:
        """The lines that each has printed, but for those of gloo and of JAX's notice of a signal."""
        noise = ("[Gloo]", "preemption_notifier")
        logs = [log.read_text(errors="replace").splitlines() for log in sorted(self.logs.iterdir())]
        return [[line for line in lines if not any(map(line.__contains__, noise))] for lines in logs]

    def steps(self) -> int:
        """The last step that metrics.jsonl knows."""
        lines = metrics(self.workdir)
        return lines[-1]["step"] if lines else 0


def metrics(workdir: pathlib.Path) -> list[dict]:
    """The whole lines of metrics.jsonl."""
    path = workdir / "metrics.jsonl"
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    return [json.loads(line) for line in lines if line.endswith("\n")]


def losses(workdir: pathlib.Path) -> dict[tuple[str, int], float]:
    """{(split, step): loss} of a run."""
    return {(line["split"], line["step"]): line["loss"] for line in metrics(workdir)}
