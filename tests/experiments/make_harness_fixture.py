"""Makes fixtures/harness: a tiny OPT and a tiny GPT-2, and what the harness's own backend answers with them.

    python -m tests.experiments.make_harness_fixture [DIRECTORY]

Used with Python 3.11, torch 2.13.0 (CPU), transformers 5.24.0, lm_eval 0.4.13 with its extra `hf`. The models
are random (see tests/huggingface/make_pretrained_fixtures.py) with biases and norms that are not trivial.
Their tokenizers are byte-level BPE learned from the made-up questions of questions_data.py; as with the real
ones, OPT's puts `</s>` before every text and GPT-2's nothing.

expected.json: of every task in CASES[family] over the made-up questions, by its name and number of solved
examples, `scores` ({metric: value}), `likelihoods` ([ids of the context, ids of the continuation,
log-likelihood, whether it is greedy], windows of whole texts among them), `rolling` (log-likelihoods of whole
texts) and `generated` (texts). LIKELIEST: what `likeliest` asks.
"""

import json
import pathlib
import shutil
import sys
import tempfile

import numpy as np

from tests.experiments import questions_data

FIXTURE = pathlib.Path(__file__).parent / "fixtures" / "harness"
POSITIONS, VOCABULARY = 288, 400  # the harness's 256 new tokens leave 32 for a prompt

OPT = {"vocab_size": VOCABULARY, "max_position_embeddings": POSITIONS, "hidden_size": 16,
       "num_hidden_layers": 2, "num_attention_heads": 2, "ffn_dim": 40, "word_embed_proj_dim": 16,
       "bos_token_id": 2, "eos_token_id": 2, "pad_token_id": 1}  # fmt: skip
GPT2 = {"vocab_size": VOCABULARY, "n_positions": POSITIONS, "n_embd": 16, "n_layer": 2, "n_head": 2,
        "bos_token_id": 0, "eos_token_id": 0}  # fmt: skip

# family: (config class, its fields, seed, special tokens, the one that begins and ends a text). With these
# seeds some answers end at a stop string, and some at the most tokens there may be.
MODELS = {
    "opt": ("OPTConfig", OPT, 44, ["<s>", "<pad>", "</s>", "<unk>"], "</s>"),
    "gpt2": ("GPT2Config", GPT2, 8, ["<|endoftext|>"], "<|endoftext|>"),
}
WITH_EXAMPLES = (
    "arc_challenge", "arc_easy", "boolq", "commonsense_qa", "hellaswag", "nq_open", "openbookqa", "piqa",
    "squad", "webqs",
)  # fmt: skip
LIKELIEST = "likeliest"
# family: (task, number of examples)
CASES = {
    "opt": [(task, k) for task in (*WITH_EXAMPLES, "lambada_openai", "triviaqa", "wikitext2") for k in (0, 1)
            if k == 0 or task in WITH_EXAMPLES],
    "gpt2": [("arc_easy", 0), ("boolq", 1), ("lambada_openai", 0), ("triviaqa", 0), ("wikitext2", 0)],
}  # fmt: skip


def make(directory: pathlib.Path) -> None:
    """Writes both models, their tokenizers and expected.json."""
    shutil.rmtree(directory, ignore_errors=True)
    with tempfile.TemporaryDirectory() as folder:
        data = questions_data.write(pathlib.Path(folder) / "data")
        for family in MODELS:
            make_model(directory / family, *MODELS[family][:3])
            make_tokenizer(directory / family, *MODELS[family][3:])
            found = expected(directory / family, CASES[family], str(data), f"{folder}/cache")
            (directory / family / "expected.json").write_text(text_of(found))


def make_model(directory: pathlib.Path, config: str, fields: dict, seed: int) -> None:
    import transformers

    from tests.huggingface.make_pretrained_fixtures import fill

    model = transformers.AutoModelForCausalLM.from_config(getattr(transformers, config)(**fields)).eval()
    fill(model, np.random.default_rng(seed))
    model.save_pretrained(directory)
    (directory / "generation_config.json").unlink(missing_ok=True)


def make_tokenizer(directory: pathlib.Path, special: list[str], end: str) -> None:
    import tokenizers
    from tokenizers import pre_tokenizers, processors, trainers

    engine = tokenizers.Tokenizer(tokenizers.models.BPE())
    engine.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    engine.decoder = tokenizers.decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY, special_tokens=special, show_progress=False,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
    )  # fmt: skip
    engine.train_from_iterator([json.dumps(questions_data.FILES), questions_data.WHOLE], trainer)
    if end == "</s>":
        engine.post_processor = processors.TemplateProcessing(
            single=f"{end} $A", special_tokens=[(end, special.index(end))]
        )
    engine.save(str(directory / "tokenizer.json"), pretty=False)
    names = {"bos_token": end, "eos_token": end, "pad_token": "<pad>" if "<pad>" in special else end}
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False, **names}
    (directory / "tokenizer_config.json").write_text(json.dumps(config) + "\n")


def expected(directory: pathlib.Path, cases: list, data: str, cache: str) -> dict[str, dict]:
    """What lm_eval's backend `hf` answers to the requests of each case, by `named`."""
    import lm_eval
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    from experiments.lm_harness import task_files

    lm = recording(HFLM)(pretrained=str(directory), device="cpu", dtype="float32", batch_size=1)
    tasks = task_files.choose(sorted({task for task, _ in cases}))
    prepared = task_files.prepare(tasks, data, cache)
    manager = TaskManager(include_path=prepared, include_defaults=False)
    found = {}
    for task, shots in cases:
        lm.answers = {}
        figures = lm_eval.simple_evaluate(
            model=lm, tasks=[task], num_fewshot=shots, task_manager=manager, bootstrap_iters=0
        )["results"][task]
        scores = {key.split(",")[0]: value for key, value in figures.items() if isinstance(value, float)}
        found[named(task, shots)] = {"scores": scores, **lm.answers}
    lm.answers = {}
    lm.loglikelihood(likeliest(lm))
    found[LIKELIEST] = {"scores": {}, "likelihoods": lm.answers["likelihoods"]}
    return found


def likeliest(lm) -> list:
    """Requests whose answers are a whole first token of the model's own: some of them are greedy."""
    from lm_eval.api.instance import Instance

    prompts = [line.rstrip() for line in questions_data.WHOLE.splitlines()[:20]]
    limits = {"max_gen_toks": 1, "until": []}
    ask = [Instance("generate_until", {}, (prompt, limits), i) for i, prompt in enumerate(prompts)]
    answers = lm.generate_until(ask, disable_tqdm=True)
    whole = [pair for pair in zip(prompts, answers) if pair[1] and "\ufffd" not in pair[1]]
    return [Instance("loglikelihood", {}, pair, i) for i, pair in enumerate(whole)]


def named(task: str, shots: int) -> str:
    return f"{task} {shots}"


def recording(kind: type) -> type:
    """A model class of the harness that keeps what it is asked and what it answers, in `answers`."""

    class Recording(kind):
        answers: dict[str, list]

        def _loglikelihood_tokens(self, requests, *args, **options):
            found = super()._loglikelihood_tokens(requests, *args, **options)
            self.answers.setdefault("likelihoods", []).extend(
                [context, continuation, round(log_likelihood, 6), bool(is_greedy)]
                for (_, context, continuation), (log_likelihood, is_greedy) in zip(requests, found)
            )
            return found

        def loglikelihood_rolling(self, *args, **options):
            found = super().loglikelihood_rolling(*args, **options)
            self.answers["rolling"] = [float(one) for one in found]
            return found

        def generate_until(self, *args, **options):
            self.answers["generated"] = super().generate_until(*args, **options)
            return self.answers["generated"]

    return Recording


def text_of(found: dict) -> str:
    """JSON, a request a line."""
    text = json.dumps(found, separators=(",", ":"))
    return text.replace("],[[", "],\n[[").replace('},"', '},\n"') + "\n"


if __name__ == "__main__":
    make(pathlib.Path(sys.argv[1]) if sys.argv[1:] else FIXTURE)
