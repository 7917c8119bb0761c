"""The API's description: valid, complete, and its examples work."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from fastapi.openapi.models import OpenAPI

from app import __version__
from app.http.errors import PROBLEM_JSON, STATUSES
from app.http.schemas import Problem
from tests.app.http.served import BAD_REQUESTS, CLASSIFY, Served, check_answer

pytestmark = pytest.mark.anyio


@pytest.fixture
async def document(served: Served) -> dict[str, Any]:
    response = await served.client.get("/openapi.json")
    assert response.status_code == 200
    body: dict[str, Any] = response.json()
    return body


def walk(node: Any) -> Iterator[dict[str, Any]]:
    """Every object in it."""
    if isinstance(node, dict):
        yield node
        for value in node.values():
            yield from walk(value)
    elif isinstance(node, list):
        for value in node:
            yield from walk(value)


async def test_it_is_valid_openapi(document: dict[str, Any]) -> None:
    """By its own model; every reference leads somewhere, every operation has its own name and words."""
    OpenAPI.model_validate(document)
    assert (True, "Fovea", __version__) == (
        document["openapi"].startswith("3.1"),
        document["info"]["title"],
        document["info"]["version"],
    )
    for node in walk(document):
        if isinstance(reference := node.get("$ref"), str):
            target: Any = document
            for step in reference.removeprefix("#/").split("/"):
                target = target[step]
            assert target
    operations = [operation for path in document["paths"].values() for operation in path.values()]
    assert len(operations) == len({operation["operationId"] for operation in operations})
    for operation in operations:
        assert operation["summary"]
        assert operation["description"]


async def test_every_route_of_ours_is_described(document: dict[str, Any]) -> None:
    """The pages are not part of the API."""
    assert {path: list(operations) for path, operations in document["paths"].items()} == {
        CLASSIFY: ["post"],
        "/v1/models": ["get"],
        "/v1/models/{name}": ["get"],
        "/v1/models/{name}/versions/{version}": ["get"],
        "/health/live": ["get"],
        "/health/ready": ["get"],
        "/metrics": ["get"],
    }


async def test_the_json_examples_work_when_sent(served: Served, document: dict[str, Any]) -> None:
    """What a stranger tries first on the API page."""
    body = document["paths"][CLASSIFY]["post"]["requestBody"]
    assert body["required"]
    examples = body["content"]["application/json"]["schema"]["examples"]
    assert examples
    for example in examples:
        answer = check_answer(await served.client.post(CLASSIFY, json=example), num_results=len(example["images"]))
        assert answer.results[0].predictions is not None
        assert example["top_k"] == len(answer.results[0].predictions)


async def test_errors_are_described_as_what_they_are(document: dict[str, Any]) -> None:
    """As problem+json with the fields of Problem, nowhere as FastAPI's own shape; every status that a refusal has is there."""
    responses = document["paths"][CLASSIFY]["post"]["responses"]
    may_happen = {STATUSES[code][0] for code in ("inference_failed", "overloaded", "deadline_exceeded", "quota_exceeded")}
    assert {str(status) for status in may_happen | {bad.status for bad in BAD_REQUESTS}} | {"200"} == set(responses)
    for path in document["paths"].values():
        for operation in path.values():
            for status, response in operation["responses"].items():
                if status.startswith("4") or (status.startswith("5") and operation["summary"] != "Are requests welcome?"):
                    assert list(response["content"]) == [PROBLEM_JSON]
                    assert set(Problem.model_fields) == set(response["content"][PROBLEM_JSON]["schema"]["properties"])
    assert "HTTPValidationError" not in document["components"]["schemas"]


async def test_every_field_of_the_answer_is_there(document: dict[str, Any]) -> None:
    """The answer is written by hand, so the description could have forgotten one."""
    schemas = document["components"]["schemas"]
    assert {"model", "version", "variant", "quality", "bound", "request_id", "results"} == set(
        schemas["ClassifyResponse"]["properties"]
    )
    assert {"predictions", "exit", "timings_ms", "error"} == set(schemas["ImageResult"]["properties"])
    media_types = set(document["paths"][CLASSIFY]["post"]["requestBody"]["content"])
    assert {"image/jpeg", "image/png", "multipart/form-data", "application/json"} <= media_types
    parameters = {parameter["name"] for parameter in document["paths"][CLASSIFY]["post"]["parameters"]}
    assert {"model", "version", "top_k", "quality", "min_quality", "timeout_ms"} == parameters
