"""Structured logging: `get_logger(__name__).info("what happened", key=value)`, with the request's id on every line."""

from __future__ import annotations

import logging
import os
import queue
import select
import sys
import threading
import time
from collections.abc import Callable
from contextvars import ContextVar
from typing import Any, Literal, Protocol

import structlog

MAX_WAITING_LINES = 10_000  # of the log, while whoever reads it does not; some MB
request_id: ContextVar[str | None] = ContextVar("request_id", default=None)


def get_logger(name: str) -> structlog.stdlib.BoundLogger:
    """A logger that takes key-value pairs."""
    logger: structlog.stdlib.BoundLogger = structlog.stdlib.get_logger(name)
    return logger


class LogStream(Protocol):
    """Where a log goes."""

    def write(self, text: str, /) -> object: ...

    def flush(self) -> None: ...

    def isatty(self) -> bool: ...


class BackgroundStream:
    """A stream on a file descriptor that never makes a writer wait: a thread of its own does that.

    A service whose log nobody reads, or whose disk is full, goes on; the lines are dropped and counted.

    Args:
        on_dropped: called with the number of lines that were lost, on any thread.
    """

    def __init__(self, descriptor: int, on_dropped: Callable[[int], object], max_lines: int = MAX_WAITING_LINES) -> None:
        self._descriptor = descriptor
        self._on_dropped = on_dropped
        self._lines: queue.Queue[str | None] = queue.Queue(max_lines)
        self._num_dropped = 0  # since the log last said so
        self._thread = threading.Thread(target=self._run, name="log", daemon=True)
        self._thread.start()

    def write(self, text: str) -> int:
        """Have it written, or drop it where too much waits already."""
        try:
            self._lines.put_nowait(text)
        except queue.Full:
            self._drop()
        return len(text)

    def flush(self) -> None:
        """Nothing: the thread writes everything at once."""

    def isatty(self) -> bool:
        return os.isatty(self._descriptor)

    def close(self, timeout_s: float = 1.0) -> None:
        """Write what waits, as far as it can be written in that time."""
        ends_at = time.monotonic() + timeout_s
        try:
            self._lines.put(None, timeout=timeout_s)
        except queue.Full:
            return
        self._thread.join(max(0.0, ends_at - time.monotonic()))

    def _run(self) -> None:
        while (text := self._lines.get()) is not None:
            try:
                self._write_all(text.encode(errors="backslashreplace"))
            except OSError:  # no space, or nobody at the other end of the pipe
                self._drop()
                continue
            if self._num_dropped:
                num_dropped, self._num_dropped = self._num_dropped, 0
                get_logger(__name__).warning("lines of the log were lost: they could not be written", lines=num_dropped)

    def _write_all(self, data: bytes) -> None:
        while data:
            try:
                data = data[os.write(self._descriptor, data) :]
            except BlockingIOError:  # somebody made the descriptor non-blocking
                select.select([], [self._descriptor], [], 1.0)

    def _drop(self) -> None:
        self._num_dropped += 1
        self._on_dropped(1)


class _OnceASecond(logging.Filter):
    """Lets the same message through at most once a second: whoever sends rubbish decides how often it is written."""

    def __init__(self) -> None:
        super().__init__()
        self._written_at: dict[str, float] = {}

    def filter(self, record: logging.LogRecord) -> bool:
        now, message = time.monotonic(), str(record.msg)
        if now - self._written_at.get(message, -1.0) < 1:
            return False
        if len(self._written_at) > 100:
            self._written_at.clear()
        self._written_at[message] = now
        return True


def _is_no_upgrade(record: logging.LogRecord) -> bool:
    """uvicorn warns of every `Upgrade` header that it ignores, as RFC 9110 7.8 lets it, and advises to install a package."""
    return not str(record.msg).startswith(("Unsupported upgrade request", "No supported WebSocket library"))


def configure(level: str, form: Literal["auto", "console", "json"], stream: LogStream | None = None) -> None:
    """Send everything, the standard library's records too, to one stream in one form.

    Args:
        stream: unset: standard error.
    """
    stream = sys.stderr if stream is None else stream
    console = form == "console" or (form == "auto" and stream.isatty())
    shared: list[Any] = [
        _add_request_id,
        structlog.stdlib.add_log_level,
        structlog.stdlib.add_logger_name,
        structlog.processors.TimeStamper(fmt="iso"),
    ]
    structlog.configure(
        processors=[*shared, structlog.stdlib.ProcessorFormatter.wrap_for_formatter],
        logger_factory=structlog.stdlib.LoggerFactory(),
        wrapper_class=structlog.stdlib.BoundLogger,
        cache_logger_on_first_use=False,
    )
    last: list[Any] = (
        # Plain tracebacks: the pretty ones show local variables, and with them images and whole models.
        [structlog.dev.ConsoleRenderer(colors=stream.isatty(), exception_formatter=structlog.dev.plain_traceback)]
        if console
        else [structlog.processors.format_exc_info, structlog.processors.JSONRenderer()]
    )
    formatter = structlog.stdlib.ProcessorFormatter(
        foreign_pre_chain=shared, processors=[structlog.stdlib.ProcessorFormatter.remove_processors_meta, *last]
    )
    handler = logging.StreamHandler(stream)
    handler.setFormatter(formatter)
    root = logging.getLogger()
    root.handlers = [handler]
    root.setLevel(level.upper())
    for name in ("uvicorn", "uvicorn.error", "uvicorn.access"):  # uvicorn brings handlers of its own
        logging.getLogger(name).handlers = []
        logging.getLogger(name).propagate = True
    logging.getLogger("uvicorn.error").setLevel(max(logging.WARNING, root.level))  # its start-up lines say what ours say
    logging.getLogger("uvicorn.error").filters = [_is_no_upgrade, _OnceASecond()]
    logging.getLogger("python_multipart").setLevel(logging.ERROR)  # it warns of every broken body, which the answer tells


def _add_request_id(_logger: Any, _method: str, event: dict[str, Any]) -> dict[str, Any]:
    current = request_id.get()
    if current is not None:
        event["request_id"] = current
    return event
