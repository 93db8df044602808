"""The scores of a checkpoint: those of its own validation, and on other text."""

import dataclasses
import json
import math
import shutil

import jax
import numpy as np
import pytest

from experiments.reporting import texts as other_texts
from experiments.reporting.record import load_results
from tests.experiments.programs import call
from tests.training.tiny import tiny_config
from tree_ffn.conversion.calibration import ffn_inputs
from tree_ffn.data import CorpusSpec
from tree_ffn.errors import InputError, NotFinite
from tree_ffn.models import Transformer
from tree_ffn.training.evaluate import changed_fields, evaluate, other_corpus
from tree_ffn.training.loop import train
from tree_ffn.training.restore import restore_for_inference
from tree_ffn.training.sharding import make_mesh

USAGE = ("dead_leaves/", "leaf_entropy/", "constant_decisions/")


@pytest.fixture(scope="module", params=["leaf", "tree"])
def run(request, texts, tmp_path_factory):
    """(workdir, figures of its last validation, over the whole split)."""
    workdir = tmp_path_factory.mktemp("run")
    config = tiny_config(texts, kind=request.param, train__eval_batches=0)
    return workdir, train(config, str(workdir), log=lambda _: None, bar=False)


one_kind = pytest.mark.parametrize("run", ["leaf"], indirect=True)


def kind_of(run):
    return json.loads((run[0] / "config.json").read_text())["ffn"]["kind"]


def test_the_validation_split_scores_as_in_training(run, tmp_path):
    workdir, figures = run
    json_path, results = tmp_path / "figures.json", tmp_path / "results.jsonl"
    outcome = call(
        "evaluate", f"--workdir={workdir}", "--step=latest", "--batch_size=8", f"--json={json_path}",
        f"--results={results}", "--row=a_row",
    )  # fmt: skip
    assert outcome.code == 0, outcome.err
    found = json.loads(json_path.read_text())
    usage = [name for name in figures if name.startswith(USAGE)]
    assert {"dead_leaves/0", "dead_leaves/1", "leaf_entropy/0", "leaf_entropy/1"} <= set(usage)
    assert (
        ("constant_decisions/1" in usage) == ("constant decisions" in outcome.out) == (kind_of(run) == "tree")
    )
    for name in ("loss", "bits_per_byte", "active_share", *usage):
        np.testing.assert_allclose(found[name], figures[name], rtol=1e-5)
    for said in (
        "(valid), step 6 of",
        "nats a token",
        "layer 1",
        "leaf entropy",
        f"{found['loss']:.4f}",
    ):
        assert said in outcome.out
    rows = load_results(str(results))
    assert {row["metric"] for row in rows} >= {"val_loss", "bits_per_byte", "active_share"}
    assert {(row["table"], row["row"], row["seed"]) for row in rows} == {("cpu_small", "a_row", 0)}


@pytest.mark.parametrize(
    "run, split",
    [
        ("leaf", "valid"),
        *(
            pytest.param(*other, marks=pytest.mark.slow)
            for other in (("leaf", "all"), ("tree", "all"), ("tree", "valid"))
        ),
    ],
    indirect=["run"],
)  # fmt: skip
def test_figures_do_not_depend_on_the_batch_size(run, split):
    """The last batch is filled up with rows that count nowhere: for one device, and for four."""
    restored = restore_for_inference(str(run[0]), "latest")
    corpus = other_corpus(restored)
    rows = len(corpus.valid) + (len(corpus.train) if split == "all" else 0)
    four = restore_for_inference(str(run[0]), "latest", make_mesh(4, 1))
    found = [evaluate(restored, corpus, split, size) for size in (7, 500)] + [
        evaluate(four, corpus, split, 12)
    ]
    for figures in found:
        assert figures["tokens"] == rows * 32
        for name, value in figures.items():  # visits are counts, and equal
            np.testing.assert_allclose(value, found[0][name], rtol=1e-6, err_msg=name)


@one_kind
def test_it_watches_a_run_to_its_end(run, tmp_path):
    """Of a run that has come there, the last step is scored; flags that make no sense with it are refused."""
    asked = ("evaluate", f"--workdir={run[0]}", "--watch=1", "--batches=1")
    outcome = call(*asked)
    assert outcome.code == 0 and outcome.out.count(", step 6 of ") == 1, outcome.err
    for flag, value in (("step", "latest"), ("results", str(tmp_path / "rows.jsonl")), ("tasks", "all")):
        outcome = call(*asked, f"--{flag}={value}", "--row=dense")
        assert outcome.code == 2 and f"--{flag}: " in outcome.err and "--watch" in outcome.err, outcome.err
    outcome = call("evaluate", f"--workdir={tmp_path}", "--watch=1")
    assert outcome.code == 2 and "holds no run" in outcome.err


@one_kind
def test_other_text(run, tmp_path):
    (tmp_path / "a.txt").write_text("to be or not to be " * 500)
    (tmp_path / "b.txt").write_text("that is the question " * 500)
    outcome = call(
        "evaluate", f"--workdir={run[0]}", f"--files={tmp_path}/*.txt", f"--cache_dir={tmp_path}/cache",
        "--batch_size=8", f"--json={tmp_path}/figures.json",
    )  # fmt: skip
    assert outcome.code == 0, outcome.err
    found = json.loads((tmp_path / "figures.json").read_text())
    assert "(all)" in outcome.out
    # One token is one byte but for the ends of documents, so bits per byte are nearly loss / ln 2.
    assert found["bits_per_byte"] == pytest.approx(found["loss"] / math.log(2), rel=1e-3)
    assert found["tokens"] > 15_000


@one_kind
def test_a_field_of_jsonl_and_a_tokenizer_by_path(run, tmp_path):
    lines = [json.dumps({"text": "", "body": f"number {i} of many lines"}) for i in range(400)]
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    common = [f"--workdir={run[0]}", f"--files={tmp_path}/a.jsonl", f"--cache_dir={tmp_path}/cache"]
    outcome = call("evaluate", *common, "--text_field=body", "--tokenizer=bytes", "--batch_size=8")
    assert outcome.code == 0 and "(all)" in outcome.out, outcome.err
    outcome = call("evaluate", *common, "--text_field=title")
    assert outcome.code == 2 and "title" in outcome.err and outcome.err.count("\n") == 1


def test_text_that_has_changed_since_is_said(texts, tmp_path):
    copy = tmp_path / "texts"
    shutil.copytree(texts, copy, ignore=shutil.ignore_patterns("cache"))
    config = tiny_config(copy, kind="dense", ffn__width=14)  # as other tests train it
    train(config, str(tmp_path / "run"), log=lambda _: None, bar=False)
    said = "the text of the run has changed since it was trained"
    asked = ("evaluate", f"--workdir={tmp_path}/run", "--batch_size=8")
    assert said not in call(*asked).out
    (copy / "0.txt").write_text("other words " * 300)
    assert said in call(*asked).out
    outcome = call(*asked, f"--files={copy}/1.txt,{copy}/2.txt")
    assert said not in outcome.out and f"--files: the run was trained on {copy}/1.txt" in outcome.out
    outcome = call(*asked, f"--texts=held={copy}/1.txt")
    assert outcome.code == 0 and f"held: the run was trained on {copy}/1.txt" in outcome.out


@one_kind
def test_another_tokenizer_is_refused(run, tmp_path):
    tokenizers = pytest.importorskip("tokenizers")
    engine = tokenizers.Tokenizer(tokenizers.models.BPE({chr(c): c - 32 for c in range(32, 127)}, []))
    engine.add_special_tokens(["<|endoftext|>"])
    engine.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "a.txt").write_text("to be or not to be " * 500)
    outcome = call(
        "evaluate", f"--workdir={run[0]}", f"--files={tmp_path}/a.txt", f"--cache_dir={tmp_path}/cache",
        f"--tokenizer={tmp_path}/tokenizer.json",
    )  # fmt: skip
    assert outcome.code == 2 and outcome.err.count("\n") == 1
    assert "is not the tokenizer of the run" in outcome.err


@one_kind
def test_a_registered_data_set(run, tmp_path):
    pytest.importorskip("tensorflow_datasets")
    from tests.data.test_tfds_input import SmallSet, make

    records = [{"text": f"number {i} of many lines of text"} for i in range(400)]
    make(tmp_path, None, {"train": records, "validation": records[:100]})
    outcome = call(
        "evaluate", f"--workdir={run[0]}", f"--tfds_name={SmallSet.name}", f"--tfds_dir={tmp_path}/tfds",
        f"--cache_dir={tmp_path}/cache", "--batch_size=8",
    )  # fmt: skip
    assert outcome.code == 0 and "small_set (valid)" in outcome.out, outcome.err


@pytest.mark.parametrize(
    "arguments,said",
    [
        ([], "--workdir is missing"),
        (["--export=exported"], "--export: is scored by --tasks alone"),
        (["--workdir=nowhere"], "workdir: nowhere has no checkpoints"),
        (["--step=4"], "step: 4 has no checkpoint; use best, latest or one of"),
        (["--step=worst"], "step: 'worst' has no checkpoint"),
        (["--batch_size=0"], "batch_size: 0 is not allowed"),
        (["--batches=-1"], "batches: -1 is not allowed; use a whole number of at least 0"),
        ([f"--files={__file__}"], "data.valid_files. --texts=NAME=FILES scores a short text whole."),
        (["--batch_size=9"], "batch_size: 9 is not allowed; use a multiple of the 8 devices"),
        (["--files=/nowhere/*.txt"], "/nowhere"),
        (["--split=test"], "split"),
        (["--results=x"], "--row is missing"),
        (["--results=x", "--row=a/b"], "--row: 'a/b' is not allowed"),
        (["--files=a", "--tfds_name=b"], "data.tfds_name: 'b' needs data.corpus='tfds'"),
        (["--tokenizer=nowhere.json"], "data.tokenizer: "),
    ],
)
@one_kind
def test_wrong_input_is_one_sentence_and_exit_code_2(run, arguments, said):
    if arguments and not arguments[0].startswith("--workdir"):
        arguments = [f"--workdir={run[0]}", *arguments]
    outcome = call("evaluate", *arguments)
    assert outcome.code == 2 and outcome.err.count("\n") == 1 and said in outcome.err


@pytest.mark.parametrize(
    "known, changes, expected",
    [
        ({"files": "a", "valid_files": "b"}, {}, {"files": "a", "valid_files": "b"}),
        ({"files": "a", "valid_files": "b"}, {"files": "c"}, {"files": "c"}),
        ({"files": "a", "valid_files": "b"}, {"tfds_dir": "c"}, {"tfds_dir": "c"}),
        ({"files": "a", "valid_files": "b"}, {"corpus": "python_stdlib"}, {}),
        ({"tfds_dir": "a"}, {"files": "c"}, {"files": "c"}),
        ({"tfds_dir": "a"}, {"tfds_name": "c"}, {"tfds_name": "c"}),
        ({"tfds_dir": "a", "tfds_name": "b"}, {"tfds_dir": "c"}, {"tfds_dir": "c"}),
        ({}, {"files": "c", "text_field": "body"}, {"files": "c", "text_field": "body"}),
        # A run of an older version, which ignored these files.
        ({"corpus": "python_stdlib", "files": "a"}, {}, {}),
    ],
)
def test_another_corpus_has_nothing_left_of_the_runs(known, changes, expected):
    data = dataclasses.asdict(CorpusSpec() if "corpus" in known else CorpusSpec(**known)) | known
    assert CorpusSpec(**changed_fields(data, changes)) == CorpusSpec(**expected)


def test_two_other_corpora_at_once_are_refused():
    data = dataclasses.asdict(CorpusSpec())
    with pytest.raises(InputError, match=r"^data\.tfds_dir: 'b' needs data\.corpus='tfds'"):
        CorpusSpec(**changed_fields(data, {"files": "a", "tfds_dir": "b"}))


@one_kind
def test_texts_are_scored_whole(run, texts, tmp_path):
    """Every token once, windows of the context one after the other, against a plain loop."""
    workdir, _ = run
    files = sorted(texts.glob("[0-2].txt"))
    results, json_path = tmp_path / "rows.jsonl", tmp_path / "figures.json"
    outcome = call(
        "evaluate", f"--workdir={workdir}", "--step=latest", "--batch_size=8",
        f"--texts=some={texts}/[0-2].txt,all={texts}/*.txt",
        f"--results={results}", "--row=a_row", f"--json={json_path}",
    )  # fmt: skip
    assert outcome.code == 0, outcome.err
    found = json.loads(json_path.read_text())["some"]

    restored = restore_for_inference(str(workdir), "latest")
    context, end = restored.model.max_seq_len, 256
    documents = [list(path.read_bytes()) for path in files]
    stream = [end] + [token for document in documents for token in [*document, end]]
    apply = jax.jit(lambda tokens: Transformer(restored.model).apply(restored.variables, tokens)[0])
    nats = 0.0
    for start in range(0, len(stream) - 1, context):
        window = stream[start : start + context + 1]
        padded = np.array([window[:-1] + [end] * (context + 1 - len(window))], np.int32)
        logits = np.asarray(apply(padded), np.float64)[0]
        for position, target in enumerate(window[1:]):
            if target != end:
                nats += np.log(np.exp(logits[position]).sum()) - logits[position, target]
    contents = [path.read_bytes() for path in files]
    words = sum(len(text.split()) + text.count(b"\n") for text in contents)
    text = b"".join(contents)
    assert found["tokens"] == len(text) and found["words"] == words
    assert found["loss"] == pytest.approx(nats / len(text), rel=1e-5)
    assert found["bits_per_byte"] == pytest.approx(nats / len(text) / math.log(2), rel=1e-5)
    assert found["word_ppl"] == pytest.approx(math.exp(nats / words), rel=1e-4)
    rows = load_results(str(results))
    assert {row["metric"] for row in rows} == {
        f"{name}_{metric}"
        for name in ("some", "all")
        for metric in ("loss", "bits_per_byte", "nats_per_word", "word_ppl")
    }
    assert all(len(row["config"]["scored"]["sha256"]) == 64 for row in rows)


@one_kind
@pytest.mark.parametrize("given", ["novels", "a=", "=x.txt", "A b=x.txt", "a=*.txt,a=*.txt"])
def test_texts_need_names(run, given):
    outcome = call("evaluate", f"--workdir={run[0]}", f"--texts={given}")
    assert outcome.code == 2 and ("--texts: " in outcome.err or "matches no file" in outcome.err)
    assert len(outcome.err.strip().splitlines()) == 1


@one_kind
def test_a_loss_that_is_no_number_is_no_figure(run, tmp_path):
    restored = restore_for_inference(str(run[0]), "latest", make_mesh(1, 1))
    restored.variables["params"]["embed"]["tokens"] *= np.float32(1e30)
    with pytest.raises(
        NotFinite, match="^loss on texts[0-9] \\(valid\\): the model's scores are NaN or infinite"
    ):
        evaluate(restored, other_corpus(restored), "valid", 8)
    path = tmp_path / "some.txt"
    path.write_text("some words\n" * 40)
    with pytest.raises(NotFinite, match="^inputs of layer 0 on the calibration text: "):
        ffn_inputs(restored, [other_corpus(restored).valid], 20, batch_size=4)
    results = tmp_path / "results.jsonl"
    with pytest.raises(NotFinite, match="^some: loss in windows 0 to 3 of the text"):
        other_texts.score(restored, {"some": str(path)}, batch_size=4, results=str(results), row="a")
    assert not results.exists()
