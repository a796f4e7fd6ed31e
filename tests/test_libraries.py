"""Corpora of `datasets` and `tensorflow-datasets`, both from local folders."""

import json

import pytest
from array_record.python import array_record_module

from larimar_jax.data import corpus, libraries

datasets = pytest.importorskip("datasets")


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


def test_wikitext_is_put_together_by_article(tmp_path):
    lines = [" = Robert <unk> = \n", "", " He was an actor . \n", " = = Life = = \n", " Born . \n",
             "", " = Homarus = \n", " A lobster . \n"]
    folder = tmp_path / "wikitext-tiny"
    datasets.Dataset.from_dict({"text": lines}).save_to_disk(folder)
    assert _documents(f"hf:{folder}:train") == [
        ("Robert <unk>", "He was an actor .\nBorn ."),
        ("Homarus", "A lobster ."),
    ]


def test_a_dataset_of_tensorflow_in_array_record(tmp_path):
    import tensorflow_datasets as tfds
    from tensorflow_datasets.core import example_serializer

    features = tfds.features.FeaturesDict({"text": tfds.features.Text(), "title": tfds.features.Text()})
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
    info = {
        "name": "tiny",
        "version": "1.0.0",
        "fileFormat": "array_record",
        "splits": [{
            "name": "train", "shardLengths": ["2"], "numBytes": "10",
            "filepathTemplate": "{DATASET}-{SPLIT}.{FILEFORMAT}-{SHARD_X_OF_Y}",
        }],
    }
    (folder / "dataset_info.json").write_text(json.dumps(info))
    assert _documents(f"tfds:{folder}:train") == rows


@pytest.mark.parametrize("name", ["hf:folder", "hf::train", "tfds:wiki40b"])
def test_a_name_without_a_split_says_how_to_write_it(name):
    with pytest.raises(libraries.CorpusNameError, match="PATH:SPLIT#COLUMN"):
        corpus.open_corpus(name)


def test_a_column_that_is_not_there_is_named(tmp_path):
    datasets.Dataset.from_dict({"body": ["One."], "n": [1]}).save_to_disk(tmp_path / "d")
    for column in ("text", "n"):
        with pytest.raises(libraries.CorpusNameError, match="they have body, n"):
            corpus.open_corpus(f"hf:{tmp_path}/d:train#{column}")


def test_what_cannot_be_opened_says_what_the_library_said(monkeypatch, tmp_path):
    with pytest.raises(FileNotFoundError, match="could not be opened"):
        corpus.open_corpus(f"hf:{tmp_path}/nothing:train")
