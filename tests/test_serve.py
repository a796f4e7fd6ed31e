"""Served memories, through Starlette's client: completions, facts, rights, limits, the page."""

import asyncio
import concurrent.futures
import contextlib
import json
import re
import threading
import time

import browser
import hypothesis
import malformed
import numpy as np
import openai
import pytest
import uvicorn
from starlette.testclient import TestClient

from larimar_jax import cli
from larimar_jax.serve import access, app, batching, prometheus, serve_commands, tenants
from larimar_jax.serve.limits import Limits
from larimar_jax.session import Session

FACT = {"prompt": "Fact 1 is", "answer": "new 1"}
JSON = {"Content-Type": "application/json"}
FACTS = "/v1/memories/default/facts"
TOKENS = {name: name.ljust(16, "x") for name in ("reader", "writer", "ops")}


@pytest.fixture
def serve(tiny, tmp_path):
    """Return what starts a server on this folder of memories."""
    clients = []

    def start(**options):
        served = app.build(tiny, tmp_path / "memories", warm_up=False, **options)
        client = TestClient(served, base_url="http://localhost", raise_server_exceptions=False)
        clients.append(client)
        return client.__enter__()

    yield start
    for client in clients:
        client.__exit__(None, None, None)


@pytest.fixture
def client(serve):
    return serve()


def complete(client, prompt, model="tiny", **options):
    body = dict(model=model, prompt=prompt, **options)
    response = client.post("/v1/completions", json=body)
    assert response.status_code == 200, response.text
    return response.json()


def events(response):
    """The objects of a stream of server-sent events, which has to end with [DONE]."""
    lines = [line.removeprefix("data: ") for line in response.text.split("\n\n") if line]
    assert response.status_code == 200 and lines.pop() == "[DONE]"
    return [json.loads(line) for line in lines]


def test_a_fact_that_is_posted_is_answered_with_its_number(client, tiny):
    response = client.post(FACTS, json=FACT)
    (fact,) = response.json()["data"]
    assert response.status_code == 201 and (fact["id"], fact["answer"]) == (1, "new 1")
    answer = complete(client, "Fact 1 is")
    (choice,) = answer["choices"]
    assert choice["text"].strip() == "new 1" and choice["finish_reason"] == "stop"
    assert choice["larimar"] == dict(in_scope=True, fact=1, score=pytest.approx(1.0, abs=1e-4))
    tokens = len(tiny.decoder_tokenizer.following("new 1"))
    assert answer["usage"]["completion_tokens"] == tokens and answer["object"] == "text_completion"
    without = complete(client, "Fact 1 is", memory=False, max_tokens=4)["choices"][0]
    assert not without["larimar"]["in_scope"] and without["finish_reason"] == "length"
    assert without["text"] == tiny.generate(["Fact 1 is"], max_tokens=4, stop="")[0]


def test_several_prompts_have_a_choice_each(client, tiny):
    client.post(FACTS, json=FACT)
    prompts = ["The capital of France is", "Fact 1 is"]
    first, second = complete(client, prompts, max_tokens=4, stop="a")["choices"]
    assert (first["index"], second["index"]) == (0, 1)
    assert second["text"].strip() == "new 1" and second["larimar"]["fact"] == 1
    assert first["text"] == tiny.generate(prompts[:1], max_tokens=4, stop="a")[0]


def test_a_stream_joins_to_the_whole_answer(client):
    client.post(FACTS, json=FACT)
    body = dict(model="tiny", prompt="The city of Japan is", max_tokens=5)
    whole = client.post("/v1/completions", json=body).json()
    body |= dict(stream=True, stream_options=dict(include_usage=True))
    response = client.post("/v1/completions", json=body)
    assert response.headers["content-type"].startswith("text/event-stream")
    *chunks, last = events(response)
    text = "".join(chunk["choices"][0]["text"] for chunk in chunks)
    assert text == whole["choices"][0]["text"] and last["usage"] == whole["usage"]
    assert "larimar" in chunks[0]["choices"][0]
    endings = [chunk["choices"][0]["finish_reason"] for chunk in chunks]
    assert endings[:-1] == [None] * (len(chunks) - 1)
    assert endings[-1] == whole["choices"][0]["finish_reason"]


@pytest.fixture
def address(tiny, tmp_path):
    """The address of a server that listens."""
    served = app.build(tiny, tmp_path / "memories", warm_up=False)
    server = uvicorn.Server(uvicorn.Config(served, port=0, log_level="warning"))
    thread = threading.Thread(target=server.run)
    thread.start()
    while not server.started:
        assert thread.is_alive()
        time.sleep(0.01)
    yield "http://{}:{}".format(*server.servers[0].sockets[0].getsockname())
    server.should_exit = True
    thread.join()


def test_the_client_of_openai_completes_chats_and_streams(address):
    official = openai.OpenAI(base_url=f"{address}/v1", api_key="none")
    official.post("/memories/default/facts", body=FACT, cast_to=object)
    answer = official.completions.create(model="tiny", prompt="Fact 1 is")
    assert answer.choices[0].text.strip() == "new 1"
    assert answer.choices[0].larimar["fact"] == 1
    turns = [dict(role="user", content=[dict(type="text", text="Fact 1 is")])]
    chat = official.chat.completions.create(model="tiny", messages=turns, temperature=1, seed=1)
    assert chat.choices[0].message.content == "new 1" and chat.choices[0].larimar["in_scope"]
    stream = official.chat.completions.create(model="tiny", messages=turns, stream=True)
    pieces = [chunk.choices[0].delta.content for chunk in stream]
    assert "".join(pieces) == "new 1"
    assert [model.id for model in official.models.list()] == ["tiny"]
    chat = official.chat.completions.create(
        model="tiny", messages=turns, logprobs=True, top_logprobs=2
    )
    tokens = chat.choices[0].logprobs.content
    assert "".join(token.token for token in tokens).strip() == "new 1"
    assert [len(token.top_logprobs) for token in tokens] == [2] * len(tokens)
    with pytest.raises(openai.BadRequestError, match="n is not supported"):
        official.completions.create(model="tiny", prompt="Fact 1 is", n=2)


def test_log_probabilities_are_those_of_the_answer_under_its_memory(client, tiny):
    client.post(FACTS, json=FACT)
    prompts = ["Fact 1 is", "The capital of France is"]
    session = Session(tiny)
    session.write(**FACT)
    for choice in complete(client, prompts, logprobs=3, max_tokens=5)["choices"]:
        likely, prompt = choice["logprobs"], prompts[choice["index"]]
        assert "".join(likely["tokens"]) == choice["text"]
        for place, token in enumerate(likely["tokens"]):
            assert choice["text"][likely["text_offset"][place] :].startswith(token)
        # The likeliest is what was drawn.
        firsts = [max(top.values()) for top in likely["top_logprobs"]]
        assert firsts == likely["token_logprobs"]
        tokens = tiny.decoder_tokenizer.following(choice["text"].strip())
        if len(tokens) == len(firsts):
            (wanted,) = session.score([prompt], [[choice["text"]]])[0]
            assert -np.mean(firsts) == pytest.approx(wanted, rel=1e-4)
    body = dict(model="tiny", prompt=prompts[0], logprobs=0, stream=True)
    *_, last = events(client.post("/v1/completions", json=body))
    assert len(last["choices"][0]["logprobs"]["tokens"]) > 1


def test_a_seed_draws_the_same_again(client):
    options = dict(temperature=1.5, top_p=0.9, max_tokens=8)
    drawn = [
        complete(client, "Japan is", seed=seed, **options)["choices"][0]["text"]
        for seed in (1, 1, 2)
    ]
    assert drawn[0] == drawn[1] != drawn[2]


def test_memories_of_one_pass_do_not_see_each_other(tiny):
    """The same prompt, in two memories and in none, is decoded once and answered three times."""
    sessions = [Session(tiny), Session(tiny), None]
    for session, answer in zip(sessions, ("new 1", "Japan city of France"), strict=False):
        session.write("Fact 1 is", answer)
    metrics = prometheus.Metrics()
    batcher = batching.Batcher(tiny, Limits(), metrics)

    async def ask():
        questions = [
            batching.PendingQuestion("Fact 1 is", session, batching.Decoded())
            for session in sessions
        ]
        batcher.submit(questions)
        batcher.start()
        for question in questions:
            match = await question.next()
            text = "".join([piece.text async for piece in question.pieces()])
            yield match.fact, text.strip()

    async def answers():
        return [answer async for answer in ask()]

    first, second, without = asyncio.run(answers())
    batcher.stop()
    assert (first, second) == ((1, "new 1"), (1, "Japan city of France"))
    assert without == (None, tiny.generate(["Fact 1 is"], stop="")[0].strip())
    assert "larimar_passes_total 1\n" in metrics.text([])


@pytest.mark.parametrize("stops", [("?a", "?a"), ("?a", "?b")])
def test_a_short_answer_does_not_wait_for_the_end_of_a_long_one(tiny, stops):
    """It enters the pass of the long one, or has one of its own."""
    metrics, ended = prometheus.Metrics(), []
    batcher = batching.Batcher(tiny, Limits(), metrics)

    async def ask(tokens, stop):
        decoded = batching.Decoded(stop=(stop,))
        question = batching.PendingQuestion("Japan is", None, decoded, max_tokens=tokens)
        batcher.submit([question])
        await question.next()
        texts = [piece.text async for piece in question.pieces()]
        ended.append(tokens)
        return "".join(texts)

    async def answers():
        asks = [asyncio.create_task(ask(60, stops[0]))]
        await asyncio.sleep(0)
        batcher.start()
        while batcher.waiting:
            await asyncio.sleep(0.001)
        asks.append(asyncio.create_task(ask(5, stops[1])))
        return await asyncio.gather(*asks)

    long, short = asyncio.run(answers())
    batcher.stop()
    assert ended == [5, 60]
    assert long == tiny.generate(["Japan is"], max_tokens=60, stop="?a")[0]
    assert short == tiny.generate(["Japan is"], max_tokens=5, stop="?b")[0]
    assert f"larimar_passes_total {len({*stops})}\n" in metrics.text([])


def test_clients_at_the_same_time_get_their_own_answers(client):
    """Each has a memory of its own, with another answer to the same prompt."""

    def work(number):
        model, url = f"tiny:m{number}", f"/v1/memories/m{number}/facts"
        answers = []
        for turn in range(3):
            answer = f"{number} {turn}"
            assert client.post(url, json=dict(FACT, answer=answer)).status_code == 201
            text = complete(client, "Fact 1 is", model)["choices"][0]["text"].strip()
            answers.append(text == answer)
        return answers

    with concurrent.futures.ThreadPoolExecutor(4) as threads:
        assert all(all(right) for right in threads.map(work, range(4)))
    ids = [model["id"] for model in client.get("/v1/models").json()["data"]]
    assert ids == ["tiny", *(f"tiny:m{number}" for number in range(4))]


def test_changes_of_a_memory_are_served_in_their_order(tiny, tmp_path):
    opened = tenants.MemoryFolder(tiny, tmp_path, Limits(writes=9), prometheus.Metrics())
    order = []

    async def change():
        await opened.get("m", create=True)
        works = (lambda session, n=n: order.append(n) for n in range(10))
        return await asyncio.gather(
            *(opened.change("m", work) for work in works), return_exceptions=True
        )

    *_, last = asyncio.run(change())
    opened.close()
    assert order == [*range(9)] and last.status == 429


def test_facts_are_listed_searched_corrected_and_forgotten(client):
    facts = [dict(prompt=f"Fact {n} is", answer=f"new {n}") for n in range(5)]
    assert client.post(FACTS, json=facts).status_code == 201
    page = client.get(FACTS, params=dict(limit=2, after=1)).json()
    assert [fact["id"] for fact in page["data"]] == [2, 3]
    assert page["has_more"] and page["total"] == 5
    (match,) = client.get(FACTS, params=dict(q="NEW 3")).json()["data"]
    assert match["id"] == 4
    corrected = client.patch(f"{FACTS}/4", json=dict(answer="true 3")).json()
    assert corrected["id"] == 6 and corrected["source"]["replaces"] == "4"
    assert complete(client, "Fact 3 is")["choices"][0]["text"].strip() == "true 3"
    moved = client.patch(f"{FACTS}/6", json=dict(prompt="Says of fact 3:")).json()
    assert moved["id"] == 7 and client.get(f"{FACTS}/6").status_code == 404
    forgotten = client.delete(f"{FACTS}/1").json()
    assert forgotten["deleted"] and forgotten["certificate"]["distance"] < 0.1
    assert complete(client, "Fact 0 is", max_tokens=2)["choices"][0]["larimar"]["fact"] != 1
    assert client.delete(f"{FACTS}/1").status_code == 404
    health = client.get("/v1/memories/default/health").json()
    assert health["facts"] == 4 and health["slots"] == 24 and not health["full"]


def test_an_undo_goes_back_to_a_point_of_the_history(client):
    url = "/v1/memories/default/undo"
    client.post(FACTS, json=dict(FACT, source={"by": "anna"}))
    client.post(FACTS, json=dict(FACT, answer="true 2"))
    client.delete(f"{FACTS}/2")
    history = client.get("/v1/memories/default/history", params=dict(after=1)).json()["data"]
    assert [event["kind"] for event in history] == ["forget", "write", "forget"]
    assert [event["change"] for event in history] == [2, 2, 3]
    undone = client.post(url, json=dict(changes=1)).json()
    assert undone["to"] == 2 and [fact["answer"] for fact in undone["written"]] == ["true 2"]
    back = client.post(url, json=dict(to=1)).json()
    assert back["forgotten"] == [3] and [fact["answer"] for fact in back["written"]] == ["new 1"]
    assert back["written"][0]["source"] == {"by": "anna", "restores": "1"}
    assert complete(client, "Fact 1 is")["choices"][0]["text"].strip() == "new 1"
    assert client.post(url, json=dict(time=history[-1]["at"])).json()["to"] >= 3
    assert client.post(url, json=dict(time="2000-01-01")).json()["to"] == 0
    assert client.get(FACTS).json()["total"] == 0
    for wrong in (dict(to=99), {}, dict(to=1, changes=1), dict(changes=-1), dict(time="now")):
        assert client.post(url, json=wrong).status_code == 400


def test_a_change_that_fails_in_the_middle_changes_nothing(tiny, tmp_path):
    session = Session(tiny, tmp_path / "s.jsonl")
    session.write("Fact 1 is", "new 1")
    before, state = (tmp_path / "s.jsonl").read_bytes(), session.state
    with pytest.raises(RuntimeError), session.together() as draft:
        draft.write("Fact 1 is", "true 2")
        draft.forget(draft.list()[0].id)
        assert draft.list() == [] and len(session.list()) == 1
        raise RuntimeError
    assert (tmp_path / "s.jsonl").read_bytes() == before
    np.testing.assert_array_equal(session.state.solution, state.solution)


def test_what_was_acknowledged_is_there_after_a_restart_and_elsewhere_after_an_import(serve):
    client = serve()
    source = {"by": "anna", "url": "https://example.org/1"}
    fact = dict(FACT, rephrasings=["Says of fact 1:"], source=source)
    client.post("/v1/memories/team-a/facts", json=fact)
    again = serve()
    (known,) = again.get("/v1/memories/team-a/facts").json()["data"]
    assert known["source"] == source and known["rephrasings"] == ["Says of fact 1:"]
    assert complete(again, "Says of fact 1:", "tiny:team-a")["choices"][0]["larimar"]["fact"] == 1
    lines = again.get("/v1/memories/team-a/export")
    assert json.loads(lines.text) == fact
    headers = {"Content-Type": "application/jsonl"}
    url = "/v1/memories/team-b/import"
    assert again.post(url, content=lines.content, headers=headers).status_code == 201
    assert complete(again, "Fact 1 is", "tiny:team-b")["choices"][0]["larimar"]["in_scope"]
    assert again.post(url, content=b"[1]", headers=headers).status_code == 400


def test_a_memory_that_is_idle_is_closed_and_opened_again_on_demand(serve):
    client = serve(limits=Limits(open_memories=1))
    client.post("/v1/memories/team-a/facts", json=FACT)
    assert 'larimar_facts{memory="team-a"} 1' in client.get("/metrics").text
    complete(client, "Japan is", max_tokens=2)
    assert "team-a" not in client.get("/metrics").text
    assert complete(client, "Fact 1 is", "tiny:team-a")["choices"][0]["larimar"]["fact"] == 1


def test_a_token_reads_and_writes_what_it_may(serve, tmp_path):
    lines = [
        f"{TOKENS['reader']} Reader team-a=read",
        f"{TOKENS['writer']} Writer team-a=write  # and nothing else",
        f"{TOKENS['ops']} Ops *=write",
    ]
    (tmp_path / "tokens").write_text("\n".join(lines))
    client = serve(access=access.Access.from_file(tmp_path / "tokens"))
    url, ask = "/v1/memories/team-a/facts", dict(model="tiny:team-a", prompt="Fact 1 is")

    def send(token, method, path, **options):
        headers = {"Authorization": f"Bearer {TOKENS[token]}"} if token else {}
        return client.request(method, path, headers=headers, **options).status_code

    for path in ("/", "/page.js", "/metrics", "/v1/models", FACTS, "/nowhere"):
        assert client.get(path).status_code == 401, path
        assert client.get(path, headers={"Authorization": "Bearer wrong"}).status_code == 401
    assert "Basic" in client.get("/").headers["www-authenticate"]
    assert client.get("/healthz").status_code == client.get("/healthz/ready").status_code == 200
    assert send("reader", "POST", url, json=FACT) == 403
    assert send("writer", "POST", url, json=FACT) == 201
    assert send("reader", "GET", url) == send("reader", "POST", "/v1/completions", json=ask) == 200
    for token, path in (("writer", FACTS), ("reader", "/v1/memories/none/facts")):
        assert send(token, "GET", path) == 403
    assert send("reader", "POST", "/v1/completions", json=dict(ask, model="tiny")) == 403
    assert send("ops", "DELETE", f"{url}/1") == 200
    page = client.get(f"{url[:-5]}history", auth=("any", TOKENS["reader"])).json()
    assert [event["source"]["by"] for event in page["data"]] == ["Writer", "Ops"]
    headers = {"Authorization": f"Bearer {TOKENS['reader']}"}
    assert client.get("/v1/models", headers=headers).json()["data"][0]["id"] == "tiny:team-a"


@pytest.mark.parametrize("line", ["short a *=read", "a" * 16, f"{'a' * 16} a team=all", ""])
def test_a_line_that_is_no_token_is_named(tmp_path, line):
    (tmp_path / "tokens").write_text(f"# a comment\n{line}\n")
    with pytest.raises(access.TokenFileError, match="line 2|no token"):
        access.Access.from_file(tmp_path / "tokens")


ASK = dict(model="tiny", prompt="Fact 1 is")
CHAT = dict(model="tiny", messages=[dict(role="user", content="Fact 1 is")])


@pytest.mark.parametrize(
    "path, body, status, words",
    [
        ("completions", dict(ASK, model="gpt"), 404, "no model 'gpt'"),
        ("completions", dict(ASK, model="tiny:none"), 404, "no memory 'none'"),
        ("completions", dict(ASK, model="tiny:../x"), 400, "a memory's name"),
        ("completions", dict(ASK, prompt=[]), 400, "1 to 2 prompts"),
        ("completions", dict(ASK, prompt=["a"] * 3), 400, "1 to 2 prompts"),
        ("completions", dict(ASK, prompt=[[1, 2]]), 400, "prompt[0]: expected str"),
        ("completions", dict(ASK, prompt="a" * 101), 400, "101 characters"),
        ("completions", dict(ASK, prompt=" "), 400, "a prompt is empty"),
        ("completions", dict(ASK, prompt="\ud800"), 400, "not UTF-8"),
        ("completions", dict(ASK, max_tokens=99), 400, "max_tokens is at most 9"),
        ("completions", dict(ASK, n=2), 400, "n is not supported"),
        ("completions", dict(ASK, logprobs=21), 400, "the 20 likeliest at most"),
        ("completions", dict(ASK, temperature=-1), 400, "temperature"),
        ("completions", dict(ASK, stop=["a"] * 17), 400, "at most 16 texts"),
        ("completions", dict(ASK, stopp="a"), 400, "did you mean stop?"),
        ("completions", [ASK], 400, "an object"),
        ("completions", dict(ASK, user="u" * 2000), 413, "longer than"),
        ("chat/completions", dict(CHAT, messages=[dict(role="robot", content="a")]), 400, "role"),
        ("chat/completions", dict(CHAT, messages=[dict(role="user", content=[{}])]), 400, "text"),
        ("memories/../facts", FACT, 404, "Not Found"),
        ("memories/..%2Fx/facts", FACT, 400, "a memory's name"),
        ("memories/a.b/facts", FACT, 400, "a memory's name"),
        ("memories/default/facts", [FACT] * 3, 413, "at most 2 facts"),
        ("memories/default/facts", [], 400, "no fact"),
        ("memories/default/facts", dict(FACT, answer=7), 400, "answer: expected str"),
        ("memories/default/facts", dict(FACT, answer="\ud800"), 400, "not UTF-8"),
        ("memories/default/facts", dict(FACT, source={"by": 1}), 400, "source.by"),
    ],
)
def test_what_is_malformed_or_too_large_is_refused_with_a_sentence(
    serve, path, body, status, words
):
    limits = Limits(prompts=2, prompt=100, max_tokens=9, facts=2, body=1500)
    client = serve(limits=limits)
    response = client.post(f"/v1/{path}", content=json.dumps(body), headers=JSON)
    assert response.status_code == status and words in response.json()["error"]["message"]


def test_a_body_of_another_type_or_no_json_and_a_full_memory_are_refused(serve):
    client = serve(limits=Limits(memory_facts=1))
    assert client.post(FACTS, content=b"{}").status_code == 415
    for content in (b"{", b"[" * 100_000, b"\xff", b'{"a": 1' + b"1" * 5000 + b"}"):
        response = client.post("/v1/completions", content=content, headers=JSON)
        assert response.status_code == 400, response.text
    response = client.post(FACTS, json=[FACT, dict(FACT, prompt="Fact 2 is")])
    error = response.json()["error"]
    assert response.status_code == 409 and "The 1 before it are written." in error["message"]
    assert client.put(FACTS).status_code == 405
    assert client.get(f"{FACTS}/x").status_code == client.get("/x").status_code == 404
    assert client.get(FACTS, params=dict(limit="many")).status_code == 400


def test_a_full_line_of_questions_asks_to_come_again(serve):
    client = serve(limits=Limits(queue=1))
    response = client.post("/v1/completions", json=dict(ASK, prompt=["a", "b"]))
    assert response.status_code == 429 and response.headers["retry-after"] == "1"


@hypothesis.settings(max_examples=60, suppress_health_check=[*hypothesis.HealthCheck])
@hypothesis.given(request=malformed.requests("tiny"))
def test_a_malformed_request_is_refused_with_a_sentence(fuzzed, request):
    method, path, headers, content = request
    response = fuzzed.request(method, path, headers=headers, content=content)
    malformed.require_refused(response.status_code, response.content)


@pytest.fixture(scope="module")
def fuzzed(tiny, tmp_path_factory):
    served = app.build(tiny, tmp_path_factory.mktemp("fuzzed"), warm_up=False)
    with TestClient(served, base_url="http://localhost", raise_server_exceptions=False) as client:
        yield client


def test_metrics_count_requests_answers_and_tokens(client):
    client.post(FACTS, json=FACT)
    complete(client, "Fact 1 is")
    client.get("/nowhere")
    text = client.get("/metrics").text
    assert 'larimar_requests_total{endpoint="completions",status="200"} 1' in text
    assert 'larimar_requests_total{endpoint="none",status="404"} 1' in text
    assert 'larimar_answers_total{in_scope="true"} 1' in text
    assert (
        'larimar_ask_seconds_bucket{le="+Inf"} 1' in text and "larimar_ask_seconds_count 1" in text
    )
    assert 'larimar_facts{memory="default"} 1' in text and "larimar_queue 0" in text
    kinds = re.findall(r"^# TYPE (\S+) (\w+)$", text, re.M)
    assert len(kinds) == len(dict(kinds)) >= 8


def test_a_server_is_ready_once_usual_programs_are_compiled(tiny, tmp_path):
    served = app.build(tiny, tmp_path, limits=Limits(batch=1))
    with TestClient(served) as client:
        assert client.get("/healthz").status_code == 200
        assert client.get("/healthz/ready").status_code == 503
        for _ in range(1200):
            if served.state.served.is_ready:
                break
            time.sleep(0.05)
        assert client.get("/healthz/ready").json() == {"ready": True}
        assert client.get("/v1/memories/default/facts").json()["total"] == 0


def test_a_server_whose_programs_can_not_be_compiled_ends_with_a_message(
    tiny, tmp_path, monkeypatch, capsys
):
    def run_out(*_, **__):
        raise MemoryError("no room for 9 GB")

    monkeypatch.setattr("larimar_jax.generate.Continuations", run_out)
    monkeypatch.setattr("larimar_jax.pipeline.load", lambda source: tiny)
    monkeypatch.setattr("larimar_jax.config.cache_programs", lambda: None)
    # Signals are the main thread's, and the test's own.
    monkeypatch.setattr("uvicorn.Server.capture_signals", contextlib.nullcontext)
    assert cli.main(["serve", "--data", str(tmp_path), "--port", "0"]) == 2
    assert "could not be compiled (no room for 9 GB)" in capsys.readouterr().err


def test_the_api_is_described_as_it_is(client):
    document = client.get("/openapi.json").json()
    routes = {route.path.replace(":path", "") for route in client.app.routes}
    assert {*document["paths"]} == {r for r in routes if r.startswith(("/v1", "/h", "/metrics"))}
    write = document["paths"]["/v1/memories/{name}/facts"]["post"]
    fact, facts = write["requestBody"]["content"]["application/json"]["schema"]["anyOf"]
    assert fact["required"] == ["prompt", "answer"] and facts["items"] == fact
    page = client.get("/docs").text
    assert "PATCH /v1/memories/{name}/facts/{fact}" in page and "max_completion_tokens" in page


def test_the_page_loads_nothing_from_elsewhere(client):
    page = client.get("/")
    assert "default-src 'self'" in page.headers["content-security-policy"]
    links = re.findall(r'(?:src|href)="([^"]*)"', page.text)
    assert sorted(links) == ["/docs", "/icon.svg", "/page.css", "/page.js"]
    for link in links:
        text = client.get(link).text
        assert text and not re.search(r'(?<!xmlns=")https?://|@import|eval\(|innerHTML', text)


@pytest.mark.skipif(browser.CHROMIUM is None, reason="no Chromium is installed")
def test_in_a_browser_a_fact_is_written_asked_for_forgotten_and_brought_back(address, tmp_path):
    page = browser.Browser(tmp_path / "profile")
    text = "document.getElementById('{}').textContent".format
    is_over = "!document.querySelector('#ask button').disabled"
    page.send("Page.navigate", url=address)
    page.wait(f"document.readyState == 'complete' && {text('total')} == '(0)'")
    page.write("prompt", "Fact 1 is")
    page.press("Tab")
    page.send("Input.insertText", text="new 1")
    page.press("Enter")
    page.wait(f"{text('total')} == '(1)' && document.activeElement.id == 'question'")
    page.send("Input.insertText", text="Fact 1 is")
    page.press("Enter")
    page.wait(f"{text('match')} == 'from fact 1, cosine 1.000'")
    page.wait(f"{text('with')}.trim() == 'new 1' && {text('without')} != '' && {is_over}")
    page.run("document.querySelector('#facts button').click()")
    page.wait(f"{text('total')} == '(0)' && {text('status')}.startsWith('Fact 1 is forgotten')")
    page.run("document.getElementById('ask').requestSubmit()")
    page.wait(f"{text('match')} == 'nothing written applies'")
    page.wait(f"{text('with')} != '' && {is_over}")
    assert page.run(text("with")) == page.run(text("without"))
    page.run("document.getElementById('undo').click()")
    page.wait(f"{text('total')} == '(1)' && {text('status')}.includes('back: 2. Fact 1 is new 1')")
    page.send("Page.navigate", url=f"{address}/docs")
    page.wait("document.querySelectorAll('section').length > 10")
    page.close()
    assert page.errors == []
    assert all(asked.startswith((address, "about:")) for asked in page.addresses)


def test_a_page_elsewhere_is_let_in_by_name_alone(serve):
    client = serve(hosts=("localhost",), cors=("https://example.org",))
    origin = {"Origin": "https://example.org"}
    allowed = client.get("/v1/models", headers=origin).headers
    assert allowed["access-control-allow-origin"] == "https://example.org"
    other = client.get("/v1/models", headers={"Origin": "https://example.com"}).headers
    assert "access-control-allow-origin" not in other
    assert client.get("/v1/models", headers={"Host": "example.com"}).status_code == 400


def test_the_command_serves_this_host_alone_unless_another_address_is_named(
    tiny, tmp_path, monkeypatch, capsys
):
    runs = []
    monkeypatch.setattr("uvicorn.Server.run", lambda server: runs.append(server.config))
    monkeypatch.setattr("larimar_jax.pipeline.load", lambda source: tiny)
    monkeypatch.setattr("larimar_jax.config.cache_programs", lambda: None)
    line = ["serve", "--data", str(tmp_path), "--port", "8001"]
    assert cli.main(line) == 0
    assert runs[0].host == "127.0.0.1" and runs[0].port == 8001
    assert runs[0].log_config is None, "handlers of other libraries stay open"
    shown = capsys.readouterr()
    assert shown.out == "http://127.0.0.1:8001\n" and not shown.err
    assert cli.main([*line, "--host", "0.0.0.0"]) == 0
    assert "anyone who reaches 0.0.0.0" in capsys.readouterr().err
    assert cli.main([*line, "--token-file", str(tmp_path / "none")]) == 2
    assert serve_commands.serve.__doc__
