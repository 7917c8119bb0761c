"""Run the application under uvicorn, and stop it so that nobody notices.

uvicorn closes its listener at once when SIGTERM comes, and whoever connects or reuses a connection just then is reset.
So a drain comes first: readiness turns red, answers close their connections, and after `drain_delay_s`, when nobody
sends any more, uvicorn stops as usual, which lets requests in flight finish.
"""

from __future__ import annotations

import asyncio
import signal
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

import uvicorn
from fastapi import FastAPI

from app.errors import StartupError
from app.http.application import drain
from app.log import get_logger
from app.settings import Settings

log = get_logger(__name__)


def serve(app: FastAPI, settings: Settings, on_ready: Callable[[str], None]) -> None:
    """Serve until SIGTERM or SIGINT.

    Args:
        on_ready: called with the address once requests are welcome.

    Raises:
        StartupError: the address cannot be listened on.
        ServiceError: as `open_service`.
    """
    http = settings.http
    config = uvicorn.Config(
        app,
        log_config=None,
        access_log=False,
        timeout_graceful_shutdown=http.shutdown_timeout_s,
        server_header=False,
        lifespan="off",  # ours, in `_DrainingServer.serve`
    )
    with _listen(http.host, http.port) as listener:
        host = f"[{http.host}]" if ":" in http.host else http.host
        server = _DrainingServer(
            config, app, http.drain_delay_s, lambda: on_ready(f"http://{host}:{listener.getsockname()[1]}")
        )
        server.run(sockets=[listener])


class _DrainingServer(uvicorn.Server):
    def __init__(self, config: uvicorn.Config, app: FastAPI, drain_delay_s: float, on_ready: Callable[[], None]) -> None:
        super().__init__(config)
        self._app = app
        self._drain_delay_s = drain_delay_s
        self._on_ready = on_ready
        self._drain_task: asyncio.Task[None] | None = None
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
            self._on_ready()

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        # A second signal, or one before the service stood, stops at once.
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

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        # uvicorn raises the signal again after it has stopped, which would turn a clean stop into exit status 143.
        previous = {sig: signal.signal(sig, self.handle_exit) for sig in (signal.SIGTERM, signal.SIGINT)}
        try:
            yield
        finally:
            for sig, handler in previous.items():
                signal.signal(sig, handler)


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
