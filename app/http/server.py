"""Run the application under uvicorn, and stop it so that nobody notices.

uvicorn closes its listener at once when SIGTERM comes, and whoever connects or reuses a connection just then is reset.
So a drain comes first: readiness turns red, answers close their connections, and after `drain_delay_s`, when nobody
sends any more, uvicorn stops as usual, which lets requests in flight finish.
"""

from __future__ import annotations

import asyncio
import gc
import math
import os
import signal
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from types import FrameType
from typing import Any

import uvicorn
from fastapi import FastAPI

from app.errors import StartupError
from app.http.application import drain
from app.http.connections import Connection, Connections, connection_limit
from app.log import get_logger
from app.settings import Settings

log = get_logger(__name__)

FIRST_REQUEST_GRACE_S = 1.0  # at the very end: how long a connection that is open already may take to say something
GC_THRESHOLD = 20_000  # more container objects made than freed before the collector looks; Python's default is 700


def serve(app: FastAPI, settings: Settings, on_ready: Callable[[str], object]) -> None:
    """Serve until SIGTERM or SIGINT.

    Args:
        on_ready: called with the address once requests are welcome.

    Raises:
        StartupError: the address cannot be listened on.
        ServiceError: as `open_service`.
    """
    http = settings.http
    with _listen(http.host, http.port) as listener:
        host = f"[{http.host}]" if ":" in http.host else http.host
        connections = Connections(http, app.state.metrics, connection_limit(http.max_connections))
        server = _DrainingServer(
            make_config(app, settings, connections),
            app,
            connections,
            http.drain_delay_s,
            lambda: on_ready(f"http://{host}:{listener.getsockname()[1]}"),
        )
        server.run(sockets=[listener])


def make_config(app: FastAPI, settings: Settings, connections: Connections) -> uvicorn.Config:
    """uvicorn's settings: h11 reads requests, and a `Connection` stands before it."""
    http = settings.http
    config = uvicorn.Config(
        app,
        http="h11",  # strict, and an `Upgrade` that it does not know costs it no body (docs/adr/0028)
        ws="none",
        log_config=None,
        access_log=False,
        proxy_headers=False,  # nothing here looks at the client's address
        h11_max_incomplete_event_size=http.max_head_bytes,
        timeout_keep_alive=math.ceil(http.keep_alive_s) + 60,  # `connections` is there before it
        timeout_graceful_shutdown=http.shutdown_timeout_s,
        server_header=False,
        lifespan="off",  # ours, in `_DrainingServer.serve`
    )
    config.load()
    stock: Callable[..., asyncio.Protocol] = config.http_protocol_class

    def connection(*, app_state: dict[str, Any], **options: Any) -> Connection:
        return Connection(connections, lambda state: stock(app_state={**app_state, **state}, **options))

    config.http_protocol_class = connection  # type: ignore[assignment]  # it is only ever called
    return config


class _DrainingServer(uvicorn.Server):
    def __init__(
        self,
        config: uvicorn.Config,
        app: FastAPI,
        connections: Connections,
        drain_delay_s: float,
        on_ready: Callable[[], object],
    ) -> None:
        super().__init__(config)
        self._app = app
        self._open = connections
        self._drain_delay_s = drain_delay_s
        self._on_ready = on_ready
        self._drain_task: asyncio.Task[None] | None = None
        self._late: list[asyncio.Task[Any]] = []  # connections taken at the very end
        self._loop: asyncio.AbstractEventLoop | None = None

    async def serve(self, sockets: list[socket.socket] | None = None) -> None:
        # uvicorn's own lifespan would log a traceback for a model that cannot be loaded, and keep the error to itself.
        with self.capture_signals():
            async with self._app.router.lifespan_context(self._app):
                await super().serve(sockets)

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        self._loop = asyncio.get_running_loop()
        await super().startup(sockets)
        if self.started:
            # What is loaded now lives as long as the process: the collector need not look at it again, and what a
            # request makes is freed by counting, so there is little for it to find.
            gc.collect()
            gc.freeze()
            gc.set_threshold(GC_THRESHOLD)
            _leave_cores_to_instances()
            if not self.should_exit:  # a signal came while it loaded
                self._on_ready()

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        # A second signal ends the drain; one before the service stands ends it as soon as it does.
        if self._drain_task is not None or not self.started or self._loop is None:
            super().handle_exit(sig, frame)
            return
        # A signal may come in the middle of anything, so the loop is only told.
        self._loop.call_soon_threadsafe(self._begin_drain)

    def _begin_drain(self) -> None:
        if self._drain_task is None:
            self._drain_task = asyncio.get_running_loop().create_task(self._drain())

    async def _drain(self) -> None:
        log.info("stopping: not ready any more, finishing what is in flight", seconds=self._drain_delay_s)
        drain(self._app)
        await asyncio.sleep(self._drain_delay_s)
        self.should_exit = True

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        # Closing the listener resets whoever waits in its queue, and uvicorn closes whoever has not asked anything yet:
        # their requests may be on their way.
        for listener in sockets or []:
            self._accept_all(listener)
        for server in self.servers:
            server.close()
        ends_at = time.monotonic() + FIRST_REQUEST_GRACE_S
        while (self._open.num_silent or not all(task.done() for task in self._late)) and time.monotonic() < ends_at:  # noqa: ASYNC110 - they tell nobody
            await asyncio.sleep(0.01)
        await super().shutdown(sockets)
        self._open.abort()  # after `shutdown_timeout_s`

    def _accept_all(self, listener: socket.socket) -> None:
        loop = asyncio.get_running_loop()
        listener.setblocking(False)
        while True:
            try:
                connection, _ = listener.accept()
            except OSError:  # nobody waits any more, or nobody more can be taken
                return
            connection.setblocking(False)
            self._late.append(loop.create_task(loop.connect_accepted_socket(self._protocol, connection)))

    def _protocol(self) -> asyncio.Protocol:
        return self.config.http_protocol_class(  # type: ignore[call-arg]
            config=self.config, server_state=self.server_state, app_state=self.lifespan.state
        )

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        # uvicorn raises the signal again after it has stopped, which would turn a clean stop into exit status 143.
        previous = {sig: signal.signal(sig, self.handle_exit) for sig in (signal.SIGTERM, signal.SIGINT)}
        try:
            yield
        finally:
            for sig, handler in previous.items():
                signal.signal(sig, handler)


def _leave_cores_to_instances() -> None:
    """Have this thread not push one that computes off its core, every time that something comes (docs/adr/0021)."""
    if hasattr(os, "SCHED_BATCH"):  # Linux
        with suppress(OSError):  # a container may forbid it: then it is as it was
            os.sched_setscheduler(0, os.SCHED_BATCH, os.sched_param(0))


@contextmanager
def _listen(host: str, port: int) -> Iterator[socket.socket]:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind((host, port))
        except OSError as error:
            raise StartupError(
                f"cannot listen on {host}:{port}: {error.strerror}; choose another port (FOVEA_HTTP__PORT, or PORT= with make)"
            ) from error
        yield listener
    finally:
        listener.close()
