"""Errors over HTTP: the table code -> status, and the one JSON shape (RFC 9457, application/problem+json)."""

from __future__ import annotations

import http
import math
from collections.abc import Mapping
from typing import Any

import orjson
from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException

from app.errors import InvalidRequest, Overloaded, QuotaExceeded, ServiceError
from app.http.schemas import Problem
from app.log import get_logger, request_id

log = get_logger(__name__)

PROBLEM_JSON = "application/problem+json"
TYPE_PREFIX = "urn:fovea:error:"
MAX_DETAIL_CHARS = 1000  # it may quote the client, who may have said millions
# code -> (status, title). The title is the same for every occurrence; the detail tells this one.
STATUSES: dict[str, tuple[int, str]] = {
    "invalid_request": (422, "The request is not valid"),
    "payload_too_large": (413, "The request is too large"),
    "image_too_large": (413, "The image is too large to decode"),
    "unsupported_image": (415, "The image format is not supported"),
    "invalid_image": (422, "The image cannot be read"),
    "malformed_request": (400, "The request is not valid HTTP"),
    "head_timeout": (408, "The request did not come in time"),
    "head_too_large": (431, "The head of the request is too large"),
    "too_many_connections": (503, "The service has too many connections"),
    "model_not_found": (404, "There is no such model"),
    "model_not_ready": (503, "The model is not ready"),
    "overloaded": (503, "The service is overloaded"),
    "quota_exceeded": (429, "The client has sent too many images"),
    "deadline_exceeded": (504, "The time budget ended"),
    "inference_failed": (500, "The model failed"),
    "model_invalid": (500, "The model is damaged"),
    "startup_error": (500, "The service is not set up correctly"),
    "not_found": (404, "There is nothing at this address"),
    "method_not_allowed": (405, "The method is not allowed here"),
    "internal_error": (500, "Something went wrong in the service"),
}


def problem(code: str, detail: str, *, headers: Mapping[str, str] | None = None) -> Response:
    """One error as problem+json."""
    status, body = problem_json(code, detail, request_id.get())
    return Response(body, status, headers, media_type=PROBLEM_JSON)


def problem_json(code: str, detail: str, identifier: str | None) -> tuple[int, bytes]:
    """Its status and its body."""
    status, title = STATUSES[code]
    if len(detail) > MAX_DETAIL_CHARS:
        detail = detail[:MAX_DETAIL_CHARS] + "…"
    body = {
        "type": TYPE_PREFIX + code,
        "title": title,
        "status": status,
        "detail": detail,
        "code": code,
        "request_id": identifier,
    }
    return status, orjson.dumps(body)


def service_problem(error: ServiceError) -> Response:
    """The problem of a ServiceError; who may come again is told when, in whole seconds."""
    headers = {"Retry-After": retry_after(error)} if isinstance(error, Overloaded | QuotaExceeded) else None
    return problem(error.code, str(error), headers=headers)


def retry_after(error: Overloaded | QuotaExceeded) -> str:
    """For the header of that name."""
    return str(math.ceil(error.retry_after_s))


def problem_responses(descriptions: Mapping[int, str]) -> dict[int | str, dict[str, Any]]:
    """What OpenAPI says of errors with these statuses. FastAPI's own `model` would say application/json."""
    content = {PROBLEM_JSON: {"schema": Problem.model_json_schema()}}
    return {status: {"description": text, "content": content} for status, text in descriptions.items()}


def install_error_handlers(app: FastAPI) -> None:
    """Give every error of the application the one shape."""
    app.add_exception_handler(ServiceError, _on_service_error)
    app.add_exception_handler(RequestValidationError, _on_validation_error)
    app.add_exception_handler(HTTPException, _on_http_exception)


async def _on_service_error(_request: Request, error: Exception) -> Response:
    if not isinstance(error, ServiceError):
        raise error
    return service_problem(error)


async def _on_validation_error(_request: Request, error: Exception) -> Response:
    if not isinstance(error, RequestValidationError):
        raise error
    return service_problem(InvalidRequest(describe_validation(error.errors())))


async def _on_http_exception(_request: Request, error: Exception) -> Response:
    if not isinstance(error, HTTPException):
        raise error
    if error.status_code == http.HTTPStatus.NOT_FOUND:
        return problem("not_found", "See /docs for the routes there are.")
    if error.status_code == http.HTTPStatus.METHOD_NOT_ALLOWED:
        return problem("method_not_allowed", "See /docs for the methods of this route.", headers=error.headers)
    return service_problem(InvalidRequest(str(error.detail)))


def unexpected_problem(error: Exception) -> Response:
    """The problem of an error that nobody expected: the log has it whole, the answer nothing of it."""
    log.error("unexpected error", exc_info=error)
    return problem("internal_error", "The request could not be answered; the service's log has the cause under its id.")


def describe_validation(errors: Any) -> str:
    """pydantic's list of errors as one sentence: where, what."""
    parts = []
    for error in errors:
        where = ".".join(str(step) for step in error["loc"] if step not in ("query", "path", "body"))
        text = "there is no such parameter" if error.get("type") == "extra_forbidden" else str(error["msg"])
        parts.append(f"{where}: {text}" if where else text)
    return "; ".join(parts)
