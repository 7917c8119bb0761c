"""A request to classify: what the ASGI server hands over, without the framework's wrapping, and what is known of it so far."""

from __future__ import annotations

import time

from starlette.requests import ClientDisconnect, Request
from starlette.types import Receive, Scope

from app.http.time_budget import TimeBudget

UNKNOWN_MODEL = "unknown"  # the metrics' label of a request that named no model of ours: never the client's own words


class Call(Request):
    """A request that looks its headers up once, and keeps its findings in attributes instead of in a dictionary.

    Args:
        longest_s: what it may take, until more is known.
    """

    def __init__(self, scope: Scope, receive: Receive, longest_s: float) -> None:
        super().__init__(scope, receive)
        self._fields: dict[bytes, bytes] = dict(reversed([*scope["headers"]]))  # the first of several counts
        self.started = time.perf_counter()
        self.budget = TimeBudget(longest_s, self.started)
        self.model_label = UNKNOWN_MODEL
        self.media_type = self.header(b"content-type").partition(";")[0].strip().lower()  # of the body, without parameters

    def header(self, name: bytes) -> str:
        """Of a name in lower case; empty where it is not there."""
        return self._fields.get(name, b"").decode("latin-1")

    async def next_chunk(self) -> tuple[bytes, bool]:
        """Some of the body, and whether there is more.

        Raises:
            ClientDisconnect: the connection was closed before the whole body had come.
        """
        message = await self.receive()
        if message["type"] == "http.disconnect":
            raise ClientDisconnect
        return message.get("body", b""), message.get("more_body", False)
