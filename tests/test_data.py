"""Readers of the editing benchmarks, corpora, and episodes."""

import dataclasses
import functools
import gzip
import json
from pathlib import Path

import numpy as np
import pytest

from larimar_jax.data import corpus, edit_records, episodes, pieces, segments
from larimar_jax.data.edit_records import MalformedRecord
from larimar_jax.data.libraries import CorpusError

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
    # As MEMIT's multi_counterfact.json has it: other keys beside those, and any number of prompts.
    multi = ORIGINAL | dict(pararel_idx=6791, paraphrase_prompts=[], neighborhood_prompts=[])
    for lines in (False, True):
        path = _file(tmp_path, FLAT, ORIGINAL, multi, lines=lines)
        flat, original, bare = edit_records.load(path)
        assert bare.paraphrases == bare.neighbourhood == bare.neighbourhood_targets == ()
        assert (flat.case_id, flat.target_new, flat.target_true) == (3, "Rome", "Paris")
        assert flat.paraphrases == ("One finds the tower in",)
        assert flat.neighbourhood == ("The palace stands in",)
        assert original.prompt == "The tower stands in"
        assert len(original.paraphrases) == len(original.neighbourhood) == 2
        assert original.neighbourhood_targets == ("Paris", "Paris")
        assert original.generation == ("The tower",)
    assert len(edit_records.load(_file(tmp_path, FLAT, ORIGINAL), limit=1)) == 1
    with pytest.raises(dataclasses.FrozenInstanceError):
        flat.prompt = ""


def test_zsre_reads_both_schemas_by_their_own_protocol(tmp_path):
    mend, knowedit = edit_records.load(_file(tmp_path, MEND, KNOWEDIT))
    assert (mend.target_new, mend.target_true) == ("Paris", "Oslo")
    assert mend.answers == ("Paris", "City of Paris")
    assert mend.neighbourhood == ("who built the palace?",)
    assert (knowedit.target_new, knowedit.target_true) == ("Oslo", "Paris")
    assert knowedit.neighbourhood_targets == ("iron",)
    assert knowedit.portability == (("Its country is", "Norway"),)
    answers = edit_records.load(_file(tmp_path, MEND, KNOWEDIT), target="answer")
    assert [record.target_new for record in answers] == ["Paris", "Paris"]


def _queries(prompt: str, answer: str) -> list:
    answers = [{"value": answer, "aliases": []}]
    return [{"test_queries": [{"prompt": prompt, "answers": answers}], "test_condition": "OR"}]


OTHERS = {
    # KnowEdit's new facts: no answer before, aliases in lists, and a question that has no answer.
    "wiki_recent": {
        **{name: KNOWEDIT[name] for name in ("subject", "prompt", "target_new", "portability")},
        "locality": {
            "Relation_Specificity": [{"prompt": "It is made of", "ground_truth": [["iron", "Fe"]]}],
            "Forgetfulness": [{"prompt": "It was in", "ground_truth": ""}],
        },
    },
    "wikibio": {
        "text": "About the tower.",
        "labels": "It stands in Oslo.",
        "concept": "tower",
        "locality": {"Relation_Specificity": [{"prompt": "It is of", "ground_truth": ["iron"]}]},
    },
    "mquake": ORIGINAL
    | {
        "requested_rewrite": [ORIGINAL["requested_rewrite"]],
        "questions": ["In what country is the tower?"],
        "new_answer": "Italy",
        "new_single_hops": [],
    },
    "ripple": {
        "edit": {
            "prompt": "The name of the city of Tower is Rome.",
            "original_fact": {"prompt": "The name of the city of Tower is Paris."},
        },
        "Relation_Specificity": _queries("The maker of Tower is", "Ann"),
        "Compositionality_I": _queries("The country of Tower is", "Italy"),
    },
    "uniedit": {
        "edit": {"prompt": "The tower is in", "subject": "tower", "target": "Rome"},
        "generality": {
            "0": {"prompt": "One finds the tower in", "target": "Rome"},
            "1": {"prompt": "The tower's country is", "target": "Italy"},
        },
        "locality": {"0": {"prompt": "The palace is in", "target": "Paris"}},
    },
    "fastedit": {"prompt": "{} is in", "subject": "Tower", "target": "Rome", "queries": ["Where"]},
    "known": {"known_id": 4, "template": "{} is in", "subject": "Tower", "attribute": "Rome"},
    "alphaedit": {
        "case_id": 4,
        "prompt": "{} is in",
        "subject": "Tower",
        "target_new": {"str": "Rome"},
    },
}


def test_records_of_other_benchmarks_of_editing_are_read(tmp_path):
    path = _file(tmp_path, *OTHERS.values())
    read = dict(zip(OTHERS, edit_records.load(path), strict=True))
    assert [read[name].target_new for name in OTHERS] == [
        *("Oslo", "It stands in Oslo.", "Rome", "Rome", "Rome", "Rome", "Rome", "Rome")
    ]
    assert [read[name].target_true for name in OTHERS] == ["", "", "Paris", "Paris", *[""] * 4]
    recent, ripple, uniedit = read["wiki_recent"], read["ripple"], read["uniedit"]
    assert recent.neighbourhood_targets == ("iron",)
    assert recent.neighbourhood_kinds == ("Relation_Specificity",)
    assert recent.portability_kinds == ("Reasoning",) and recent.paraphrases == ()
    assert read["wikibio"].neighbourhood_targets == ("iron",)
    assert read["mquake"].prompt == "The tower stands in"
    assert read["mquake"].portability == (("In what country is the tower?", "Italy"),)
    assert (ripple.prompt, ripple.subject) == ("The name of the city of Tower is", "Tower")
    assert ripple.neighbourhood == ("The maker of Tower is",)
    assert ripple.neighbourhood_targets == ("Ann",)
    assert ripple.portability == (("The country of Tower is", "Italy"),)
    assert ripple.portability_kinds == ("Compositionality_I",)
    assert uniedit.paraphrases == ("One finds the tower in",)
    assert uniedit.portability == (("The tower's country is", "Italy"),)
    assert read["fastedit"].paraphrases == ("Where",)
    assert read["known"].case_id == read["alphaedit"].case_id == 4
    assert read["known"].prompt == read["alphaedit"].prompt == "Tower is in"
    # UniEdit's file is an object of records by number.
    path.write_text(json.dumps({"0": OTHERS["uniedit"]}))
    assert edit_records.load(path) == [dataclasses.replace(uniedit, case_id=0)]
    two = OTHERS["mquake"] | {"requested_rewrite": 2 * OTHERS["mquake"]["requested_rewrite"]}
    with pytest.raises(MalformedRecord, match="has 2 items, and a record of one edit is read"):
        edit_records.load(_file(tmp_path, two))
    with pytest.raises(MalformedRecord, match=r"known, by a field of theirs: mquake \(new_single"):
        edit_records.load(_file(tmp_path, {"x": 1}))


@pytest.mark.parametrize(
    ("record", "change", "field"),
    [
        (FLAT, {"target_new": None}, "target_new"),
        (FLAT, {"subject": "  "}, "subject"),
        (FLAT, {"case_id": "3"}, "case_id"),
        (ORIGINAL, {"paraphrase_prompts": ["x", 4]}, r"paraphrase_prompts\[1\]"),
        (ORIGINAL, {"requested_rewrite": {}}, "requested_rewrite.prompt"),
        (MEND, {"answers": []}, "answers"),
        (KNOWEDIT, {"locality": {"R": [{"prompt": "x"}]}}, r"locality.R\[0\].ground_truth"),
    ],
)
def test_a_malformed_record_is_named_by_file_index_line_and_field(tmp_path, record, change, field):
    for lines, line in ((False, 1), (True, 2)):
        path = _file(tmp_path, record, {**record, **change}, lines=lines)
        place = rf"{path.name}, record 1 \(line {line}\)"
        with pytest.raises(MalformedRecord, match=f"{place}: field '{field}'"):
            edit_records.load(path)


def test_a_record_of_a_list_is_named_by_the_line_that_it_begins_in(tmp_path):
    path = tmp_path / "records.json"
    bad = {**FLAT, "subject": 4}

    def places(text):
        path.write_text(text, encoding="utf-8")
        skipped = []
        assert len(edit_records.load(path, skipped=skipped)) == 2
        return [line.partition(": field")[0].partition(", ")[2] for line in skipped]

    spread = json.dumps([FLAT, bad, FLAT, bad], indent=2)
    begins = [n for n, line in enumerate(spread.split("\n"), 1) if line == "  {"]
    assert places(spread) == [f"record 1 (line {begins[1]})", f"record 3 (line {begins[3]})"]
    # Line breaks in strings are escaped, and U+2028 breaks no line; several records may share one.
    good = json.dumps({**FLAT, "subject": "a\n\u2028b"}, ensure_ascii=False)
    wrong = json.dumps(bad)
    assert places(f"\n[\r\n{good} , {wrong},\n\n\t{wrong}\n,{good}]\n") == [
        "record 1 (line 3)", "record 2 (line 5)"
    ]  # fmt: skip


@pytest.mark.parametrize(
    "text", ["[", "[1", "[1,", "[1,]", "[1 2]", "[1]]", "[,]", '[{"a": }]', "[1,\n2\n} ]", "[1] x"]
)
def test_a_list_that_is_no_json_is_refused_where_json_says(tmp_path, text):
    (tmp_path / "broken.json").write_text(text)
    with pytest.raises(json.JSONDecodeError) as want:
        json.loads(text)
    place = rf"at line {want.value.lineno}, column {want.value.colno} \({want.value.msg}\)"
    with pytest.raises(MalformedRecord, match=f"not valid JSON {place}"):
        edit_records.load(tmp_path / "broken.json")


@pytest.mark.parametrize(
    "data",
    [
        json.dumps([FLAT]).encode("utf-8-sig"),
        json.dumps([FLAT]).encode("utf-16"),
        gzip.compress(json.dumps(FLAT).encode()),
        json.dumps({"version": 1, "data": [FLAT]}, indent=1).encode(),
    ],
    ids=["mark", "utf-16", "gzip", "data"],
)
def test_records_are_read_as_other_programs_write_them(tmp_path, data):
    (tmp_path / "records.json").write_bytes(data)
    [record] = edit_records.load(tmp_path / "records.json")
    assert record.case_id == FLAT["case_id"] and record.target_new == "Rome"


def test_a_file_that_is_no_text_says_so(tmp_path):
    whole = gzip.compress(json.dumps([FLAT]).encode())
    for data in (b'["caf\xe9"]', whole[:-9], whole[:20] + b"?" * 40):
        (tmp_path / "records.json").write_bytes(data)
        with pytest.raises(MalformedRecord, match=r"no text in UTF-8 .* Convert it"):
            edit_records.load(tmp_path / "records.json")


def test_files_that_hold_no_records_say_so(tmp_path):
    (tmp_path / "cut.json").write_text(json.dumps([FLAT])[:-20])
    with pytest.raises(MalformedRecord, match="not valid JSON at line 1"):
        edit_records.load(tmp_path / "cut.json")
    (tmp_path / "cut.jsonl").write_text(json.dumps(FLAT) + "\n{")
    with pytest.raises(MalformedRecord, match=r"record 1 \(line 2\): not valid JSON"):
        edit_records.load(tmp_path / "cut.jsonl")
    (tmp_path / "empty.json").write_text("[]")
    with pytest.raises(MalformedRecord, match="no record"):
        edit_records.load(tmp_path / "empty.json")
    with pytest.raises(FileNotFoundError, match="no such file"):
        edit_records.load(tmp_path / "absent.json")


def test_sentences_end_where_people_would_end_them():
    text = (
        'J. Smith, Jr. of the U.S. Army met Dr. Who at 5 p.m. on Jan. 3. "It rained." '
        "He left (St. Paul is far). Did he? Yes! 2001 was later, e.g. in Rome."
    )
    assert segments.sentences(text) == [
        "J. Smith, Jr. of the U.S. Army met Dr. Who at 5 p.m. on Jan. 3.",
        '"It rained."',
        "He left (St. Paul is far).",
        "Did he?",
        "Yes!",
        "2001 was later, e.g. in Rome.",
    ]
    assert segments.sentences("  ") == []


def test_chunks_hold_whole_words_and_no_more_tokens_than_asked():
    words = "one two three four five six seven unbelievably eight".split()
    parts = segments.chunks(" ".join(words), 10, lambda text: len(text.strip()))
    assert all(len(chunk.replace(" ", "")) <= 10 for chunk in parts)
    assert " ".join(parts).split() == [word for word in words if len(word) <= 10]


def _documents(name):
    return list(corpus.open_corpus(str(name)).documents())


def test_corpora_come_by_name_and_by_path(tmp_path):
    (tmp_path / "a.txt").write_text("First one.\nStill first.\n \n\nSecond.")
    texts = [document.text for document in _documents(tmp_path / "a.txt")]
    assert texts == ["First one. Still first.", "Second."]
    (tmp_path / "a.jsonl").write_text('{"text": "One.", "title": "A"}\n{"text": "Two."}\n')
    assert [d.title for d in _documents(tmp_path / "a.jsonl")] == ["A", "Two."]
    (tmp_path / "b.jsonl").write_text('{"body": "One."}\n{"title": "A"}\n')
    with pytest.raises(CorpusError, match="b.jsonl, .* have no column 'text'; they have body"):
        _documents(tmp_path / "b.jsonl")
    (tmp_path / "c.txt").write_bytes(b"fine\n\n\xff")
    with pytest.raises(CorpusError, match="c.txt, which could not be opened.*utf-8"):
        _documents(tmp_path / "c.txt")
    with pytest.raises(FileNotFoundError, match="wikipedia-summaries"):
        corpus.open_corpus("wikipedia")


def test_a_corpus_is_another_when_its_file_is(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("One.")
    first = corpus.open_corpus(str(path))
    assert corpus.open_corpus(str(path)).identity == first.identity
    assert list(first.documents()) == list(first.documents())
    path.write_text("Two.")
    assert corpus.open_corpus(str(path)).identity != first.identity


def test_pieces_are_distinct():
    texts = [corpus.Document("a", "One two three. Four five."), corpus.Document("b", "Four five.")]
    distinct = list(segments.distinct_pieces(texts, "sentence", 9, len))
    assert distinct == ["One two three.", "Four five."]


def test_wikipedia_summaries_split_by_title():
    documents = _documents("wikipedia-summaries")
    held_out = [d.title for d in documents if d.held_out]
    assert len(documents) == 10_033
    assert 0.03 < len(held_out) / len(documents) < 0.05
    # Pinned: a split that moves would leak held-out text into runs that go on.
    assert held_out[:3] == ["Actor", "Alternative rock", "Ancient Egyptian literature"]


class _Numbered(pieces.TokenizedPieces):
    """Pieces whose tokens are their own number."""

    def counts(self):
        encoder = np.random.default_rng(0).integers(2, 10, len(self.dataset))
        return encoder, encoder + np.arange(len(encoder)) % 3

    def gather(self, rows, lengths):
        numbers, tokens = rows[..., None].astype(np.int32), {}
        for tower, counts, length in zip(
            ("encoder", "decoder"), self.counts(), lengths, strict=True
        ):
            tokens[f"{tower}_tokens"] = np.repeat(numbers, length, axis=2)
            tokens[f"{tower}_mask"] = np.arange(length) < counts[numbers]
        return tokens


def _rows(batch) -> np.ndarray:
    return batch["encoder_tokens"][:, :, 0]


def streams(count, *arguments, processes=1, **options):
    """Return an iterator of each process over the batches of `count` pieces."""
    numbered = _Numbered(range(count), (10, 12), (0, 0, 0), 0)
    stream = functools.partial(episodes.episodes, numbered, *arguments, **options)
    return [iter(stream(process=(index, processes))) for index in range(processes)]


def _together(parts) -> np.ndarray:
    """Return the next batch of all processes."""
    return np.concatenate([_rows(next(part)) for part in parts])


def test_episodes_hold_different_texts_in_an_order_that_the_seed_decides():
    def epoch(parts, batches=4):
        return np.concatenate([_together(parts) for _ in range(batches)])

    first = epoch(streams(50, (4,), 3, 0))
    assert first.shape == (12, 4)
    assert len(np.unique(first)) == 48  # One pass: no text twice.
    np.testing.assert_array_equal(first, epoch(streams(50, (4,), 3, 0)))
    assert (first != epoch(streams(50, (4,), 3, 1))).any()
    two = streams(24, (4,), 3, 0, epochs=2)
    assert (epoch(two, 2) != epoch(two, 2)).any() and not list(two[0])


@pytest.mark.parametrize(("before", "after"), [(1, 1), (1, 4), (4, 2), (3, 1)])
def test_processes_share_each_batch_and_another_number_of_them_goes_on_from_a_state(before, after):
    whole, parts = streams(99, (3, 5), 12, 2), streams(99, (3, 5), 12, 2, processes=before)
    for _ in range(7):  # Past the first epoch.
        np.testing.assert_array_equal(_together(parts), _together(whole))
    states = [part.get_state() for part in parts]
    assert all(state == states[0] for state in states)
    resumed = streams(99, (3, 5), 12, 2, processes=after)
    for part in resumed:
        part.set_state(states[0])
    for _ in range(6):
        np.testing.assert_array_equal(_together(resumed), _together(whole))


def test_sizes_are_mixed_and_an_epoch_is_all_pieces():
    whole = [_rows(batch) for batch in streams(130, (2, 5, 3), 4, 1, epochs=3)[0]]
    sizes = np.reshape([rows.shape[1] for rows in whole], (9, 3))
    assert (np.sort(sizes, axis=1) == [2, 3, 5]).all() and len(set(map(tuple, sizes))) > 1
    for epoch in range(3):
        rows = np.concatenate([rows.ravel() for rows in whole[9 * epoch : 9 * epoch + 9]])
        assert len(np.unique(rows)) == len(rows) == 120


def test_batches_of_pieces_of_like_lengths_pad_less_and_an_epoch_is_still_all_of_them():
    def padding(batches):
        masks = [m for batch in batches for m in (batch["encoder_mask"], batch["decoder_mask"])]
        return 1 - sum(mask.sum() for mask in masks) / sum(mask.size for mask in masks)

    (plain,), (few,) = (streams(2000, (2, 3), 4, 1, epochs=2, buckets=n) for n in (1, 5))
    plain, few = list(plain), list(few)
    shapes = [episodes.shape(batch)[1:] for batch in few]
    assert len(set(shapes)) == 5 and len(set(shapes[:20])) > 2  # mixed, not one after the other
    assert padding(plain) > 0.4 and padding(few) < 0.13
    half = len(few) // 2
    for epoch in (few[:half], few[half:]):
        rows = np.concatenate([_rows(batch).ravel() for batch in epoch])
        assert len(np.unique(rows)) == len(rows) > 1900
    counts = _Numbered(range(2000), (10, 12), (0, 0, 0), 0).counts()
    for batch in few:  # Nothing is cut.
        for tower, tokens in zip(("encoder", "decoder"), counts, strict=True):
            assert (batch[f"{tower}_mask"].sum(axis=2) == tokens[_rows(batch)]).all()
    parts = streams(2000, (2, 3), 4, 1, processes=2, buckets=5)
    for batch in few[:9]:
        np.testing.assert_array_equal(_together(parts), _rows(batch))
    # A bucket that would make no batch is none: here two of a batch's pieces each.
    assert (
        len({episodes.shape(batch) for batch in streams(40, (5,), 4, 1, epochs=1, buckets=9)[0]})
        < 3
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((50, (), 3), "data.episode"),
        ((50, (4, 0), 3), "data.episode"),
        ((11, (4,), 3), "11 pieces do not fill one batch of 3"),
        ((50, (4,), 5), "do not divide"),
    ],
)
def test_what_makes_no_batch_of_episodes_is_refused(arguments, message):
    few = episodes.TooFewPieces if arguments[0] == 11 else ValueError
    with pytest.raises(few, match=message):
        streams(*arguments, 0, processes=2 if arguments[2] == 5 else 1)


def test_workers_and_their_state():
    (alone,), (first,) = (streams(50, (4, 2), 3, 0, workers=workers) for workers in (0, 2))
    expected = [_rows(next(alone)) for _ in range(6)]
    np.testing.assert_array_equal(_rows(next(first)), expected[0])
    state = first.get_state()
    (resumed,) = streams(50, (4, 2), 3, 0, workers=2)
    resumed.set_state(state)
    for batch in expected[1:]:
        np.testing.assert_array_equal(_rows(next(resumed)), batch)
