"""Prompts and their candidates as tries, several of them side by side in a row of the decoder.

What a token attends to is what comes before it in its own text, so two texts under one condition share
the tokens that they begin with: each is computed once, whether they are the candidates of a prompt, the
prompts of a fact that is written in front of all of them, or the same prompt asked twice. Texts that
share nothing do not see each other and stand in one row all the same, which is then full of tokens
and not of padding.

    texts ─▶ Trie ─▶ families, whose texts share much ─▶ rows of a bucketed length ─▶ arrays of B rows
"""

import dataclasses
from collections.abc import Iterator, Sequence, Set
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Int

# Lengths and numbers of rows grow in steps of a quarter to a half, so that few shapes are compiled.
LENGTH_BUCKET = 8
# The length of a row, where nothing is longer and not all of a call is shorter: four or five prompts.
# Attention is quadratic in it; in a shorter one less fits exactly.
ROW = 64
# The most conditions in a row.
CONDITIONS = 8
# Texts that begin with so many equal tokens are kept together.
SHARED = 4
# How many rows that are not full a text is tried on.
_UNFILLED = 32


def steps_bucket(size: int, unit: int) -> int:
    """The least of unit × (1, 2, 3, 4, 6, 8, 12, 16, …) that holds `size`."""
    whole = max(1, -(-size // unit))
    power = 1 << (whole - 1).bit_length()
    return unit * (power * 3 // 4 if power >= 4 and whole <= power * 3 // 4 else power)


class Trie:
    """Every token of a call once for each different beginning under each condition.

    A node's id is above its parent's. token, parent, depth, condition: of each node; a first token's
    parent is −1, and its depth 0.
    """

    def __init__(self):
        self.token: list[int] = []
        self.parent: list[int] = []
        self.depth: list[int] = []
        self.condition: list[int] = []
        self._found: dict[tuple[int, int, int], int] = {}

    def path(self, tokens: Sequence[int], condition: int, after: int = -1) -> list[int]:
        """The nodes of tokens that follow a node, made where they are missing; −1 is no node."""
        nodes = []
        for token in tokens:
            key = (condition, after, token)
            if key not in self._found:
                self._found[key] = len(self.token)
                self.token.append(token)
                self.parent.append(after)
                self.depth.append(0 if after < 0 else self.depth[after] + 1)
                self.condition.append(condition)
            after = self._found[key]
            nodes.append(after)
        return nodes


class Place(NamedTuple):
    """Where something is scored: after which node, and how many tokens into the answer that is."""

    node: int
    depth: int


@dataclasses.dataclass(frozen=True)
class Text:
    """A prompt with its candidates: its nodes, all of them, and for each token of each candidate after
    what it comes, and which it is."""

    nodes: frozenset[int]
    paths: Sequence[Sequence[tuple[Place, int]]]


def text(
    trie: Trie, prompt: Sequence[int], answers: Sequence[Sequence[int]], condition: int
) -> Text:
    """A prompt and its candidates' tokens, none of them empty, put into the trie.

    A candidate's last token is followed by nothing and needs no node.
    """
    begun = trie.path(prompt, condition)
    nodes, paths = set(begun), []
    for answer in answers:
        before = [begun[-1], *trie.path(answer[:-1], condition, begun[-1])]
        nodes.update(before)
        places = (Place(node, depth) for depth, node in enumerate(before))
        paths.append(list(zip(places, answer, strict=True)))
    return Text(frozenset(nodes), paths)


@dataclasses.dataclass
class Row:
    """Nodes side by side in `length` tokens, and the conditions that they are under."""

    length: int
    nodes: set[int]
    conditions: set[int]

    def gains(self, nodes: Set[int], conditions: Set[int]) -> int | None:
        """How many nodes come to it with these, or None where they do not fit."""
        gained = len(nodes - self.nodes)
        if len(self.nodes) + gained > self.length:
            return None
        return gained if len(self.conditions | conditions) <= CONDITIONS else None


def rows(trie: Trie, texts: Sequence[Text]) -> list[Row]:
    """Rows that have every text whole in one of them, as few as are easily found.

    The longest families come first, each into the row that gains the least by it, and of such the
    fullest. Of a call that fits into one row, the row is as short as that allows.
    """
    made: list[Row] = []
    unfilled: list[Row] = []
    for nodes in sorted(_families(texts), key=len, reverse=True):
        conditions = {trie.condition[node] for node in nodes}
        gains = [row.gains(nodes, conditions) for row in unfilled]
        fits = [
            (gained, row.length - len(row.nodes), place)
            for place, (gained, row) in enumerate(zip(gains, unfilled, strict=True))
            if gained is not None
        ]
        if fits:
            row = unfilled[min(fits)[2]]
        else:
            row = Row(max(ROW, steps_bucket(len(nodes), LENGTH_BUCKET)), set(), set())
            made.append(row)
            unfilled.append(row)
            if len(unfilled) > _UNFILLED:
                room = [row.length - len(row.nodes) for row in unfilled]
                unfilled.pop(int(np.argmin(room)))
        row.nodes |= nodes
        row.conditions |= conditions
    if len(made) == 1:
        made[0].length = steps_bucket(len(made[0].nodes), LENGTH_BUCKET)
    return made


def _families(texts: Sequence[Text]) -> Iterator[set[int]]:
    """The nodes of texts that begin alike, together at most a row, or twice a text that is longer."""
    family: set[int] = set()
    room = ROW
    # Sorted by their beginnings: a text's nodes in the order of their ids begin with its prompt's.
    for nodes in sorted({text.nodes for text in texts}, key=sorted):
        own = ROW if len(nodes) <= ROW else 2 * len(nodes)
        together = family | nodes
        if len(family & nodes) >= SHARED and len(together) <= max(room, own):
            family, room = together, max(room, own)
            continue
        if family:
            yield family
        family, room = set(nodes), own
    if family:
        yield family


def batches(made: Sequence[Row], most: int) -> Iterator[list[Row]]:
    """Rows of one length together, a power of two of them, and at most `most` · ROW tokens.

    So few shapes are compiled, and no row is all padding.
    """
    for length in sorted({row.length for row in made}):
        rest = [row for row in made if row.length == length]
        while rest:
            size = min(len(rest), max(1, most * ROW // length))
            size = 1 << (size.bit_length() - 1)
            yield rest[:size]
            rest = rest[size:]


class Packed(NamedTuple):
    """B rows of T tokens as arrays, and S conditions of each.

    tokens, index: the tokens and their places in their own texts. seen: which tokens of its row a token
    attends to; padding sees itself. owner: which of its row's conditions a token is under. conditions:
    which those are; where a row has fewer, the first is repeated. where: of each row, the token that a
    node of it is; texts that share little may have a node in several rows.
    """

    tokens: Int[np.ndarray, "B T"]
    index: Int[np.ndarray, "B T"]
    seen: Bool[np.ndarray, "B T T"]
    owner: Int[np.ndarray, "B T"]
    conditions: Int[np.ndarray, "B S"]
    where: list[dict[int, int]]


def pack(trie: Trie, batch: Sequence[Row]) -> Packed:
    """Rows of one length as arrays; S is 1 or CONDITIONS, so that few shapes are compiled."""
    count, length = len(batch), batch[0].length
    several = any(len(row.conditions) > 1 for row in batch)
    tokens, index, owner = np.zeros((3, count, length), np.int32)
    seen = np.zeros((count, length, length), bool)
    seen[:, np.arange(length), np.arange(length)] = True
    conditions = np.zeros((count, CONDITIONS if several else 1), np.int32)
    where: list[dict[int, int]] = []
    for number, row in enumerate(batch):
        own = sorted(row.conditions)
        conditions[number] = own[0]
        conditions[number, : len(own)] = own
        place: dict[int, int] = {}
        # Parents have lower ids: what they see is known before their children ask.
        for at, node in enumerate(sorted(row.nodes)):
            place[node] = at
            tokens[number, at], index[number, at] = trie.token[node], trie.depth[node]
            owner[number, at] = own.index(trie.condition[node])
            if trie.parent[node] >= 0:
                seen[number, at] |= seen[number, place[trie.parent[node]]]
        where.append(place)
    return Packed(tokens, index, seen, owner, conditions, where)
