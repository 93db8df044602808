"""Times how fast HellaSwag's rows are scored: by our adapter, and by the harness's own backend `hf`.

    python -m experiments.benchmark_scoring --task_data=data --tokenizer=gpt2-vocab.json,vocab.bpe
    python -m experiments.benchmark_scoring --rows=1000 --results=results/scoring_speed.jsonl ...

An OPT of random weights is written as a Hugging Face checkpoint, with its tokenizer, and loaded by both. The
harness makes the requests; only answering them is timed, tokenising included. The backend takes the fastest
of --hf_batches, tried on a tenth of the rows. Answers are compared first; then both take turns, and the ratio
is the median over turns. `cold` is our first time, compilation included. Needs the extra `eval`, torch
and transformers.
"""

import importlib.util
import json
import os
import statistics
import tempfile
import time
from pathlib import Path

import jax
import numpy as np
from absl import flags

from experiments.common import cli, path_flags
from experiments.common.loaded import Loaded
from experiments.lm_harness import questions, task_files
from experiments.reporting import record
from tree_ffn.data.tokenizers import FileTokenizer, load_tokenizer
from tree_ffn.errors import InputError, check_positive_int, is_whole_number
from tree_ffn.huggingface import pretrained
from tree_ffn.models import DenseSpec, ModelSpec, Transformer

_TASK_DATA = path_flags.define("task_data", None, "Folder with the rows of HellaSwag.")
_TASK_CACHE = path_flags.define("task_cache", "data_cache/tasks", "Where task data are kept unpacked.")
_TOKENIZER = path_flags.define_each("tokenizer", None, "OPT's vocabulary and merges, or files of their form.")
_ROWS = flags.DEFINE_integer("rows", 1000, "Rows of HellaSwag, four requests each.")
_WIDTH = flags.DEFINE_integer("width", 128, "Width of the model; heads have 64 of it at most.")
_LAYERS = flags.DEFINE_integer("layers", 2, "Its layers.")
_CONTEXT = flags.DEFINE_integer("context", 256, "Its positions.")
_TURNS = flags.DEFINE_integer("turns", 3, "How often each is timed.")
_BATCH_TOKENS = flags.DEFINE_integer("batch_tokens", 4096, "Tokens of a batch of ours.")
_HF_BATCHES = flags.DEFINE_list("hf_batches", ["1", "8", "32"], "Rows of a batch of theirs, tried first.")
_RESULTS = path_flags.define_written("results", None, "Append rows of table scoring_speed to this file.")

TOLERANCE = 1e-3  # nats of a whole continuation
ANSWERS = 4  # of a row of HellaSwag


def main() -> None:
    for flag in (_TASK_DATA, _TOKENIZER):
        if flag.value is None:
            raise InputError(f"--{flag.name} is missing; name files.")
    for flag in (_ROWS, _WIDTH, _LAYERS, _CONTEXT, _TURNS, _BATCH_TOKENS):
        check_positive_int(f"--{flag.name}", flag.value)
    if not _HF_BATCHES.value or not all(is_whole_number(word) and int(word) for word in _HF_BATCHES.value):
        raise InputError(f"--hf_batches: {','.join(_HF_BATCHES.value)!r} is not allowed; use whole numbers.")
    versions = hf_versions()
    requests, data_sha256 = hellaswag(_TASK_DATA.value, _TASK_CACHE.value, _ROWS.value)
    from experiments.lm_harness.answering import Answering
    from experiments.lm_harness.harness import HarnessModel

    with tempfile.TemporaryDirectory() as directory:
        model = write_model(directory, _TOKENIZER.value)
        ours = HarnessModel(model, Answering(model, _BATCH_TOKENS.value))
        theirs, batch_size = fastest(directory, requests[: max(ANSWERS, len(requests) // 10)])
    figures = compare(ours, theirs, requests, _TURNS.value)
    print(
        f"{_ROWS.value:,} rows of HellaSwag: ours {figures['rows_per_s']:.1f} rows/s "
        f"({figures['rows_per_s_cold']:.1f} the first time), hf backend {figures['hf_rows_per_s']:.1f} with "
        f"{batch_size} requests a batch; {figures['ratio_to_hf']:.2f} times as fast"
    )
    if _RESULTS.value:
        config = {
            "width": _WIDTH.value, "layers": _LAYERS.value, "context": _CONTEXT.value,
            "rows": _ROWS.value, "turns": _TURNS.value, "batch_tokens": _BATCH_TOKENS.value,
            "data_sha256": data_sha256, "hf_batch_size": batch_size,
            "cores": len(os.sched_getaffinity(0)), "hf": versions,
        }  # fmt: skip
        row = f"opt_d{_WIDTH.value}_L{_LAYERS.value}_hellaswag"
        rows = [
            record.make_row(
                "scoring_speed", row, metric, value, None, config, "1" if "ratio" in metric else "rows/s"
            )
            for metric, value in figures.items()
        ]
        record.append_rows(_RESULTS.value, rows)


def hf_versions() -> dict[str, str]:
    """Versions of what the backend is made of.

    Raises:
      InputError: some of it is not installed.
    """
    names = ("lm_eval", "torch", "transformers")
    for name in names:
        if importlib.util.find_spec(name) is None:
            raise InputError(
                f"the backend hf needs the package {name}; install lm_eval, torch and transformers."
            )
    return {name: importlib.import_module(name).__version__ for name in names}


def hellaswag(data: str, cache: str, n_rows: int) -> tuple[list, str]:
    """The harness's requests of the first rows without examples, and the sha256 of the data.

    Args:
      data: directory with the task's data.
      cache: directory that the harness may write to.
      n_rows: how many rows are asked.
    """
    if not os.path.isdir(data):
        raise InputError(f"--task_data: {data} is no directory.")
    [file] = task_files.choose(["hellaswag"])
    task = questions.task_manager([file], data, cache).load([file.name])["tasks"][file.name]
    if n_rows > len(task.eval_docs):
        raise InputError(f"--rows: {n_rows} is not allowed; there are {len(task.eval_docs)} rows.")
    task.set_config(key="num_fewshot", value=0)
    task.build_all_requests(limit=n_rows)
    return task.instances, task_files.data_sha256(file, cache)


def write_model(directory: str, files: str) -> Loaded:
    """A model of random weights, with its tokenizer, in Hugging Face's form; returned in ours."""
    tokenizer = load_tokenizer(files)
    if not isinstance(tokenizer, FileTokenizer):
        raise InputError(f"--tokenizer: {files!r} is not allowed; name files.")
    width, n_layers = _WIDTH.value, _LAYERS.value
    spec = ModelSpec(
        tokenizer.vocab_size, _CONTEXT.value, width, n_layers, max(1, width // 64),
        ffns=(DenseSpec(4 * width, activation="relu"),) * n_layers,
    )  # fmt: skip
    variables = jax.jit(Transformer(spec).init)(jax.random.key(0), np.zeros((1, spec.max_seq_len), np.int32))
    pretrained.save(directory, spec, variables, family="opt")
    end = tokenizer.engine.id_to_token(tokenizer.end_id)
    import tokenizers

    engine = tokenizers.Tokenizer.from_str(tokenizer.engine.to_str())
    engine.post_processor = tokenizers.processors.TemplateProcessing(
        single=f"{end} $A", special_tokens=[(end, tokenizer.end_id)]
    )
    engine.save(os.path.join(directory, "tokenizer.json"))
    names = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": end, "eos_token": end}
    Path(directory, "tokenizer_config.json").write_text(json.dumps({**names, "pad_token": end}))
    return Loaded(spec, variables, tokenizer, [tokenizer.end_id], {}, "opt")


def fastest(directory: str, requests: list):
    """The backend with the batch size that answers some requests soonest, and that size."""
    from lm_eval.models.huggingface import HFLM  # pyright: ignore[reportMissingImports]

    backend, times = HFLM(pretrained=directory, device="cpu", dtype="float32"), {}
    for size in map(int, _HF_BATCHES.value):
        backend.batch_size_per_gpu = size
        times[size] = seconds(backend, requests)[0]
    best = min(times, key=lambda size: times[size])
    backend.batch_size_per_gpu = best
    return backend, best


def seconds(lm, requests: list) -> tuple[float, list]:
    """How long a model takes to answer, and its answers."""
    started = time.perf_counter()
    answers = lm.loglikelihood(requests, disable_tqdm=True)
    return time.perf_counter() - started, answers


def compare(ours, theirs, requests: list, turns: int) -> dict[str, float]:
    """Rows a second of both, and the ratio.

    Args:
      ours: our adapter of the harness.
      theirs: the harness's own.
      requests: what both answer.
      turns: how often each is timed.

    Raises:
      RuntimeError: their answers differ.
    """
    cold, mine = seconds(ours, requests)
    times: dict[str, list[float]] = {"ours": [], "hf": []}
    for _ in range(turns):
        taken, answers = seconds(theirs, requests)
        times["hf"].append(taken)
        times["ours"].append(seconds(ours, requests)[0])
        worst = max(abs(a - b) for (a, _), (b, _) in zip(mine, answers, strict=True))
        if worst > TOLERANCE:
            raise RuntimeError(f"log-likelihoods differ by up to {worst:g} nats")
    n_rows = len(requests) / ANSWERS
    ratios = [hf / own for hf, own in zip(times["hf"], times["ours"])]
    return {
        "rows_per_s": n_rows / statistics.median(times["ours"]),
        "rows_per_s_cold": n_rows / cold,
        "hf_rows_per_s": n_rows / statistics.median(times["hf"]),
        "ratio_to_hf": statistics.median(ratios),
    }


if __name__ == "__main__":
    cli.run(main, prints=lambda: not _RESULTS.value)
