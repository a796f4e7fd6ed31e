"""Benchmarks of one memory of many facts, on a tiny model against loops of one question each."""

import argparse
import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from known_editor import cases, fraction, measured, question, rows, same, saved, values

from larimar_jax.bench import attack, batch, forget, noise, rephrase, summary
from larimar_jax.bench.editor import LarimarEditor
from larimar_jax.bench.fact_store import FactStore, encode_facts
from larimar_jax.bench.systems import Systems
from larimar_jax.bench.task import add_arguments, build
from larimar_jax.pipeline import Pipeline
from larimar_jax.session import Session

RECORDS = cases(6)
FACTS = [(record.prompt, record.target_new) for record in RECORDS]


def known_hits(self, prompts, targets, condition):
    """Hits that differ for each prompt, target and condition; a tiny model's own are nearly all 0."""
    shares = np.asarray([fraction(p, t) for p, t in zip(prompts, targets, strict=True)])
    if condition is not None:
        embedding = np.abs(np.asarray(condition.prefix.embedding)[: len(prompts)])
        shares = shares + 1 + embedding.reshape(len(prompts), -1).mean(axis=1)
    return [np.asarray([share]) for share in shares]


@pytest.fixture
def hits(monkeypatch):
    """Known hits, and a scope that lets through what is as near as a threshold."""

    def install(threshold):
        monkeypatch.setattr(LarimarEditor, "hits", known_hits)
        monkeypatch.setattr(Pipeline, "scope_threshold", threshold)

    return install


def share_of(editor, target):
    """The share of a target's tokens that are the likeliest, and that of a forced answer."""

    def measure(text, condition):
        return float(np.mean(editor.hits([text], [target], condition)[0]))

    def forced(answer):
        tokens, wanted = editor.tokens(answer), editor.tokens(target)
        return float(np.mean([tokens[n : n + 1] == wanted[n : n + 1] for n in range(len(wanted))]))

    return measure, forced


def losses_of(model, pair):
    """ℓ of two targets, and that of a forced answer."""
    shares = [share_of(LarimarEditor(model), target)[1] for target in pair]

    def measure(text, condition):
        return model.score([text], [pair], condition)[0].tolist()

    return measure, lambda answer: [100 * (1 - share(answer)) for share in shares]


def same_losses(rows, wanted, place=0, **chosen):
    """Compare ℓ(new) and ℓ(true) of one case with {system: both}."""
    for column, metric in enumerate(("loss_new", "loss_true")):
        (have,) = values(rows, metric, **chosen).values()
        same(have, {system: pair[column] for system, pair in wanted.items()}, place, rel=2e-4)


def test_a_store_is_the_session_with_the_same_facts(tiny):
    facts = FACTS[:5]
    queries = [*(prompt for prompt, _ in facts), "Says something else"]
    session = Session(tiny)
    tiny = tiny.with_memory(session._rule, tiny.prepared)
    store = FactStore(encode_facts(tiny, facts, queries), facts)
    for prompt, answer in facts:
        session.write(prompt, answer)
    targets = [("new 1", "true 0")] * len(queries)
    latent, match = store.read(queries)
    inside = match.within(tiny.scope_threshold)
    assert match.key[:5].tolist() == list(range(5)) and inside[:5].all()
    chosen = np.flatnonzero(inside)
    within = [queries[row] for row in chosen]
    scores = tiny.score(within, [targets[row] for row in chosen], tiny.condition(latent[chosen]))
    # ℓ near 0 is what is left of two numbers of about 20.
    wanted = session.score(queries, targets)[chosen]
    np.testing.assert_allclose(scores, wanted, rtol=1e-3, atol=1e-4)
    left = store.without([1, 3])
    assert left.facts == [facts[n] for n in (0, 2, 4)]
    assert int(left.state.count) == 3 and int(left.state.refused) == 0
    again = FactStore(left._encoded, left.facts)
    np.testing.assert_allclose(left.state.solution, again.state.solution, atol=2e-3)


# Batch


def test_batch_is_one_fact_at_a_time_in_memories_of_every_size(tiny, tmp_path):
    task = batch.Batch(data=saved(RECORDS[:5], tmp_path / "f.json"), facts=(1, 5), chunk=3)
    table, results = measured(task, tiny, tmp_path)
    encoded = encode_facts(tiny, FACTS[:5])
    measured_cases = {(row["facts"], row["case"]) for row in table}
    assert measured_cases == {(1, 0), *((5, case) for case in range(5))}
    for size, case in measured_cases:
        store, pair = FactStore(encoded, FACTS[:size]), [f"new {case}", f"true {case}"]
        wanted, *match = question(store, FACTS[case][0], FACTS[case], *losses_of(tiny, pair))
        assert match == [case, True]
        same_losses(table, wanted, facts=size, case=case)
    (entry,) = [e for e in results if (e["system"], e["facts"]) == ("larimar", 5)]
    assert entry["own_key_nearest"] == {"mean": 100.0, "standard_error": 0.0, "cases": 5}
    with pytest.raises(ValueError, match="has 5 records, and 9 are to be written at once"):
        batch.Batch(data=task.data, facts=(1, 9)).cases(None)


def test_the_untouched_model_reads_a_text_once(tiny, tmp_path, monkeypatch):
    """A lookup that matches the fact itself is the fact in the prompt, at whatever N."""
    task = batch.Batch(data=saved(RECORDS[:5], tmp_path / "f.json"), facts=(1, 5), chunk=3)
    scored, score = [], tiny.score

    def counting(prompts, targets, condition=None):
        scored.append((len(prompts), condition is None))
        return score(prompts, targets, condition)

    monkeypatch.setattr(tiny, "score", counting)
    rows(task, tiny, 3)
    assert sum(count for count, plain in scored if plain) == 2 * 3
    assert sorted(count for count, plain in scored if not plain) == [1, 1, 2, 3]


def test_out_of_scope_memory_and_lookups_are_the_base_model(tiny, tmp_path, monkeypatch):
    """To the last bit, whatever is nearest."""
    monkeypatch.setattr(type(tiny), "scope_threshold", 2.0)
    task = batch.Batch(data=saved(RECORDS[:5], tmp_path / "f.json"), facts=(5,), chunk=5)
    for losses in values(rows(task, tiny), "loss_new").values():
        assert losses["larimar"] == losses["lookup"] == losses["verbatim"] == losses["base"]


# Forgetting


@pytest.fixture
def forgetting(tmp_path):
    data = saved(RECORDS, tmp_path / "f.json")
    return forget.Forget(data=data, facts=(4, 6), forget=2, others=2, seed=3, chunk=3)


def test_cases_forget_different_facts_beside_others(forgetting):
    chosen = forgetting.cases(None)
    assert [case.facts for case in chosen] == [4, 4, 6, 6]
    for size in (4, 6):
        of_size = [case for case in chosen if case.facts == size]
        assert len({case.index for case in of_size}) == 2
        for case in of_size:
            assert len(set(case.others)) == 2 and case.index not in case.others
            assert max(case.index, *case.others) < size


def test_forgetting_is_that_of_a_plain_loop(tiny, forgetting, tmp_path, hits):
    hits(2.0)  # forgetting has nothing to do with the scope
    table, results = measured(forgetting, tiny, tmp_path)
    unknown = [(prompt, forget.UNKNOWN) for prompt, _ in FACTS]
    encoded, editor = encode_facts(tiny, [*FACTS, *unknown]), LarimarEditor(tiny)
    for case in forgetting.cases(None):
        left = [fact for place, fact in enumerate(FACTS[: case.facts]) if place != case.index]
        stores = dict(before=FACTS[: case.facts], forgotten=left)
        stores["replaced"] = [*left, unknown[case.index]]
        for moment, facts in stores.items():
            store = FactStore(encoded, facts)
            recall = values(table, "recall", moment=moment)[case.case_id]
            for place, index in enumerate((case.index, *case.others)):
                fact = FACTS[index]
                wanted, *_ = question(store, *(fact[0], fact), *share_of(editor, fact[1]), True)
                same(recall, wanted, place, rel=1e-6)
                assert len(set(wanted.values())) >= 4
    certified = [row for row in table if row.get("distance") is not None]
    assert [row["case"] for row in certified] == [case.case_id for case in forgetting.cases(None)]
    for row in certified:
        # What is left is the memory that never saw the fact, to what float32 solves to.
        assert row["distance"] < 1e-3 and row["refused"] == 0 and 0 <= row["leverage"] <= 1
        assert (row["system"], row["kind"], row["moment"]) == ("open", "forgotten", "forgotten")
    (entry,) = [e for e in results if (e["kind"], e["facts"]) == ("certificates", 4)]
    of_size = [row for row in certified if row["facts"] == 4]
    ratios = [row["certificate"] / row["distance"] for row in of_size]
    wanted = [max(row["distance"] for row in of_size), min(ratios), max(ratios)]
    names = ("largest_distance", "least_ratio", "largest_ratio")
    assert [entry[name]["mean"] for name in names] == wanted


def test_a_store_of_one_fact_has_nothing_to_look_up_once_it_is_forgotten(tiny, tmp_path, hits):
    hits(2.0)
    data = saved(RECORDS, tmp_path / "f.json")
    task = forget.Forget(data=data, facts=(1,), forget=1, others=0)
    measured = rows(task, tiny)
    moments = ("before", "forgotten")
    before, gone = (values(measured, "recall", moment=moment)["1/0"] for moment in moments)
    assert gone["lookup"] == gone["verbatim"] == gone["base"]
    assert before["lookup"] == before["prompt"] and before["verbatim"] == [1.0]


def test_to_forget_better_than_a_lookup_is_to_recall_less(forgetting):
    shares = {
        ("forgotten", "before"): {"open": 1.0, "lookup": 0.5, "verbatim": 1.0},
        ("forgotten", "forgotten"): {"open": 0.25, "lookup": 0.5, "verbatim": 0.0},
        ("forgotten", "replaced"): {"open": 0.25, "lookup": 0.25, "verbatim": 0.5},
        ("others", "forgotten"): {"open": 0.75, "lookup": 0.5, "verbatim": 1.0},
    }
    table = [
        dict(case="4/0", system=system, kind=kind, moment=moment, facts=4, recall=value)
        for (kind, moment), each in shares.items()
        for system, value in each.items()
    ]
    for entry in summary.summarise(forgetting, table):
        if entry["system"] == "open":
            each = shares[entry["kind"], entry["moment"]]
            sign = -1 if (entry["kind"], entry["moment"]) in list(shares)[1:3] else 1
            gains = {n: 100 * sign * (each["open"] - each[n]) for n in ("lookup", "verbatim")}
            for name, gain in gains.items():
                assert entry["recall"][f"versus_{name}"]["mean"] == gain
                label = {"lookup": "the lookup", "verbatim": "verbatim lookup"}[name]
                assert (label in entry["recall"].get("note", "")) == (gain <= 0)


# Unseen wordings

TOWNS = ["Rome", "Oslo", "Cairo", "Lima"]
# Between the likenesses of these prompts.
THRESHOLD = 0.9926


@pytest.fixture
def rephrasing(tmp_path, monkeypatch):
    """Six cities, each with one or two wordings that are not the query."""
    some = [
        dataclasses.replace(
            case,
            prompt=f"City {n} of",
            subject=f"City {n}",
            target_new=TOWNS[n % 4],
            paraphrases=(f"The land of city {n}:",),
        )
        for n, case in enumerate(RECORDS)
    ]
    wordings = [(f"Of city {n}:", f"City {n} is in")[: 2 - n % 2] for n in range(6)]
    monkeypatch.setattr(rephrase.Rephrase, "other_wordings", lambda *_: wordings)
    path = saved(some, tmp_path / "f.json")
    return rephrase.Rephrase(data=path, cells=((3, 2), (1, 1)), queries=4, chunk=3)


def test_recall_is_that_of_each_question_in_a_memory_of_its_facts(tiny, rephrasing, tmp_path, hits):
    hits(THRESHOLD)
    table, _ = measured(rephrasing, tiny, tmp_path)
    editor, decided = LarimarEditor(tiny), set()
    for case in rephrasing.cases(None):
        facts = [fact for i in case.together for fact in rephrasing._written(i, case.wordings)]
        record = rephrasing.facts[case.index][0]
        prompt, target = record.paraphrases[0], record.target_new
        encoded = encode_facts(tiny, facts, [prompt])
        keys = encoded([p for p, _ in facts]).latent[:: case.wordings]
        query = (prompt, (record.prompt, target), *share_of(editor, target))
        wanted, near, inside = question(FactStore(encoded, facts), *query)
        wanted["own"] = wanted["open"]
        for name in ("pinv", "gaussian"):
            model = rephrase.keyed(tiny, rephrase.ADDRESSINGS[name], keys)
            wanted[name] = question(FactStore(encoded, facts, model=model), *query)[0]["open"]
        same(values(table, "recall")[case.case_id], wanted, rel=1e-6)
        (row,) = [r for r in table if (r["case"], r["system"]) == (case.case_id, "larimar")]
        mine = facts[near] in rephrasing._written(case.index, case.wordings)
        assert (row["in_scope"], row["own_fact_nearest"]) == (inside, mine)
        assert (row["facts"], row["wordings"]) == (len(case.together), case.wordings)
        decided.add((inside, mine))
    assert {each for pair in decided for each in pair} == {True, False}


def test_keys_over_known_prompts_are_what_the_equations_define(tiny):
    """One-hot for α → 0, and the coordinates in the prompts."""
    known = tiny.encode(["City 1 of", "City 2 of", "Rain"]).latent
    for addressing in rephrase.ADDRESSINGS.values():
        model = rephrase.keyed(tiny, addressing, known)
        weights = np.asarray(model.memory.address(model.prepared, jnp.asarray(known)))
        np.testing.assert_allclose(weights, np.eye(3), atol=2e-4)
        assert model.memory.slots == 3 and tiny.memory.slots != 3 and model.graph is tiny.graph
    with pytest.raises(ValueError, match="holds 5 numbers a text"):
        rephrase.keyed(tiny, rephrase.ADDRESSINGS["pinv"], np.zeros((3, 5), np.float32))


def test_cells_are_read_and_checked(rephrasing):
    assert rephrase.cell("20x10") == (20, 10)
    for wrong in ("20", "x3", "0x2", "ax2", "2x"):
        with pytest.raises(argparse.ArgumentTypeError, match="is not as 20x10"):
            rephrase.cell(wrong)
    with pytest.raises(ValueError, match="3 records have 3 wordings .* 4x3 writes 4"):
        dataclasses.replace(rephrasing, cells=((4, 3),)).cases(None)
    parser = argparse.ArgumentParser()
    add_arguments(parser, rephrase.Rephrase)
    line = ["--data", "x", "--cells", "2x3", "1x1"]
    built = build(rephrase.Rephrase, vars(parser.parse_args(line)))
    assert built.cells == ((2, 3), (1, 1)) and built.queries == 200


# Noise


@pytest.fixture
def noisy(tmp_path):
    data = saved(RECORDS[:4], tmp_path / "f.json")
    return noise.Noise(data=data, sigmas=(0.5, 0.0), tokens=3, chunk=2)


def test_a_read_is_the_mean_plus_noise_of_that_size(tiny, noisy, tmp_path):
    table, results = measured(noisy, tiny, tmp_path)
    memory, prepared = tiny.dual, tiny.prepared

    def text_of(prompt, condition):
        return tiny.generate([prompt], condition, max_tokens=3, stop=())[0]

    for record in noisy.records[:2]:
        of_case = [row for row in table if row["case"] == record.case_id]
        prompts, fact = [record.prompt, *record.paraphrases], (record.prompt, record.target_new)
        store = FactStore(encode_facts(tiny, [fact], prompts), [fact])
        facts = map(jnp.asarray, (store.keys, store.values))
        state = memory.write(prepared, memory.empty(prepared), *facts)
        padded = np.zeros((4, store.keys.shape[1]), np.float32)
        padded[: len(prompts)] = tiny.encode(prompts).latent
        mean = memory.address(prepared, jnp.asarray(padded))
        own_key = jax.random.fold_in(jax.random.key(0), record.case_id)
        drawn = mean + 0.5 * jax.random.normal(own_key, mean.shape)
        reads = np.asarray(drawn @ memory.matrix(prepared, state))
        texts = {}
        for place, prompt in enumerate(prompts):
            read = tiny.condition(reads[place : place + 1])
            measure, forced = losses_of(tiny, [record.target_new, record.target_true])
            wanted, *_ = question(store, prompt, fact, measure, forced)
            for sigma, names in ((None, ("base", "zero", "prompt", "lookup")), (0.0, ("open",))):
                chosen = [r for r in of_case if r["prompt"] == prompt and r["system"] in names]
                same_losses(chosen, wanted, sigma=sigma)
            same_losses(of_case, {"open": measure(prompt, read)}, prompt=prompt, sigma=0.5)
            if not place:
                spoken, *_ = question(store, prompt, fact, text_of, lambda answer: "")
                texts = {(n, 0.0 if n == "open" else None): text for n, text in spoken.items()}
                texts["open", 0.5] = text_of(prompt, read)
        edits = {(r["system"], r["sigma"]): r for r in of_case if r["kind"] == "edit"}
        del edits["verbatim", None]
        # Each is judged to the length of the shortest.
        length = min(len(texts[side].split()) for side in edits)
        for side, row in edits.items():
            assert row["text"] == texts[side]
            text = " ".join(texts[side].split()[:length])
            nats = tiny.score([record.prompt], [[text]])[0, 0] if text else None
            assert row["perplexity"] == (nats and pytest.approx(float(nats), rel=1e-5))
    (entry,) = [e for e in results if (e["kind"], e["sigma"]) == ("edit", 0.5)]
    nats = values(table, "perplexity", kind="edit", sigma=0.5)
    nats = [each["open"][0] for each in nats.values() if each["open"][0] is not None]
    assert entry["perplexity"]["mean"] == pytest.approx(math.exp(np.mean(nats)))
    assert entry["perplexity"]["cases"] == len(nats) == 4 * (1 - entry["silent"]["mean"] / 100)


def test_the_order_of_cases_changes_no_draw(tiny, noisy, tmp_path):
    turned = saved(noisy.records[::-1], tmp_path / "turned.json")
    kinds = dict(kind="edit", sigma=0.5)
    first = values(rows(noisy, tiny), "loss_new", **kinds)
    second = values(rows(dataclasses.replace(noisy, data=turned), tiny), "loss_new", **kinds)
    for case, losses in first.items():
        np.testing.assert_allclose(losses["open"], second[case]["open"], atol=1e-5)


@pytest.mark.parametrize("sigmas", [(), (-1.0,), (math.inf,)])
def test_a_width_below_zero_is_refused(sigmas):
    with pytest.raises(ValueError, match="must be at least 0, not .*σ_W, a standard deviation"):
        noise.Noise(data="x", sigmas=sigmas)


# The rephrase attack


@pytest.fixture
def attacking(tiny, tmp_path, monkeypatch):
    some = [
        dataclasses.replace(r, case_id=3 * n, target_true="it" if n == 0 else "zq")
        for n, r in enumerate(RECORDS[:3])
    ]
    known = [attack.AttackedFact(r, (f"Is fact {n}:", f"Fact {n} is")) for n, r in enumerate(some)]
    monkeypatch.setattr(attack.Attack, "_known", lambda self, model: known)
    path = saved(some, tmp_path / "f.json")
    return attack.Attack(data=path, facts=3, wordings=2, samples=2, tokens=3, chunk=2)


def test_samples_are_drawn_after_each_wording_under_each_memory(tiny, attacking, tmp_path):
    table, _ = measured(attacking, tiny, tmp_path)
    edits = [(case.record.prompt, attack.UNKNOWN) for case in attacking._known(None)]
    tokenizer, decided = tiny.decoder_tokenizer, set()
    word = tokenizer.decode(tokenizer.following("unknown")[:3])
    for case, edit in list(zip(attacking.cases(Systems(tiny)), edits, strict=True))[:2]:
        # What a case draws depends on nothing beside it; a wording has two rows.
        keys = jax.random.split(jax.random.fold_in(jax.random.key(0), case.case_id), 4)
        for memory, facts in (("alone", [edit]), ("together", edits)):
            store = FactStore(encode_facts(tiny, facts, case.wordings), facts)
            texts = values(table, "texts", memory=memory)[case.case_id]
            texts = {system: samples for system, (samples,) in texts.items()}
            for row, prompt in enumerate(np.repeat(case.wordings, 2).tolist()):

                def draw(text, condition, rng=keys[row : row + 1]):
                    options = dict(max_tokens=3, temperature=1.0, rng=rng, stop=())
                    return tiny.generate([text], condition, **options)[0]

                wanted, _, inside = question(store, prompt, edit, draw, lambda _: word)
                same(texts, wanted, row)
                decided.add((memory, inside, wanted["open"] != wanted["base"]))
    assert {(memory, True, True) for memory in ("alone", "together")} < decided
    assert ("together", False) in {each[:2] for each in decided}
    leaks = [row["samples"] for row in table if row["system"] == "base"]
    assert any(leaks) and not all(leaks)
    for row in table:
        leaked = [row["true"] in text for text in row["texts"]]
        assert (row["success"], row["samples"]) == (float(any(leaked)), np.mean(leaked))


def test_the_order_of_facts_changes_no_sample(tiny, attacking, monkeypatch):
    first = values(rows(attacking, tiny), "texts", memory="alone")
    turned = [attacking._known(None)[n] for n in (2, 0, 1)]
    monkeypatch.setattr(attack.Attack, "_known", lambda self, model: turned)
    assert values(rows(attacking, tiny), "texts", memory="alone") == first


def test_facts_are_attacked_that_the_base_model_knows(tiny, tmp_path):
    # What the model says after a prompt it knows, if it is text that reads back as the same tokens.
    prompts = [f"Fact {n} {word}" for n in range(8) for word in ("is", "says", "of")]
    known = []
    for n, text in enumerate(tiny.generate(prompts, max_tokens=1, stop=())):
        text = text.strip()
        if text and tiny.judge([prompts[n]], [[text]]).accuracy[0, 0] == 1:
            changes = dict(case_id=n, prompt=prompts[n], target_true=text, paraphrases=("W",))
            known.append(dataclasses.replace(RECORDS[0], **changes))
    unknown = dataclasses.replace(RECORDS[0], target_true="zqzq", paraphrases=("W",))
    assert len(known) > 2
    path = saved([unknown, *known], tmp_path / "f.json")
    task = attack.Attack(data=path, facts=2, wordings=1)
    assert [case.case_id for case in task.cases(Systems(tiny))] == [r.case_id for r in known[:2]]
    path = saved([unknown], tmp_path / "g.json")
    with pytest.raises(ValueError, match="of 1 records the base LM knows 0, and 2 are"):
        attack.Attack(data=path, facts=2, wordings=1).cases(Systems(tiny))
    with pytest.raises(ValueError, match="--samples must be at least 1, not 0"):
        attack.Attack(data="x", samples=0)
