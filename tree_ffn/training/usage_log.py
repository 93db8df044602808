"""What a run keeps of how its trees are used: enough for any later plot, in few bytes.

Files usage/STEP.SPLIT.npz hold, for every run of layers that routes, arrays [layers, ...], called
FIRST_LAYER/NAME by the first layer of the run.

At every validation, split "train", over the steps since the last one:

    visits    int32 [layers, P, 2^D]      of leaves (a node's are sums of them); of experts [layers, 1, X]

At every validation, split "valid":

    visits    int32 [layers, P, 2^D]      over the validation batches
    moved     float32 [layers, P, D + 1]  share of the first batch's tokens that reach another node of a level
                                          than at the validation before
    gradient, peak, working               see `probe.probe`; where `train.probe` is on
"""

import glob
import os

import jax
import jax.numpy as jnp
import numpy as np

from tree_ffn.models.spec import ModelSpec
from tree_ffn.paths import replacing, writing
from tree_ffn.training.compiled import Score
from tree_ffn.training.metrics import moved_metrics, probe_metrics, usage_metrics
from tree_ffn.tree import TreeSpec
from tree_ffn.tree.usage import moved

LEAVES, USAGE = "probe_leaves.npz", "usage"


def usage_files(workdir: str) -> list[tuple[str, int, str]]:
    """(path, step, split) of every file of usage in a workdir, by steps; none where it has none.

    Example:
      >>> usage_files("nowhere")
      []
    """
    paths = sorted(glob.glob(os.path.join(glob.escape(workdir), USAGE, "*.*.npz")))
    names = [os.path.basename(path).split(".") for path in paths]
    return [(path, int(step), split) for path, (step, split, _) in zip(paths, names) if step.isdecimal()]


class UsageLog:
    """Sums visits, remembers the leaves of the first validation batch, and writes both.

    Args:
      workdir: directory of the run; `LEAVES` in it holds what the next
        validation is compared with, so that a resumed run says the same.
      model: the model.
      step: finished steps when the run starts or resumes; files of later steps, of an interrupted run, are
        removed, so that every step is there once.
      writes: False: reads and computes the same, and changes no file.

    Attributes:
      forgot: the leaves of the last validation are not known; `remember` can mend that.
    """

    def __init__(self, workdir: str, model: ModelSpec, step: int, writes: bool = True):
        self._path, self._model, self._writes = os.path.join(workdir, LEAVES), model, writes
        self._directory = os.path.join(workdir, USAGE)
        for path, of_step, _ in usage_files(workdir):
            if of_step > step and writes:
                with writing(path):
                    os.remove(path)
        self._visits = None
        self._leaves = _read_leaves(self._path, step)
        # Killed after a validation whose checkpoint was not whole: the state that goes on is older.
        self.forgot = step > 0 and self._leaves is None
        lengths = [0, *(length for _, length in model.runs)]
        self._first_layers = np.cumsum(lengths)[:-1].tolist()

    def train(self, usage: tuple) -> None:
        """Adds the visits of a window of training steps, as `step.empty_usage`."""
        if self._visits is None:
            self._visits = usage
        else:
            self._visits = jax.tree.map(np.add, self._visits, usage)

    def flush(self, step: int) -> None:
        """Writes the visits of training since the last call."""
        if self._visits is not None:
            self._write(step, "train", [_only(visits=counts) for counts in self._visits])
        self._visits = None

    def valid(self, step: int, score: Score, probed: tuple | None, write: bool) -> dict[str, float]:
        """Keeps a validation; its metrics, keyed `name/<layer>`.

        Args:
          step: finished steps.
          score: of the validation.
          probed: of `probe.probe`, on the first batch; None where it is off.
          write: False leaves files and memory as they are; nothing is said then on what changed.
        """
        metrics = usage_metrics(score.usage, self._model)
        runs = [_only(visits=counts) for counts in score.usage]
        leaves = self._of_trees(score.leaves)
        if write and self._leaves and leaves:
            ways = [self._moved(i, leaves, self._leaves) for i in range(len(runs))]
            metrics |= moved_metrics(ways, self._model)
            runs = [run | _only(moved=way) for run, way in zip(runs, ways)]
        if probed is not None:
            metrics |= probe_metrics(probed, self._model)
            runs = [run | _halved(found) for run, found in zip(runs, jax.device_get(probed))]
        if write:
            self.flush(step)
            self._write(step, "valid", runs)
            self._leaves = leaves
            if leaves and self._writes:
                with replacing(self._path, "wb") as file:
                    np.savez_compressed(file, step=step, **leaves)
        return metrics

    def remember(self, score: Score) -> None:
        """Takes a score of the first validation batch by the weights of the last validation."""
        self._leaves, self.forgot = self._of_trees(score.leaves), False

    def _of_trees(self, leaves) -> dict[str, np.ndarray]:
        """{number of the run: leaves} of the runs of trees, in the smallest type that holds them."""
        small = lambda leaf: leaf.astype(np.min_scalar_type(int(leaf.max(initial=0))))
        runs = enumerate(zip(self._model.runs, leaves))
        return {str(i): small(leaf) for i, ((ffn, _), leaf) in runs if isinstance(ffn, TreeSpec)}

    def _moved(self, run: int, leaves: dict, known: dict) -> np.ndarray | None:
        ffn, _ = self._model.runs[run]
        if not isinstance(ffn, TreeSpec):
            return None
        now, before = (jnp.asarray(a[str(run)], jnp.int32) for a in (leaves, known))
        return np.asarray(jax.vmap(lambda a, b: moved(a, b, ffn.shape.depth))(now, before))

    def _write(self, step: int, split: str, runs: list[dict]) -> None:
        named = zip(self._first_layers, runs)
        arrays = {f"{first}/{name}": array for first, run in named for name, array in run.items()}
        if not (arrays and self._writes):
            return
        path = os.path.join(self._directory, f"{step:09d}.{split}.npz")
        with writing(path):
            os.makedirs(self._directory, exist_ok=True)
        with replacing(path, "wb") as file:
            np.savez_compressed(file, **arrays)


def _only(**arrays) -> dict:
    return {name: np.asarray(array) for name, array in arrays.items() if array is not None}


def _halved(found: dict | None) -> dict:
    """A run's probe for the file: 16 bits say enough of activations and shares; gradients may be smaller."""
    if found is None:
        return {}
    half = {name: found[name].clip(max=np.finfo(np.float16).max) for name in ("peak", "working")}
    return {**found, **{name: array.astype(np.float16) for name, array in half.items()}}


def _read_leaves(path: str, step: int) -> dict | None:
    """Leaves of the last validation before `step`; None where they are not known."""
    try:
        with np.load(path) as file:
            arrays = dict(file)
    except (OSError, ValueError, KeyError):  # not there, or torn: the next validation says nothing on change
        return None
    return arrays if int(arrays.pop("step")) <= step else None
