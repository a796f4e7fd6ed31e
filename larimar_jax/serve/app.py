"""The application: routes, the gate before them, and what runs beside requests."""

import asyncio
import contextlib
import json
import logging
from collections.abc import AsyncIterator, Sequence
from pathlib import Path

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from larimar_jax.memory.finite import NotKept
from larimar_jax.pipeline import Pipeline
from larimar_jax.serve import completions, facts, openapi, problems
from larimar_jax.serve.access import Access
from larimar_jax.serve.batching import Batcher, Decoded, PendingQuestion
from larimar_jax.serve.limits import Limits
from larimar_jax.serve.openapi import Operation
from larimar_jax.serve.prometheus import Metrics
from larimar_jax.serve.state import Served
from larimar_jax.serve.tenants import DEFAULT, MemoryFolder
from larimar_jax.serve.undo import Undo
from larimar_jax.session import Session

_LOG = logging.getLogger("larimar")
_PAGE = Path(__file__).parent / "page"
_FILES = {
    "/": ("page.html", "text/html"),
    "/page.css": ("page.css", "text/css"),
    "/page.js": ("page.js", "text/javascript"),
    "/icon.svg": ("icon.svg", "image/svg+xml"),
}
# What the page may load: nothing from elsewhere.
_POLICY = "default-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
# Of no memory: whoever restarts a server has no token.
_OPEN = ("/healthz", "/healthz/ready")
_CLOSE_EVERY = 30.0


def build(
    model: Pipeline,
    folder: Path,
    *,
    access: Access | None = None,
    limits: Limits | None = None,
    hosts: Sequence[str] = ("*",),
    cors: Sequence[str] = (),
    warm_up: bool = True,
) -> Starlette:
    """Return the application.

    Args:
      folder: of the memories' files.
      hosts: names by which the server is reached; a page elsewhere that has its own name resolve to
        this host is none.
      cors: origins of pages that may send requests.
      warm_up: compile the programs of usual requests first; they are answered meanwhile.
    """
    limits, metrics = limits or Limits(), Metrics()
    memories = MemoryFolder(model, folder, limits, metrics)
    batcher = Batcher(model, limits, metrics)
    served = Served(model, memories, batcher, access or Access(), limits, metrics, not warm_up)
    middleware = [Middleware(TrustedHostMiddleware, allowed_hosts=list(hosts))]
    if cors:
        options = dict(allow_methods=["*"], allow_headers=["*"])
        middleware.append(Middleware(CORSMiddleware, allow_origins=list(cors), **options))
    middleware.append(Middleware(Gate, served=served))
    handlers = {HTTPException: _http_error}
    app = Starlette(
        routes=_routes(), middleware=middleware, exception_handlers=handlers, lifespan=_running
    )
    app.state.served = served
    return app


class Gate:
    """What every request passes: its caller's token, the count of responses, errors as responses."""

    def __init__(self, app: ASGIApp, served: Served):
        self.app, self.served = app, served

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on."""
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        status = 0

        async def send_counted(message: Message) -> None:
            nonlocal status
            status = message.get("status", status)
            await send(message)

        try:
            if scope["path"] not in _OPEN:
                authorization = Request(scope).headers.get("authorization", "")
                scope["caller"] = self.served.access.caller(authorization)
            await self.app(scope, receive, send_counted)
        except Exception as error:
            if status:  # The response has begun, and can only break off.
                raise
            await problems.response(error)(scope, receive, send_counted)
        finally:
            endpoint = getattr(scope.get("endpoint"), "__name__", "none")
            labels = dict(endpoint=endpoint, status=str(status))
            self.served.metrics.count("larimar_requests_total", **labels)


async def models(request: Request) -> Response:
    """List the memories that the caller may read, as models: MODEL, MODEL:MEMORY."""
    served: Served = request.app.state.served
    may = request.scope["caller"].may
    names = [name for name in served.memories.names() if may("read", name)]
    ids = [f"{served.model_name}:{n}" if n != DEFAULT else served.model_name for n in names]
    data = [dict(id=i, object="model", created=0, owned_by="larimar") for i in sorted(ids)]
    return JSONResponse(dict(object="list", data=data))


async def alive(request: Request) -> Response:
    """Answer while the process lives."""
    return JSONResponse(dict(status="ok"))


async def ready(request: Request) -> Response:
    """Answer 200 once usual programs are compiled, and 503 before and while the server ends."""
    is_ready = request.app.state.served.is_ready
    return JSONResponse(dict(ready=is_ready), 200 if is_ready else 503)


async def metrics(request: Request) -> Response:
    """Show counts and times in Prometheus' text format."""
    served: Served = request.app.state.served
    gauges = [
        ("larimar_queue", {}, float(served.batcher.waiting)),
        ("larimar_ready", {}, float(served.is_ready)),
    ]
    for name, memory in served.memories.open.items():
        gauges.append(("larimar_facts", dict(memory=name), float(len(memory.session.list()))))
    text = served.metrics.text(gauges)
    return PlainTextResponse(text, media_type="text/plain; version=0.0.4")


_LINES, _PLAIN = "application/jsonl", "text/plain"
_MEMORY = "/v1/memories/{name}"
_FACTS, _FACT = f"{_MEMORY}/facts", f"{_MEMORY}/facts/{{fact}}"
_PAGES = ("limit", "after")
_OPERATIONS = (
    Operation("POST", "/v1/completions", completions.completions, completions.CompletionRequest),
    Operation(
        "POST", "/v1/chat/completions", completions.chat_completions, completions.ChatRequest
    ),
    Operation("GET", "/v1/models", models),
    Operation("POST", _FACTS, facts.write, facts.NewFact, many=True),
    Operation("GET", _FACTS, facts.list_facts, query=("q", *_PAGES)),
    Operation("GET", _FACT, facts.show),
    Operation("PATCH", _FACT, facts.change, facts.FactChange),
    Operation("DELETE", _FACT, facts.forget, query=("purge",)),
    Operation("POST", f"{_MEMORY}/undo", facts.undo, Undo),
    Operation("GET", f"{_MEMORY}/history", facts.history, query=_PAGES),
    Operation("GET", f"{_MEMORY}/health", facts.health),
    Operation("GET", f"{_MEMORY}/export", facts.export, media=_LINES),
    Operation("POST", f"{_MEMORY}/import", facts.import_facts, media=_LINES),
    Operation("GET", "/healthz", alive),
    Operation("GET", "/healthz/ready", ready),
    Operation("GET", "/metrics", metrics, media=_PLAIN),
)


def _page(path: str, content: bytes | str, media_type: str) -> Route:
    async def page(request: Request) -> Response:
        headers = {"Content-Security-Policy": _POLICY, "Cache-Control": "no-cache"}
        headers |= {"X-Content-Type-Options": "nosniff", "Referrer-Policy": "no-referrer"}
        return Response(content, media_type=media_type, headers=headers)

    return Route(path, page)


def _routes() -> list[Route]:
    document = openapi.document(_OPERATIONS)
    pages = [(path, (_PAGE / name).read_bytes(), kind) for path, (name, kind) in _FILES.items()]
    pages.append(("/openapi.json", json.dumps(document), "application/json"))
    pages.append(("/docs", openapi.page(document), "text/html"))
    # A name of any characters: what is none is an error of its own, and reaches no file.
    return [_page(*page) for page in pages] + [
        Route(o.path.replace("{name}", "{name:path}"), o.endpoint, methods=[o.method])
        for o in _OPERATIONS
    ]


async def _http_error(request: Request, error: Exception) -> Response:
    """Answer for a path or a method that is not there, in the same form as any error."""
    assert isinstance(error, HTTPException)
    problem = problems.Problem(
        error.status_code, "http_error", f"{error.detail}: /docs lists what there is."
    )
    problem.headers = dict(error.headers or {})
    return problems.response(problem)


@contextlib.asynccontextmanager
async def _running(app: Starlette) -> AsyncIterator[None]:
    """Open the default memory, compile, close idle memories; at the end, finish what has begun."""
    served: Served = app.state.served
    served.batcher.start()
    await served.memories.get(DEFAULT, create=True)
    tasks = [asyncio.create_task(_close_idle(served))]
    if not served.is_ready:
        tasks.append(asyncio.create_task(_warm_up(served)))
    yield
    served.is_ready = False
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    await asyncio.to_thread(served.batcher.stop)
    served.memories.close()


async def _close_idle(served: Served) -> None:
    while True:
        await asyncio.sleep(_CLOSE_EVERY)
        served.memories.close_idle()


async def _warm_up(served: Served) -> None:
    """Compile what usual requests run: a write, questions alone and with others, in scope or not."""
    try:
        session = await served.memories.run(Session, served.model)
        fact = ("The capital of Atlantis is", "new")
        with contextlib.suppress(NotKept):  # A model that refuses it has run the same programs.
            await served.memories.run(session.write, *fact)
        sizes = [4**power for power in range(8) if 4**power < 4 * served.limits.batch]
        for size in sizes:
            for prompt in (fact[0], "What we see above us is"):
                count = min(size, served.limits.batch)
                questions = [PendingQuestion(prompt, session, Decoded()) for _ in range(count)]
                served.batcher.submit(questions)
                for question in questions:
                    await question.next()
                    async for _ in question.pieces():
                        pass
    except Exception as error:  # What every request would run into: a server of no use has to end.
        _LOG.exception("the programs of usual requests could not be compiled")
        served.failure = error
        served.stop()
    else:
        served.is_ready = True
