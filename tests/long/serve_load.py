"""A server under load: is each answer that of the client's own memory, is what was acknowledged there
after a kill, and how long do requests take. Figures are in docs/serve.md.

    python tests/long/serve_load.py --clients 16 --memories 4 --requests 100

Each time a `larimar serve` of its own: one client sends its requests alone; all of them send theirs at
the same time; they send again, and the server is killed by SIGKILL. The one after it has to have each
change that was acknowledged, and its journals are replayed.

All memories have the same prompts, and answers of their own.
"""

import argparse
import collections
import concurrent.futures
import contextlib
import http.client
import json
import os
import random
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import warnings
from pathlib import Path

import numpy as np
from session_rates import ATTRIBUTES, FAMILY, FIRST

from larimar_jax.pipeline import load as load_model
from larimar_jax.session import Session
from larimar_jax.session_file import Journal
from larimar_jax.train.logging import matmul_rate

TOWNS = "Aldra Berwik Corvo Dunmar Elsby Fjorda Gratz Hilden Ivrea Jarnac Korsk Lutha".split()
# Of a client's requests: what each does, and how often.
MIX = dict(ask=55, ask_elsewhere=10, write=20, correct=5, forget=5, list=3, health=2)


class Server:
    """`larimar serve` in a process of its own."""

    def __init__(self, folder: Path):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        code = "import sys; from larimar_jax import cli; sys.exit(cli.main())"
        line = [
            sys.executable,
            "-c",
            code,
            "serve",
            "--data",
            str(folder),
            "--port",
            str(self.port),
        ]
        begin = time.monotonic()
        self.process = subprocess.Popen(line, stdout=subprocess.DEVNULL)
        while True:
            assert self.process.poll() is None, "the server has ended"
            try:
                if self.send("GET", "/healthz/ready")[0] == 200:
                    break
            except OSError:
                pass
            time.sleep(0.1)
        print(f"ready after {time.monotonic() - begin:.0f} s", flush=True)

    def send(self, method, path, body=None, connection=None):
        """Return the status and the object of a response."""
        connection = connection or http.client.HTTPConnection("127.0.0.1", self.port, timeout=300)
        content = None if body is None else json.dumps(body)
        connection.request(method, path, content, {"Content-Type": "application/json"})
        response = connection.getresponse()
        return response.status, json.loads(response.read())

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.end(signal.SIGKILL if any(error) else signal.SIGTERM)

    def end(self, number):
        """End it by a signal."""
        self.process.send_signal(number)
        self.process.wait()

    def megabytes(self):
        """Resident memory."""
        return int(Path(f"/proc/{self.process.pid}/statm").read_text().split()[1]) * 4096 / 1e6

    def seconds(self):
        """CPU seconds so far."""
        fields = Path(f"/proc/{self.process.pid}/stat").read_text().rpartition(")")[2].split()
        return sum(map(int, fields[11:13])) / os.sysconf("SC_CLK_TCK")


class Client:
    """One that knows what it wrote, and checks each answer.

    facts: by prompt what is acknowledged, (number, answer), None for nothing. open: prompts of a request
    that was sent and not answered.
    """

    def __init__(self, server, number, memories, draw):
        self.server, self.draw = server, draw
        self.connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=300)
        self.memory, place = f"m{number % memories}", number // memories
        self.model = f"smol:{self.memory}"
        names = [f"{a} {b}" for b in FAMILY for a in FIRST][place::16]
        # In each memory the same prompts, asked for in the same words.
        rows = [(row[0].format(name), row[1].format(name)) for name in names for row in ATTRIBUTES]
        random.Random(place).shuffle(rows)
        self.free, self.facts, self.words = rows, {}, dict(rows)
        self.times, self.open, self.count = collections.defaultdict(list), None, 0

    def send(self, method, path, body=None):
        return self.server.send(method, path, body, self.connection)

    def answer(self):
        """Return an answer that no other memory has."""
        self.count += 1
        return f"{self.draw.choice(TOWNS)} {self.memory}-{self.count}"

    def run(self, requests):
        """Send requests, one after the other."""
        for _ in range(requests):
            there = [prompt for prompt, fact in self.facts.items() if fact]
            kind = self.draw.choices([*MIX], [*MIX.values()])[0] if there else "write"
            begin = time.monotonic()
            getattr(self, kind)(there)
            self.times[kind].append(time.monotonic() - begin)

    def complete(self, prompt):
        status, answer = self.send(
            "POST", "/v1/completions", dict(model=self.model, prompt=prompt, stop="\n")
        )
        assert status == 200, answer
        (choice,) = answer["choices"]
        return choice["text"].strip(), choice["larimar"]

    def ask(self, there):
        prompt = self.draw.choice(there)
        number, wanted = self.facts[prompt]
        text, match = self.complete(self.draw.choice([prompt, self.words[prompt]]))
        assert (match["fact"], text) == (number, wanted), (self.memory, prompt, wanted, text, match)

    def ask_elsewhere(self, there):
        gone = [prompt for prompt, fact in self.facts.items() if not fact]
        _, match = self.complete(self.draw.choice([*gone, "The largest planet is"]))
        assert not match["in_scope"], match

    def change(self, prompt, after, method, path, body=None):
        """Send a change of a prompt's fact, and note that it is acknowledged."""
        self.open = prompt, after
        status, answer = self.send(method, f"/v1/memories/{self.memory}/facts{path}", body)
        assert status in (200, 201), answer
        number = answer["data"][0]["id"] if "data" in answer else answer["id"]
        self.facts[prompt], self.open = after and (number, after), None

    def write(self, there):
        if not self.free:
            return self.ask(there)
        prompt, _ = self.free.pop()
        answer = self.answer()
        self.change(prompt, answer, "POST", "", dict(prompt=prompt, answer=answer))

    def correct(self, there):
        prompt, answer = self.draw.choice(there), self.answer()
        self.change(prompt, answer, "PATCH", f"/{self.facts[prompt][0]}", dict(answer=answer))

    def forget(self, there):
        prompt = self.draw.choice(there)
        self.change(prompt, None, "DELETE", f"/{self.facts[prompt][0]}")

    def list(self, there):
        status, page = self.send("GET", f"/v1/memories/{self.memory}/facts?limit=1000")
        answers = {fact["prompt"]: (fact["id"], fact["answer"]) for fact in page["data"]}
        assert status == 200 and all(answers[prompt] == self.facts[prompt] for prompt in there)

    def health(self, there):
        status, health = self.send("GET", f"/v1/memories/{self.memory}/health")
        assert status == 200 and not health["full"], health


def load(server, arguments, count, requests):
    """Let so many new clients send so many requests each; print and return requests a second."""
    clients = [
        Client(server, number, arguments.memories, random.Random(number)) for number in range(count)
    ]
    begin, used = time.monotonic(), server.seconds()
    with concurrent.futures.ThreadPoolExecutor(count) as threads:
        list(threads.map(lambda client: client.run(requests), clients))
    seconds = time.monotonic() - begin
    rate = count * requests / seconds
    cpu = 1e3 * (server.seconds() - used) / (count * requests)
    print(f"{count} clients x {requests}: {rate:.2f} requests/s, {cpu:.0f} ms of CPU each")
    for kinds in (("ask", "ask_elsewhere"), ("write", "correct", "forget"), ("list", "health")):
        times = [t for client in clients for kind in kinds for t in client.times[kind]]
        if len(times) > 1:
            cuts = statistics.quantiles(times, n=20)
            print(f"  {'/'.join(kinds):24} p50 {cuts[9]:6.2f} s  p95 {cuts[18]:6.2f} s", flush=True)
    return rate


def killed(folder, arguments):
    """Kill the server under load, and require of the next one what was acknowledged."""
    with Server(folder) as server:
        clients = [
            Client(server, number, arguments.memories, random.Random(number))
            for number in range(arguments.clients)
        ]
        timer = threading.Timer(arguments.kill_after, server.end, [signal.SIGKILL])
        timer.start()

        def run(client):
            with contextlib.suppress(OSError, http.client.HTTPException):
                client.run(10**6)

        with concurrent.futures.ThreadPoolExecutor(len(clients)) as threads:
            list(threads.map(run, clients))
        timer.join()
    there = 0
    with Server(folder) as server:
        for client in clients:
            _, page = server.send("GET", f"/v1/memories/{client.memory}/facts?limit=1000")
            answers = {fact["prompt"]: (fact["id"], fact["answer"]) for fact in page["data"]}
            # A change that was not answered may be there or not.
            prompt, after = client.open or (None, None)
            for written, fact in client.facts.items():
                if written != prompt:
                    assert answers.get(written) == fact, (written, fact, answers.get(written))
                    there += 1
            if prompt:
                before = client.facts.get(prompt)
                assert answers.get(prompt, (0, None))[1] in (after, before and before[1]), prompt
    print(f"killed after {arguments.kill_after} s: {there} acknowledged facts are as they were")


def replayed(path, model):
    """Return how far a memory that took in its journal line by line is from one that is opened anew from
    the facts that are in, how far two of these are from each other, and certificates of either."""
    journal, copy = Journal(path), Journal(path.with_suffix(".copy"))
    header, lines = journal.read()
    copy.rewrite({name: header[name] for name in ("model", "fingerprint", "next_id")}, [])
    live = Session(model, copy.path)
    for line in lines:
        with copy.locked():
            copy.read()
            copy.append({"events": line["events"]})
        with live.together():  # takes in the line
            pass
    one, two = Session(model, path), Session(model, path)
    assert live.list() == one.list() and live.history() == one.history()
    apart = [
        difference(*(float64(getattr(session.state, name)) for session in (live, one)))
        for name in ("gram", "cross")
    ]
    same = difference(one.state.solution, two.state.solution)
    certificates = [session.forget(one.list()[0].id) for session in (live, one)]
    return max(apart), same, [(c.distance, c.leverage) for c in certificates]


def float64(statistic):
    return np.float64(statistic.high) + np.float64(statistic.low)


def difference(one, two):
    """Return ‖one − two‖ / ‖two‖."""
    return float(np.linalg.norm(one - two) / np.linalg.norm(two))


def main():
    parser = argparse.ArgumentParser()
    for name, default in (("clients", 16), ("memories", 4), ("requests", 100), ("kill-after", 30)):
        parser.add_argument(f"--{name}", type=int, default=default)
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    print(f"float32 matrices multiply at {matmul_rate('float32') / 1e9:.0f} GFLOP/s")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        with Server(folder / "alone") as server:
            alone = load(server, arguments, 1, arguments.requests)
        with Server(folder / "many") as server:
            many = load(server, arguments, arguments.clients, arguments.requests)
        print(f"throughput of {arguments.clients} clients / one client alone: {many / alone:.1f}")
        killed(folder / "killed", arguments)
        model = load_model("smol")
        for path in sorted((folder / "killed").glob("m*.jsonl")):
            apart, same, certificates = replayed(path, model)
            print(
                f"{path.stem}: statistics of the replay differ by {apart:.0e} from those of the"
                f" changes in turn, memories of two replays by {same:.0e}; (distance, leverage) of a"
                f" forget {' and '.join(f'({d:.1e}, {share:.6f})' for d, share in certificates)}",
                flush=True,
            )


if __name__ == "__main__":
    main()
