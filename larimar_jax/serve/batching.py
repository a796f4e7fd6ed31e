"""Questions to many memories in one decoder pass.

Questions wait in line. A thread takes the first one and all that are decoded alike (stops, temperature),
reads each memory at its own questions, and decodes them together, so that what one pass costs is shared.
Numbers of rows are padded to powers of four: few programs are compiled. What comes meanwhile is in the
next pass, which begins at the end of the one before, or beside it after its first `_SHORT` tokens: from
there on passes go on in turn. A question of one memory is never read in another: rows of a pass do not
see each other.
"""

import asyncio
import collections
import dataclasses
import threading
import time
from collections.abc import AsyncIterator, Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from larimar_jax import generate, scoring
from larimar_jax.pipeline import Pipeline
from larimar_jax.scope import Recalled
from larimar_jax.scoring import TokenScores
from larimar_jax.serve.limits import Limits
from larimar_jax.serve.problems import Problem
from larimar_jax.serve.prometheus import Metrics
from larimar_jax.session import Session

# Tokens of a pass's turn, and its first ones, in which none begins beside it: most answers end there.
_TURN, _SHORT = 16, 33
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


class _Pass:
    """A pass on its way. tokens: how many of each answer it has decoded, at the most."""

    def __init__(self, questions: Sequence[PendingQuestion], steps: Iterator[int]):
        self.questions, self.steps, self.tokens = questions, steps, 0

    def go_on(self) -> bool:
        """Decode a turn's tokens, and return whether there may be more."""
        end = self.tokens + _TURN
        try:
            while self.tokens < end:
                self.tokens += next(self.steps)
        except StopIteration:
            return False
        except Exception as error:  # Of this pass; each of its questions raises it.
            for question in self.questions:
                question.put(error)
            return False
        return True


class Batcher:
    """The line of questions, and the thread that answers them."""

    def __init__(self, model: Pipeline, limits: Limits, metrics: Metrics):
        self.model, self.limits, self.metrics = model, limits, metrics
        # The cache has to hold prompt and answer.
        self.most_tokens = min(limits.max_tokens, model.model.decoder.config.max_length // 2)
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
        passes: list[_Pass] = []
        while not self._is_stopped:
            if len(passes) < _PASSES and all(own.tokens >= _SHORT for own in passes):
                if questions := self._take(is_idle=not passes):
                    passes.append(_Pass(questions, self._answer(questions)))
            passes = [own for own in passes if own.go_on()]

    def _take(self, is_idle: bool) -> list[PendingQuestion]:
        """Return the first question in line and those that are decoded alike; if idle, wait for one."""
        if is_idle:
            with self._changed:
                self._changed.wait_for(lambda: self._line or self._is_stopped)
            time.sleep(_GATHER)
        with self._changed:
            line = [question for question in self._line if not question.is_over]
            alike = [question for question in line if question.decoded == line[0].decoded]
            chosen = alike[: self.limits.batch]
            self._line = collections.deque(q for q in line if q not in chosen)
        return chosen

    def _answer(self, questions: Sequence[PendingQuestion]) -> Iterator[int]:
        """Answer questions in one pass, yielding after every few tokens how many."""
        recall, questions = self._recall(questions)
        if not questions:
            return
        decoded, count = questions[0].decoded, len(questions)
        limits = [
            min(q.max_tokens or max(generate.Options.max_tokens, tokens + 1), self.most_tokens)
            for q, tokens in zip(questions, recall.tokens, strict=True)
        ]
        # Rows of padding repeat the first, whose prompt is then read once, and end after a token.
        padding = 4 ** ((count - 1).bit_length() + 1 >> 1) - count
        rows = [*range(count), *[0] * padding]
        parts = [[part[row] for row in rows] for part in recall[:3]]
        padded = Recalled(*parts, recall.readout[rows], {})
        options = dict(stop=decoded.stop, temperature=decoded.temperature, cut=True)
        if decoded.temperature:
            keys = jnp.stack([jax.random.key(questions[row].seed) for row in rows])
            options |= dict(top_k=decoded.top_k, top_p=decoded.top_p, rng=keys)
        steps = generate.pieces(
            self.model.model,
            self.model.decoder_tokenizer,
            [questions[row].prompt for row in rows],
            padded.condition(self.model.condition),
            every=(every := 1 if any(q.is_streamed for q in questions) else _TURN),
            max_tokens=[*limits, *[1] * padding],
            stop_after=padded.tokens,
            **options,
        )
        self.metrics.count("larimar_passes_total")
        for pieces in steps:
            for row, (question, piece) in enumerate(zip(questions, pieces, strict=False)):
                if question.is_scored and piece.ending and piece.tokens:
                    question.scores = self._scores(question, piece.tokens, limits[row], recall, row)
                self._hand_over(question, piece)
            if all(question.is_over for question in questions):
                break
            yield every

    def _scores(
        self, question: PendingQuestion, tokens: list[int], limit: int, recall: Recalled, row: int
    ) -> TokenScores:
        """Return the log probabilities of an answer's tokens, as they were decoded."""
        model, room = self.model.model, self.model.model.decoder.config.max_length - 1 - limit
        ids = generate.prompt_ids(self.model.decoder_tokenizer, question.prompt)
        ids = generate.without_beginning(ids, room)
        own = Recalled(*([part[row]] for part in recall[:3]), recall.readout[row : row + 1], {})
        condition = own.condition(self.model.condition)
        return scoring.token_scores(model, [ids], [tokens], condition)[0]

    def _hand_over(self, question: PendingQuestion, piece: generate.Piece) -> None:
        if question.is_over:
            return
        question.put(piece)
        if piece.ending:
            self.metrics.count("larimar_tokens_total", len(piece.tokens))
            self.metrics.observe("larimar_ask_seconds", time.monotonic() - question.begin)

    def _recall(
        self, questions: Sequence[PendingQuestion]
    ) -> tuple[Recalled, list[PendingQuestion]]:
        """Return what the memories read, and the questions that are read, in the order of the rows."""
        by_session: dict[Session | None, list[PendingQuestion]] = collections.defaultdict(list)
        for question in questions:
            by_session[question.session].append(question)
        recalls, readable = [], []
        for session, own in by_session.items():
            try:
                recalls.append(self._recall_one(session, [q.prompt for q in own]))
            except Exception as error:  # Of this memory; the others' questions go on.
                for question in own:
                    question.put(error)
                continue
            readable += own
            for question, fact, score in zip(own, *recalls[-1][:2], strict=True):
                self.metrics.count("larimar_answers_total", in_scope=str(fact is not None).lower())
                question.put(Matched(fact, score))
        # Further parts of an answer stand behind a readout, of some memories more than of others.
        width = max((recall.readout.shape[1] for recall in recalls), default=0)
        readouts = [
            np.pad(recall.readout, ((0, 0), (0, width - recall.readout.shape[1])))
            for recall in recalls
        ]
        joined = [sum((recall[part] for recall in recalls), []) for part in range(3)]
        return Recalled(*joined, np.concatenate(readouts) if readouts else _NOTHING, {}), readable

    def _recall_one(self, session: Session | None, prompts: Sequence[str]) -> Recalled:
        if session is not None:
            return session.recall(prompts)
        count = len(prompts)
        readout = np.zeros((count, self.model.memory.latent), np.float32)
        return Recalled([None] * count, [-1.0] * count, [0] * count, readout, {})


_NOTHING = np.zeros((0, 0), np.float32)
