"""The commonest request, one image as the body, from its head to its answer without a task of its own (docs/adr/0022).

Good answers are made here. What is unusual is not taken on, and what goes wrong is handed to the framework's way, which tells
the client, but for refusals (`app.http.refusals`), of which an overload has more than answers.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable

from app.classification import Classification, Terms
from app.errors import InvalidRequest, ServiceError
from app.http.asked import HandedOver, answer_json, ask, out_of_time, parameters
from app.http.call import Call
from app.http.middleware import HEADER, identify
from app.http.uploads import Body
from app.log import request_id
from app.types import PipelineResult


class OneImage:
    """A request that has been taken on: it ends with one call of `on_answer` or `on_error`, unless its client leaves before.

    Args:
        call: its head, which tells the length of its body.
        on_answer: takes the body and the headers of a good answer.
        on_error: takes what goes the framework's way instead.

    Raises:
        ServiceError: it is refused, and holds nothing.
    """

    def __init__(self, call: Call, on_answer: Callable[[bytes, str], None], on_error: Callable[[HandedOver], None]) -> None:
        self._call = call
        self._identifier = identify(call.scope)
        self._on_answer = on_answer
        self._on_error = on_error
        self._state = call.app.state
        self._body = Body()
        self._terms: Terms | None = None
        self._classification: Classification | None = None
        self._read = self._ended = False
        self._permit = self._state.service.admission.admit()
        self._permit.__enter__()
        try:
            self._asked = ask(call, parameters(call))
            self._permit.take_bytes(int(call.header(b"content-length")))
        except BaseException as error:
            self._permit.__exit__(type(error), error, None)
            raise
        self._timer = asyncio.get_running_loop().call_later(max(0.0, call.budget.left_s), self._run_out)

    def take(self, piece: bytes) -> None:
        """Some of its body."""
        if not self._ended:
            self._body.add(piece)

    def start(self) -> None:
        """All of its body has come."""
        if self._ended:
            return
        self._read = True
        call, state, asked = self._call, self._state, self._asked
        body = self._body.take()
        try:
            if state.quotas is not None:
                state.quotas.take(call.header(state.settings.quotas.header.lower().encode()), 1)
            self._terms = state.service.begin(
                1,
                self._permit,
                model=asked.model,
                top_k=asked.top_k,
                choice=asked.choice,
                deadline=call.budget.deadline,
                started=call.started,
            )
            self._classification = state.service.start(body, self._terms)
            self._classification.ended.add_done_callback(self._finish)
        except Exception as error:
            self._fail(error)

    def leave(self) -> None:
        """Its client has gone."""
        if not self._ended:
            self._end(InvalidRequest("the connection was closed before the answer"))
            self._observe("client_error")

    def _finish(self, ended: asyncio.Future[PipelineResult]) -> None:
        classification, self._classification = self._classification, None
        if self._ended or classification is None or self._terms is None:
            _ = ended.cancelled() or ended.exception()  # looked at, or the loop would complain
            return
        request_id.set(self._identifier)  # a callback has a context of its own
        try:
            answer = classification.conclude()
            self._terms.learn([answer])
            body, timing = (b"", None) if isinstance(answer, ServiceError) else answer_json(self._asked, [answer])
        except Exception as error:
            self._end(error)
            self._tell(error)
            return
        self._end(None)  # it has been worked on
        if isinstance(answer, ServiceError):
            self._tell(answer)
            return
        self._observe("ok")
        headers = f"server-timing: {timing}\r\ncontent-length: {len(body)}\r\ncontent-type: application/json\r\n"
        self._on_answer(body, f"{headers}x-request-id: {self._identifier}\r\n")

    def _run_out(self) -> None:
        self._fail(out_of_time(self._call))

    def _fail(self, error: Exception) -> None:
        if not self._ended:
            self._end(error)
            self._tell(error)

    def _tell(self, error: Exception) -> None:
        self._call.scope["headers"].append((HEADER, self._identifier.encode()))  # whoever answers takes it from there
        self._on_error(HandedOver(self._call, error, read=self._read))

    def _end(self, error: Exception | None) -> None:
        """Give back whatever it holds."""
        self._ended = True
        self._timer.cancel()
        self._body.clear()
        if self._classification is not None:
            self._classification.abandon()
            if self._terms is not None:
                self._terms.learn([])
        self._permit.__exit__(None if error is None else type(error), error, None)

    def _observe(self, outcome: str) -> None:
        call = self._call
        self._state.metrics.observe_request(call.model_label, outcome, time.perf_counter() - call.started)
