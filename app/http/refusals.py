"""Refusals of requests that would come too late, and how they are told again for a moment without reading (docs/adr/0027).

Under an overload most requests are refused, and many of them have the same head but for the length of the body. What one of
them was told is as true for the next, as long as no fewer images are in front.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from typing import NamedTuple

from app.classification import outcome_of
from app.errors import CannotBeInTime, Overloaded
from app.http.call import Call
from app.http.errors import PROBLEM_JSON, problem_json, retry_after
from app.http.middleware import HEADER, MAX_DROPPED_BYTES
from app.metrics import Metrics

MAX_HOLD_S = 0.01  # then it is looked at again: it may be told for other reasons than those in front
MAX_HEAD_BYTES = 4096
MAX_HELD = 64
END = b"\r\n\r\n"
_LENGTH = re.compile(rb"\r\ncontent-length:[ \t]*(\d{1,9})\r\n", re.IGNORECASE)
# A head with one of them always goes through the parser.
_UNUSUAL = {b"transfer-encoding", b"upgrade", b"expect", HEADER}


class Refusal(NamedTuple):
    """What a refused request is told; no exception, which would hold the frames that it came through."""

    model_label: str
    code: str
    outcome: str
    detail: str
    retry_after: str

    @classmethod
    def of(cls, call: Call, error: Overloaded) -> Refusal:
        """Of a request that was not taken on."""
        return cls(call.model_label, error.code, outcome_of(error), str(error), retry_after(error))

    def answer(self, metrics: Metrics, identifier: str, started: float) -> tuple[bytes, str, int]:
        """Body, headers and status, as `service_problem` but without a `Response`; and it is counted.

        Args:
            started: when the request came, by `time.perf_counter`.
        """
        status, body = problem_json(self.code, self.detail, identifier)
        metrics.observe_request(self.model_label, self.outcome, time.perf_counter() - started)
        headers = f"retry-after: {self.retry_after}\r\ncontent-length: {len(body)}\r\ncontent-type: {PROBLEM_JSON}\r\n"
        return body, f"{headers}x-request-id: {identifier}\r\n", status


class Again(NamedTuple):
    """A request that is refused as one before it was."""

    refusal: Refusal
    num_bytes: int  # of head and body


class _Held(NamedTuple):
    refusal: Refusal
    until: float
    holds: Callable[[], bool]


class Refusals:
    """What was refused a moment ago, by its head without the length of its body.

    Args:
        max_body_bytes: longer ones are not dropped here.
    """

    def __init__(self, max_body_bytes: int = MAX_DROPPED_BYTES, clock: Callable[[], float] = time.perf_counter) -> None:
        self._max_body_bytes = min(max_body_bytes, MAX_DROPPED_BYTES)
        self._clock = clock
        self._held: dict[bytes, _Held] = {}
        self._until = 0.0  # of all

    def hold(self, wire: bytes, call: Call, error: CannotBeInTime) -> None:
        """A request was refused whose head the parser has taken; `wire` begins with it."""
        key, _, _ = _split(wire, 0)
        kept = call.scope["http_version"] == "1.1" and call.header(b"connection").lower() in ("", "keep-alive")
        if key is None or not kept or any(call.header(name) for name in _UNUSUAL):
            return
        if len(self._held) >= MAX_HELD:
            self._held.clear()
        self._until = self._clock() + MAX_HOLD_S
        self._held[key] = _Held(Refusal.of(call, error), self._until, error.holds)

    def find(self, wire: bytes, begin: int = 0) -> Again | None:
        """The refusal of the request that begins there, where one like it was refused a moment ago."""
        now = self._clock()
        if now >= self._until:
            return None
        key, num_head_bytes, num_body_bytes = _split(wire, begin)
        held = None if key is None else self._held.get(key)
        if held is None or now >= held.until or not held.holds() or num_body_bytes > self._max_body_bytes:
            return None
        return Again(held.refusal, num_head_bytes + num_body_bytes)


def _split(wire: bytes, begin: int) -> tuple[bytes | None, int, int]:
    """The head that begins there, without the digits of its length; its bytes; that length. None: no such head."""
    end = wire.find(END, begin, begin + MAX_HEAD_BYTES)
    length = _LENGTH.search(wire, begin, end + 2) if end >= 0 else None
    if length is None:
        return None, 0, 0
    return wire[begin : length.start(1)] + wire[length.end(1) : end], end + len(END) - begin, int(length[1])
