"""POST /v1/classify."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, Request, Response
from starlette.types import Receive, Scope, Send

from app.errors import ServiceError
from app.http.answers import classified
from app.http.call import Call
from app.http.errors import problem_responses, service_problem
from app.http.schemas import ClassifyFields, ClassifyJson, ClassifyResponse
from app.service import InferenceService

PATH = "/v1/classify"


async def handle(scope: Scope, receive: Receive) -> Response:
    """The answer to a request to classify, good or bad."""
    state = scope["app"].state
    service: InferenceService = state.service
    try:
        return classified(await service.answer(Call(scope, receive, state.settings)))
    except ServiceError as error:
        return service_problem(error)


async def endpoint(scope: Scope, receive: Receive, send: Send) -> None:
    """The same as plain ASGI, for `app.http.application`, which spares the request the framework's layers."""
    response = await handle(scope, receive)
    await response(scope, receive, send)


router = APIRouter(tags=["classify"])

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
PARAMETERS = [
    {"name": name, "in": "query", "required": False, "schema": schema, "description": schema.pop("description")}
    for name, schema in ClassifyFields.model_json_schema()["properties"].items()
]


@router.post(
    PATH,
    summary="Classify one image or several",
    responses=RESPONSES,
    response_class=Response,
    openapi_extra={"requestBody": REQUEST_BODY, "parameters": PARAMETERS},
)
async def classify(request: Request) -> Response:
    """Send the image as the body (`curl --data-binary @photo.jpg`), one or several as multipart files, or JSON with base64.

    With a single image an error is the answer's status, as problem+json. With several the answer is 200 and each
    image has its own predictions or its own error.
    """
    return await handle(request.scope, request.receive)
