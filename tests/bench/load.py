"""Closed-loop and open-loop (Poisson) load on one URL; `python -m tests.bench.load --url … --images DIR`.

Closed loop: each connection sends its next request when the last one was answered, so it finds the most a server can do
with that many callers. Open loop: requests arrive on their own schedule and latency counts from when one was *due*, so
waiting is not hidden however late the server, or this generator, is.

In tests, import `closed_loop` and `open_loop`. To measure, run it as a process of its own: then it shares no interpreter
with the server. Timers are as fine as the event loop's (1 ms): `LoadResult.lags` shows how late requests really left.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Coroutine, Sequence
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np

from tests.bench.http_client import Answer, Connection, Outcome, UnsupportedAnswer, address, build_request, connect
from tests.bench.load_result import LoadResult, Recorder, count_line

DEFAULT_TIMEOUT_S = 60.0
TIMER_S = 0.001  # as fine as an event loop's timers are
MAX_IDLE_S = 3.0  # servers end connections that idle, uvicorn after 5 s: a request sent just then would be lost
REFUSED_PAUSE_S = 0.02  # before a closed loop asks again where no connection was accepted


async def closed_loop(
    url: str,
    bodies: Sequence[bytes],
    *,
    connections: int,
    seconds: float | None = None,
    num_requests: int | None = None,
    ramp_s: float = 0.0,
    keep_bodies: bool = False,
    stop_when_refused: bool = False,
    timeout_s: float = DEFAULT_TIMEOUT_S,
    content_type: str | None = None,
) -> LoadResult:
    """POST the bodies in turn over keep-alive connections, each sending as soon as its last answer came.

    A connection that the server ends is replaced. What is in flight when the time is up is waited for and counted.

    Args:
        bodies: request bodies; request i carries body i modulo their number.
        seconds: length of the measured window; or
        num_requests: how many to send in all, measured from the first to the last.
        ramp_s: with `seconds`: load before the window opens, so that it starts with the server full.
        keep_bodies: keep every answer in `LoadResult.answers`.
        stop_when_refused: a connection that is not accepted ends its loop, for a server that is going away.
        timeout_s: longest wait for a connection and for an answer.
        content_type: of every body; None: told by its first bytes.

    Raises:
        ValueError: not exactly one of `seconds` and `num_requests`.
        UnsupportedAnswer: the server speaks what this client cannot read.
    """
    if (seconds is None) == (num_requests is None):
        raise ValueError("a closed loop needs either seconds or num_requests")
    host, port = address(url)
    payloads = [build_request(url, body, content_type) for body in bodies]
    recorder = Recorder(time.monotonic(), keep_bodies)
    ends_at = time.monotonic() + ramp_s + seconds if seconds is not None else float("inf")
    limit = num_requests if num_requests is not None else float("inf")
    num_sent = 0

    async def caller() -> None:
        nonlocal num_sent
        connection: Connection | None = None
        while num_sent < limit and time.monotonic() < ends_at:
            image, num_sent = num_sent % len(payloads), num_sent + 1
            due_at = time.monotonic()
            if connection is None or not connection.usable:
                opened = await connect(host, port, timeout_s=timeout_s, keep_bodies=keep_bodies)
                if isinstance(opened, Outcome):
                    recorder.add(Answer(opened, time.monotonic()), due_at=due_at, sent_at=due_at, image=image)
                    if stop_when_refused and opened is Outcome.REFUSED:
                        return
                    await asyncio.sleep(REFUSED_PAUSE_S)
                    continue
                connection = opened
                recorder.num_connections += 1
            sent_at = time.monotonic()
            answer = await connection.request(payloads[image], timeout_s=timeout_s)
            recorder.add(answer, due_at=due_at, sent_at=sent_at, image=image)
        if connection is not None:
            connection.close()

    cpu_before_s = time.process_time()
    async with _callers() as group:
        for _ in range(connections):
            group.create_task(caller())
    measured_s = None if seconds is None else (ramp_s, ramp_s + seconds)
    elapsed_s = time.monotonic() - recorder.started_at
    return recorder.result(measured_s=measured_s, elapsed_s=elapsed_s, cpu_s=time.process_time() - cpu_before_s)


async def open_loop(
    url: str,
    bodies: Sequence[bytes],
    *,
    rate: float,
    seconds: float,
    seed: int,
    ramp_s: float = 0.0,
    keep_bodies: bool = False,
    max_connections: int = 1024,
    timeout_s: float = DEFAULT_TIMEOUT_S,
    content_type: str | None = None,
    give_up: float = 0.0,
    give_up_within_s: float = 1.0,
) -> LoadResult:
    """POST the bodies at Poisson arrivals, whatever the server does; latency counts from when a request was due.

    A request takes an idle connection or opens another; beyond `max_connections` it waits for one, which counts.

    Args:
        rate: mean arrivals per second; `seed` decides when exactly.
        seconds: length of the measured window, after `ramp_s` of the same load.
        keep_bodies, timeout_s, content_type: as in `closed_loop`; the timeout runs from when the request was sent.
        give_up: share of the callers who leave after a time drawn evenly from 0 to `give_up_within_s`, if there is no answer.
    """
    load = _OpenLoop(
        address(url),
        [build_request(url, body, content_type) for body in bodies],
        keep_bodies=keep_bodies,
        max_connections=max_connections,
        timeout_s=timeout_s,
        give_up=give_up,
        give_up_within_s=give_up_within_s,
        patience=np.random.default_rng(seed + 1),
    )
    cpu_before_s = time.process_time()
    await load.run(poisson_arrivals(rate, ramp_s + seconds, seed))
    recorder = load.recorder
    elapsed_s = time.monotonic() - recorder.started_at
    measured_s = (ramp_s, ramp_s + seconds)
    return recorder.result(measured_s=measured_s, elapsed_s=elapsed_s, cpu_s=time.process_time() - cpu_before_s)


class _OpenLoop:
    """Sends what is due and notes what ends, in callbacks: a task for every request would cost as much as all the rest."""

    def __init__(
        self,
        server: tuple[str, int],
        payloads: Sequence[bytes],
        *,
        keep_bodies: bool,
        max_connections: int,
        timeout_s: float,
        give_up: float,
        give_up_within_s: float,
        patience: np.random.Generator,
    ) -> None:
        self._server = server
        self._payloads = payloads
        self._keep_bodies = keep_bodies
        self._max_connections = max_connections
        self._timeout_s = timeout_s
        self._give_up = give_up
        self._give_up_within_s = give_up_within_s
        self._patience = patience
        self._loop = asyncio.get_running_loop()
        self._idle: list[tuple[Connection, float]] = []  # and since when
        self._waiting: deque[tuple[int, float]] = deque()  # for a connection: image, and when it was due
        self._connecting: set[asyncio.Task[None]] = set()
        self._connected: set[Connection] = set()
        self._num_connections = 0  # that are open, or being opened
        self._num_unanswered = 0
        self._num_sent = 0
        self._arrivals_s: Sequence[float] = ()
        self._ended: asyncio.Future[None] = self._loop.create_future()
        self.recorder = Recorder(time.monotonic(), keep_bodies)

    async def run(self, arrivals_s: Sequence[float]) -> None:
        """Until the last of them has been answered."""
        self._arrivals_s = arrivals_s
        self._num_unanswered = len(arrivals_s)
        try:
            if arrivals_s:
                self._send_due()
                await self._ended
        finally:
            self._num_sent = len(arrivals_s)  # where it failed: no more
            self._waiting.clear()
            for task in self._connecting:
                task.cancel()
            for connection in [*self._connected]:
                connection.close()
            await asyncio.sleep(0)

    def _send_due(self) -> None:
        arrivals_s, started_at = self._arrivals_s, self.recorder.started_at
        while self._num_sent < len(arrivals_s):
            due_at = started_at + arrivals_s[self._num_sent]
            if (wait_s := due_at - time.monotonic()) > 0:
                self._loop.call_later(max(wait_s, TIMER_S), self._send_due)  # uvloop would turn round and round for less
                return
            image = self._num_sent % len(self._payloads)
            self._num_sent += 1
            self._place(image, due_at)

    def _place(self, image: int, due_at: float) -> None:
        while self._idle:  # the last one used: the least likely to have been closed meanwhile
            connection, since = self._idle.pop()
            if connection.usable and time.monotonic() - since <= MAX_IDLE_S:
                self._send(connection, image, due_at)
                return
            self._forget(connection)
        if self._num_connections >= self._max_connections:
            self._waiting.append((image, due_at))
            return
        self._num_connections += 1
        task = self._loop.create_task(self._connect(image, due_at))
        self._connecting.add(task)
        task.add_done_callback(self._connecting.discard)

    async def _connect(self, image: int, due_at: float) -> None:
        try:
            opened = await connect(*self._server, timeout_s=self._timeout_s, keep_bodies=self._keep_bodies)
        except Exception as error:  # nobody waits for this task
            self._fail(error)
            return
        self.recorder.num_connections += isinstance(opened, Connection)
        if isinstance(opened, Connection) and opened.usable:
            self._connected.add(opened)
            self._send(opened, image, due_at)
        else:
            outcome = Outcome.RESET if isinstance(opened, Connection) else opened  # it may have ended already
            self._note(Answer(outcome, time.monotonic()), image, due_at, time.monotonic())
            self._num_connections -= 1
            self._place_next()

    def _send(self, connection: Connection, image: int, due_at: float) -> None:
        sent_at = time.monotonic()
        leaves = self._give_up > 0 and self._patience.random() < self._give_up
        timeout_s = self._give_up_within_s * self._patience.random() if leaves else self._timeout_s

        def on_end(answer: Answer | UnsupportedAnswer) -> None:
            if not isinstance(answer, Answer):
                self._fail(answer)
                return
            self._note(answer, image, due_at, sent_at)
            if connection.usable:
                self._idle.append((connection, answer.finished_at))
            else:
                self._forget(connection)
            self._place_next()

        connection.start(self._payloads[image], on_end, timeout_s=timeout_s, give_up=leaves)

    def _forget(self, connection: Connection) -> None:
        connection.close()
        self._connected.discard(connection)
        self._num_connections -= 1

    def _place_next(self) -> None:
        if self._waiting:
            self._place(*self._waiting.popleft())

    def _note(self, answer: Answer, image: int, due_at: float, sent_at: float) -> None:
        self.recorder.add(answer, due_at=due_at, sent_at=sent_at, image=image)
        self._num_unanswered -= 1
        if not self._num_unanswered and not self._ended.done():
            self._ended.set_result(None)

    def _fail(self, error: Exception) -> None:
        if not self._ended.done():
            self._ended.set_exception(error)


def poisson_arrivals(rate: float, seconds: float, seed: int) -> list[float]:
    """Arrival times in [0, seconds) with exponential gaps of mean 1 / rate; the same for the same seed."""
    if rate <= 0:
        raise ValueError(f"the rate must be above 0 per second, not {rate}")
    rng = np.random.default_rng(seed)
    arrivals: list[float] = []
    now_s = 0.0
    while now_s < seconds:
        block = now_s + np.cumsum(rng.exponential(1 / rate, size=1024))
        arrivals += block[block < seconds].tolist()
        now_s = float(block[-1])
    return arrivals


@asynccontextmanager
async def _callers() -> AsyncIterator[asyncio.TaskGroup]:
    """A task group that raises the first failure as it is, and leaves the loop a turn to let closed sockets go."""
    try:
        async with asyncio.TaskGroup() as group:
            yield group
    except BaseExceptionGroup as failures:
        raise failures.exceptions[0] from failures
    finally:
        await asyncio.sleep(0)


def run_on_fast_loop(main: Callable[[], Coroutine[Any, Any, LoadResult]]) -> LoadResult:
    """Run it on uvloop, or on asyncio's own loop where there is none."""
    new_event_loop: Callable[[], asyncio.AbstractEventLoop] = asyncio.new_event_loop
    with suppress(ImportError):
        from uvloop import new_event_loop
    with asyncio.Runner(loop_factory=new_event_loop) as runner:
        return runner.run(main())


def main() -> None:
    """The command line: one run, told in a line or as JSON."""
    parser = argparse.ArgumentParser(prog="python -m tests.bench.load", description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--url", required=True, help="where to POST, for example http://127.0.0.1:8000/v1/classify")
    parser.add_argument("--images", type=Path, required=True, help="folder of images, taken in turn")
    mode = parser.add_mutually_exclusive_group()
    mode.add_argument("--connections", type=int, default=32, help="closed loop with so many keep-alive connections")
    mode.add_argument("--rate", type=float, help="open loop with so many Poisson arrivals per second")
    length = parser.add_mutually_exclusive_group()
    length.add_argument("--seconds", type=float, default=5.0, help="length of the measured window")
    length.add_argument("--requests", type=int, help="closed loop: so many requests instead")
    parser.add_argument("--ramp", type=float, default=0.0, help="seconds of load before the measured window")
    parser.add_argument("--timeout", type=float, default=DEFAULT_TIMEOUT_S, help="longest wait for an answer, in seconds")
    parser.add_argument("--seed", type=int, default=0, help="open loop: when the requests arrive")
    parser.add_argument("--give-up", type=float, default=0.0, help="open loop: share of the callers who leave early")
    parser.add_argument("--give-up-within", type=float, default=1.0, help="after at most so many seconds")
    parser.add_argument("--json", action="store_true", help="everything, as one line of JSON")
    args = parser.parse_args()

    from tests.bench.images import read_folder

    bodies = read_folder(args.images)
    if args.rate is not None:
        result = run_on_fast_loop(
            lambda: open_loop(
                args.url,
                bodies,
                rate=args.rate,
                seconds=args.seconds,
                seed=args.seed,
                ramp_s=args.ramp,
                timeout_s=args.timeout,
                give_up=args.give_up,
                give_up_within_s=args.give_up_within,
            )
        )
    else:
        result = run_on_fast_loop(
            lambda: closed_loop(
                args.url,
                bodies,
                connections=args.connections,
                seconds=None if args.requests else args.seconds,
                num_requests=args.requests,
                ramp_s=args.ramp,
                timeout_s=args.timeout,
            )
        )
    if args.json:
        print(json.dumps(result.to_json()))
        return
    p50, p90, p99 = (1e3 * result.percentile_s(q) for q in (50, 90, 99))
    print(
        f"{result.ok_per_s:.1f} images/s; p50 {p50:.1f} ms, p90 {p90:.1f} ms, p99 {p99:.1f} ms; {count_line(result.counts)}; "
        f"generator: {1e6 * result.cpu_per_request_s:.0f} us CPU per request, {result.num_connections} connections"
    )


if __name__ == "__main__":
    main()
