"""Questions to many memories in one decoder pass (continuous batching).

Questions wait in line. A thread takes the first one and all that are decoded alike (stops, temperature),
reads each memory at its own questions, and decodes them together, so that what one step costs is shared.
After every few tokens those whose answer has ended leave, and those that have come meanwhile enter: a
short answer waits for no long one. Passes of questions that are decoded otherwise go on in turn. Numbers
of rows are padded to powers of four: few programs are compiled. A question of one memory is never read
in another: rows of a pass do not see each other.
"""

import asyncio
import collections
import contextlib
import dataclasses
import threading
import time
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from larimar_jax import generate, scoring
from larimar_jax.latent_layout import Condition, within_answers
from larimar_jax.pipeline import Pipeline
from larimar_jax.scope import Recalled
from larimar_jax.scoring import TokenScores
from larimar_jax.serve.limits import Limits
from larimar_jax.serve.problems import Problem
from larimar_jax.serve.prometheus import Metrics
from larimar_jax.session import Session

# Tokens of a pass's turn; where a client reads along, one.
_TURN = 8
# Passes at a time: each has a cache.
_PASSES = 4
# How long the first question waits for others that are sent at the same time.
_GATHER = 0.005


@dataclasses.dataclass(frozen=True)
class Decoded:
    """How an answer is drawn; of a pass, all alike."""

    stop: tuple[str, ...] = ()
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0


@dataclasses.dataclass(frozen=True)
class Matched:
    """What a question is about: the fact it matches, None out of scope, and the score."""

    fact: int | None
    score: float


class PendingQuestion:
    """A prompt in line, and what comes of it: `Matched`, then pieces, or an error.

    session: None is the base LM. max_tokens: None takes what the fact's answer needs. scores: of its
    tokens, at the last piece, where it is to be scored.
    """

    def __init__(
        self,
        prompt: str,
        session: Session | None,
        decoded: Decoded,
        *,
        max_tokens: int | None = None,
        seed: int = 0,
        is_streamed: bool = False,
        is_scored: bool = False,
    ):
        self.prompt, self.session, self.decoded = prompt, session, decoded
        self.max_tokens, self.seed, self.is_streamed = max_tokens, seed, is_streamed
        self.is_scored = is_scored
        self.scores: TokenScores | None = None
        self.begin, self.is_over = time.monotonic(), False
        self._loop = asyncio.get_running_loop()
        self._queue: asyncio.Queue[Matched | generate.Piece | Exception] = asyncio.Queue()

    def put(self, item: Matched | generate.Piece | Exception) -> None:
        """Hand over what is known, from another thread."""
        if not self.is_over:
            self.is_over = isinstance(item, Exception) or bool(getattr(item, "ending", None))
            self._loop.call_soon_threadsafe(self._queue.put_nowait, item)

    async def next(self) -> Matched | generate.Piece:
        """Return what comes next.

        Raises:
          Exception: what the thread ran into.
        """
        item = await self._queue.get()
        if isinstance(item, Exception):
            raise item
        return item

    async def pieces(self) -> AsyncIterator[generate.Piece]:
        """Yield pieces up to the one that has an ending; who stops earlier gives up the answer."""
        try:
            ending = None
            while ending is None:
                piece = await self.next()
                yield piece
                ending = piece.ending
        finally:
            self.is_over = True


class _PassRow(NamedTuple):
    """A question that is decoded: what is read for it, and its most tokens."""

    question: PendingQuestion
    recall: Recalled
    limit: int


class _Pass(NamedTuple):
    """Questions that are decoded together, in the first rows of `running`."""

    rows: list[_PassRow]
    running: generate.Continuations

    def live(self) -> list[int]:
        """Return the rows whose client waits for more."""
        return [n for n, row in enumerate(self.rows) if not row.question.is_over]

    def join(self, *others: "_Pass") -> "_Pass":
        """Return one of all live rows, of which there is one at least."""
        parts = [(own, live) for own in (self, *others) if (live := own.live())]
        rows = [own.rows[n] for own, live in parts for n in live]
        running = [(own.running, live) for own, live in parts]
        return _Pass(rows, generate.Continuations.join(running, _padded(len(rows))))


class Batcher:
    """The line of questions, and the thread that answers them."""

    def __init__(self, model: Pipeline, limits: Limits, metrics: Metrics):
        self.model, self.limits, self.metrics = model, limits, metrics
        # The cache has to hold prompt and answer.
        self.most_tokens = min(limits.max_tokens, model.model.decoder.config.max_length // 2)
        # What is read without a memory.
        readout = np.zeros((1, model.memory.latent), np.float32)
        readout = within_answers(readout, model.layout, model.config.editing.answer_code, [0])
        self._nothing = Recalled([None], [-1.0], [0], readout, {})
        self._line: collections.deque[PendingQuestion] = collections.deque()
        self._changed, self._is_stopped = threading.Condition(), False
        self._thread = threading.Thread(target=self._run, name="larimar-decoder", daemon=True)

    @property
    def waiting(self) -> int:
        """How many questions are in line."""
        return len(self._line)

    def start(self) -> None:
        """Begin to answer."""
        self._thread.start()

    def stop(self) -> None:
        """Give up what is in line, and end; whoever waits for an answer has gone."""
        with self._changed:
            self._is_stopped = True
            self._line.clear()
            self._changed.notify()
        self._thread.join()

    def submit(self, questions: Sequence[PendingQuestion]) -> None:
        """Put the questions of a request in line, all or none.

        Raises:
          Problem: 429, the line is full; 503, the server is being stopped.
        """
        with self._changed:
            if self._is_stopped:
                raise Problem(503, "stopping", "the server is being stopped.")
            if len(self._line) + len(questions) > self.limits.queue:
                message = f"{len(self._line)} questions wait: try again."
                raise Problem(429, "too_many_questions", message, **{"Retry-After": "1"})
            self._line.extend(questions)
            self._changed.notify()

    def _run(self) -> None:
        passes: dict[Decoded, _Pass] = {}
        while not self._is_stopped:
            if questions := self._take(passes):
                with _telling(questions):
                    self._enter(passes, questions)
            for decoded, own in [*passes.items()]:
                del passes[decoded]
                with _telling([row.question for row in own.rows]):
                    if live := own.live():
                        if _padded(len(live)) < _padded(len(own.rows)):
                            own = own.join()
                        is_streamed = any(row.question.is_streamed for row in own.rows)
                        own.running.advance(1 if is_streamed else _TURN)
                        self._hand_over(own)
                        passes[decoded] = own

    def _take(self, passes: Mapping[Decoded, _Pass]) -> list[PendingQuestion]:
        """Return the first question in line, if there is room for it, and others that are decoded alike;
        where nothing is decoded, wait for one."""
        if not passes:
            with self._changed:
                self._changed.wait_for(lambda: self._line or self._is_stopped)
            time.sleep(_GATHER)
        with self._changed:
            line = [question for question in self._line if not question.is_over]
            alike = [question for question in line if question.decoded == line[0].decoded]
            # None overtakes the first: a pass that others always enter would never make room for it.
            room = self.limits.batch
            if alike and (own := passes.get(line[0].decoded)):
                room -= len(own.live())
            elif len(passes) == _PASSES:
                room = 0
            self._line = collections.deque(q for q in line if q not in alike[:room])
        return alike[:room]

    def _enter(self, passes: dict[Decoded, _Pass], questions: Sequence[PendingQuestion]) -> None:
        """Read memories and prompts; the questions join the pass of those that are decoded alike."""
        recalls, questions = self._recall(questions)
        if not questions:
            return
        decoded, rows = questions[0].decoded, []
        for question, recall in zip(questions, recalls, strict=True):
            most = question.max_tokens or max(generate.Options.max_tokens, recall.tokens[0] + 1)
            rows.append(_PassRow(question, recall, min(most, self.most_tokens)))
        # Rows of padding repeat the first, whose prompt is then read once, and end after a token.
        padding = _padded(len(rows)) - len(rows)
        all_rows = [*rows, *[rows[0]] * padding]
        options = dict(stop=decoded.stop, temperature=decoded.temperature, cut=True)
        if decoded.temperature:
            keys = jnp.stack([jax.random.key(row.question.seed) for row in all_rows])
            options |= dict(top_k=decoded.top_k, top_p=decoded.top_p, rng=keys)
        running = generate.Continuations(
            self.model.model,
            self.model.decoder_tokenizer,
            [row.question.prompt for row in all_rows],
            self._condition([row.recall for row in all_rows]),
            max_tokens=[*[row.limit for row in rows], *[1] * padding],
            stop_after=[row.recall.tokens[0] for row in all_rows],
            **options,
        )
        own = _Pass(rows, running)
        self._hand_over(own)
        if before := passes.get(decoded):
            own = before.join(own)
        else:
            self.metrics.count("larimar_passes_total")
        passes[decoded] = own

    def _condition(self, recalls: Sequence[Recalled]) -> Condition:
        # Further parts of an answer stand behind a readout, of some memories more than of others.
        width = max(recall.readout.shape[1] for recall in recalls)
        readouts = [
            np.pad(recall.readout, ((0, 0), (0, width - recall.readout.shape[1])))
            for recall in recalls
        ]
        inside = np.asarray([recall.facts[0] is not None for recall in recalls])
        return self.model.condition(np.concatenate(readouts), inside)

    def _scores(self, row: _PassRow, tokens: list[int]) -> TokenScores:
        """Return the log probabilities of an answer's tokens, as they were decoded."""
        model = self.model.model
        room = model.decoder.config.max_length - 1 - row.limit
        ids = generate.prompt_ids(self.model.decoder_tokenizer, row.question.prompt)
        ids = generate.without_beginning(ids, room)
        return scoring.token_scores(model, [ids], [tokens], self._condition([row.recall]))[0]

    def _hand_over(self, own: _Pass) -> None:
        """Give each client what its answer has gained."""
        for row, piece in zip(own.rows, own.running.gained(), strict=False):
            question = row.question
            if question.is_over:
                continue
            if question.is_scored and piece.ending and piece.tokens:
                question.scores = self._scores(row, piece.tokens)
            if piece.ending:
                self.metrics.count("larimar_tokens_total", len(piece.tokens))
                self.metrics.observe("larimar_ask_seconds", time.monotonic() - question.begin)
            question.put(piece)

    def _recall(
        self, questions: Sequence[PendingQuestion]
    ) -> tuple[list[Recalled], list[PendingQuestion]]:
        """Return what memories read for each question that is read, and these questions."""
        by_session: dict[Session | None, list[PendingQuestion]] = collections.defaultdict(list)
        for question in questions:
            by_session[question.session].append(question)
        recalls, readable, texts, parts = [], [], [], []
        for session, own in by_session.items():
            if session is None:
                readable += own
                recalls += [self._nothing] * len(own)
                continue
            # An error is of this memory; the others' questions go on.
            with _telling(own):
                first, texts = len(texts), [*texts, *session.questions([q.prompt for q in own])]
                parts.append((session, own, slice(first, len(texts))))
        # Of all memories in one call.
        encodings = self.model.encode(texts, cut=True) if texts else None
        for session, own, places in parts:
            with _telling(own):
                recall = session.read(texts[places], encodings[places])
                readable += own
                recalls += [recall.row(n) for n in range(len(own))]
        for question, recall in zip(readable, recalls, strict=True):
            fact = recall.facts[0]
            self.metrics.count("larimar_answers_total", in_scope=str(fact is not None).lower())
            question.put(Matched(fact, recall.scores[0]))
        return recalls, readable


@contextlib.contextmanager
def _telling(questions: Sequence[PendingQuestion]) -> Iterator[None]:
    """What goes wrong is an error of these questions, each of which raises it."""
    try:
        yield
    except Exception as error:
        for question in questions:
            question.put(error)


def _padded(rows: int) -> int:
    """Return the least power of four that holds so many rows."""
    return 4 ** ((rows - 1).bit_length() + 1 >> 1)
