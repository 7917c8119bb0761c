"""A request with two faults is told the first one in the order of `InferenceService.answer`, whichever way it comes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from itertools import combinations
from pathlib import Path
from typing import Any

import orjson
import pytest

from tests.app.http.served import (
    CLASSIFY,
    JPEG,
    MAX_UPLOAD_BYTES,
    MULTIPART,
    Served,
    base64_of,
    check_answer,
    check_problem,
    make_settings,
    multipart,
    part,
    running,
)

pytestmark = [pytest.mark.anyio, pytest.mark.usefixtures("both_ways")]


def _close(served: Served, patch: pytest.MonkeyPatch) -> None:
    patch.setattr(served.service.admission, "_closed", True)


def _fill(served: Served, patch: pytest.MonkeyPatch) -> None:
    patch.setattr(served.service.admission, "max_images", 0)


@dataclass(frozen=True, slots=True)
class Fault:
    """What may be wrong with a request, and what it is told then."""

    status: int
    code: str
    words: str
    params: Mapping[str, Any] = field(default_factory=dict)
    headers: Mapping[str, str] = field(default_factory=dict)
    content: bytes | None = None
    service: Callable[[Served, pytest.MonkeyPatch], None] | None = None


STOPPING = Fault(503, "overloaded", "stopping", service=_close)
PARAMETER = Fault(422, "invalid_request", "topk", params={"topk": 1})
MODEL = Fault(404, "model_not_found", "'nobody'", params={"model": "nobody"})
TIME = Fault(422, "invalid_request", "takes at most", headers={"X-Request-Timeout-Ms": "40000"})
TOP_K = Fault(422, "invalid_request", "between 1 and 10", params={"top_k": 0})
QUALITY = Fault(422, "invalid_request", "'splendid'", params={"quality": "splendid"})
BYTES = Fault(413, "payload_too_large", "bytes", content=b"\xff" * (MAX_UPLOAD_BYTES + 1))
FORM = Fault(422, "invalid_request", "body", content=b"no form")
QUOTA = Fault(429, "quota_exceeded", "try again later", headers={"X-API-Key": "spent"})
ROOM = Fault(503, "overloaded", "at most 0 are accepted", service=_fill)

# What asks for a model can stand in the body of a form, so there the body comes first.
RAW_ORDER = [STOPPING, PARAMETER, MODEL, TIME, TOP_K, QUALITY, BYTES, QUOTA, ROOM]
FORM_ORDER = [STOPPING, PARAMETER, BYTES, FORM, QUOTA, MODEL, TIME, TOP_K, QUALITY, ROOM]
FORMS: dict[str, tuple[str, bytes, list[Fault]]] = {
    "raw": ("image/jpeg", JPEG, RAW_ORDER),
    "multipart": (MULTIPART, multipart(part(JPEG)), FORM_ORDER),
    "json": ("application/json", orjson.dumps({"images": [base64_of(JPEG)]}), FORM_ORDER),
}


@pytest.mark.parametrize("form", FORMS)
async def test_the_first_fault_in_the_order_is_told(tiny_repository: Path, monkeypatch: pytest.MonkeyPatch, form: str) -> None:
    """Alone or beside a later one, and nothing stays held."""
    content_type, content, order = FORMS[form]
    async with running(make_settings(tiny_repository, quotas={"images_per_s": 1e-6, "burst": 1})) as served:

        async def send(*faults: Fault) -> Any:
            sent = {"content": content, "params": {}, "headers": {"content-type": content_type}}
            with monkeypatch.context() as patch:
                for fault in reversed(faults):
                    sent["params"].update(fault.params)  # type: ignore[attr-defined]
                    sent["headers"].update(fault.headers)  # type: ignore[attr-defined]
                    sent["content"] = sent["content"] if fault.content is None else fault.content
                    if fault.service is not None:
                        fault.service(served, patch)
                if QUOTA not in faults:
                    sent["headers"]["x-api-key"] = str(len(asked))  # type: ignore[index]
                asked.append(faults)
                return await served.client.post(CLASSIFY, **sent)

        asked: list[tuple[Fault, ...]] = []
        check_answer(await send())
        check_answer(await served.classify(JPEG, headers=QUOTA.headers))  # all that this client may send
        for first in order:
            check_problem(await send(first), first.status, first.code, first.words)
        for first, second in combinations(order, 2):
            check_problem(await send(first, second), first.status, first.code, first.words)
        served.assert_nothing_in_flight()
        check_answer(await send())
