"""A request to classify as HTTP brings it: the `Incoming` of the use case (`app.request`)."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Coroutine
from functools import lru_cache
from typing import Any, TypeVar

from pydantic import ValidationError
from starlette.datastructures import QueryParams
from starlette.types import Receive, Scope

from app.errors import InvalidRequest
from app.http.errors import describe_validation
from app.http.schemas import ClassifyFields
from app.http.uploads import FORMS, read_body, take_apart
from app.request import Parameters, Upload
from app.scheduling.admission import Permit
from app.settings import Settings

TIMEOUT_HEADER = b"x-request-timeout-ms"
MAX_KEPT_QUERY_BYTES = 256  # a longer one is read anew every time
WATCH_AFTER_S = 0.02  # of work before anyone looks whether the client is still there
T = TypeVar("T")


class Call:
    """One request to classify.

    Args:
        scope, receive: as the ASGI server gives them.
    """

    def __init__(self, scope: Scope, receive: Receive, settings: Settings) -> None:
        self.started = time.perf_counter()
        self.longest_s = settings.http.request_timeout_s
        self._query: bytes = scope["query_string"]
        self._fields: dict[bytes, bytes] = dict(reversed(scope["headers"]))  # the first of several counts
        self._receive = receive
        self._http = settings.http
        self._content_type = self._header(b"content-type")
        self._media_type = self._content_type.partition(";")[0].strip().lower()
        self.client: str | None = self._header(settings.quotas.header.lower().encode())
        # A body that is no form is one image, and all that is asked for stands in the head.
        self.num_images: int | None = None if self._media_type in FORMS else 1

    def parameters(self) -> Parameters:
        """Those of the query and the headers; see `Incoming`."""
        query = _known_query(self._query) if len(self._query) <= MAX_KEPT_QUERY_BYTES else _parameters_of_query(self._query)
        header = Parameters(timeout_ms=_timeout_ms(self._header(TIMEOUT_HEADER)))
        return query.merged(header, where="query", other_where="header")

    async def read(self, permit: Permit) -> Upload:
        """The body, within the limits; see `Incoming`."""
        body = await read_body(self._receive, self._header(b"content-length"), permit, self._http.max_upload_bytes)
        return take_apart(self._media_type, self._content_type, body, self._http.max_images_per_request)

    async def while_connected(self, work: Coroutine[Any, Any, T]) -> T:
        """The result of the work, cancelled when the client leaves; see `Incoming`.

        Nobody watches during the first moments, in which most work is done: a watcher costs more than it could save then.
        """
        loop, task = asyncio.get_running_loop(), asyncio.current_task()
        watcher: asyncio.Task[None] | None = None
        has_left = False

        async def watch() -> None:
            nonlocal has_left
            while (await self._receive())["type"] != "http.disconnect":
                pass
            has_left = True
            if task is not None:
                task.cancel()

        def start_watching() -> None:
            nonlocal watcher
            watcher = loop.create_task(watch())

        timer = loop.call_later(WATCH_AFTER_S, start_watching)
        try:
            return await work
        except asyncio.CancelledError:
            if has_left and task is not None and not task.uncancel():
                raise InvalidRequest("the connection was closed before the answer") from None
            raise
        finally:
            timer.cancel()
            if watcher is not None:
                watcher.cancel()

    def _header(self, name: bytes) -> str:
        """Of a name in lower case; empty where it is not there."""
        return self._fields.get(name, b"").decode("latin-1")


def _parameters_of_query(query: bytes) -> Parameters:
    if not query:
        return Parameters()
    try:
        return ClassifyFields.model_validate(dict(QueryParams(query))).parameters()
    except ValidationError as error:
        raise InvalidRequest(describe_validation(error.errors())) from error


# Clients ask the same thing again and again, and under an overload reading it is a good part of a refusal.
_known_query = lru_cache(maxsize=256)(_parameters_of_query)


def _timeout_ms(value: str) -> int | None:
    if not value:
        return None
    if not (value.isascii() and value.isdecimal() and len(value) < 10 and int(value)):
        raise InvalidRequest(f"{TIMEOUT_HEADER.decode()} is {value!r}; it must be a whole number of milliseconds, at least 1")
    return int(value)
