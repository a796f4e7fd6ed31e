"""Corpora of `datasets` and `tensorflow-datasets`, both from local folders."""

import json
import os
import shutil
import sys

import datasets
import pytest
from array_record.python import array_record_module

from larimar_jax.data import corpus, libraries


def _documents(name):
    return [(d.title, d.text) for d in corpus.open_corpus(name).documents()]


def test_a_saved_dataset_with_titles_and_one_without(tmp_path):
    rows = {"body": ["One.", " ", "Two."], "title": ["A", "B", ""]}
    datasets.DatasetDict(train=datasets.Dataset.from_dict(rows)).save_to_disk(tmp_path / "titled")
    assert _documents(f"hf:{tmp_path}/titled:train#body") == [("A", "One."), ("Two.", "Two.")]
    datasets.Dataset.from_dict({"text": ["Three."]}).save_to_disk(tmp_path / "bare")
    assert _documents(f"hf:{tmp_path}/bare:train") == [("Three.", "Three.")]


def test_files_that_datasets_reads(tmp_path):
    (tmp_path / "rows.jsonl").write_text(json.dumps({"text": "One."}) + "\n")
    assert _documents(f"hf:{tmp_path}:train") == [("One.", "One.")]


@pytest.mark.parametrize("suffix", ["parquet", "jsonl", "csv"])
def test_a_single_file_and_a_slice_of_it(tmp_path, suffix):
    rows = datasets.Dataset.from_dict({"text": ["One.", "Two.", "Three.", "Four."]})
    write = dict(parquet=rows.to_parquet, jsonl=rows.to_json, csv=rows.to_csv)[suffix]
    write(str(tmp_path / f"rows.{suffix}"))
    assert len(_documents(f"hf:{tmp_path}/rows.{suffix}:train")) == 4
    assert _documents(f"hf:{tmp_path}/rows.{suffix}:train[:50%]") == [("One.",) * 2, ("Two.",) * 2]
    assert len(_documents(f"hf:{tmp_path}/rows.{suffix}:train[:1]+train[-1:]#text")) == 2


def test_an_identity_is_of_the_column_the_split_and_the_content_alone(tmp_path):
    def identity(place):
        return corpus.open_corpus(f"hf:{place}").identity

    path = tmp_path / "a" / "rows.jsonl"
    path.parent.mkdir()
    path.write_text(json.dumps({"text": "One.", "body": "Two."}) + "\n")
    first = identity(f"{path}:train")
    os.utime(path, (1, 1))
    (tmp_path / "b").mkdir()
    shutil.copy(path, tmp_path / "b")
    # Hosts hold copies, in other folders and of another time, and have to agree.
    assert first == identity(f"{path}:train#text") == identity(f"{tmp_path}/b/rows.jsonl:train")
    others = {identity(f"{path}:train#body"), identity(f"{path}:train[:1]")}
    path.write_text(json.dumps({"text": "Other."}) + "\n")
    assert len({first, *others, identity(f"{path}:train")}) == 4


def test_rows_without_text_are_passed_over_and_rows_of_no_text_named(tmp_path):
    def saved(name, values):
        datasets.Dataset.from_dict({"text": values}).save_to_disk(tmp_path / name)
        return _documents(f"hf:{tmp_path}/{name}:train")

    assert saved("gaps", [None, "One.", "", None]) == [("One.", "One.")]
    with pytest.raises(libraries.CorpusError, match="row 1 is not UTF-8"):
        saved("bytes", [b"fine", b"\xff"])
    with pytest.raises(libraries.CorpusError, match="row 0 holds no text but a int"):
        saved("numbers", [1, 2])


# As `wikitext` on the hub gives it: headings between blank rows, lines of text together.
WIKITEXT = [
    "", " = Robert <unk> = \n", "", " He was an actor . \n", " = 1 + 1 = \n", " So he said . \n",
    "", " = = Life = = \n", "", " Born . \n", "", " = Homarus = \n", "", " A lobster . \n",
]  # fmt: skip


def test_wikitext_is_put_together_by_article(tmp_path):
    folder = tmp_path / "copy"
    datasets.Dataset.from_dict({"text": WIKITEXT}).save_to_disk(folder)
    articles = [
        ("Robert <unk>", "He was an actor .\n= 1 + 1 =\nSo he said .\nBorn ."),
        ("Homarus", "A lobster ."),
    ]
    assert _documents(f"hf:{folder}:train") == articles
    # In a slice that begins inside an article, whose title is not known.
    datasets.Dataset.from_dict({"text": WIKITEXT[9:]}).save_to_disk(tmp_path / "rest")
    assert _documents(f"hf:{tmp_path}/rest:train") == [("Born .", "Born ."), articles[1]]


def test_a_validation_split_is_held_out_as_a_whole(tmp_path):
    rows = datasets.Dataset.from_dict({"text": WIKITEXT})
    datasets.DatasetDict(train=rows, validation=rows).save_to_disk(tmp_path / "copy")
    training, validation = (
        corpus.open_corpus(f"hf:{tmp_path}/copy:{split}") for split in ("train", "validation")
    )
    assert [d.title for d in validation.side(held_out=True)] == ["Robert <unk>", "Homarus"]
    assert [d.title for d in training.side(held_out=False)] == ["Robert <unk>", "Homarus"]
    assert not list(validation.side(held_out=False)) and not list(training.side(held_out=True))
    assert training.identity != validation.identity


def test_other_rows_stay_apart_whatever_their_folder_is_called(tmp_path):
    datasets.Dataset.from_dict({"text": ["One.", "Two = 2"]}).save_to_disk(tmp_path / "wikitext")
    assert len(_documents(f"hf:{tmp_path}/wikitext:train")) == 2


def test_a_dataset_of_tensorflow_in_array_record(tmp_path):
    import tensorflow_datasets as tfds
    from tensorflow_datasets.core import example_serializer

    text = tfds.features.Text()
    features = tfds.features.FeaturesDict({"text": text, "title": text})
    folder = tmp_path / "tiny" / "1.0.0"
    folder.mkdir(parents=True)
    serializer = example_serializer.ExampleSerializer(features.get_serialized_info())
    writer = array_record_module.ArrayRecordWriter(
        str(folder / "tiny-train.array_record-00000-of-00001"), "group_size:1"
    )
    rows = [("A", "One."), ("B", "Two ü.")]
    for title, text in rows:
        example = features.encode_example({"text": text, "title": title})
        writer.write(serializer.serialize_example(example))
    writer.close()
    features.save_config(str(folder))
    path = "{DATASET}-{SPLIT}.{FILEFORMAT}-{SHARD_X_OF_Y}"
    split = dict(name="train", shardLengths=["2"], numBytes="10", filepathTemplate=path)
    info = dict(name="tiny", version="1.0.0", fileFormat="array_record", splits=[split])
    (folder / "dataset_info.json").write_text(json.dumps(info))
    assert _documents(f"tfds:{folder}:train") == rows
    assert [text for _, text in _documents(f"tfds:{folder}:train#title")] == ["A", "B"]
    identities = {corpus.open_corpus(f"tfds:{folder}:train{c}").identity for c in ("", "#title")}
    assert len(identities) == 2
    assert "tensorflow" not in sys.modules
    with pytest.raises(libraries.CorpusError, match="they have text, title"):
        corpus.open_corpus(f"tfds:{folder}:train#body")
    with pytest.raises(libraries.CorpusError, match="could not be opened"):
        corpus.open_corpus(f"tfds:{folder}:test")


@pytest.mark.parametrize("name", ["hf:folder", "hf::train", "tfds:wiki40b"])
def test_a_name_without_a_split_says_how_to_write_it(name):
    with pytest.raises(libraries.CorpusError, match="PATH:SPLIT#COLUMN"):
        corpus.open_corpus(name)


def test_a_column_that_is_not_there_is_named(tmp_path):
    datasets.Dataset.from_dict({"body": ["One."], "n": [1]}).save_to_disk(tmp_path / "d")
    with pytest.raises(libraries.CorpusError, match="no column 'text'; they have body, n"):
        corpus.open_corpus(f"hf:{tmp_path}/d:train")


def test_what_cannot_be_opened_says_why(tmp_path):
    with pytest.raises(libraries.CorpusError, match="could not be opened"):
        corpus.open_corpus(f"hf:{tmp_path}/nothing:train")
    rows = datasets.Dataset.from_dict({"text": ["One."]})
    datasets.DatasetDict(train=rows, test=rows).save_to_disk(tmp_path / "saved")
    for split in ("validation", "train[:1]"):
        with pytest.raises(libraries.CorpusError, match="saved with train, test"):
            corpus.open_corpus(f"hf:{tmp_path}/saved:{split}")
    (tmp_path / "cut.jsonl").write_text('{"text": "One."}\n{"text"')
    with pytest.raises(libraries.CorpusError, match="JSON parse error"):
        corpus.open_corpus(f"hf:{tmp_path}/cut.jsonl:train")
