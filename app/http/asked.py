"""What a request to classify asks for, and its answer; both its ways have this: the route, and `app.http.fast_path`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple, TypeVar

import orjson
from pydantic import ValidationError
from starlette.datastructures import QueryParams

from app.errors import DeadlineExceeded, InvalidRequest, ServiceError
from app.http.call import Call
from app.http.errors import describe_validation
from app.http.schemas import ClassifyFields, answer_body, server_timing
from app.http.time_budget import TIMEOUT_HEADER, budget_s, timeout_asked_ms
from app.loaded_model import Choice, LoadedModel
from app.log import request_id
from app.types import Prediction

HANDED_OVER = "fovea.handed_over"
PATH = "/v1/classify"
DEFAULT_TOP_K = 5
MAX_KEPT_QUERY_BYTES = 256  # longer ones are read anew every time
T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class HandedOver:
    """In the scope of a request that another way has taken on, and that ended in an error: the route answers it."""

    call: Call
    error: Exception
    read: bool  # all of its body


class Parameters(NamedTuple):
    """What may be said beside the images."""

    model: str | None = None
    version: int | None = None
    top_k: int | None = None
    quality: str | None = None
    min_quality: str | None = None
    timeout_ms: int | None = None

    def with_body(self, fields: ClassifyFields) -> Parameters:
        """Of a query, those that came in the body too.

        Raises:
            InvalidRequest: something was said twice, and not the same.
        """
        return Parameters(*(_either(name, value, getattr(fields, name)) for name, value in self._asdict().items()))


def parameters(call: Call) -> Parameters:
    """Of the query and the headers; a time budget counts from here on.

    Raises:
        InvalidRequest: they cannot be read.
    """
    query = call.scope["query_string"]
    found = _known_query(query) if len(query) <= MAX_KEPT_QUERY_BYTES else _read_query(query)
    if asked := call.header(TIMEOUT_HEADER):
        found = found._replace(timeout_ms=_either("timeout_ms", found.timeout_ms, timeout_asked_ms(asked), "header"))
    if found.timeout_ms is not None:
        call.budget.shorten(found.timeout_ms / 1000)  # the upload is part of it
    return found


def _read_query(query: bytes) -> Parameters:
    if not query:
        return Parameters()
    try:
        return Parameters(**ClassifyFields.model_validate(dict(QueryParams(query))).model_dump())
    except ValidationError as error:
        raise InvalidRequest(describe_validation(error.errors())) from error


# A client asks the same thing again and again, and reading it is a good part of what a refusal takes (docs/adr/0022).
_known_query = lru_cache(maxsize=256)(_read_query)


@dataclass(frozen=True, slots=True)
class Asked:
    """How a request is to be answered."""

    model: LoadedModel
    choice: Choice
    top_k: int


def ask(call: Call, wanted: Parameters, num_images: int = 1) -> Asked:
    """Find the model, the operating point and the time for a request.

    Raises:
        InvalidRequest: there is no such point, or not so much time.
        ModelNotFound: there is none of that name.
        Overloaded: it cannot be answered in time.
    """
    state = call.app.state
    chosen = state.service.registry.get(wanted.model, wanted.version)
    name = call.model_label = chosen.manifest.name
    call.budget.shorten(budget_s(state.settings, name, wanted.timeout_ms))
    choice = chosen.choose(wanted.quality, wanted.min_quality, images=num_images, budget_s=call.budget.left_s)
    return Asked(chosen, choice, min(DEFAULT_TOP_K, len(chosen.labels)) if wanted.top_k is None else wanted.top_k)


def out_of_time(call: Call) -> DeadlineExceeded:
    """What a request is told whose time has run out."""
    return DeadlineExceeded(f"the request took longer than its time budget of {call.budget.seconds:g} s; try again later")


def answer_json(asked: Asked, answers: Sequence[Prediction | ServiceError]) -> tuple[bytes, str | None]:
    """The body of an answer, and its Server-Timing where an image was classified."""
    model, rung = asked.model, asked.choice.rung
    body = {
        "model": model.manifest.name,
        "version": model.manifest.version,
        "variant": model.variant,
        "quality": rung.name,
        "bound": rung.bound,
        "request_id": request_id.get(),
        "results": [answer_body(answer) for answer in answers],
    }
    predictions = [answer for answer in answers if isinstance(answer, Prediction)]
    return orjson.dumps(body), server_timing(predictions) if predictions else None


def _either(name: str, query: T | None, other: T | None, where: str = "body") -> T | None:
    if query is not None and other is not None and query != other:
        raise InvalidRequest(f"{name} is {query} in the query and {other} in the {where}; say it once")
    return query if query is not None else other
