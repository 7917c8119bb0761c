"""The three programs of a benchmark, each in a process of its own: the server, the load generator, the plain loop."""

from __future__ import annotations

import http.client
import json
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Self

import psutil

from tests.bench.http_client import address

ROOT = Path(__file__).resolve().parents[2]
START_TIMEOUT_S = 60.0
STOP_TIMEOUT_S = 60.0
POLL_S = 0.01


class BenchError(Exception):
    """The benchmark cannot go on; the message says why."""


class Server:
    """`fovea serve` on a free port of this machine, or a server that runs already (then only its URL is known).

    Use as a context manager: leaving it ends the process if `stop` did not.

    Args:
        url: of a server that runs already.
        tree: the source tree whose `app` is served.
        variables: of its environment, besides ours.
    """

    def __init__(self, url: str | None = None, *, tree: Path = ROOT, variables: Mapping[str, str] | None = None) -> None:
        self._tree = tree
        self._variables = dict(variables or {})
        self.ready_s: float | None = None  # process start to the first 200 of /health/ready
        self._process: subprocess.Popen[bytes] | None = None
        self._log: IO[bytes] | None = None
        self.url = url.rstrip("/") if url else f"http://127.0.0.1:{_free_port()}"
        if url is None:
            self._start()

    @property
    def pid(self) -> int:
        """Of our own server."""
        if self._process is None:
            raise BenchError("the server is not ours")
        return self._process.pid

    @property
    def classify_url(self) -> str:
        return f"{self.url}/v1/classify"

    def models(self) -> list[dict[str, Any]]:
        """What the server says it has loaded."""
        status, body = get(self.url, "/v1/models")
        if status != 200:
            raise BenchError(f"GET /v1/models answered {status}: {body[:200]!r}")
        models: list[dict[str, Any]] = json.loads(body)["models"]
        return models

    def exit_counts(self, model: str) -> dict[int, float]:
        """Images that left so far, by stage, from /metrics."""
        _, body = get(self.url, "/metrics")
        lines = re.findall(r"^fovea_exits_total\{([^}]*)\} (\S+)$", body.decode(), flags=re.MULTILINE)
        counts = {}
        for labels, value in lines:
            found = dict(re.findall(r'(\w+)="([^"]*)"', labels))
            if found["model"] == model:
                counts[int(found["stage"])] = float(value)
        return counts

    def memory_mib(self) -> tuple[float, float] | None:
        """Resident memory of our server, now and at its peak, in MiB; None for a server that is not ours, or off Linux."""
        if self._process is None:
            return None
        try:
            text = Path(f"/proc/{self._process.pid}/status").read_text()
        except OSError:
            return None
        now, peak = (int(re.findall(rf"^{key}:\s+(\d+) kB", text, flags=re.MULTILINE)[0]) for key in ("VmRSS", "VmHWM"))
        return now / 1024, peak / 1024

    def cpu_s(self) -> float | None:
        """CPU time our server has used so far, in seconds."""
        if self._process is None:
            return None
        times = psutil.Process(self._process.pid).cpu_times()
        return float(times.user + times.system)

    def stop(self) -> int | None:
        """SIGTERM and wait: the exit code; None for a server that is not ours.

        Raises:
            BenchError: it does not end, or had ended before.
        """
        if self._process is None:
            return None
        if self._process.poll() is not None:
            raise BenchError(f"the server ended by itself with code {self._process.returncode}{self._tail()}")
        self._process.send_signal(signal.SIGTERM)
        try:
            return self._process.wait(STOP_TIMEOUT_S)
        except subprocess.TimeoutExpired as error:
            raise BenchError(f"the server did not end within {STOP_TIMEOUT_S:.0f} s of SIGTERM{self._tail()}") from error

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._process is not None and self._process.poll() is None:
            self._process.kill()
            self._process.wait()
        if self._log is not None:
            self._log.close()

    def _start(self) -> None:
        host, port = address(self.url)
        self._log = tempfile.TemporaryFile()  # noqa: SIM115 - closed in __exit__
        started = time.monotonic()
        self._process = subprocess.Popen(
            [sys.executable, "-m", "app", "serve"],
            cwd=self._tree,
            env=os.environ | self._variables | {"FOVEA_HTTP__HOST": host, "FOVEA_HTTP__PORT": str(port)},
            stdin=subprocess.DEVNULL,
            stdout=self._log,
            stderr=subprocess.STDOUT,
        )
        try:
            while not self._is_ready():
                if self._process.poll() is not None:
                    raise BenchError(f"the server did not start: exit code {self._process.returncode}{self._tail()}")
                if time.monotonic() - started > START_TIMEOUT_S:
                    raise BenchError(f"the server was not ready within {START_TIMEOUT_S:.0f} s{self._tail()}")
                time.sleep(POLL_S)
        except BaseException:
            self.__exit__(None, None, None)
            raise
        self.ready_s = time.monotonic() - started

    def _is_ready(self) -> bool:
        try:
            return get(self.url, "/health/ready")[0] == 200
        except (OSError, http.client.HTTPException):
            return False

    def _tail(self) -> str:
        if self._log is None:
            return ""
        self._log.seek(0)
        return "; its last words:\n" + "\n".join(self._log.read().decode(errors="replace").splitlines()[-20:])


class PlainLoopProcess:
    """`tests.bench.inprocess` with its model loaded, idle until it is told to measure. A context manager."""

    def __init__(self, *arguments: str) -> None:
        command = [sys.executable, "-m", "tests.bench.inprocess", *arguments]
        self._process = subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.threads = int(self._read()["threads"])

    def throughput(self, *, seconds: float, ramp_s: float, by_hand: bool = False) -> dict[str, Any]:
        """See `PlainLoop.throughput`."""
        return self._ask({"do": "throughput", "seconds": seconds, "ramp_s": ramp_s, "by_hand": by_hand})

    def latency(self, *, num_images: int) -> list[float]:
        """Latencies of single images, in seconds."""
        latencies_s: list[float] = self._ask({"do": "latency", "num_images": num_images})["latencies_s"]
        return latencies_s

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        with self._process:  # closes its input, which ends it
            if kind is not None:
                self._process.kill()

    def _ask(self, command: dict[str, Any]) -> dict[str, Any]:
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(command) + "\n")
        self._process.stdin.flush()
        return self._read()

    def _read(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise BenchError(f"the in-process loop ended with code {self._process.wait()}; its message is above")
        answer: dict[str, Any] = json.loads(line)
        return answer


def run_load(url: str, images: Path, **options: float) -> dict[str, Any]:
    """One run of `tests.bench.load` in a fresh process: `LoadResult.to_json`; options as on its command line."""
    flags = [f"--{name}={value}" for name, value in options.items()]
    command = [sys.executable, "-m", "tests.bench.load", "--json", f"--url={url}", f"--images={images}", *flags]
    # Unbuffered, Python loses the rest of a long line where a signal interrupts its writing.
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise BenchError(f"the load generator failed:\n{done.stderr[-2000:]}")
    result: dict[str, Any] = json.loads(done.stdout)
    return result


def get(url: str, path: str, *, timeout_s: float = 5.0) -> tuple[int, bytes]:
    """GET: status and body; OSError when nobody answers."""
    connection = http.client.HTTPConnection(*address(url), timeout=timeout_s)
    try:
        connection.request("GET", path)
        response = connection.getresponse()
        return response.status, response.read()
    finally:
        connection.close()


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port
