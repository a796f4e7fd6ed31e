"""Completions and chat completions, as clients of OpenAI's API send them; `model` names a memory.

An answer's choice has, beside what the API has there, `larimar`: whether the question is in scope, the
number of the fact that it matches, and how near its prompt is.
"""

import dataclasses
import functools
import json
import secrets
import time
import uuid
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from typing import Any, Literal

from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse

from larimar_jax import generate, scoring
from larimar_jax.schema import Count, Natural, NonNegative
from larimar_jax.serve import log_probabilities, problems, tenants
from larimar_jax.serve.batching import Decoded, Matched, PendingQuestion
from larimar_jax.serve.problems import Content, Problem, Texts
from larimar_jax.serve.state import Served
from larimar_jax.weights.tokenizer import Tokenizer

# Stops of a request, and the characters of one.
_STOPS, _STOP_LENGTH = 16, 100
# What the decoder cannot do: accepted at the value that asks for nothing.
_NEUTRAL: tuple[tuple[str, Any], ...] = (
    ("n", 1),
    ("best_of", 1),
    ("echo", False),
    ("suffix", ""),
    ("presence_penalty", 0),
    ("frequency_penalty", 0),
    ("logit_bias", {}),
    ("tools", []),
    ("tool_choice", "none"),
    ("response_format", {"type": "text"}),
)
# Of no effect on an answer.
_IGNORED = ("user", "metadata", "store", "service_tier", "parallel_tool_calls")


@dataclasses.dataclass(frozen=True)
class StreamOptions:
    """include_usage: a last chunk holds the number of tokens."""

    include_usage: bool = False


@dataclasses.dataclass(frozen=True, kw_only=True)
class Drawn:
    """What completions and chats have in common."""

    model: str
    max_tokens: Count | None = None
    temperature: NonNegative = 0.0
    top_p: NonNegative = 1.0
    top_k: Natural = 0
    stop: Texts = Texts(())
    seed: int | None = None
    stream: bool = False
    stream_options: StreamOptions = StreamOptions()
    memory: bool = True


@dataclasses.dataclass(frozen=True, kw_only=True)
class CompletionRequest(Drawn):
    """prompt: what is to be continued. model: MODEL or MODEL:MEMORY. max_tokens: default as the fact's
    answer needs, at least 16. memory: whether written facts count; else the base LM answers. logprobs:
    those of each token, and of so many of the likeliest there."""

    prompt: Texts
    logprobs: Natural | None = None


@dataclasses.dataclass(frozen=True)
class Message:
    """A turn of a chat."""

    role: Literal["system", "developer", "user", "assistant"]
    content: Content
    name: str = ""


@dataclasses.dataclass(frozen=True, kw_only=True)
class ChatRequest(Drawn):
    """messages: turns of a chat, the last of which is answered. Else as of completions;
    max_completion_tokens is the newer name of max_tokens."""

    messages: tuple[Message, ...]
    max_completion_tokens: Count | None = None
    logprobs: bool = False
    top_logprobs: Natural = 0


async def completions(request: Request) -> Response:
    """Continue one prompt or several, as OpenAI's API does.

    A choice has `larimar` beside its text: whether a written fact is in scope, the number of that fact,
    and the score of its prompt. With `stream`, events of the server that end with [DONE].
    """
    wanted = problems.read(CompletionRequest, await _values(request), _NEUTRAL)
    return await _respond(request, wanted, wanted.prompt, wanted.stop, wanted.logprobs)


async def chat_completions(request: Request) -> Response:
    """Answer the last turn of a chat, as OpenAI's API does.

    A choice has `larimar`, as of completions.
    """
    wanted = problems.read(ChatRequest, await _values(request), _NEUTRAL)
    wanted = dataclasses.replace(
        wanted, max_tokens=wanted.max_completion_tokens or wanted.max_tokens
    )
    tokenizer = request.app.state.served.model.decoder_tokenizer
    prompt, stop = chat_prompt(tokenizer, wanted.messages)
    likeliest = wanted.top_logprobs if wanted.logprobs else None
    return await _respond(request, wanted, [prompt], (*wanted.stop, *stop), likeliest)


def chat_prompt(tokenizer: Tokenizer, messages: Sequence[Message]) -> tuple[str, tuple[str, ...]]:
    """Return a chat as the decoder continues it, and what ends a turn.

    Turns are in ChatML where the tokenizer has its tokens, and else named in plain text.
    """
    if tokenizer.backend.token_to_id("<|im_start|>") is None:
        turns = [f"{message.role.capitalize()}: {message.content}\n" for message in messages]
        return "".join(turns) + "Assistant:", ("\nUser:",)
    turns = [f"<|im_start|>{message.role}\n{message.content}<|im_end|>\n" for message in messages]
    return "".join(turns) + "<|im_start|>assistant\n", ("<|im_end|>",)


async def _values(request: Request) -> dict[str, Any]:
    served: Served = request.app.state.served
    values = await problems.json_body(request, served.limits.body)
    if not isinstance(values, dict):
        raise Problem(400, "no_object", "the body is an object, such as {'model': …, 'prompt': …}.")
    return {name: value for name, value in values.items() if name not in _IGNORED}


async def _respond(
    request: Request,
    wanted: Drawn,
    prompts: Sequence[str],
    stop: tuple[str, ...],
    likeliest: int | None,
) -> Response:
    served: Served = request.app.state.served
    if (likeliest or 0) > scoring.TOP:
        raise Problem(
            400, "invalid", f"log probabilities are of the {scoring.TOP} likeliest at most."
        )
    questions = await _questions(served, request, wanted, prompts, stop, likeliest is not None)
    served.batcher.submit(questions)
    # An error of these is the response's status.
    matches = [await question.next() for question in questions]
    answers = [*zip(questions, matches, strict=True)]
    is_chat, tokenizer = isinstance(wanted, ChatRequest), served.model.decoder_tokenizer
    likely = None
    if likeliest is not None:
        options = dict(likeliest=likeliest, is_chat=is_chat)
        likely = functools.partial(log_probabilities.as_sent, tokenizer, **options)
    head = dict(id=uuid.uuid4().hex, created=int(time.time()), model=wanted.model)
    head["object"] = "chat.completion" if is_chat else "text_completion"
    tokens = sum(len(generate.prompt_ids(tokenizer, prompt)) for prompt in prompts)
    if wanted.stream:
        head["object"] += ".chunk" if is_chat else ""
        usage = tokens if wanted.stream_options.include_usage else None
        events = _events(head, is_chat, answers, usage, likely)
        return StreamingResponse(events, media_type="text/event-stream")
    choices, more = [], 0
    for place, (question, match) in enumerate(answers):
        pieces = [piece async for piece in question.pieces()]
        text, more = "".join(piece.text for piece in pieces), more + len(pieces[-1].tokens)
        content = dict(text=text)
        if is_chat:
            content = dict(message=dict(role="assistant", content=text.strip(), refusal=None))
        scores = likely and likely(text, pieces[-1].tokens, question.scores)
        choices.append(_choice(content, place, pieces[-1].ending, match, scores))
    return JSONResponse(dict(head, choices=choices, usage=_usage(tokens, more)))


async def _questions(
    served: Served,
    request: Request,
    wanted: Drawn,
    prompts: Sequence[str],
    stop: tuple[str, ...],
    is_scored: bool,
) -> list[PendingQuestion]:
    """Return a request's questions.

    Raises:
      Problem: what it wants is beyond a limit, or of a memory that is not there or not the caller's.
    """
    limits, most = served.limits, served.batcher.most_tokens
    name = served.memory_name(wanted.model)
    tenants.require_name(name)
    request.scope["caller"].require("read", name)
    if not 1 <= len(prompts) <= limits.prompts:
        raise Problem(400, "too_many_prompts", f"a request has 1 to {limits.prompts} prompts.")
    for prompt in prompts:
        served.require_text("a prompt", prompt)
    if len(stop) > _STOPS or any(len(text) > _STOP_LENGTH for text in stop):
        message = f"stop has at most {_STOPS} texts, of at most {_STOP_LENGTH} characters each."
        raise Problem(400, "invalid", message)
    for text in stop:
        served.require_text("a stop", text, empty=True)
    if (wanted.max_tokens or 1) > most:
        message = f"max_tokens is at most {most}; got {wanted.max_tokens}."
        raise Problem(400, "too_many_tokens", message)
    if not 0 < wanted.top_p <= 1 or wanted.temperature > 100:
        message = "temperature is at most 100, top_p above 0 and at most 1."
        raise Problem(400, "invalid", message)
    decoded = Decoded(stop)
    # Below, the likeliest token is all that is drawn.
    if wanted.temperature >= 1e-3:
        top_k = min(wanted.top_k, served.model.decoder_tokenizer.vocab_size)
        decoded = Decoded(stop, wanted.temperature, top_k, wanted.top_p)
    session = (await served.memories.get(name)).session if wanted.memory else None
    seed = secrets.randbits(31) if wanted.seed is None else wanted.seed % 2**31
    return [
        PendingQuestion(
            prompt,
            session,
            decoded,
            max_tokens=wanted.max_tokens,
            seed=(seed + place) % 2**31,
            is_streamed=wanted.stream,
            is_scored=is_scored,
        )
        for place, prompt in enumerate(prompts)
    ]


async def _events(
    head: Mapping[str, Any],
    is_chat: bool,
    answers: Sequence[tuple[PendingQuestion, Matched]],
    usage: int | None,
    likely: Callable[..., dict[str, Any]] | None,
) -> AsyncIterator[str]:
    """Yield server-sent events: the pieces of each answer in turn, and the usage where it is wanted; log
    probabilities with the last piece."""
    tokens = 0
    try:
        for place, (question, match) in enumerate(answers):
            first: Matched | None = match
            whole = ""
            async for piece in question.pieces():
                content: dict[str, Any] = dict(text=piece.text)
                if is_chat:
                    # The blank between prompt and answer is no part of a turn.
                    role = dict(role="assistant") if first else {}
                    text = piece.text.lstrip() if first else piece.text
                    content = dict(delta=dict(role, content=text))
                whole += piece.text
                if piece.text or piece.ending:
                    is_last = likely and piece.ending
                    scores = likely(whole, piece.tokens, question.scores) if is_last else None
                    choice = _choice(content, place, piece.ending, first, scores)
                    yield _event(dict(head, choices=[choice]))
                    first = None
            tokens += len(piece.tokens)
        if usage is not None:
            yield _event(dict(head, choices=[], usage=_usage(usage, tokens)))
        yield "data: [DONE]\n\n"
    except Exception as error:  # The status is sent: it is an event.
        yield _event(json.loads(problems.response(error).body))
    finally:
        for question, _ in answers:
            question.is_over = True


def _event(content: Mapping[str, Any]) -> str:
    return f"data: {json.dumps(content, ensure_ascii=False)}\n\n"


def _choice(
    content: dict[str, Any],
    place: int,
    ending: str | None,
    match: Matched | None,
    scores: dict[str, Any] | None,
) -> dict[str, Any]:
    choice = dict(content, index=place, logprobs=scores, finish_reason=ending)
    if match is not None:
        in_scope = match.fact is not None
        choice["larimar"] = dict(in_scope=in_scope, fact=match.fact, score=match.score)
    return choice


def _usage(prompt: int, completion: int) -> dict[str, int]:
    total = prompt + completion
    return dict(prompt_tokens=prompt, completion_tokens=completion, total_tokens=total)
