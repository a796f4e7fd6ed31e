"""The API as an OpenAPI document and as a page, both from the table of its operations in app.py.

What a request's body holds are the fields of its dataclass; all words are those of docstrings.
"""

import dataclasses
import inspect
import re
import typing
from collections.abc import Awaitable, Callable, Mapping, Sequence
from html import escape
from importlib import metadata
from typing import Any, NamedTuple

from starlette.requests import Request
from starlette.responses import Response

from larimar_jax.schema import Count, Natural, NonNegative
from larimar_jax.serve.problems import Content, Texts

_TEXT = {"type": "string"}
_TYPES: dict[Any, dict[str, Any]] = {
    str: _TEXT,
    int: {"type": "integer"},
    bool: {"type": "boolean"},
    float: {"type": "number"},
    Count: {"type": "integer", "minimum": 1},
    Natural: {"type": "integer", "minimum": 0},
    NonNegative: {"type": "number", "minimum": 0},
    Texts: {"anyOf": [_TEXT, {"type": "array", "items": _TEXT}]},
    Content: {"anyOf": [_TEXT, {"type": "array", "items": {"type": "object"}}]},
}
# Of paths and queries.
_PARAMETERS = {
    "name": (_TEXT, "the memory; default is that of a model without a memory's name"),
    "fact": (_TYPES[int], "the fact's number"),
    "q": (_TEXT, "a part of a text of the fact, in any capitals"),
    "limit": (_TYPES[Natural] | {"default": 100, "maximum": 1000}, "the most that are listed"),
    "after": (_TYPES[Natural] | {"default": 0}, "the number behind which the list begins"),
    "purge": (_TYPES[bool] | {"default": False}, "also remove its text from history and file"),
}
_ERROR = {
    "type": "object",
    "properties": {"error": {"type": "object", "properties": {"message": _TEXT, "code": _TEXT}}},
}


class Operation(NamedTuple):
    """A method of a path. body: the dataclass of its JSON; many: or a list of them. query: names of its
    parameters. media: of what it returns, and takes where it has no dataclass."""

    method: str
    path: str
    endpoint: Callable[[Request], Awaitable[Response]]
    body: type | None = None
    query: tuple[str, ...] = ()
    many: bool = False
    media: str = "application/json"


def document(operations: Sequence[Operation]) -> dict[str, Any]:
    """Return the OpenAPI document of operations."""
    paths: dict[str, dict[str, Any]] = {}
    for operation in operations:
        paths.setdefault(operation.path, {})[operation.method.lower()] = _described(operation)
    scheme = {"type": "http", "scheme": "bearer", "description": "if the server has --token-file"}
    return {
        "openapi": "3.1.0",
        "info": {"title": "larimar", "version": metadata.version("larimar-jax")},
        "paths": paths,
        "components": {"securitySchemes": {"token": scheme}, "schemas": {"Error": _ERROR}},
        "security": [{}, {"token": []}],
    }


def _described(operation: Operation) -> dict[str, Any]:
    summary, _, more = inspect.cleandoc(operation.endpoint.__doc__ or "").partition("\n\n")
    in_path = re.findall(r"{(\w+)}", operation.path)
    parameters = []
    for name in (*in_path, *operation.query):
        schema, about = _PARAMETERS[name]
        where = {"in": "path", "required": True} if name in in_path else {"in": "query"}
        parameters.append({"name": name, **where, "schema": schema, "description": about})
    error = {"application/json": {"schema": {"$ref": "#/components/schemas/Error"}}}
    described: dict[str, Any] = {
        "operationId": operation.endpoint.__name__,
        "summary": " ".join(summary.split()),
        "description": " ".join(more.split()),
        "parameters": parameters,
        "responses": {
            "2XX": {"description": "done", "content": {operation.media: {}}},
            "default": {"description": "one sentence that says why not", "content": error},
        },
    }
    if operation.method in ("POST", "PATCH"):
        content = {"schema": schema_of(operation.body) if operation.body else _TEXT}
        if operation.many:
            one = content["schema"]
            content["schema"] = {"anyOf": [one, {"type": "array", "items": one}]}
        described["requestBody"] = {"required": True, "content": {operation.media: content}}
    return described


def schema_of(kind: Any) -> dict[str, Any]:
    """Return the JSON schema of what `problems.read` takes for a type."""
    if kind in _TYPES:
        return _TYPES[kind]
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if dataclasses.is_dataclass(kind):
        hints, properties, required = typing.get_type_hints(kind, include_extras=True), {}, []
        for field in dataclasses.fields(kind):
            properties[field.name] = schema = schema_of(hints[field.name])
            if isinstance(field.default, str | int | float):
                properties[field.name] = schema | {"default": field.default}
            elif field.default is field.default_factory is dataclasses.MISSING:
                required.append(field.name)
        about = " ".join(inspect.cleandoc(kind.__doc__ or "").split())
        parts = dict(description=about, properties=properties, required=required)
        return {"type": "object", **parts, "additionalProperties": False}
    if origin is typing.Literal:
        return {"enum": [*arguments]}
    if origin is tuple:
        return {"type": "array", "items": schema_of(arguments[0])}
    if isinstance(origin, type) and issubclass(origin, Mapping):
        return {"type": "object", "additionalProperties": schema_of(arguments[1])}
    return schema_of(arguments[0])  # or None, which is as if the field were not there


def page(described: Mapping[str, Any]) -> str:
    """Return an OpenAPI document as a page."""
    parts = []
    for path, operations in described["paths"].items():
        for method, operation in operations.items():
            parts.append(f"<section><h2><code>{method.upper()} {escape(path)}</code></h2>")
            parts += [f"<p>{_words(operation[part])}</p>" for part in ("summary", "description")]
            rows = [
                (p["name"], _kind(p["schema"]), p["schema"].get("default"), p["description"])
                for p in operation["parameters"]
                if p["in"] == "query"
            ]
            body = operation.get("requestBody", {}).get("content", {})
            for media, content in body.items():
                schema = content["schema"]
                schema = schema.get("anyOf", [schema])[0]
                rows += [
                    (
                        name,
                        _kind(part),
                        part.get("default"),
                        "required" * (name in schema["required"]),
                    )
                    for name, part in schema.get("properties", {}).items()
                ]
                about = schema.get("description", "")
                parts.append(f'<p class="note">Body: {media}. {_words(about)}</p>')
            if rows:
                cells = ("".join(f"<td>{escape(_cell(cell))}</td>" for cell in row) for row in rows)
                head = "<tr><th>name</th><th>type</th><th>default</th><th></th></tr>"
                table = "".join(f"<tr>{row}</tr>" for row in cells)
                parts.append(f"<table>{head}{table}</table>")
            parts.append("</section>")
    return (
        '<!doctype html><html lang="en"><meta charset="utf-8"><title>larimar: API</title>'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        '<link rel="icon" href="/icon.svg"><link rel="stylesheet" href="/page.css">'
        '<header><h1>larimar: API</h1><p><a href="/">The page</a></p>'
        '<p><a href="/openapi.json">OpenAPI</a></p></header>'
        f'<main class="api">{"".join(parts)}</main></html>'
    )


def _kind(schema: Mapping[str, Any]) -> str:
    """Return a schema in words."""
    if "anyOf" in schema:
        return " or ".join(map(_kind, schema["anyOf"]))
    if "enum" in schema:
        return ", ".join(schema["enum"])
    words = f"list of {_kind(schema['items'])}" if "items" in schema else schema["type"]
    least = f", at least {schema['minimum']}" if "minimum" in schema else ""
    return words + least + (f", at most {schema['maximum']:,}" if "maximum" in schema else "")


def _words(text: str) -> str:
    return re.sub("`([^`]+)`", r"<code>\1</code>", escape(text))


def _cell(value: Any) -> str:
    return "" if value is None else str(value).lower() if isinstance(value, bool) else str(value)
