"""Packed rows: nothing computed twice, nothing lost, and to rounding as if each text were alone."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from larimar_jax import packing, scoring


def drawn(count, longest=20, seed=0, conditions=1):
    """Texts of random tokens, many of which begin alike, in a trie: (tokens, answers, condition)."""
    draw = np.random.default_rng(seed)
    stems = [draw.integers(0, 9, 12).tolist() for _ in range(4)]
    cases = []
    for _ in range(count):
        end = draw.integers(0, 9, draw.integers(1, longest)).tolist()
        prompt = [1, *stems[draw.integers(4)][: draw.integers(13)], *end]
        answers = [draw.integers(0, 3, draw.integers(1, 5)).tolist() for _ in range(2)]
        cases.append((prompt, answers, int(draw.integers(conditions))))
    trie = packing.Trie()
    return trie, cases, [trie.add(*case) for case in cases]


@pytest.mark.parametrize("conditions", [1, 30])
@pytest.mark.parametrize(("count", "longest"), [(1, 8), (3, 8), (70, 20), (40, 90)])
def test_every_token_sees_its_own_text_and_no_other(count, longest, conditions):
    trie, cases, texts = drawn(count, longest, conditions=conditions)
    rows = packing.fill_rows(trie, texts)
    for text in texts:
        assert any(text.nodes <= row.nodes for row in rows)
    read = set()
    for batch in packing.batches(rows, 4):
        packed = packing.pack(trie, batch)
        assert packed.tokens.size <= max(4 * packing.ROW, batch[0].length)
        assert packed.conditions.shape[1] <= packing.CONDITIONS
        for b in range(len(batch)):
            for at in range(packed.tokens.shape[1]):
                visible = np.flatnonzero(packed.visible[b, at])
                if at >= len(batch[b].nodes):
                    assert visible.tolist() == [at]
                    continue
                np.testing.assert_array_equal(packed.index[b, visible], np.arange(len(visible)))
                owner = packed.conditions[b, packed.owner[b, visible]]
                assert len(set(owner.tolist())) == 1
                read.add((tuple(packed.tokens[b, visible].tolist()), int(owner[0])))
    # The decoder reads a prompt with each of its answers but for its last token.
    whole = [(prompt + a[:-1], condition) for prompt, answers, condition in cases for a in answers]
    wanted = {(tuple(s[:end]), c) for s, c in whole for end in range(1, len(s) + 1)}
    assert read == wanted and len(trie.token) == len(wanted)


def test_places_are_where_the_answers_stand():
    trie, cases, texts = drawn(9)
    for (prompt, answers, _), text in zip(cases, texts, strict=True):
        for answer, path in zip(answers, text.paths, strict=True):
            assert [token for _, token in path] == answer
            assert [place.depth for place, _ in path] == list(range(len(answer)))
            depths = [trie.depth[place.node] for place, _ in path]
            assert depths == list(range(len(prompt) - 1, len(prompt) - 1 + len(answer)))


def test_rows_are_full():
    """Of 200 texts under conditions of their own, and of as many that share beginnings."""
    for conditions in (10**6, 1):
        trie, _, texts = drawn(200, conditions=conditions)
        rows = packing.fill_rows(trie, texts)
        assert {row.length for row in rows} == {packing.ROW}
        assert sum(len(row.nodes) for row in rows) > 0.93 * packing.ROW * len(rows)
    # What is shared is not far from being there once.
    assert sum(len(row.nodes) for row in rows) < 1.2 * len(trie.token)


def test_a_beginning_longer_than_a_row_is_shared():
    trie = packing.Trie()
    texts = [trie.add([*range(100), 200 + n], [[1]], 0) for n in range(30)]
    (row,) = packing.fill_rows(trie, texts)
    assert len(row.nodes) == 130 and row.length < 200


def test_few_shapes():
    shapes = set()
    for seed in range(30):
        trie, _, texts = drawn(20 + 4 * seed, seed=seed, conditions=20)
        for rows in packing.batches(packing.fill_rows(trie, texts), 16):
            packed = packing.pack(trie, rows)
            shapes.add((*packed.tokens.shape, packed.conditions.shape[1]))
    assert len(shapes) <= 12, shapes


@pytest.fixture(scope="module")
def texts():
    words = ["Fact", "The capital of Japan is", "new true Japan", "France", "1 2 3", "0"]
    prompts = [f"{a} {b}" for a in words for b in words]
    return prompts, [("new 1", words[n % len(words)]) for n in range(len(prompts))]


@pytest.mark.parametrize("conditioned", [True, False])
def test_scores_are_those_of_each_prompt_alone(tiny, texts, conditioned):
    """Whatever the order, the size of a batch, and what else is scored, a prompt twice among it."""
    prompts, candidates = (part + part[:3] for part in texts)
    latent = jax.random.normal(jax.random.key(0), (len(prompts), 16)).at[-3:].set(0.0)
    active = jnp.arange(len(prompts)) % 3 > 0
    condition = tiny.model.condition(latent, active) if conditioned else None

    def losses(rows, batch):
        part = None if condition is None else condition.rows(jnp.asarray(rows, jnp.int32))
        chosen = [prompts[row] for row in rows], [candidates[row] for row in rows]
        return scoring.judge(tiny.model, tiny.decoder_tokenizer, *chosen, part, batch=batch).loss

    everyone = np.arange(len(prompts))
    alone = np.concatenate([losses([row], 16) for row in everyone])
    shuffled = np.random.default_rng(0).permutation(everyone)
    for order, batch in ((everyone, 16), (shuffled, 3)):
        np.testing.assert_allclose(losses(order, batch), alone[order], rtol=2e-5, atol=1e-6)


def test_a_score_that_is_not_finite_stays_with_its_prompt(tiny, texts):
    prompts, candidates = (part[:8] for part in texts)
    latent = jax.random.normal(jax.random.key(0), (8, 16))
    whole, broken = (
        tiny.score(prompts, candidates, tiny.model.condition(z))
        for z in (latent, latent.at[5].set(jnp.inf))
    )
    rest = np.arange(8) != 5
    assert np.isnan(broken[5]).all()
    np.testing.assert_allclose(broken[rest], whole[rest], rtol=2e-5)


def test_equal_conditions_share_a_prompt_that_occurs_twice(tiny, monkeypatch):
    """z = 0 of 20 rows is one condition; rows that differ anywhere are two."""
    lengths, fill_rows = [], packing.fill_rows

    def counted(trie, texts):
        lengths.append(len(trie.token))
        return fill_rows(trie, texts)

    monkeypatch.setattr(packing, "fill_rows", counted)
    once = tiny.score(["Fact is"], [("new", "true")], tiny.zero(1))
    often = tiny.score(["Fact is"] * 20, [("new", "true")] * 20, tiny.zero(20))
    assert lengths[0] == lengths[1]
    np.testing.assert_allclose(often, np.repeat(once, 20, axis=0), rtol=1e-6)
    unequal = tiny.model.condition(jnp.zeros((2, 16)), jnp.asarray([True, False]))
    tiny.score(["Fact is"] * 2, [("new", "true")] * 2, unequal)
    assert lengths[2] == 2 * lengths[0]
