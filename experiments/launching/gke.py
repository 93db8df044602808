"""Slices of TPUs in a Kubernetes cluster of Google's: a JobSet, one pod a host."""

import json
import shlex

from experiments.launching.job import STOPPED, WRONG_INPUT, Job

TOOL = "kubectl"
ACCELERATORS = {"v5e": "tpu-v5-lite-podslice", "v5p": "tpu-v5p-slice", "v6e": "tpu-v6e-slice"}


def command(job: Job) -> list[str]:
    """The words of the tool, which reads what `text` returns."""
    return [TOOL, "apply", *job.submit, "-f", "-"]


def text(job: Job) -> str:
    """The JobSet.

    A run that was stopped and has saved ends with 143: its pod is made again and does not count, nor does a
    pod whose host is taken away. Wrong input, 2, ends the JobSet. Whatever else happens to a pod ends all of
    them, and all start again, `restarts` times.
    """
    quote = json.dumps
    queue = f"\n  labels: {{kueue.x-k8s.io/queue-name: {quote(job.queue)}}}" if job.queue else ""
    labels = [label.partition("=") for label in job.select]
    select = "".join(f"\n              {key}: {quote(value)}" for key, _, value in labels)
    words = "".join(f"\n              - {quote(word)}" for word in job.command())
    variables = [f"{{name: {name}, value: {quote(value)}}}" for name, value in job.environment().items()]
    mount = volume = ""
    if job.mount:
        claim, path = map(quote, job.mount)
        mount = f"\n              volumeMounts: [{{name: shared, mountPath: {path}}}]"
        volume = f"\n            volumes: [{{name: shared, persistentVolumeClaim: {{claimName: {claim}}}}}]"
    return f"""\
# By tools that make a JobSet of their own, where stops count as restarts:
# {shlex.join(gcluster(job))}
# {shlex.join(xpk(job))}
apiVersion: jobset.x-k8s.io/v1alpha2
kind: JobSet
metadata:
  name: {job.name}{queue}
  annotations:
    alpha.jobset.sigs.k8s.io/exclusive-topology: cloud.google.com/gke-nodepool  # a slice is one node pool
spec:
  ttlSecondsAfterFinished: 3600  # then the same name can be launched again
  failurePolicy:
    maxRestarts: {job.restarts}
    rules:
    - name: wrongInput
      action: FailJobSet
      onJobFailureReasons: [PodFailurePolicy]
  replicatedJobs:
  - name: slice
    replicas: 1
    template:
      spec:
        completionMode: Indexed
        parallelism: {job.slice.hosts}
        completions: {job.slice.hosts}
        backoffLimit: 0  # a failure that no rule knows ends all pods: the JobSet starts them again
        podFailurePolicy:
          rules:
          - action: FailJob  # wrong input
            onExitCodes: {{operator: In, values: [{WRONG_INPUT}]}}
          - action: Ignore  # stopped, and saved
            onExitCodes: {{operator: In, values: [{STOPPED}]}}
          - action: Ignore  # the host is taken away
            onPodConditions: [{{type: DisruptionTarget, status: "True"}}]
        template:
          spec:
            restartPolicy: Never
            terminationGracePeriodSeconds: {job.grace}
            shareProcessNamespace: true  # process 1 of a container would not hear SIGTERM while it starts
            nodeSelector:
              cloud.google.com/gke-tpu-accelerator: {ACCELERATORS[job.slice.chip]}
              cloud.google.com/gke-tpu-topology: {job.slice.topology.partition(":")[2]}{select}
            containers:
            - name: run
              image: {quote(job.image)}
              command:{words}
              env: [{", ".join(variables)}]
              resources:
                limits: {{google.com/tpu: {job.chips_each}}}{mount}{volume}
"""


def rented(job: Job) -> str:
    """What the slice is called where it is rented, e.g. v5litepod-16."""
    return job.topology.replace("v5e", "v5litepod")


def gcluster(job: Job) -> list[str]:
    """The line of Cluster Toolkit that submits the same."""
    mount = ["--mount", f"{':'.join(job.mount)}:rw"] if job.mount else []
    return [
        "gcluster", "job", "submit", "--name", job.name, "--compute-type", rented(job), "--topology",
        job.shape, "--image", job.image, "--restarts", str(job.restarts), "--restart-on-exit-codes",
        f"1,134,137,139,{STOPPED}", "--grace-period", f"{job.grace}s", *mount, "--command", _line(job),
    ]  # fmt: skip


def xpk(job: Job) -> list[str]:
    """The line of xpk, which Cluster Toolkit replaces; --cluster, --project and --zone are yours."""
    return [
        "xpk", "workload", "create", "--workload", job.name, "--tpu-type", rented(job), "--docker-image",
        job.image, "--max-restarts", str(job.restarts), "--termination-grace-period-seconds", str(job.grace),
        "--command", _line(job),
    ]  # fmt: skip


def _line(job: Job) -> str:
    variables = [f"{name}={value}" for name, value in job.environment().items()]
    return shlex.join(["env", *variables, *job.command()])
