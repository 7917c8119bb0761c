"""uvicorn's protocol, with a short way for the commonest request: one image as the body (docs/adr/0022).

It builds on the insides of `HttpToolsProtocol`, so pyproject.toml bounds uvicorn's version.
"""

from __future__ import annotations

import time
from typing import Any, cast

from fastapi import FastAPI
from starlette.types import Receive, Scope
from uvicorn._types import ASGI3Application
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol, RequestResponseCycle

from app.errors import CannotBeInTime, Overloaded
from app.http.asked import HANDED_OVER, PATH, HandedOver
from app.http.call import Call
from app.http.fast_path import OneImage
from app.http.middleware import MAX_DROPPED_BYTES, identify, new_id
from app.http.refusals import Again, Refusal, Refusals
from app.http.uploads import FORMS


class Protocol(HttpToolsProtocol):
    """Of one connection. One request on it is worked on at a time; that may be a `OneImage`."""

    _image: OneImage | None = None
    _cycle: RequestResponseCycle | None = None  # uvicorn's record of that request
    _between = True  # messages, for the parser
    _wire: bytes | None = None  # what the parser has now, while that begins with the head that it is at
    _num_unwanted = 0  # bytes still to come of a body that the parser does not get

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._refusals: Refusals = self.app.state.refusals if isinstance(self.app, FastAPI) else Refusals()

    def abort(self) -> None:
        """There is no time any more for what is worked on here."""
        if self._image is not None:
            self.transport.abort()

    def data_received(self, data: bytes) -> None:
        if (begin := self._skip(data)) < len(data):
            data = data[begin:] if begin else data
            self._wire = data if self._between else None
            super().data_received(data)
            self._wire = None
        # Where a body goes on after its answer, uvicorn forgets to end the connection when nothing more comes.
        if self.cycle is not None and self.cycle.response_complete and self.timeout_keep_alive_task is None:
            self._wait_for_more()

    def _skip(self, data: bytes) -> int:
        """Where in it the parser goes on: after a body that nobody wants, and requests that are refused as one before them."""
        begin = 0
        if self._num_unwanted:
            begin = min(self._num_unwanted, len(data))
            self._num_unwanted -= begin
            self._wait_for_more()
        while begin < len(data) and (again := self._refusals.find(data, begin)) is not None and self._may_refuse_again:
            self._refuse_again(again)
            begin += again.num_bytes
        if begin > len(data):
            self._num_unwanted = begin - len(data)
        return begin

    @property
    def _may_refuse_again(self) -> bool:
        """The connection is between two requests, as far as the parser and the client see it."""
        idle = self._between and (self.cycle is None or self.cycle.response_complete)
        return idle and not (self.flow.write_paused or self.transport.is_closing() or self._draining)

    @property
    def _draining(self) -> bool:
        return isinstance(self.app, FastAPI) and self.app.state.draining

    def _refuse_again(self, again: Again) -> None:
        if isinstance(self.app, FastAPI):
            self._write(*again.refusal.answer(self.app.state.metrics, new_id(), time.perf_counter()))
            self.on_response_complete()

    def _wait_for_more(self) -> None:
        """As long as for a next request."""
        self._unset_keepalive_if_required()
        self.timeout_keep_alive_task = self.loop.call_later(self.timeout_keep_alive, self.timeout_keep_alive_handler)

    def on_body(self, body: bytes) -> None:
        if self._image is not None and self._cycle is self.cycle:
            self._image.take(body)  # reading need not be paused: a permit is held for all of it
        else:
            super().on_body(body)

    def on_message_begin(self) -> None:
        self._between = False
        super().on_message_begin()

    def on_message_complete(self) -> None:
        self._between, self._wire = True, None
        super().on_message_complete()
        if self._image is not None and self._cycle is self.cycle:
            self._image.start()

    def connection_lost(self, exc: Exception | None) -> None:
        if self._image is not None and self._cycle is not None:
            self._image.leave()
            _release(self._cycle)
            self._image = self._cycle = None
        super().connection_lost(exc)

    def _start_asgi_task(self, cycle: RequestResponseCycle, app: ASGI3Application) -> None:
        call = None if self.flow.write_paused else _call_of_one_image(cycle, app)
        if call is None:
            super()._start_asgi_task(cycle, app)
            return
        self._cycle = cycle
        try:
            self._image = OneImage(call, self._answer, self._hand_over)
        except Exception as error:
            # Under load there is nothing more often, so it is not to cost a task. The body that is still to come is dropped.
            # Not with more waiting behind it: uvicorn starts the next one from within an answer, one refusal inside the other.
            short = int(call.header(b"content-length")) <= MAX_DROPPED_BYTES
            if isinstance(error, Overloaded) and short and not self.pipeline:
                if isinstance(error, CannotBeInTime) and self._wire is not None:
                    self._refusals.hold(self._wire, call, error)
                identifier = identify(call.scope)
                self._answer(*Refusal.of(call, error).answer(call.app.state.metrics, identifier, call.started))
            else:
                self._hand_over(HandedOver(call, error, read=False))
            return
        if cycle.body:  # it came while the request before it was worked on
            self._image.take(bytes(cycle.body))
            cycle.body = bytearray()
        if not cycle.more_body:
            self._image.start()

    def _answer(self, body: bytes, headers: str, status: int = 200) -> None:
        cycle, self._image, self._cycle = self._cycle, None, None
        if cycle is None:
            return
        _release(cycle)
        if self.transport.is_closing():
            return
        if self._draining:  # the client finishes here and finds another instance
            cycle.keep_alive = False
        if not cycle.keep_alive:
            headers += "connection: close\r\n"
        self._write(body, headers, status)
        cycle.response_started = cycle.response_complete = True
        if not cycle.keep_alive:
            self.transport.close()
        self.on_response_complete()

    def _write(self, body: bytes, headers: str, status: int) -> None:
        defaults = b"".join([b"%b: %b\r\n" % header for header in self.server_state.default_headers])
        self.transport.write(b"%b%b%b\r\n%b" % (STATUS_LINE[status], defaults, headers.encode(), body))

    def _hand_over(self, handed_over: HandedOver) -> None:
        """To the framework's way, which answers with the error."""
        cycle, self._image, self._cycle = self._cycle, None, None
        if cycle is not None:
            _scope_of(cycle)[HANDED_OVER] = handed_over
            super()._start_asgi_task(cycle, self.app)


def _call_of_one_image(cycle: RequestResponseCycle, app: ASGI3Application) -> Call | None:
    """Its head, where it is a request for the short way."""
    scope = _scope_of(cycle)
    if scope["path"] != PATH or scope["method"] != "POST" or cycle.waiting_for_100_continue or not isinstance(app, FastAPI):
        return None
    scope["app"] = app
    settings = app.state.settings
    call = Call(scope, cast("Receive", cycle.receive), settings.http.request_timeout_s)
    length = call.header(b"content-length")
    fits = length.isdecimal() and int(length) <= settings.http.max_upload_bytes
    return call if fits and call.media_type not in FORMS and not settings.log.access else None


def _scope_of(cycle: RequestResponseCycle) -> Scope:
    return cast("Scope", cycle.scope)  # for uvicorn it has fixed keys


def _release(cycle: RequestResponseCycle) -> None:
    """Let it go, as uvicorn does at the end of its task: else it and its protocol hold each other until the collector comes."""
    cycle.on_response = _nothing


def _nothing() -> None:
    pass
