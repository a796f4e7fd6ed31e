"""Requests to a server that are malformed or too large, each in some way: a strategy of Hypothesis."""

import json

from hypothesis import strategies as st

_BODIES = {
    "/v1/completions": dict(model="{}", prompt="Fact 1 is"),
    "/v1/chat/completions": dict(model="{}", messages=[dict(role="user", content="Fact 1 is")]),
    "/v1/memories/m/facts": dict(prompt="Fact 1 is", answer="new 1"),
    "/v1/memories/m/undo": dict(changes=1),
}
# What no field of these takes.
_WRONG = st.recursive(
    st.floats(max_value=-1) | st.just(""),
    lambda inner: (
        st.lists(inner, max_size=3).map(lambda values: [{}, *values])
        | st.dictionaries(st.text(), inner, min_size=1, max_size=3)
    ),
    max_leaves=8,
)
_TOO_LARGE = [
    ("/v1/completions", dict(prompt="a" * 16_385)),
    ("/v1/completions", dict(prompt=["a"] * 17)),
    ("/v1/completions", dict(max_tokens=10**9)),
    ("/v1/completions", dict(temperature=1e9)),
    ("/v1/completions", dict(stop=["a"] * 17)),
    ("/v1/completions", dict(logit_bias={str(i): 1 for i in range(100_000)})),
    ("/v1/completions", {f"field {i}": i for i in range(10_000)}),
    ("/v1/chat/completions", dict(messages=[dict(role="user", content="a" * 2_000_000)])),
    ("/v1/memories/m/facts", dict(answer="a" * 16_385)),
    ("/v1/memories/m/facts", dict(source={str(i): "a" for i in range(17)})),
    ("/v1/memories/m/facts", dict(rephrasings=[""] * 1_000)),
    ("/v1/memories/m/undo", dict(changes=10**30)),
]


@st.composite
def requests(draw, model):
    """Draw a method, a path, headers and a body that a server of this model has to refuse."""
    kind = draw(st.sampled_from("bytes field unknown missing large path query type method".split()))
    path = draw(st.sampled_from([*_BODIES]))
    body = {n: v.format(model) if n == "model" else v for n, v in _BODIES[path].items()}
    headers, method, content = {"Content-Type": "application/json"}, "POST", None
    match kind:
        case "bytes":
            content = draw(st.binary(max_size=200) | st.sampled_from([b"[" * 99_999, b"1" * 9_999]))
        case "field":
            body[draw(st.sampled_from([*body]))] = draw(_WRONG)
        case "unknown":
            body["x" + draw(st.text(max_size=20))] = draw(st.text() | st.integers())
        case "missing":
            del body[draw(st.sampled_from([*body]))]
        case "large":
            path, more = draw(st.sampled_from(_TOO_LARGE))
            body = {n: v.format(model) if n == "model" else v for n, v in _BODIES[path].items()}
            body |= more
        case "path":
            name = draw(
                st.sampled_from(["..%2F..%2Fetc%2Fpasswd", "A", "-a", "a" * 65, "%00", "%FF"])
            )
            end = draw(
                st.sampled_from(["facts", "facts/1", "history", "health", "export", "nothing"])
            )
            method, path = draw(st.sampled_from(["GET", "DELETE"])), f"/v1/memories/{name}/{end}"
        case "query":
            value = draw(st.sampled_from(["-1", "1e9", "%D9%A3", "9" * 30, "a", "1001", "%00"]))
            method, path = "GET", f"/v1/memories/default/facts?limit={value}"
        case "type":
            headers = {"Content-Type": draw(st.sampled_from(["text/plain", "", "json"]))}
        case "method":
            method = draw(st.sampled_from(["PUT", "DELETE", "PATCH", "TRACE", "OPTIONS"]))
    if content is None:
        content = json.dumps(body).encode()
    return method, path, headers, content


def require_refused(status, content):
    """Raise AssertionError unless a response is a 4xx with a sentence."""
    assert 400 <= status < 500, (status, content)
    message = json.loads(content)["error"]["message"]
    assert message.endswith((".", "…")) and len(message.split()) > 3, message
