"""Data sets that TFDS prepared: tokens in place, text, and what is refused."""

import shutil
from pathlib import Path

import numpy as np
import pytest

from tree_ffn.data import CorpusSpec, prepare
from tree_ffn.errors import InputError

tfds = pytest.importorskip("tensorflow_datasets")
pytest.importorskip("array_record")

SILENT = lambda line: None
VOCAB = 257


class SmallSet(tfds.core.GeneratorBasedBuilder):
    """A data set in memory: `splits` maps names to lists of records."""

    VERSION = tfds.core.Version("1.0.0")
    # Where the class is defined. TFDS would look that up with a package it does not require (datasets#11212),
    # and needs it for checksum files only, of which there are none.
    code_path = None

    def __init__(self, *, features=None, splits=None, **kwargs):
        self.given = (
            features or {"text": tfds.features.Text()},
            splits or {"train": [{"text": "some text"}] * 50},
        )
        super().__init__(**kwargs)

    def _info(self):
        features = tfds.features.FeaturesDict(self.given[0])
        return tfds.core.DatasetInfo(builder=self, features=features, disable_shuffling=True)

    def _split_generators(self, dl_manager):
        return {name: list(enumerate(records)) for name, records in self.given[1].items()}

    def _generate_examples(self):
        raise AssertionError("the splits are given")


def make(directory: Path, features, splits, file_format="array_record") -> str:
    """Prepares a data set and returns its directory."""
    builder = SmallSet(
        features=features, splits=splits, data_dir=str(directory / "tfds"), file_format=file_format
    )
    tfds.display_progress_bar(enable=False)
    builder.download_and_prepare()
    return str(builder.data_dir)


def token_set(directory: Path, rows: np.ndarray, **splits) -> str:
    feature = tfds.features.Tensor(shape=rows.shape[1:], dtype=rows.dtype, encoding="bytes")
    named = {"train": rows, **splits}
    records = {name: [{"tokens": row} for row in split] for name, split in named.items()}
    return make(directory, {"tokens": feature}, records)


def spec_of(directory: Path, tfds_dir: str = "", **fields) -> CorpusSpec:
    fields = {"cache_dir": f"{directory}/cache", "valid_share": 0.25, **fields}
    return CorpusSpec(corpus="tfds", tfds_dir=tfds_dir, **fields)


def all_rows(source) -> np.ndarray:
    return source.rows(np.arange(len(source)))


@pytest.fixture
def rows() -> np.ndarray:
    return np.random.default_rng(0).integers(0, VOCAB, (40, 9)).astype(np.uint16)


def test_tokens_are_used_in_place(tmp_path, rows):
    corpus = prepare(spec_of(tmp_path, token_set(tmp_path, rows)), 9, SILENT)
    assert (all_rows(corpus.train) == rows[:30]).all() and (all_rows(corpus.valid) == rows[30:]).all()
    assert corpus.meta["format"] == "tfds" and corpus.meta["corpus"] == "small_set"
    targets = rows[30:, 1:].reshape(-1)
    assert corpus.meta["splits"]["valid"]["tokens"] == len(targets)
    assert sorted(path.name for path in corpus.directory.iterdir()) == ["SHA256SUMS", "meta.json"]
    assert str(tmp_path) not in (corpus.directory / "meta.json").read_text()


@pytest.mark.parametrize("name", ["valid", "validation"])
def test_a_validation_split_is_used(tmp_path, rows, name):
    corpus = prepare(spec_of(tmp_path, token_set(tmp_path, rows, **{name: rows[:5]})), 9, SILENT)
    assert len(corpus.train) == 40 and (all_rows(corpus.valid) == rows[:5]).all()


def test_a_large_split_stays_on_disk(tmp_path, rows, monkeypatch):
    directory = token_set(tmp_path, rows)
    whole = prepare(spec_of(tmp_path, directory), 9, SILENT)
    monkeypatch.setattr("tree_ffn.data.tfds_input.IN_MEMORY_RECORDS", 10)
    corpus = prepare(spec_of(tmp_path, directory), 9, SILENT)
    assert type(corpus.train) is not type(whole.train)
    for numbers in ([3, 1, 29], [0], [5, 5]):
        assert (corpus.valid.rows(np.array([2])) == rows[32:33]).all()
        assert (corpus.train.rows(np.array(numbers)) == whole.train.rows(np.array(numbers))).all()


def test_plain_int_features_serve_too(tmp_path, rows):
    feature = tfds.features.Sequence(np.int64, length=9)
    directory = make(tmp_path, {"tokens": feature}, {"train": [{"tokens": row.tolist()} for row in rows]})
    assert (all_rows(prepare(spec_of(tmp_path, directory), 9, SILENT).train) == rows[:30]).all()


@pytest.mark.parametrize("field", ["text", "body"])
def test_text_is_tokenised(tmp_path, field):
    texts = [f"Text {i} é\n" for i in range(40)]
    records = {
        "train": [{field: text} for text in texts[:30]],
        "validation": [
            {field: f"{texts[30]}<|endoftext|>\n{texts[31]}"},
            *({field: text} for text in texts[32:]),
        ],
    }
    directory = make(tmp_path, {field: tfds.features.Text()}, records)
    corpus = prepare(spec_of(tmp_path, directory, text_field=field), 9, SILENT)
    assert corpus.meta["documents"] == 40
    for source, part in ((corpus.train, texts[:30]), (corpus.valid, texts[30:])):
        stream = [token for text in part for token in [*text.encode(), 256]]
        assert all_rows(source)[:, :-1].reshape(-1).tolist() == stream[: len(source) * 8]


def test_rows_of_unequal_length_or_no_numbers(tmp_path):
    ragged = [{"tokens": list(range(4 + i % 2))} for i in range(20)]
    directory = make(tmp_path, {"tokens": tfds.features.Sequence(np.int64)}, {"train": ragged})
    with pytest.raises(InputError, match="tokens are needed"):
        prepare(spec_of(tmp_path, directory), 5, SILENT)
    words = {"train": [{"tokens": f"word {i}"} for i in range(20)]}
    directory = make(tmp_path / "words", {"tokens": tfds.features.Text()}, words)
    with pytest.raises(InputError, match="tokens are needed"):
        prepare(spec_of(tmp_path, directory), 5, SILENT)


def test_rows_of_another_length(tmp_path, rows):
    with pytest.raises(InputError, match=r"shape \(9,\) do not fit; model\.max_seq_len \+ 1 = 17 tokens"):
        prepare(spec_of(tmp_path, token_set(tmp_path, rows)), 17, SILENT)


def test_ids_beyond_the_vocabulary(tmp_path, rows):
    rows[20, 3] = VOCAB
    with pytest.raises(InputError, match=r"token id 257 is not allowed; the vocabulary has 0 to 256\."):
        prepare(spec_of(tmp_path, token_set(tmp_path, rows)), 9, SILENT)
    assert not list((tmp_path / "cache").glob("*/meta.json"))


@pytest.mark.parametrize(
    "damage",
    [
        lambda path: path.write_bytes(path.read_bytes()[:70_000]),
        lambda path: path.write_bytes(b"foreign" * 20_000),
        lambda path: path.write_bytes(b""),
        lambda path: path.with_name("features.json").write_text('{"a": 1}'),
        lambda path: path.with_name("dataset_info.json").write_text("{"),
        lambda path: path.with_name("dataset_info.json").unlink(),
    ],
)
def test_damaged_or_foreign_files_get_one_sentence(tmp_path, damage):
    rows = np.random.default_rng(0).integers(0, VOCAB, (4000, 33)).astype(np.uint16)
    directory = Path(token_set(tmp_path, rows))
    (path,) = directory.glob("*train*")
    assert path.stat().st_size > 70_000
    damage(path)
    with pytest.raises(InputError, match=rf"^data\.tfds_dir: .*{directory.name}") as error:
        prepare(spec_of(tmp_path, str(directory)), 33, SILENT)
    assert "\n" not in str(error.value)


def test_neither_tokens_nor_text(tmp_path):
    directory = make(tmp_path, {"label": tfds.features.Scalar(np.int64)}, {"train": [{"label": 1}]})
    with pytest.raises(
        InputError, match=r"^data\.text_field: 'text' is no feature of the data set; use one of: label\."
    ):
        prepare(spec_of(tmp_path, directory), 9, SILENT)


def test_names(tmp_path):
    directory = make(
        tmp_path, {"text": tfds.features.Text()}, {"train": [{"text": f"some text {i}"} for i in range(50)]}
    )
    by_directory = prepare(spec_of(tmp_path, directory), 9, SILENT)
    by_name = prepare(spec_of(tmp_path, f"{tmp_path}/tfds", tfds_name="small_set"), 9, SILENT)
    assert by_name.directory == by_directory.directory
    shutil.rmtree(tmp_path / "tfds")
    with pytest.raises(
        InputError, match=r"small_set: is not prepared under .*run python -m experiments\.prepare_data"
    ):
        prepare(spec_of(tmp_path, f"{tmp_path}/tfds", tfds_name="small_set"), 9, SILENT)
    with pytest.raises(InputError, match=r"^data\.tfds_name: 'no_such_set' cannot be found"):
        prepare(spec_of(tmp_path, f"{tmp_path}/tfds", tfds_name="no_such_set"), 9, SILENT)
