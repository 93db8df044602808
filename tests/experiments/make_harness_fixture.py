"""Makes fixtures/harness: a tiny OPT, and what the harness's own backend says of its answers.

    python -m tests.experiments.make_harness_fixture [DIRECTORY]

Used with Python 3.11, torch 2.13.0 (CPU), transformers 5.24.0, lm_eval 0.4.13 with its extra `hf`. The model
is random (see tests/models/make_pretrained_fixtures.py) with biases and norms that are not trivial; its
tokenizer has the 256 bytes and `</s>`. expected.json: for every request of the tasks over the made-up
questions of questions_data.py, token ids of context and continuation, log-likelihood, and whether it is
greedy; and the rolling log-likelihood of the whole text.
"""

import json
import pathlib
import shutil
import sys
import tempfile

import numpy as np

FIXTURE = pathlib.Path(__file__).parent / "fixtures" / "harness"
TASKS = ("arc_easy", "boolq", "lambada_openai", "piqa", "hellaswag", "webqs", "wikitext2")
SHOTS = {"arc_easy": 1, "boolq": 1, "hellaswag": 1}
OPT = {"vocab_size": 257, "max_position_embeddings": 96, "hidden_size": 16, "num_hidden_layers": 2,
       "num_attention_heads": 2, "ffn_dim": 40, "word_embed_proj_dim": 16, "bos_token_id": 256,
       "eos_token_id": 256, "pad_token_id": 256}  # fmt: skip


def make(directory: pathlib.Path) -> None:
    """Writes model, tokenizer and expected.json."""
    import tokenizers
    import transformers

    from tests.models.make_pretrained_fixtures import fill

    shutil.rmtree(directory, ignore_errors=True)
    model = transformers.AutoModelForCausalLM.from_config(transformers.OPTConfig(**OPT)).eval()
    fill(model, np.random.default_rng(7))
    model.save_pretrained(directory)
    (directory / "generation_config.json").unlink(missing_ok=True)
    letters = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {letter: i for i, letter in enumerate(letters)}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE(vocabulary, []))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    tokenizer.add_special_tokens(["</s>"])
    tokenizer.save(str(directory / "tokenizer.json"))
    names = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "</s>", "pad_token": "</s>"}
    (directory / "tokenizer_config.json").write_text(json.dumps(names))
    (directory / "expected.json").write_text(json.dumps(expected(directory), indent=0) + "\n")


def expected(directory: pathlib.Path) -> dict:
    """What lm_eval's backend `hf` answers to the requests of the tasks."""
    import lm_eval
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    from experiments import task_files
    from tests.experiments import questions_data

    asked = []

    class Recorder(HFLM):
        def _loglikelihood_tokens(self, requests, **options):
            found = super()._loglikelihood_tokens(requests, **options)
            for (_, context, continuation), (log_likelihood, is_greedy) in zip(requests, found, strict=True):
                asked.append([context, continuation, log_likelihood, bool(is_greedy)])
            return found

    lm = Recorder(pretrained=str(directory), device="cpu", dtype="float32", batch_size=1)
    with tempfile.TemporaryDirectory() as folder:
        data = questions_data.write(pathlib.Path(folder) / "data")
        tasks = task_files.choose(list(TASKS))
        prepared = task_files.prepare(tasks, str(data), f"{folder}/cache")
        manager = TaskManager(include_path=prepared, include_defaults=False)
        rolling = 0.0
        for task in tasks:
            shots = SHOTS.get(task.name, 0)
            found = lm_eval.simple_evaluate(
                model=lm, tasks=[task.name], num_fewshot=shots, task_manager=manager, bootstrap_iters=0
            )
            if task.name == "wikitext2":
                rolling = found["samples"][task.name][0]["resps"][0][0]
    return {"requests": asked, "rolling": float(rolling)}


if __name__ == "__main__":
    make(pathlib.Path(sys.argv[1]) if sys.argv[1:] else FIXTURE)
