"""Jobs as text: what tools say of it, what a real shell does with it, and what is refused."""

import json
import os
import pathlib
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time

import pytest
import yaml

from experiments.launching.job import Job, restarting, slice_named
from tests.experiments.programs import call

ROOT = pathlib.Path(__file__).parent.parent.parent
SMOKE = ["--config=configs/smoke.py", "--config.train.batch_size=256", "--config.mesh.data=-1"]
FILES = "--config.data.files=/shared/*.txt"
PLACES = {
    "gke": [
        "--topology=v5e-16", "--image=eu/x:1", "--mount=claim:/shared", "--workdir=/shared/runs/Run_1.5",
    ],
    "queued": [
        "--topology=v5p-128", "--image=eu-docker.pkg.dev/p/x:1", "--mount=10.0.0.2:/export:/shared",
        "--workdir=/shared/runs/first", "--submit=--zone=us-west4-a --spot",
    ],
    "slurm": ["--topology=2x8", "--workdir=/nfs/runs/it's first", "--submit=--time=60", "--grace=90"],
    "ssh": ["--topology=2x8", "--hosts=a,me@b", "--workdir=/nfs/runs/first"],
}  # fmt: skip
TOOLS = {"gke": "kubectl", "queued": "gcloud", "slurm": "sbatch", "ssh": "ssh"}


@pytest.fixture(autouse=True)
def _in_the_checkout(monkeypatch):
    monkeypatch.chdir(ROOT)


def dry(place, *more):
    """(the words of the tool, the text that it reads) of a dry run."""
    outcome = call("launch", place, *SMOKE, FILES, *PLACES[place], "--dry_run", *more)
    assert outcome.code == 0, outcome.err
    first, text = outcome.out.split(" <<'END'\n")
    assert text.endswith("\nEND\n")
    return shlex.split(first), text.removesuffix("END\n")


def inner(text):
    """The spec of the Job in a JobSet."""
    return yaml.safe_load(text)["spec"]["replicatedJobs"][0]["template"]["spec"]


def complaints(tool, *words, text="") -> str:
    """What a tool says of a text that it refuses, where it is installed."""
    if shutil.which(tool) is None:
        pytest.skip(f"{tool} is not installed")
    done = subprocess.run([tool, *words], input=text, capture_output=True, text=True, check=False)
    return f"{done.returncode}: {done.stdout}{done.stderr}" if done.returncode else ""


def test_a_job_set():
    words, text = dry("gke", "--queue=main", "--select=cloud.google.com/gke-spot=true", "--restarts=5")
    made, job = yaml.safe_load(text), inner(text)
    pod = job["template"]["spec"]
    (container,) = pod["containers"]
    assert words == ["kubectl", "apply", "-f", "-"]
    assert made["metadata"]["name"].startswith("run-1-5-")
    assert made["metadata"]["labels"] == {"kueue.x-k8s.io/queue-name": "main"}
    assert made["spec"]["failurePolicy"]["maxRestarts"] == 5
    rules = job["podFailurePolicy"]["rules"]
    codes = [(rule["action"], rule.get("onExitCodes", {}).get("values")) for rule in rules]
    assert codes == [("FailJob", [2]), ("Ignore", [143]), ("Ignore", None)] and job["backoffLimit"] == 0
    assert pod["nodeSelector"] == {
        "cloud.google.com/gke-tpu-accelerator": "tpu-v5-lite-podslice",
        "cloud.google.com/gke-tpu-topology": "4x4",
        "cloud.google.com/gke-spot": "true",
    }
    words = ["python", "-m", "experiments.train", *SMOKE, FILES, "--workdir=/shared/runs/Run_1.5"]
    assert container["command"] == words
    assert container["env"] == [{"name": "JAX_COMPILATION_CACHE_DIR", "value": "/shared/runs/jax_cache"}]
    assert container["volumeMounts"][0]["mountPath"] == "/shared"
    assert pod["volumes"][0]["persistentVolumeClaim"] == {"claimName": "claim"}


# Hosts and topology by xpk 1.16's own dry run.
@pytest.mark.parametrize(
    "name, hosts, topology",
    [("v5e-16", 4, "4x4"), ("v5e-256", 64, "16x16"), ("v5p-128", 16, "4x4x4"), ("v6e-256", 64, "16x16")],
)
def test_slices_are_those_of_xpk(name, hosts, topology, tmp_path):
    """And of the xpk that is installed, by the line that the text's head has for it."""
    text = dry("gke", f"--topology={name}")[1]
    found = lambda job: (
        job["parallelism"],
        job["completions"],
        job["template"]["spec"]["nodeSelector"]["cloud.google.com/gke-tpu-topology"],
        job["template"]["spec"]["containers"][0]["resources"]["limits"]["google.com/tpu"],
    )
    assert found(inner(text)) == (hosts, hosts, topology, 4)
    if shutil.which("xpk"):
        words = shlex.split(next(line for line in text.splitlines() if line.startswith("# xpk"))[2:])
        alone = ["--dry-run", "--skip-validation", "--cluster=c", "--project=p", "--zone=us-central2-b"]
        words += [*alone, f"--output-manifest-file={tmp_path}/m.yaml"]
        subprocess.run(words, check=True, capture_output=True, env=os.environ | {"HOME": str(tmp_path)})
        assert found(inner((tmp_path / "m.yaml").read_text())) == found(inner(text))


def test_kubernetes_takes_the_inner_job(tmp_path):
    job = {"apiVersion": "batch/v1", "kind": "Job", "metadata": {"name": "x"}, "spec": inner(dry("gke")[1])}
    (tmp_path / "job.yaml").write_text(yaml.safe_dump(job))
    assert not complaints("kubernetes-validate", "--strict", str(tmp_path / "job.yaml"))


def test_the_dockerfile_passes_hadolint():
    assert not complaints("hadolint", "-", text=(ROOT / "Dockerfile").read_text())


@pytest.mark.parametrize("place", ["queued", "slurm", "ssh"])
def test_scripts_pass_shellcheck(place):
    assert not complaints("shellcheck", "-", text=dry(place)[1])


def test_the_script_of_a_machine():
    words, text = dry("queued")
    assert words[:5] == ["gcloud", "compute", "tpus", "queued-resources", "create"]
    assert words[6:] == [
        f"--node-id={words[5]}", "--accelerator-type=v5p-128", "--runtime-version=v2-alpha-tpuv5",
        "--zone=us-west4-a", "--spot", "--metadata-from-file=startup-script=/dev/stdin",
    ]  # fmt: skip
    assert "mount -t nfs 10.0.0.2:/export /shared\n" in text and "--volume=/shared:/shared" in text
    assert "configure-docker --quiet eu-docker.pkg.dev\n" in text
    assert "--accelerator-type=v5litepod-16" in dry("queued", "--topology=v5e-16")[0]


def test_a_batch_script():
    words, text = dry("slurm")
    subprocess.run(["bash", "-n"], input=text, text=True, check=True)
    asked = [line[8:].split("=", 1) for line in text.splitlines() if line.startswith("#SBATCH")]
    found = {name: value for name, *rest in asked for value in rest or [""]}
    assert words == ["sbatch", "--time=60"] and f"cd {ROOT} || exit\n" in text and "--requeue" in found
    assert found["--nodes"] == "2" and found["--ntasks-per-node"] == found["--gpus-per-node"] == "8"
    assert found["--signal"] == "TERM@90"
    assert f"srun {sys.executable} -m experiments.train" in text


def test_lines_of_ssh():
    words, text = dry("ssh")
    subprocess.run(["bash", "-n"], input=text, text=True, check=True)
    assert words == ["bash"]
    assert text.count("JAX_COORDINATOR_ADDRESS=a:8476") == text.count("JAX_NUM_PROCESSES=2") == 2
    assert " a 'cd " in text and " me@b 'cd " in text and "JAX_PROCESS_ID=1" in text


@pytest.mark.slow  # test_train stops the same program, test_a_job_set has the words of the command
def test_the_command_of_a_pod_ends_with_143(texts, tmp_path):
    """Under bash, where it is told to stop; and with 2 where its input is wrong."""
    files = [f"--config.data.files={texts}/*.txt", f"--config.data.cache_dir={tmp_path}/cache"]
    own = ["--config.data.workers=0", "--config.train.steps=100000", f"--mount=claim:{tmp_path}"]
    (container,) = inner(dry("gke", *files, *own, f"--workdir={tmp_path}/run")[1])["template"]["spec"][
        "containers"
    ]
    words = [sys.executable, *container["command"][1:]]
    environment = os.environ | {entry["name"]: entry["value"] for entry in container["env"]}
    environment |= {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": "1"}
    process = subprocess.Popen(["bash", "-c", shlex.join(words)], env=environment)
    try:
        deadline = time.monotonic() + 300
        while not (tmp_path / "run" / "metrics.jsonl").exists():
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.1)
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 143
    finally:
        process.kill()
    wrong = shlex.join([*words, "--config.optim.lr=-1"])
    assert subprocess.run(["bash", "-c", wrong], env=environment, check=False).returncode == 2


@pytest.mark.parametrize(
    "ends, restarts, said, runs",
    [
        ([143, 134, 143, 0], 1, 0, 4),  # stops do not count
        ([1, 137, 139, 0], 2, 139, 3),
        ([2, 0], 3, 2, 1),
        ([0], 0, 0, 1),
    ],
)
def test_a_run_is_started_again(tmp_path, ends, restarts, said, runs):
    """By a real shell; what it runs ends as told, and it does not sleep."""
    (tmp_path / "ends").write_text("".join(f"{end}\n" for end in ends))
    one = 'echo >> runs; return "$(sed -n "$(wc -l < runs)p" ends)"'
    text = f"sleep() {{ :; }}\none() {{ {one}; }}\n{restarting('one', restarts, ':')}"
    assert subprocess.run(["bash", "-c", text], cwd=tmp_path, check=False).returncode == said
    assert len((tmp_path / "runs").read_text()) == runs


def test_a_workdir_in_a_bucket_needs_no_disk():
    (container,) = inner(dry("gke", "--mount=", "--workdir=gs://b/runs/one")[1])["template"]["spec"][
        "containers"
    ]
    assert container["env"][0]["value"] == "gs://b/runs/jax_cache" and "volumeMounts" not in container
    assert container["command"][-1] == "--workdir=gs://b/runs/one"
    assert (
        "export JAX_COMPILATION_CACHE_DIR=gs://b/runs/jax_cache\n"
        in dry("slurm", "--workdir=gs://b/runs/one")[1]
    )


def test_names():
    """Two runs never share one, and all places take them."""
    places = "/a/t1/Dense_lr0.002", "/b/t1/Dense_lr0.002", "/7", "gs://b/" + 40 * "ä.x"
    names = [Job([], "2x8", slice_named("2x8", of_tpus=False), place).name for place in places]
    assert len(set(names)) == 4 and names[0].startswith("dense-lr0-002-") and names[2].startswith("run-7-")
    assert all(len(name) <= 28 and name.replace("-", "").isalnum() and name.isascii() for name in names)


@pytest.mark.parametrize(
    "place, given, said",
    [
        ("k8s", [], "place: 'k8s' is not known; use one of: gke, queued, slurm, ssh."),
        ("gke", ["--topology=v5e-12"], "'v5e-12' is not known here; use one of v5e-4, v5e-8, v5e-16, "),
        ("queued", ["--topology=h200-8"], "--topology: 'h200-8' is not known here; use one of v5e-4, "),
        ("slurm", ["--topology=v5e-16"], "use one of h200-1, h200-8, or HOSTSxDEVICES such as 2x8."),
        ("gke", ["--config.mesh.model=3"], "mesh: data=-1, model=3 does not fit 16 devices; "),
        ("gke", ["--config.mesh.data=8"], "mesh: data=8, model=1 leaves some of 16 devices idle; use all"),
        ("gke", ["--config.train.batch_size=24"], "a microbatch of 24 rows does not split over 16"),
        ("ssh", ["--hosts=a"], "--hosts: 'a' is not allowed; 2x8 needs 2."),
        ("ssh", ["--hosts="], "--hosts is missing; "),
        ("gke", ["--image="], "--image is missing; "),
        ("gke", ["--workdir=runs/first"], "--workdir: 'runs/first' is on a disk that one host sees alone; "),
        ("gke", ["--mount="], "--workdir: '/shared/runs/Run_1.5' is on a disk that one host sees alone; "),
        ("slurm", ["--workdir=/tmp/first"], "alone; name one that all 2 share."),
        (
            "gke",
            ["--mount=claim"],
            "--mount: 'claim' is not allowed; use CLAIM:/PATH, or HOST:/EXPORT:/PATH.",
        ),
        ("gke", ["--select=spot"], "--select: 'spot' is not allowed; use KEY=VALUE."),
        ("slurm", ["--image=x"], "--image is not allowed for slurm; it is of gke and queued."),
    ],
)
def test_bad_input_is_one_sentence(place, given, said):
    outcome = call("launch", place, *SMOKE, *PLACES.get(place, PLACES["gke"]), "--dry_run", *given)
    assert outcome.code == 2 and said in outcome.err and len(outcome.err.splitlines()) == 1, outcome


def test_a_config_that_the_image_does_not_have():
    config = f"--config={ROOT}/configs/smoke.py"
    outcome = call("launch", "gke", config, *SMOKE[1:], *PLACES["gke"])
    assert outcome.code == 2 and outcome.err.endswith("is not in the image; name one of configs/.\n")


@pytest.mark.parametrize("place, tool", TOOLS.items())
def test_a_tool_that_is_not_installed(place, tool, tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    outcome = call("launch", place, *SMOKE, *PLACES[place])
    said = f"launch.py: {place}: {tool} is not installed; install it, or take --dry_run's text.\n"
    assert outcome.code == 2 and outcome.err == said and not outcome.out


def test_a_tool_gets_the_text_and_its_failure_ends_all(tmp_path, monkeypatch):
    """Here a script in its place, which keeps what it was given."""
    keep = f'#!/bin/sh\necho "$@" > {tmp_path}/words\ncat > {tmp_path}/text\nexit 3\n'
    (tmp_path / "sbatch").write_text(keep)
    (tmp_path / "sbatch").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    assert call("launch", "slurm", *SMOKE, FILES, *PLACES["slurm"]).code == 3
    assert (tmp_path / "text").read_text() == dry("slurm")[1]
    assert (tmp_path / "words").read_text() == "--time=60\n"


def test_a_table_is_a_job_a_run():
    table = ["--sweep=configs/sweeps/t4_cpu.py", "--results=/shared/t4.jsonl", "--workdir=/shared/runs/t4"]
    outcome = call(
        "ablate", *table, "--launch=gke --topology=v5e-4 --image=x --mount=claim:/shared", "--print"
    )
    assert outcome.code == 0, outcome.err
    printed = call("ablate", *table, "--print").out.splitlines()
    texts = [part.rpartition("\nEND")[0] for part in outcome.out.split(" <<'END'\n")[1:]]
    words = [inner(text)["template"]["spec"]["containers"][0]["command"] for text in texts]
    assert [shlex.join(one) for one in words] == printed and len(printed) > 3
    assert len({yaml.safe_load(text)["metadata"]["name"] for text in texts}) == len(texts)


@pytest.mark.parametrize(
    "launch, said",
    [
        ("k8s --topology=v5e-4", "place: 'k8s' is not known; use one of: gke, queued, slurm, ssh."),
        ("slurm --topologie=1x8", "--launch: 'slurm --topologie=1x8' is not allowed; Unknown command line"),
        ("slurm '", '--launch: "slurm \'" is not allowed; No closing quotation.'),
        ("--topology=1x8", "--launch: '--topology=1x8' is not allowed; "),
        ("slurm 1x8", "--launch: '1x8' is not known; flags have the form --name=value."),
        ("gke --topology=v5e-4 --image=x", "--workdir: '/shared/runs/t4/"),
    ],
)
def test_bad_words_for_a_table(launch, said):
    table = ["--sweep=configs/sweeps/t4_cpu.py", "--results=/shared/t4.jsonl", "--workdir=/shared/runs/t4"]
    outcome = call("ablate", *table, f"--launch={launch}")
    assert outcome.code == 2 and said in outcome.err and len(outcome.err.splitlines()) == 1, outcome


@pytest.mark.slow
def test_a_requeued_job_ends_as_one_that_ran_through(texts, tmp_path, monkeypatch):
    """On a real cluster, where one answers; SLURM lets a job wait two minutes that is queued again."""
    ask = lambda *words: subprocess.run(words, capture_output=True, text=True, check=True).stdout
    if (
        shutil.which("sinfo") is None
        or subprocess.run(["sinfo"], capture_output=True, check=False).returncode
    ):
        pytest.skip("no SLURM cluster answers")
    monkeypatch.setenv("XLA_FLAGS", "")  # a task has one device
    files = [f"--config.data.files={texts}/*.txt", f"--config.data.cache_dir={texts}/cache"]
    own = ["--config.data.workers=0", "--config.train.steps=400", "--topology=1x2", "--submit=--time=30"]
    lines = {}

    def until(happens):
        deadline = time.monotonic() + 500
        while not happens():
            assert time.monotonic() < deadline
            time.sleep(0.5)

    def ends(run, requeued):
        """What SLURM says of a job at its end."""
        workdir = f"{tmp_path}/{run}"
        name = Job([], "1x2", slice_named("1x2", of_tpus=False), workdir).name
        assert call("launch", "slurm", SMOKE[0], *files, *own, f"--workdir={workdir}").code == 0
        job = ask("squeue", "-h", "-o", "%i", f"--name={name}").strip()
        metrics = tmp_path / run / "metrics.jsonl"
        if requeued:
            until(lambda: metrics.exists() and len(metrics.read_text().splitlines()) > 20)
            ask("scontrol", "requeue", job)
        until(lambda: not re.search("PENDING|RUNNING|COMPLETING", ask("scontrol", "show", "job", job)))
        lines[run] = metrics.read_text().splitlines()
        (ROOT / f"{name}.log").unlink()
        return ask("scontrol", "show", "job", job)

    assert "JobState=COMPLETED" in ends("through", requeued=False)
    said = ends("requeued", requeued=True)
    assert "JobState=COMPLETED" in said and "Restarts=1" in said
    through, requeued = (json.loads(lines[run][-1]) for run in ("through", "requeued"))
    assert through == requeued and through["step"] == 400
