"""Errors as responses: a status, a code and one sentence; and bodies that are read strictly."""

import json
import logging
from collections.abc import Iterable, Mapping
from typing import Any, NewType, TypeVar

from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse

from larimar_jax import schema
from larimar_jax.generate import PromptTooLong
from larimar_jax.memory.finite import MemoryNotFinite, NotKept
from larimar_jax.serve.undo import NoSuchChange
from larimar_jax.session_file import (
    DamagedSession,
    EmptyFact,
    NotText,
    NotUnicode,
    SaveFailed,
    UnknownFact,
    WrongModel,
)
from larimar_jax.weights.tokenizer import TextTooLong

T = TypeVar("T")
# One text or a list of them; and a chat's, which may also come in parts.
Texts, Content = NewType("Texts", tuple), NewType("Content", str)
_LOG = logging.getLogger("larimar")
# Of a message: a text of a client's is not sent back whole.
_LONGEST = 500
# Of a body. Each unknown one is compared with those that are known.
_MOST_FIELDS = 64
_TYPES = {401: "authentication_error", 403: "permission_error", 404: "not_found_error"}
_TYPES |= {429: "rate_limit_error"}
# Status and code of errors. The messages of those from 500 on name files of the server.
_STATUS: dict[type[Exception], tuple[int, str]] = {
    EmptyFact: (400, "empty_text"),
    NotText: (400, "not_text"),
    NotUnicode: (400, "not_unicode"),
    TextTooLong: (400, "text_too_long"),
    PromptTooLong: (400, "prompt_too_long"),
    NoSuchChange: (400, "no_such_change"),
    UnknownFact: (404, "unknown_fact"),
    NotKept: (409, "not_kept"),
    MemoryNotFinite: (409, "not_finite"),
    SaveFailed: (507, "not_saved"),
    WrongModel: (503, "wrong_model"),
    DamagedSession: (503, "damaged_memory"),
    ClientDisconnect: (400, "disconnected"),
}
_HIDDEN = {
    507: "the memory's file could not be written; nothing was changed. The server's log names why.",
    503: "the memory's file cannot be opened under this model. The server's log names why.",
}


class Problem(Exception):
    """A request that is answered by an error."""

    def __init__(self, status: int, code: str, message: str, **headers: str):
        super().__init__(message)
        self.status, self.code, self.headers = status, code, headers


def explain(error: Exception) -> Problem:
    """Return the problem that an error is answered by; one without an explanation is logged."""
    if isinstance(error, Problem):
        return error
    status, code = _STATUS.get(type(error), (500, "internal_error"))
    if status < 500:
        return Problem(status, code, str(error))
    _LOG.error("%s", error, exc_info=error if status == 500 else None)
    return Problem(
        status, code, _HIDDEN.get(status, "an error of the server, which is in its log.")
    )


def response(error: Exception) -> JSONResponse:
    """Return the response to an error, as clients of OpenAI's API read it."""
    problem = explain(error)
    text = str(problem) if len(str(problem)) <= _LONGEST else f"{str(problem)[:_LONGEST]}…"
    kind = _TYPES.get(problem.status, "server_error" if problem.status >= 500 else None)
    content = dict(
        message=text.encode("utf-8", "replace").decode(),
        type=kind or "invalid_request_error",
        param=None,
        code=problem.code,
    )
    return JSONResponse({"error": content}, problem.status, headers=problem.headers)


async def body(request: Request, limit: int) -> bytes:
    """Return a request's body of JSON.

    Raises:
      Problem: 413, it is longer than the limit; 415, it is of another type. A page elsewhere can send
        a browser's plain forms here, but not this type.
    """
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind not in ("application/json", "application/jsonl", "application/x-ndjson"):
        raise Problem(415, "not_json", "the body is JSON: set Content-Type to application/json.")
    content = bytearray()
    async for chunk in request.stream():
        content += chunk
        if len(content) > limit:
            raise Problem(413, "too_large", f"the body is longer than {limit:,} bytes: send less.")
    return bytes(content)


async def json_body(request: Request, limit: int) -> Any:
    """Return what a request's body holds.

    Raises:
      Problem: as `body`; 400, it is no JSON.
    """
    content = await body(request, limit)
    try:
        return json.loads(content)
    except (ValueError, RecursionError) as error:
        raise Problem(400, "not_json", f"the body is no JSON that can be read: {error}.") from error


def read(kind: type[T], values: Any, neutral: Iterable[tuple[str, Any]] = ()) -> T:
    """Return a dataclass from a JSON object; null means that a field is not there.

    Args:
      neutral: fields that are accepted at this value alone.

    Raises:
      Problem: 400, naming all fields that are unknown, missing or of a wrong type.
    """
    if not isinstance(values, dict) or len(values) > _MOST_FIELDS:
        raise Problem(400, "no_object", f"expected an object of at most {_MOST_FIELDS} fields.")
    values = {name: value for name, value in values.items() if value is not None}
    for name, value in neutral:
        wanted = values.pop(name, value)
        # 0 is no False: completions want log probabilities by the one, and chats none by the other.
        if wanted != value or isinstance(wanted, bool) != isinstance(value, bool):
            message = f"{name} is not supported here: leave it out, or set it to {value!r}."
            raise Problem(400, "unsupported", message)
    problems: list[str] = []
    parts = schema.fields(kind, values, "", problems, _READERS)
    if problems:
        raise Problem(400, "invalid", f"the body does not fit: {'; '.join(problems)}.")
    return kind(**parts)


def _texts(value: Any, path: str, problems: list[str]) -> Any:
    values = [value] if isinstance(value, str) else value
    return schema.read(tuple[str, ...], values, path, problems, {})


def _content(value: Any, path: str, problems: list[str]) -> Any:
    if isinstance(value, list):
        if not all(isinstance(part, dict) and isinstance(part.get("text"), str) for part in value):
            problems.append(f"{path}: a message has parts of text alone")
            return None
        value = "\n".join(part["text"] for part in value)
    return schema.read(str, value, path, problems, {})


_READERS: Mapping[Any, schema.Reader] = {Texts: _texts, Content: _content}


def integer(request: Request, name: str, default: int, most: int) -> int:
    """Return a number of the query, from 0 to `most`.

    Raises:
      Problem: 400, it is none.
    """
    text = request.query_params.get(name, str(default))
    if not (text.isascii() and text.isdigit() and len(text) < 16 and int(text) <= most):
        raise Problem(400, "invalid", f"{name} is a number from 0 to {most}.")
    return int(text)
