"""Thousands of malformed and oversized requests to a server: each is refused with a sentence, and its
memory stays.

    python tests/long/serve_malformed.py --requests 10000
"""

import argparse
import http.client
import sys
import tempfile
import time
from pathlib import Path

import hypothesis
from serve_load import Server

sys.path.insert(0, str(Path(__file__).parents[1]))

import malformed  # noqa: E402


def main(count: int) -> None:
    """Send so many, and print the statuses and the server's memory on the way."""
    statuses, sizes, begin = dict[int, int](), list[float](), time.monotonic()

    @hypothesis.settings(
        max_examples=count,
        database=None,
        deadline=None,
        phases=[hypothesis.Phase.generate],
        suppress_health_check=[*hypothesis.HealthCheck],
    )
    @hypothesis.given(malformed.requests("smol"))
    def send(request):
        connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=60)
        connection.request(request[0], request[1], request[3], request[2])
        response = connection.getresponse()
        malformed.require_refused(response.status, response.read())
        connection.close()
        statuses[response.status] = statuses.get(response.status, 0) + 1
        if (number := sum(statuses.values())) % (count // 10) == 0:
            sizes.append(server.megabytes())
            seconds = time.monotonic() - begin
            print(f"{number} requests, {seconds:.0f} s: {sizes[-1]:.0f} MB, {statuses}", flush=True)

    with tempfile.TemporaryDirectory() as folder, Server(Path(folder)) as server:
        send()
    assert max(sizes) < 1.05 * sizes[0], sizes


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--requests", type=int, default=10_000)
    main(parser.parse_args().requests)
