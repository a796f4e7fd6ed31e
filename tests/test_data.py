"""Readers of the editing benchmarks, corpora, and episodes."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest

from larimar_jax.data import corpus, counterfact, episodes, zsre
from larimar_jax.data.records import MalformedRecord
from larimar_jax.weights import Tokenizer

SHARED = Path(__file__).parents[2] / "shared" / "data"

FLAT = {
    "case_id": 3,
    "prompt": "The tower stands in",
    "target_new": "Rome",
    "subject": "The tower",
    "ground_truth": "Paris",
    "rephrase_prompt": "One finds the tower in",
    "locality_prompt": "The palace stands in",
    "locality_ground_truth": "Paris",
}
ORIGINAL = {
    "case_id": 7,
    "requested_rewrite": {
        "prompt": "{} stands in",
        "subject": "The tower",
        "target_new": {"str": "Rome", "id": "Q1"},
        "target_true": {"str": "Paris", "id": "Q2"},
    },
    "paraphrase_prompts": ["A. The tower is in", "B. The tower is in"],
    "neighborhood_prompts": ["The palace stands in", "The bridge stands in"],
    "generation_prompts": ["The tower"],
}
MEND = {
    "subject": "Tower",
    "src": "Where is the Tower?",
    "pred": "Rome",
    "rephrase": "In what city is the Tower?",
    "alt": "Oslo",
    "answers": ["Paris", "City of Paris"],
    "loc": "nq question: who built the palace",
    "loc_ans": "Louis",
}
KNOWEDIT = {
    "subject": "Tower",
    "target_new": "Oslo",
    "prompt": "Where is the Tower?",
    "ground_truth": ["Paris"],
    "rephrase_prompt": "In what city is the Tower?",
    "locality": {"Relation_Specificity": [{"prompt": "It is made of", "ground_truth": ["iron"]}]},
    "portability": {"Reasoning": [{"prompt": "Its country is", "ground_truth": "Norway"}]},
}


def _file(folder: Path, *records, lines: bool = False) -> Path:
    path = folder / ("records.jsonl" if lines else "records.json")
    text = "\n".join(map(json.dumps, records)) if lines else json.dumps(records)
    path.write_text(text)
    return path


def test_counterfact_reads_both_schemas_from_json_and_jsonl(tmp_path):
    for lines in (False, True):
        flat, original = counterfact.load(_file(tmp_path, FLAT, ORIGINAL, lines=lines))
        assert (flat.case_id, flat.target_new, flat.target_true) == (3, "Rome", "Paris")
        assert flat.paraphrases == ("One finds the tower in",)
        assert flat.neighbourhood == ("The palace stands in",)
        assert original.prompt == "The tower stands in"
        assert len(original.paraphrases) == len(original.neighbourhood) == 2
        assert original.neighbourhood_targets == ("Paris", "Paris")
        assert original.generation == ("The tower",)
    assert len(counterfact.load(_file(tmp_path, FLAT, ORIGINAL), limit=1)) == 1
    with pytest.raises(dataclasses.FrozenInstanceError):
        flat.prompt = ""


def test_zsre_reads_both_schemas_by_their_own_protocol(tmp_path):
    mend, knowedit = zsre.load(_file(tmp_path, MEND, KNOWEDIT))
    assert (mend.target_new, mend.target_true) == ("Paris", "Oslo")
    assert mend.answers == ("Paris", "City of Paris")
    assert mend.neighbourhood == ("who built the palace?",)
    assert (knowedit.target_new, knowedit.target_true) == ("Oslo", "Paris")
    assert knowedit.neighbourhood_targets == ("iron",)
    assert knowedit.portability == (("Its country is", "Norway"),)
    answers = zsre.load(_file(tmp_path, MEND, KNOWEDIT), target="answer")
    assert [record.target_new for record in answers] == ["Paris", "Paris"]


@pytest.mark.parametrize(
    ("reader", "record", "change", "field"),
    [
        (counterfact, FLAT, {"target_new": None}, "target_new"),
        (counterfact, FLAT, {"subject": "  "}, "subject"),
        (counterfact, FLAT, {"case_id": "3"}, "case_id"),
        (counterfact, ORIGINAL, {"paraphrase_prompts": ["x", 4]}, r"paraphrase_prompts\[1\]"),
        (counterfact, ORIGINAL, {"requested_rewrite": {}}, "requested_rewrite.prompt"),
        (zsre, MEND, {"answers": []}, "answers"),
        (zsre, KNOWEDIT, {"locality": {"R": [{"prompt": "x"}]}}, r"locality.R\[0\].ground_truth"),
    ],
)
def test_a_malformed_record_is_named_by_file_index_and_field(
    tmp_path, reader, record, change, field
):
    path = _file(tmp_path, record, {**record, **change})
    with pytest.raises(MalformedRecord, match=rf"{path.name}, record 1: field '{field}'"):
        reader.load(path)


def test_files_that_hold_no_records_say_so(tmp_path):
    (tmp_path / "cut.json").write_text(json.dumps([FLAT])[:-20])
    with pytest.raises(MalformedRecord, match="not valid JSON at line 1"):
        counterfact.load(tmp_path / "cut.json")
    (tmp_path / "cut.jsonl").write_text(json.dumps(FLAT) + "\n{")
    with pytest.raises(MalformedRecord, match="record 1: not valid JSON"):
        counterfact.load(tmp_path / "cut.jsonl")
    (tmp_path / "empty.json").write_text("[]")
    with pytest.raises(MalformedRecord, match="no record"):
        counterfact.load(tmp_path / "empty.json")
    with pytest.raises(FileNotFoundError, match="no such file"):
        counterfact.load(tmp_path / "absent.json")


@pytest.mark.skipif(not SHARED.is_dir(), reason="the evaluation data is not beside this checkout")
@pytest.mark.parametrize(
    ("reader", "name", "records"),
    [
        (counterfact, "counterfact-edit.json", 300),
        (counterfact, "counterfact-original-schema.json", 10),
        (zsre, "zsre-mend.json", 300),
        (zsre, "zsre-knowedit.json", 300),
    ],
)
def test_the_real_files_are_read(reader, name, records):
    found = reader.load(SHARED / name, limit=300)
    assert len(found) == records
    assert all(record.paraphrases for record in found)
    assert all(len(r.neighbourhood) == len(r.neighbourhood_targets) for r in found)


def test_sentences_end_where_people_would_end_them():
    text = (
        'J. Smith, Jr. of the U.S. Army met Dr. Who at 5 p.m. on Jan. 3. "It rained." '
        "He left (St. Paul is far). Did he? Yes! 2001 was later, e.g. in Rome."
    )
    assert corpus.sentences(text) == [
        "J. Smith, Jr. of the U.S. Army met Dr. Who at 5 p.m. on Jan. 3.",
        '"It rained."',
        "He left (St. Paul is far).",
        "Did he?",
        "Yes!",
        "2001 was later, e.g. in Rome.",
    ]
    assert corpus.sentences("  ") == []


def test_chunks_hold_whole_words_and_no_more_tokens_than_asked():
    words = "one two three four five six seven unbelievably eight".split()
    found = corpus.chunks(" ".join(words), 10, lambda text: len(text.strip()))
    assert all(len(chunk.replace(" ", "")) <= 10 for chunk in found)
    assert " ".join(found).split() == [word for word in words if len(word) <= 10]


def test_corpora_come_by_name_and_by_path(tmp_path):
    (tmp_path / "a.txt").write_text("First one.\nStill first.\n\n\nSecond.")
    assert [d.text for d in corpus.documents(str(tmp_path / "a.txt"))] == [
        "First one. Still first.",
        "Second.",
    ]
    (tmp_path / "a.jsonl").write_text('{"text": "One.", "title": "A"}\n{"text": "Two."}\n')
    assert [d.title for d in corpus.documents(str(tmp_path / "a.jsonl"))] == ["A", "Two."]
    (tmp_path / "b.jsonl").write_text('{"text": "One."}\n{"title": "A"}\n')
    with pytest.raises(MalformedRecord, match=r"b.jsonl, record 1: field 'text'"):
        corpus.documents(str(tmp_path / "b.jsonl"))
    with pytest.raises(FileNotFoundError, match="wikipedia-summaries"):
        corpus.documents("wikipedia")
    with pytest.raises(ValueError, match="sentence, chunk"):
        corpus.pieces([], "word", 4, len)


def test_wikipedia_summaries_split_by_title():
    documents = corpus.documents("wikipedia-summaries")
    held_out = [d.title for d in documents if d.held_out]
    assert len(documents) == 10_033
    assert 0.03 < len(held_out) / len(documents) < 0.05
    # Pinned: a split that moves would leak held-out text into runs that go on.
    assert held_out[:3] == ["Actor", "Alternative rock", "Ancient Egyptian literature"]


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.train(["the cat sat on the mat and the dog ran after the cat"] * 3, 280)


def test_pieces_are_framed_and_too_long_ones_dropped(tokenizer):
    texts = ["the cat", "the mat and the dog", "zebra quickly jumped over lazy foxes again"]
    pieces, dropped = episodes.tokenise(texts, tokenizer.framed(), tokenizer, 24, 16)
    assert (len(pieces), dropped) == (2, 1)
    for row, text in enumerate(texts[:2]):
        ids = tokenizer.ids(text)
        real = pieces.decoder_tokens[row][pieces.decoder_mask[row]].tolist()
        assert real == [tokenizer.bos, *ids, tokenizer.eos]
        assert pieces.decoder_mask[row].sum() == len(ids) + 2
        assert (pieces.decoder_tokens[row][len(ids) + 2 :] == tokenizer.pad).all()
        seen = pieces.encoder_tokens[row][pieces.encoder_mask[row]].tolist()
        assert seen == [tokenizer.bos, *ids, tokenizer.eos]
    with pytest.raises(episodes.TooFewPieces):
        episodes.tokenise([], tokenizer, tokenizer, 16, 16)


def _numbered(count: int) -> episodes.Pieces:
    """Pieces whose tokens are their own number."""
    tokens = np.repeat(np.arange(count, dtype=np.int32)[:, None], 3, axis=1)
    mask = np.ones((count, 3), bool)
    return episodes.Pieces(tokens, mask, tokens, mask)


def _rows(batch) -> np.ndarray:
    return batch["encoder_tokens"][:, :, 0]


def test_episodes_hold_different_texts_in_an_order_that_the_seed_decides():
    def epoch(seed):
        stream = iter(episodes.episodes(_numbered(50), 4, 3, seed))
        return np.concatenate([_rows(next(stream)) for _ in range(4)])

    first = epoch(0)
    assert first.shape == (12, 4)
    assert len(np.unique(first)) == 48  # One pass: no text twice.
    np.testing.assert_array_equal(first, epoch(0))
    assert (first != epoch(1)).any()
    two = list(episodes.episodes(_numbered(24), 4, 3, 0, epochs=2))
    assert len(two) == 4
    first, second = (np.concatenate([_rows(b) for b in two[i : i + 2]]) for i in (0, 2))
    assert (first != second).any()


def test_processes_share_each_batch():
    whole = iter(episodes.episodes(_numbered(50), 4, 6, 5))
    parts = [iter(episodes.episodes(_numbered(50), 4, 6, 5, process=(i, 3))) for i in range(3)]
    for _ in range(5):
        together = np.concatenate([_rows(next(part)) for part in parts])
        assert sorted(together.tolist()) == sorted(_rows(next(whole)).tolist())
    with pytest.raises(ValueError, match="do not divide"):
        episodes.episodes(_numbered(50), 4, 5, 0, process=(0, 2))


def test_an_iterator_goes_on_where_its_state_was_taken():
    stream = iter(episodes.episodes(_numbered(50), 4, 3, 0))
    for _ in range(7):  # Past the first epoch.
        next(stream)
    state = stream.get_state()
    expected = [_rows(next(stream)) for _ in range(3)]
    again = iter(episodes.episodes(_numbered(50), 4, 3, 0))
    again.set_state(state)
    np.testing.assert_array_equal(expected, [_rows(next(again)) for _ in range(3)])


def test_too_small_a_corpus_says_so():
    with pytest.raises(episodes.TooFewPieces, match="11 pieces do not fill one batch of 3"):
        episodes.episodes(_numbered(11), 4, 3, 0)
