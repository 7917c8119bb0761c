"""Half an hour of everything at once: `python -m tests.bench.soak --images DIR --minutes 30`.

Poisson load whose callers sometimes leave, multipart and JSON requests, broken and hostile images, bodies that end halfway and
bodies that come a byte at a time. Watched from outside: memory, file descriptors, threads, what was answered; afterwards
nothing may be in flight, and memory after the fifth minute may have grown by less than 3 %.
"""

from __future__ import annotations

import argparse
import base64
import json
import random
import socket
import sys
import threading
import time
from collections import Counter
from contextlib import suppress
from pathlib import Path

import httpx
import psutil

from tests.bench.cancellations import total
from tests.bench.http_client import address
from tests.bench.images import read_folder
from tests.bench.machine import facts
from tests.bench.processes import ROOT, Server, run_load
from tests.images import png_bomb_header, truncated

SEGMENT_S = 20.0
SETTLED_AFTER_MIN = 5.0
MAX_GROWTH = 1.03
EXPECTED = {"good": {200}, "bad": {413, 415, 422}, "busy": {503, 504}}


class Nuisance:
    """Odd requests, one after the other on a thread of its own, with a short pause between."""

    def __init__(self, url: str, images: list[bytes], pause_s: float) -> None:
        self._url = url
        self._images = images
        self._pause_s = pause_s
        self._random = random.Random(0)
        self._stop = threading.Event()
        self.counts: Counter[str] = Counter()
        self.unexplained: list[str] = []
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """After the request it is at."""
        self._stop.set()
        self._thread.join()

    def _run(self) -> None:
        ways = (
            self._multipart,
            self._json,
            self._bad,
            self._bomb,
            self._text,
            self._half_body,
            self._slow_body,
            self._not_http,
        )
        with httpx.Client(timeout=60) as client:
            while not self._stop.wait(self._pause_s):
                way = self._random.choice(ways)
                try:
                    way(client)
                except (httpx.HTTPError, OSError) as error:
                    self.unexplained.append(f"{way.__name__}: {error!r}")

    def _told(self, name: str, response: httpx.Response, *expected: str) -> None:
        self.counts[f"{name} {response.status_code}"] += 1
        if response.status_code not in set().union(*(EXPECTED[each] for each in (*expected, "busy"))):
            self.unexplained.append(f"{name}: {response.status_code} {response.text[:200]}")

    def _multipart(self, client: httpx.Client) -> None:
        chosen = [*self._random.sample(self._images, 3), truncated(self._images[0])]
        files = [("images", (f"{index}.jpg", data)) for index, data in enumerate(chosen)]
        response = client.post(self._url, files=files)
        self._told("multipart", response, "good")
        if response.status_code == 200:
            errors = [result.get("error", {}).get("code") for result in response.json()["results"]]
            if errors != [None, None, None, "invalid_image"]:
                self.unexplained.append(f"multipart: {errors}")

    def _json(self, client: httpx.Client) -> None:
        body = {"images": [base64.b64encode(self._random.choice(self._images)).decode()], "top_k": 2}
        self._told("json", client.post(self._url, json=body), "good")

    def _bad(self, client: httpx.Client) -> None:
        data = bytearray(self._random.choice(self._images))
        for _ in range(200):
            data[self._random.randrange(len(data))] = self._random.randrange(256)
        self._told("scrambled", client.post(self._url, content=bytes(data)), "good", "bad")

    def _bomb(self, client: httpx.Client) -> None:
        self._told("bomb", client.post(self._url, content=png_bomb_header(50_000, 50_000)), "bad")

    def _text(self, client: httpx.Client) -> None:
        self._told("text", client.post(self._url, content=b"Dear diary" * 1000), "bad")

    def _half_body(self, _: httpx.Client) -> None:
        data = self._random.choice(self._images)
        with socket.create_connection(address(self._url), timeout=30) as connection:
            head = f"POST /v1/classify HTTP/1.1\r\nHost: f\r\nContent-Length: {len(data)}\r\n\r\n"
            connection.sendall(head.encode() + data[: len(data) // 2])
        self.counts["half a body"] += 1

    def _slow_body(self, _: httpx.Client) -> None:
        with socket.create_connection(address(self._url), timeout=30) as connection, suppress(OSError):
            connection.sendall(b"POST /v1/classify?timeout_ms=1000 HTTP/1.1\r\nHost: f\r\nContent-Length: 5000\r\n\r\n")
            for _ in range(15):
                connection.sendall(b"\xff")
                time.sleep(0.1)
            answer = connection.recv(4096)
            self.counts[f"slow body {answer[9:12].decode()}"] += 1
            if answer[9:12] not in (b"504", b"503"):  # out of time, or refused by its head alone
                self.unexplained.append(f"slow body: {answer[:100]!r}")

    def _not_http(self, _: httpx.Client) -> None:
        with socket.create_connection(address(self._url), timeout=30) as connection:
            connection.sendall(self._random.randbytes(2000) + b"\r\n\r\n")
            with suppress(OSError):
                connection.recv(4096)
        self.counts["not HTTP"] += 1


def main() -> None:
    """The command line; exit status 1 where something is not as it should be."""
    parser = argparse.ArgumentParser(prog="python -m tests.bench.soak", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--images", type=Path, required=True)
    parser.add_argument("--minutes", type=float, default=30.0)
    parser.add_argument("--rate", type=float, default=200.0, help="of the Poisson load, a second")
    parser.add_argument("--json", type=Path, help="where to write the samples")
    args = parser.parse_args()
    print("\n".join(f"- {name}: {text}" for name, text in facts(ROOT).items()), flush=True)
    samples: list[dict[str, float]] = []
    counts: Counter[str] = Counter()
    faults: list[str] = []
    with Server() as server:
        process = psutil.Process(server.pid)
        nuisance = Nuisance(server.classify_url, read_folder(args.images)[:100], pause_s=0.05)
        started = time.monotonic()
        seed = 0
        while time.monotonic() - started < 60 * args.minutes:
            seed += 1
            rate = args.rate * (3.0 if seed % 15 == 0 else 1.0)  # now and then more than it can do
            options = {"rate": rate, "seconds": SEGMENT_S, "seed": seed, "give-up": 0.1, "give-up-within": 0.1}
            counts.update(run_load(f"{server.classify_url}?timeout_ms=2000", args.images, **options)["counts"])
            sample = {
                "minute": (time.monotonic() - started) / 60,
                "rss_mib": process.memory_info().rss / 2**20,
                "fds": process.num_fds(),
                "threads": process.num_threads(),
                "in_flight": total(server, "fovea_in_flight"),
            }
            samples.append(sample)
            if seed % 3 == 0:
                print("· " + ", ".join(f"{name} {value:.1f}" for name, value in sample.items()), flush=True)
        nuisance.stop()
        time.sleep(3)
        left = {name: total(server, name) for name in ("fovea_in_flight", "fovea_in_flight_bytes", "fovea_queue_size")}
        failed = total(server, "fovea_stage_failures_total")
        server.stop()
    settled = [sample for sample in samples if sample["minute"] >= SETTLED_AFTER_MIN]
    print(f"load: {dict(counts)}; besides: {dict(nuisance.counts)}; afterwards {left}; failed runs {failed:.0f}")
    if settled:
        third = max(1, len(settled) // 3)
        for name in ("rss_mib", "fds", "threads"):
            first, last = (max(sample[name] for sample in part) for part in (settled[:third], settled[-third:]))
            print(f"{name}: at most {first:.1f} in the first third after minute {SETTLED_AFTER_MIN:g}, {last:.1f} in the last")
            if last > first * MAX_GROWTH + (2 if name == "fds" else 0):
                faults.append(f"{name} grew from {first:.1f} to {last:.1f}")
    faults += [f"{name} is {value:g} afterwards" for name, value in left.items() if value]
    faults += [f"{counts[name]} answers: {name}" for name in ("client_error", "timeout", "reset", "refused") if counts[name]]
    faults += nuisance.unexplained[:20]
    if args.json is not None:
        args.json.write_text(json.dumps(samples))
    print("\n".join(faults) if faults else "nothing unexplained")
    sys.exit(bool(faults))


if __name__ == "__main__":
    main()
