"""POST /v1/classify."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Coroutine
from typing import Annotated, Any, TypeVar, cast

from fastapi import APIRouter, FastAPI, Query, Request, Response
from fastapi.routing import APIRoute
from starlette.types import Receive, Scope

from app.classification import outcome_of
from app.errors import InvalidRequest, ServiceError
from app.http.asked import HANDED_OVER, PATH, Parameters, answer_json, ask, out_of_time, parameters
from app.http.call import Call
from app.http.errors import problem_responses
from app.http.schemas import ClassifyJson, ClassifyResponse
from app.http.uploads import FORMS, read_upload
from app.service import InferenceService
from app.settings import Settings


class _DirectRoute(APIRoute):
    """Hands the endpoint its parameters without FastAPI's resolving, which cost more than the rest of the route.

    The endpoint's signature still makes the API page (docs/adr/0010).
    """

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        async def handle(request: Request) -> Response:
            return await _handle(request.scope, request.receive)

        return handle


async def _handle(scope: Scope, receive: Receive) -> Response:
    """Gives the endpoint its time budget and its parameters, and counts how it ended, whatever was wrong."""
    app: FastAPI = scope["app"]
    longest_s: float = app.state.settings.http.request_timeout_s
    call: Call = scope[HANDED_OVER].call if HANDED_OVER in scope else Call(scope, receive, longest_s)
    budget = call.budget
    outcome = "failed"
    try:
        if HANDED_OVER in scope:
            if scope[HANDED_OVER].read:
                await receive()  # as the layers around see it: nothing of the body is left
            # No variable has it: an error holds its frames, and one of them would hold it, and a body, until it is collected.
            raise scope.pop(HANDED_OVER).error
        async with asyncio.timeout(longest_s) as budget.timer:
            response = await classify(call, *parameters(call))
        outcome = "ok"
        return response
    except TimeoutError as error:
        outcome = "timeout"
        raise out_of_time(call) from error
    except ServiceError as error:
        outcome = outcome_of(error)
        raise
    finally:
        app.state.metrics.observe_request(call.model_label, outcome, time.perf_counter() - call.started)


DIRECT = {("POST", PATH): _handle}


router = APIRouter(tags=["classify"], route_class=_DirectRoute)

WATCH_AFTER_S = 0.02  # of work before anyone looks whether the client is still there
T = TypeVar("T")

_BINARY = {"schema": {"type": "string", "format": "binary"}}
REQUEST_BODY = {
    "required": True,
    "content": {
        "image/jpeg": _BINARY,
        "image/png": _BINARY,
        "image/webp": _BINARY,
        "multipart/form-data": {
            "schema": {
                "type": "object",
                "properties": {"images": {"type": "array", "items": {"type": "string", "format": "binary"}}},
                "required": ["images"],
            }
        },
        "application/json": {"schema": ClassifyJson.model_json_schema()},
    },
}
RESPONSES: dict[int | str, dict[str, Any]] = {
    200: {"model": ClassifyResponse, "description": "One result per image, in order; a bad image has an error in its place."},
    **problem_responses(
        {
            404: "No such model or version.",
            413: "Too many bytes, images or pixels.",
            415: "Not one of the accepted image formats.",
            429: "The client is over its quota; `Retry-After` says when to try again.",
            422: "A parameter, the body's form, or a broken image.",
            500: "The model failed.",
            503: "Overloaded; `Retry-After` says when to try again.",
            504: "The time budget ended first.",
        }
    ),
}


@router.post(
    PATH,
    summary="Classify one image or several",
    responses=RESPONSES,
    response_class=Response,
    openapi_extra={"requestBody": REQUEST_BODY},
)
async def classify(
    call: Call,
    model: Annotated[str | None, Query(description="Model to use; unset: the default one.")] = None,
    version: Annotated[int | None, Query(ge=1, description="Version of the model; unset: the highest loaded.")] = None,
    top_k: Annotated[int | None, Query(description="How many classes to answer with; unset: 5, or all if fewer.")] = None,
    quality: Annotated[
        str | None, Query(description="Operating point: full, balanced, or one that the model adds; unset: its default.")
    ] = None,
    min_quality: Annotated[
        str | None, Query(description="Last operating point that may be used instead when there is much to do.")
    ] = None,
    timeout_ms: Annotated[
        int | None,
        Query(ge=1, description="Time budget in milliseconds, upload included; also as the header X-Request-Timeout-Ms."),
    ] = None,
) -> Response:
    """Send the image as the body (`curl --data-binary @photo.jpg`), one or several as multipart files, or JSON with base64.

    With a single image an error is the answer's status, as problem+json. With several the answer is 200 and each
    image has its own predictions or its own error.
    """
    state = call.app.state
    service: InferenceService = state.service
    settings: Settings = state.settings
    query = Parameters(model, version, top_k, quality, min_quality, timeout_ms)
    with service.admission.admit() as permit:
        # One image as the body: all that it asks for stands in the head, so what comes too late need not be read.
        asked = ask(call, query) if call.media_type not in FORMS else None
        upload = await read_upload(
            call, permit, max_bytes=settings.http.max_upload_bytes, max_images=settings.http.max_images_per_request
        )
        if state.quotas is not None:
            state.quotas.take(call.header(settings.quotas.header.lower().encode()), len(upload.images))
        if asked is None:
            asked = ask(call, query.with_body(upload.fields), len(upload.images))
        classified = service.classify(
            upload.images,
            permit,
            model=asked.model,
            top_k=asked.top_k,
            choice=asked.choice,
            deadline=call.budget.deadline,
            started=call.started,
        )
        answers = await _while_connected(call, classified)
    if not upload.several and isinstance(answers[0], ServiceError):
        raise cast("ServiceError", answers.pop())  # no variable has it: see `_handle`
    body, timing = answer_json(asked, answers)
    return Response(body, headers=None if timing is None else {"Server-Timing": timing}, media_type="application/json")


async def _while_connected(call: Call, work: Coroutine[Any, Any, T]) -> T:
    """The result of the work. It is cancelled when the client leaves, so that no batch is computed for nobody.

    Nobody watches during the first moments, in which most work is done: a watcher costs more than it could save then.

    Raises:
        InvalidRequest: the client has left.
    """
    loop, task = asyncio.get_running_loop(), asyncio.current_task()
    watcher: asyncio.Task[None] | None = None
    has_left = False

    async def watch() -> None:
        nonlocal has_left
        while (await call.receive())["type"] != "http.disconnect":
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
