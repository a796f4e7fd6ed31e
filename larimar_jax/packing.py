"""Texts as a trie, several of them side by side in a row of the decoder.

A token attends to what comes before it in its own text. So two texts under one condition share the
tokens that they begin with, and each of these tokens is computed once: for the candidates of a prompt,
for the prompts behind one fact, or for a prompt that occurs twice. Texts that share nothing do not see
each other and still stand in one row, which is then full of tokens and not of padding.

    texts ─▶ Trie ─▶ families, whose texts share much ─▶ rows of a bucketed length ─▶ arrays of B rows
"""

import dataclasses
import functools
import hashlib
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int

from larimar_jax.decoders.decoder import Cache, Tree
from larimar_jax.latent_layout import Condition, TokenEvidence

# Lengths and numbers of rows grow in steps of a quarter to a half, so that few shapes are compiled.
LENGTH_BUCKET = 8
# The length of a row, where nothing is longer and not all of a call is shorter: four or five prompts.
# Attention is quadratic in it; in a shorter one less fits exactly.
ROW = 64
# The most conditions in a row.
CONDITIONS = 8
# Texts that begin with so many equal tokens are placed together.
SHARED = 4
# How many rows that are not full a text is tried on.
_UNFILLED = 32


@runtime_checkable
class LanguageModel(Protocol):
    """What is decoded: a `Larimar`, or anything else around a `decoders.decoder.Decoder`."""

    decoder: Any
    hidden: Any
    """(tokens, condition, cache, start, tree, product_dtype) → (last hidden states, cache), as
    `Decoder.hidden`."""


def steps_bucket(size: int, unit: int) -> int:
    """Return the least of unit × (1, 2, 3, 4, 6, 8, 12, 16, …) that holds `size`."""
    whole = max(1, -(-size // unit))
    power = 1 << (whole - 1).bit_length()
    return unit * (power * 3 // 4 if power >= 4 and whole <= power * 3 // 4 else power)


class TokenPlace(NamedTuple):
    """Where a token is scored: after which node, and how many tokens into the answer that is."""

    node: int
    depth: int


@dataclasses.dataclass(frozen=True)
class Text:
    """A prompt with its candidates: all nodes, and for each token of each candidate its place and id."""

    nodes: frozenset[int]
    paths: Sequence[Sequence[tuple[TokenPlace, int]]] = ()


class Trie:
    """Every token of a call, once for each different beginning under each condition.

    token, parent, depth, condition: of each node. A node's id is above its parent's. A first token's
    parent is −1, and its depth 0.
    """

    def __init__(self):
        self.token: list[int] = []
        self.parent: list[int] = []
        self.depth: list[int] = []
        self.condition: list[int] = []
        self._nodes: dict[tuple[int, int, int], int] = {}

    def path(self, tokens: Sequence[int], condition: int, after: int = -1) -> list[int]:
        """Return the nodes of tokens that follow a node, adding those that are missing."""
        nodes = []
        for token in tokens:
            key = (condition, after, token)
            if key not in self._nodes:
                self._nodes[key] = len(self.token)
                self.token.append(token)
                self.parent.append(after)
                self.depth.append(0 if after < 0 else self.depth[after] + 1)
                self.condition.append(condition)
            after = self._nodes[key]
            nodes.append(after)
        return nodes

    def add(self, prompt: Sequence[int], answers: Sequence[Sequence[int]], condition: int) -> Text:
        """Add a prompt and its candidates' tokens, none of them empty.

        A candidate's last token is followed by nothing and needs no node.
        """
        stem = self.path(prompt, condition)
        nodes, paths = set(stem), []
        for answer in answers:
            before = [stem[-1], *self.path(answer[:-1], condition, stem[-1])]
            nodes.update(before)
            places = (TokenPlace(node, depth) for depth, node in enumerate(before))
            paths.append(list(zip(places, answer, strict=True)))
        return Text(frozenset(nodes), paths)


@dataclasses.dataclass
class Row:
    """Nodes side by side in `length` tokens, and the conditions that they are under."""

    length: int
    nodes: set[int] = dataclasses.field(default_factory=set)
    conditions: set[int] = dataclasses.field(default_factory=set)


def fill_rows(trie: Trie, texts: Sequence[Text]) -> list[Row]:
    """Return rows that have every text whole in one of them, as few as are easily reached.

    The longest families come first, each into the row that gains the least by it, and of such the
    fullest. Of a call that fits into one row, the row is as short as that allows.
    """
    rows: list[Row] = []
    unfilled: list[Row] = []
    for nodes in sorted(_families(texts), key=len, reverse=True):
        conditions = {trie.condition[node] for node in nodes}
        fits = []
        for place, row in enumerate(unfilled):
            gained, space = len(nodes - row.nodes), row.length - len(row.nodes)
            if gained <= space and len(row.conditions | conditions) <= CONDITIONS:
                fits.append((gained, space, place))
        if fits:
            row = unfilled[min(fits)[2]]
        else:
            row = Row(max(ROW, steps_bucket(len(nodes), LENGTH_BUCKET)))
            rows.append(row)
            unfilled.append(row)
            if len(unfilled) > _UNFILLED:
                space = [row.length - len(row.nodes) for row in unfilled]
                unfilled.pop(int(np.argmin(space)))
        row.nodes |= nodes
        row.conditions |= conditions
    if len(rows) == 1:
        rows[0].length = steps_bucket(len(rows[0].nodes), LENGTH_BUCKET)
    return rows


def _families(texts: Sequence[Text]) -> Iterator[set[int]]:
    """Yield nodes of texts that begin alike: at most a row of them, or twice a text that is longer."""
    family: set[int] = set()
    space = ROW
    # Sorted by their beginnings: a text's nodes in the order of their ids begin with its prompt's.
    for nodes in sorted({text.nodes for text in texts}, key=sorted):
        own = ROW if len(nodes) <= ROW else 2 * len(nodes)
        together = family | nodes
        if len(family & nodes) >= SHARED and len(together) <= max(space, own):
            family, space = together, max(space, own)
            continue
        if family:
            yield family
        family, space = set(nodes), own
    if family:
        yield family


def batches(rows: Sequence[Row], limit: int) -> Iterator[list[Row]]:
    """Yield rows of one length, a power of two of them, and at most `limit` · ROW tokens.

    So few shapes are compiled, and no row is all padding.
    """
    for length in sorted({row.length for row in rows}):
        rest = [row for row in rows if row.length == length]
        while rest:
            size = min(len(rest), max(1, limit * ROW // length))
            size = 1 << (size.bit_length() - 1)
            yield rest[:size]
            rest = rest[size:]


class Packed(NamedTuple):
    """B rows of T tokens as arrays, and S conditions of each.

    tokens, index: the tokens and their places in their own texts. visible: which tokens of its row a
    token attends to; padding attends to itself. owner: which of its row's conditions a token is under.
    conditions: which those are; where a row has fewer, the first is repeated. where: of each row, the
    token that a node of it is; texts that share little may have a node in several rows.
    """

    tokens: Int[np.ndarray, "B T"]
    index: Int[np.ndarray, "B T"]
    visible: Bool[np.ndarray, "B T T"]
    owner: Int[np.ndarray, "B T"]
    conditions: Int[np.ndarray, "B S"]
    where: list[dict[int, int]]


def pack(trie: Trie, batch: Sequence[Row]) -> Packed:
    """Return rows of one length as arrays; S is 1 or CONDITIONS, so that few shapes are compiled."""
    count, length = len(batch), batch[0].length
    several = any(len(row.conditions) > 1 for row in batch)
    tokens, index, owner = np.zeros((3, count, length), np.int32)
    visible = np.zeros((count, length, length), bool)
    visible[:, np.arange(length), np.arange(length)] = True
    conditions = np.zeros((count, CONDITIONS if several else 1), np.int32)
    where: list[dict[int, int]] = []
    for number, row in enumerate(batch):
        own = sorted(row.conditions)
        conditions[number] = own[0]
        conditions[number, : len(own)] = own
        place: dict[int, int] = {}
        # Parents have lower ids: what they attend to is known before their children need it.
        for at, node in enumerate(sorted(row.nodes)):
            place[node] = at
            tokens[number, at], index[number, at] = trie.token[node], trie.depth[node]
            owner[number, at] = own.index(trie.condition[node])
            if trie.parent[node] >= 0:
                visible[number, at] |= visible[number, place[trie.parent[node]]]
        where.append(place)
    return Packed(tokens, index, visible, owner, conditions, where)


class ConditionRows:
    """The rows of a condition on the host, where equal rows are recognised and taken without compiling.

    first: of each prompt, the first row that equals its own. A condition of None has equal, empty rows.

    Raises:
      ValueError: a condition has fewer rows than there are prompts.
    """

    def __init__(self, condition: Condition | None, prompts: int):
        if condition is not None and (rows := condition.count) < prompts:
            raise ValueError(
                f"the condition has {rows} rows for {prompts} prompts; row i of it belongs to prompt i"
            )
        self._condition = _on_host(condition)
        self._of_answers = _on_host((None, None) if condition is None else condition.of_answer)
        self.first: list[int] = []
        rows_by_digest: dict[bytes, int] = {}
        for row in range(prompts):
            content = b"".join(leaf.take(row, axis).tobytes() for leaf, axis in self._condition[0])
            digest = hashlib.sha256(content).digest()
            self.first.append(rows_by_digest.setdefault(digest, row))

    def take(self, rows: Int[np.ndarray, " R"]) -> Condition | None:
        """Return the condition of chosen rows."""
        return _on_device(self._condition, rows)

    def of_answers(self, rows: Int[np.ndarray, " R"]) -> tuple[Array | None, TokenEvidence | None]:
        """Return what chosen rows hold of answers: slots are large, and logits need none of them."""
        return _on_device(self._of_answers, rows)


def _on_host(tree: Any) -> tuple[list[tuple[np.ndarray, int]], Any]:
    """Return the leaves of a condition with the axis of their rows, and the tree that they are of."""
    leaves, structure = jax.tree.flatten(tree)
    # Slots lead with their layer.
    return [(np.asarray(leaf), 1 if leaf.ndim == 5 else 0) for leaf in leaves], structure


def _on_device(tree: tuple[list[tuple[np.ndarray, int]], Any], rows: Int[np.ndarray, " R"]) -> Any:
    leaves, structure = tree
    return structure.unflatten([jax.device_put(leaf.take(rows, axis)) for leaf, axis in leaves])


def read(
    model: LanguageModel,
    trie: Trie,
    texts: Sequence[Text],
    conditions: ConditionRows,
    limit: int,
    with_cache: bool = False,
    product_dtype: DTypeLike | None = None,
) -> Iterator[tuple[Packed, Float[Array, "B T D"], Cache | None]]:
    """Yield packed rows with the decoder's last hidden states, and with its keys and values if wanted.

    A masked place has no weight, but 0 times what is not finite still spreads to all of its row. Texts
    that are not finite come once more at the end, each in a row of its own; what comes last counts.

    Args:
      limit: the most rows of `ROW` tokens at a time; of longer ones as many as have no more tokens.
      product_dtype: what the factors of products with kernels are rounded to.
    """
    graph, state = nnx.split(model)
    checks: list[tuple[Packed, Array]] = []
    for batch in batches(fill_rows(trie, texts), limit):
        packed = pack(trie, batch)
        condition = conditions.take(packed.conditions.ravel())
        owner = None if packed.conditions.shape[1] == 1 else packed.owner
        tokens, *parts = jax.device_put((packed.tokens, packed.index, packed.visible, owner))
        how = (with_cache, product_dtype)
        hidden, cache, finite = _hidden(graph, state, tokens, Tree(*parts), condition, *how)
        checks.append((packed, finite))
        yield packed, hidden, cache
    broken = {
        node
        for packed, finite in checks
        for where, row in zip(packed.where, np.asarray(finite), strict=True)
        for node, at in where.items()
        if not row[at]
    }
    unlike = {text.nodes: text for text in texts}
    for text in unlike.values() if len(unlike) > 1 else ():
        if not broken.isdisjoint(text.nodes):
            yield from read(model, trie, [text], conditions, limit, with_cache, product_dtype)


@functools.partial(jax.jit, static_argnums=(0, 5, 6))
def _hidden(
    graph: nnx.GraphDef,
    state: nnx.State,
    tokens: Int[Array, "B T"],
    tree: Tree,
    condition: Condition | None,
    with_cache: bool,
    product_dtype: DTypeLike | None,
) -> tuple[Float[Array, "B T D"], Cache | None, Bool[Array, "B T"]]:
    """Return hidden states, keys and values, and which tokens are finite; a row has S conditions."""
    model = nnx.merge(graph, state)
    hidden, cache = model.hidden(tokens, condition, tree=tree, product_dtype=product_dtype)
    return hidden, cache if with_cache else None, jnp.isfinite(hidden).all(axis=-1)
