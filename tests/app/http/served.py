"""The real application in this process, with the tiny model and real ONNX Runtime; and what every answer must look like."""

from __future__ import annotations

import asyncio
import base64
import threading
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager, contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest
from fastapi import FastAPI
from uvicorn.server import ServerState

from app.http.application import create_app
from app.http.connections import Connections
from app.http.errors import PROBLEM_JSON, STATUSES, TYPE_PREFIX
from app.http.schemas import ClassifyResponse, Problem
from app.http.server import make_config
from app.metrics import Metrics
from app.runtime.backend import RunControl
from app.runtime.ort_backend import OrtBackend
from app.service import InferenceService
from app.settings import Settings
from app.types import Array, StageOutput
from tests.fakes import PATIENCE_S
from tests.images import make_jpeg, make_png, photo, png_bomb_header, truncated

MODEL = "test_vit"
CLASSIFY = "/v1/classify"
MAX_UPLOAD_BYTES = 2**20
BOUNDARY = "a-boundary"
MULTIPART = f"multipart/form-data; boundary={BOUNDARY}"
# Words that only somebody who has read the code would understand, or that give away how it is made.
INTERNAL_WORDS = ("Traceback", "object at 0x", "pydantic", "starlette", "ClassifyJson", "Error(", ".py")


def make_settings(root: Path, /, **sections: Mapping[str, Any]) -> Settings:
    """Settings for a quick start: one instance of the fp32 variant, so nothing is timed at load."""
    settings: dict[str, dict[str, Any]] = {
        "repository": {"root": root},
        "runtime": {"variant": "fp32", "instances": 1},
        "http": {"max_upload_bytes": MAX_UPLOAD_BYTES},
    }
    for name, values in sections.items():
        settings[name] = {**settings.get(name, {}), **values}
    return Settings.model_validate(settings)


@dataclass(frozen=True, slots=True)
class Served:
    """A running application and a client that calls it."""

    app: FastAPI
    client: httpx.AsyncClient

    @property
    def service(self) -> InferenceService:
        service: InferenceService = self.app.state.service
        return service

    @property
    def metrics(self) -> Metrics:
        metrics: Metrics = self.app.state.metrics
        return metrics

    def sample(self, name: str, **labels: str) -> float:
        """A metric's value now; 0 where nothing was counted yet."""
        return self.metrics.registry.get_sample_value(name, labels) or 0.0

    def outcome(self, outcome: str, model: str = MODEL) -> float:
        """Requests that ended so."""
        return self.sample("fovea_requests_total", model=model, outcome=outcome)

    def assert_nothing_in_flight(self) -> None:
        assert self.sample("fovea_in_flight") == 0
        assert self.sample("fovea_in_flight_bytes") == 0

    async def classify(self, body: bytes, **options: Any) -> httpx.Response:
        """POST one image as the body."""
        return await self.client.post(CLASSIFY, content=body, **options)


Way = Callable[[FastAPI], AbstractAsyncContextManager[httpx.AsyncClient]]


@asynccontextmanager
async def plain_asgi(app: FastAPI) -> AsyncIterator[httpx.AsyncClient]:
    """A client that calls the application without a server."""
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://fovea") as client:
        yield client


@asynccontextmanager
async def over_socket(app: FastAPI) -> AsyncIterator[httpx.AsyncClient]:
    """A client that calls it over a socket, through what stands before the application in the server."""
    settings: Settings = app.state.settings
    connections = Connections(settings.http, app.state.metrics, settings.http.max_connections)
    config, state = make_config(app, settings, connections), ServerState()
    server = await asyncio.get_running_loop().create_server(
        lambda: config.http_protocol_class(config=config, server_state=state, app_state={}), "127.0.0.1", 0
    )
    try:
        async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}") as client:
            yield client
    finally:
        server.close()
        await until(lambda: not state.connections)


WAYS: dict[str, Way] = {"plain ASGI": plain_asgi, "over a socket": over_socket}
_way = ContextVar("_way", default="plain ASGI")


@contextmanager
def going(way: str) -> Iterator[None]:
    """Applications that run meanwhile are called on one of `WAYS`."""
    token = _way.set(way)
    try:
        yield
    finally:
        _way.reset(token)


@asynccontextmanager
async def running(settings: Settings) -> AsyncIterator[Served]:
    """The application between its start and its stop."""
    app = create_app(settings)
    async with app.router.lifespan_context(app), WAYS[_way.get()](app) as client:
        yield Served(app, client)


class Gate:
    """Stands before every run of the real backend: holds runs, makes them fail, and remembers their batch sizes."""

    def __init__(self) -> None:
        self.batches: list[tuple[int, int]] = []  # stage and images of each run, in the order in which they began
        self.failures: list[BaseException] = []  # the next runs raise these
        self._changed = threading.Condition()
        self._open = threading.Event()
        self._open.set()

    def installed(self, monkeypatch: pytest.MonkeyPatch) -> Gate:
        """This gate, before every run of the backends opened from now on."""
        run: Callable[[OrtBackend, int, Mapping[str, Array], RunControl | None], StageOutput] = OrtBackend.run

        def guarded(
            backend: OrtBackend, stage: int, inputs: Mapping[str, Array], control: RunControl | None = None
        ) -> StageOutput:
            with self._changed:
                self.batches.append((stage, len(next(iter(inputs.values())))))
                failure = self.failures.pop(0) if self.failures else None
                self._changed.notify_all()
            assert self._open.wait(PATIENCE_S), "held for ever"
            if failure is not None:
                raise failure
            return run(backend, stage, inputs, control)

        monkeypatch.setattr(OrtBackend, "run", guarded)
        return self

    @contextmanager
    def held(self) -> Iterator[None]:
        """No run ends while this is open, or until `release`."""
        self._open.clear()
        try:
            yield
        finally:
            self.release()

    def release(self) -> None:
        """Let all runs go on."""
        self._open.set()

    async def began(self, count: int) -> None:
        """Wait until so many runs have begun in all."""
        await asyncio.to_thread(self._wait, count)

    def _wait(self, count: int) -> None:
        with self._changed:
            assert self._changed.wait_for(lambda: len(self.batches) >= count, PATIENCE_S), f"{len(self.batches)} runs began"


async def until(condition: Callable[[], object]) -> None:
    """Let the event loop turn until it holds."""
    async with asyncio.timeout(PATIENCE_S):
        while not condition():  # noqa: ASYNC110 - metrics and tasks are looked at, they tell nobody
            await asyncio.sleep(0.001)


@asynccontextmanager
async def in_background(*requests: Any) -> AsyncIterator[list[asyncio.Task[httpx.Response]]]:
    """Requests on their way; whatever happens, none is left behind."""
    tasks = [asyncio.ensure_future(request) for request in requests]
    try:
        yield tasks
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


def part(content: bytes, name: str = "images", filename: str | None = "photo.jpg") -> bytes:
    """One part of a multipart body; without a file name it is a field."""
    file = "" if filename is None else f'; filename="{filename}"'
    head = f'--{BOUNDARY}\r\nContent-Disposition: form-data; name="{name}"{file}\r\n\r\n'
    return head.encode() + content + b"\r\n"


def multipart(*parts: bytes) -> bytes:
    """A whole multipart body."""
    return b"".join(parts) + f"--{BOUNDARY}--\r\n".encode()


def as_files(images: Sequence[bytes]) -> list[tuple[str, tuple[str, bytes]]]:
    """For httpx's `files`."""
    return [("images", (f"{index}.jpg", image)) for index, image in enumerate(images)]


def base64_of(image: bytes) -> str:
    return base64.b64encode(image).decode()


def check_answer(response: httpx.Response, num_results: int = 1) -> ClassifyResponse:
    """Holds a good answer to the published schema: all of it, and nothing beside it."""
    assert response.status_code == 200, response.text
    assert response.headers["content-type"] == "application/json"
    body = response.json()
    answer = ClassifyResponse.model_validate(body, strict=True)
    assert body == answer.model_dump(exclude_unset=True)
    assert answer.request_id == response.headers["x-request-id"]
    assert num_results == len(answer.results)
    for result in answer.results:
        assert (result.error is None) == (result.predictions is not None) == (result.timings_ms is not None)
        if result.predictions is not None:
            probabilities = [score.probability for score in result.predictions]
            assert sorted(probabilities, reverse=True) == probabilities
            assert 1.001 > sum(probabilities) > 0
    return answer


def check_problem(response: httpx.Response, status: int, code: str, *words: str) -> Problem:
    """Holds an error to RFC 9457 and to our own table; its detail has these words, and none that a stranger cannot know."""
    assert (status, PROBLEM_JSON) == (response.status_code, response.headers["content-type"]), response.text
    body = response.json()
    problem = Problem.model_validate(body, strict=True)
    assert body == problem.model_dump()
    assert (status, STATUSES[code][1]) == STATUSES[code] == (problem.status, problem.title)
    assert (code, TYPE_PREFIX + code) == (problem.code, problem.type)
    assert problem.request_id
    assert problem.request_id == response.headers["x-request-id"]
    assert len(problem.detail) > 10
    for word in words:
        assert word in problem.detail
    for word in INTERNAL_WORDS:
        assert word not in problem.detail
    return problem


def labels_of(answer: ClassifyResponse, index: int = 0) -> list[tuple[str, float]]:
    """Labels and probabilities of one result."""
    predictions = answer.results[index].predictions
    assert predictions is not None
    return [(score.label, score.probability) for score in predictions]


@dataclass(frozen=True, slots=True)
class Bad:
    """A request that must be refused, and how."""

    name: str
    status: int
    code: str
    words: tuple[str, ...]
    request: Mapping[str, Any]

    def __str__(self) -> str:
        return self.name


def _bad(name: str, status: int, code: str, *words: str, **request: Any) -> Bad:
    return Bad(name, status, code, words, request)


def _json(name: str, status: int, code: str, *words: str, content: bytes) -> Bad:
    return _bad(name, status, code, *words, content=content, headers={"content-type": "application/json"})


def _form(name: str, status: int, code: str, *words: str, content: bytes, content_type: str = MULTIPART) -> Bad:
    return _bad(name, status, code, *words, content=content, headers={"content-type": content_type})


JPEG = make_jpeg(photo(seed=1))
PNG = make_png(photo(seed=2))

BAD_REQUESTS = [
    _bad("empty body", 422, "invalid_image", "empty", content=b""),
    _bad(
        "text called jpg",
        415,
        "unsupported_image",
        "JPEG",
        "PNG",
        content=b"Dear diary,\n",
        headers={"content-type": "image/jpeg"},
    ),
    _form("text file called jpg", 415, "unsupported_image", "JPEG", content=multipart(part(b"Dear diary"))),
    _bad("truncated JPEG", 422, "invalid_image", "JPEG", "cut off", content=truncated(JPEG)),
    _bad("PNG of 50000 x 50000", 413, "image_too_large", "50000 x 50000", content=png_bomb_header(50_000, 50_000)),
    _bad("too many bytes", 413, "payload_too_large", str(MAX_UPLOAD_BYTES), content=b"\xff" * (MAX_UPLOAD_BYTES + 1)),
    _bad("unknown model", 404, "model_not_found", "'nobody'", MODEL, content=JPEG, params={"model": "nobody"}),
    _bad("unknown version", 404, "model_not_found", "version 7", "loaded: 1", content=JPEG, params={"version": 7}),
    _bad("version 0", 422, "invalid_request", "version", content=JPEG, params={"version": 0}),
    _bad("version latest", 422, "invalid_request", "version", content=JPEG, params={"version": "latest"}),
    _bad("top_k 0", 422, "invalid_request", "top_k", "between 1 and 10", content=JPEG, params={"top_k": 0}),
    _bad("top_k -1", 422, "invalid_request", "top_k", content=JPEG, params={"top_k": -1}),
    _bad("top_k 100000", 422, "invalid_request", "top_k", "100000", content=JPEG, params={"top_k": 100_000}),
    _bad("top_k abc", 422, "invalid_request", "top_k", "integer", content=JPEG, params={"top_k": "abc"}),
    _bad("unknown parameter", 422, "invalid_request", "topk", content=JPEG, params={"topk": 3}),
    _form("form without file", 422, "invalid_request", "no file", content=multipart(part(b"3", "top_k", None))),
    _form(
        "image without a file name",
        422,
        "invalid_request",
        "not a file",
        "images",
        content=multipart(part(b"string", "images", None), part(JPEG)),
    ),
    _form("form without parts", 422, "invalid_request", "no file", content=multipart()),
    _form("empty form", 422, "invalid_request", "closing boundary", content=b""),
    _form(
        "form without boundary",
        422,
        "invalid_request",
        "boundary",
        content=multipart(part(JPEG)),
        content_type="multipart/form-data",
    ),
    _form(
        "form with another boundary",
        422,
        "invalid_request",
        "multipart",
        content=multipart(part(JPEG)),
        content_type="multipart/form-data; boundary=other",
    ),
    _form("form cut in its only file", 422, "invalid_request", "closing boundary", content=part(JPEG)[:-200]),
    _form("form cut after its second file", 422, "invalid_request", "closing boundary", content=part(JPEG) + part(PNG)[:-200]),
    _form("form that is no form", 422, "invalid_request", "multipart", content=JPEG),
    _form("65 files", 413, "payload_too_large", "64 images", content=multipart(*[part(b"x")] * 65)),
    _form("5000 files", 413, "payload_too_large", "64 images", content=multipart(*[part(b"x")] * 5000)),
    _form("17 fields", 422, "invalid_request", "fields", content=multipart(*[part(b"1", "top_k", None)] * 17, part(JPEG))),
    _form("unknown field", 422, "invalid_request", "topk", content=multipart(part(b"1", "topk", None), part(JPEG))),
    _form("field top_k abc", 422, "invalid_request", "top_k", content=multipart(part(b"abc", "top_k", None), part(JPEG))),
    _form("field top_k 0", 422, "invalid_request", "top_k", content=multipart(part(b"0", "top_k", None), part(JPEG))),
    _form("field model", 404, "model_not_found", "'nobody'", content=multipart(part(b"nobody", "model", None), part(JPEG))),
    _json("no JSON at all", 422, "invalid_request", "not JSON", content=b""),
    _json("broken JSON", 422, "invalid_request", "not JSON", "line 1", content=b'{"images": ["'),
    _json("an image called JSON", 422, "invalid_request", "not JSON", content=JPEG),
    _json("half a surrogate", 422, "invalid_request", "not JSON", content=b'{"images": ["\\ud800"]}'),
    _json("deep JSON", 422, "invalid_request", "nested", content=b"[" * 100_000),
    _json("JSON null", 422, "invalid_request", "object", "images", content=b"null"),
    _json("JSON list", 422, "invalid_request", "object", "images", content=b"[]"),
    _json("JSON without images", 422, "invalid_request", "images", content=b"{}"),
    _json("JSON with no image", 422, "invalid_request", "empty", content=b'{"images": []}'),
    _json("images not a list", 422, "invalid_request", "images", "list", content=b'{"images": "abcd"}'),
    _json("images are numbers", 422, "invalid_request", "images.0", "string", content=b'{"images": [1, 2]}'),
    _json("images are null", 422, "invalid_request", "images", content=b'{"images": null}'),
    _json("top_k is a word", 422, "invalid_request", "top_k", content=b'{"images": ["aaaa"], "top_k": "many"}'),
    _json("top_k is a list", 422, "invalid_request", "top_k", content=b'{"images": ["aaaa"], "top_k": [1]}'),
    _json("unknown key", 422, "invalid_request", "topk", content=b'{"images": ["aaaa"], "topk": 1}'),
    _json("65 images", 413, "payload_too_large", "64 images", content=b'{"images": [' + b'"",' * 64 + b'""]}'),
    _json("100000 numbers", 413, "payload_too_large", "64 images", content=b'{"images": [' + b"1," * 99_999 + b"1]}"),
    _json(
        "50000 keys",
        422,
        "invalid_request",
        "keys",
        content=b"{" + b",".join(b'"k%d":1' % key for key in range(50_000)) + b"}",
    ),
    _json("not base64", 422, "invalid_image", "base64", content=b'{"images": ["this is no base64!"]}'),
    _json("base64 that is no ASCII", 422, "invalid_image", "base64", content='{"images": ["ä"]}'.encode()),
    _json("base64 of text", 415, "unsupported_image", "JPEG", content=b'{"images": ["SGVsbG8="]}'),
    _json("empty data URL", 422, "invalid_image", "empty", content=b'{"images": ["data:image/png;base64,"]}'),
]
