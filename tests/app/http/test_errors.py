"""Every refusal: its status, one problem+json that a stranger understands, and no cost for anybody else."""

from __future__ import annotations

import asyncio
import gc
from pathlib import Path
from typing import Any

import pytest

from app import errors
from app.classification import Classification
from app.http.call import Call
from app.http.errors import MAX_DETAIL_CHARS, STATUSES, describe_validation, problem
from app.http.schemas import Problem
from app.imaging.preprocess import load_pixels
from tests.app.http.conftest import LogLines
from tests.app.http.served import (
    BAD_REQUESTS,
    CLASSIFY,
    JPEG,
    MODEL,
    MULTIPART,
    PNG,
    Bad,
    Gate,
    Served,
    as_files,
    base64_of,
    check_answer,
    check_problem,
    going,
    in_background,
    labels_of,
    make_settings,
    running,
    until,
)
from tests.images import make_jpeg, photo, truncated

pytestmark = [pytest.mark.anyio, pytest.mark.usefixtures("both_ways")]


@pytest.fixture
async def held(tiny_repository: Path, gate: Gate) -> Any:
    """The application with a good request in flight, held in the backend until the test is over."""
    async with running(make_settings(tiny_repository, runtime={"instances": 2})) as served:
        expected = labels_of(check_answer(await served.classify(JPEG)))
        begun = len(gate.batches)
        with gate.held():
            async with in_background(served.classify(JPEG)) as (good,):
                await gate.began(begun + 1)
                yield served
                assert not good.done()
                assert served.sample("fovea_in_flight") == 1
                assert len(JPEG) == served.sample("fovea_in_flight_bytes")
                gate.release()
                assert expected == labels_of(check_answer(await good))
        served.assert_nothing_in_flight()


@pytest.mark.parametrize("bad", BAD_REQUESTS, ids=str)
async def test_a_bad_request_is_told_what_is_wrong_and_costs_no_other_anything(held: Served, bad: Bad) -> None:
    """It is refused while a good request is in flight, which then gets the answer it gets alone."""
    response = await held.client.post(CLASSIFY, **bad.request)
    check_problem(response, bad.status, bad.code, *bad.words)
    assert 0 == held.outcome("failed") == held.outcome("failed", model="unknown")


async def test_good_requests_among_all_bad_ones_are_answered_as_alone(served: Served) -> None:
    """All at once: every good one gets its own answer, every bad one its own error."""
    images = [make_jpeg(photo(seed=seed)) for seed in range(8)]
    alone = [labels_of(check_answer(await served.classify(image))) for image in images]
    good = [served.classify(images[index % 8]) for index in range(len(BAD_REQUESTS))]
    bad = [served.client.post(CLASSIFY, **case.request) for case in BAD_REQUESTS]
    async with in_background(*(request for pair in zip(good, bad, strict=True) for request in pair)) as tasks:
        answers = await asyncio.gather(*tasks)
    for index, (case, answer, refusal) in enumerate(zip(BAD_REQUESTS, answers[::2], answers[1::2], strict=True)):
        check_problem(refusal, case.status, case.code, *case.words)
        found = labels_of(check_answer(answer))
        assert [label for label, _ in alone[index % 8]] == [label for label, _ in found]
        assert [p for _, p in found] == pytest.approx([p for _, p in alone[index % 8]], abs=1e-4)
    assert len(images) + len(good) == served.outcome("ok")
    served.assert_nothing_in_flight()


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("GET", "/nothing"),
        ("POST", "/nothing"),
        ("GET", "/v1"),
        ("GET", "/static/nothing.js"),
        ("GET", "/static/"),
        ("GET", "/static/../application.py"),
        ("GET", "/static/%2e%2e/application.py"),
        ("GET", "/static/swagger/nothing.css"),
        ("GET", "/v1/models/a/b"),
        ("GET", "/redoc"),
    ],
)
async def test_an_unknown_address_is_a_problem_too(served: Served, method: str, path: str) -> None:
    """It says where the routes are told."""
    check_problem(await served.client.request(method, path), 404, "not_found", "/docs")


@pytest.mark.parametrize(
    ("method", "path", "allowed"),
    [
        ("GET", CLASSIFY, {"POST"}),
        ("HEAD", CLASSIFY, {"POST"}),
        ("PUT", CLASSIFY, {"POST"}),
        ("DELETE", "/v1/models", {"GET"}),
        ("POST", "/health/ready", {"GET"}),
        ("POST", "/metrics", {"GET"}),
        ("POST", "/", {"GET"}),
        ("POST", "/static/page.js", {"GET", "HEAD"}),
        ("TRACE", "/", {"GET"}),
    ],
)
async def test_a_wrong_method_is_a_problem_that_names_the_right_one(
    served: Served, method: str, path: str, allowed: set[str]
) -> None:
    """RFC 9110 asks for the Allow header; the answer to HEAD has no body."""
    response = await served.client.request(method, path)
    assert allowed == set(response.headers["allow"].split(", "))
    if method == "HEAD":
        assert (response.status_code, response.content) == (405, b"")
    else:
        check_problem(response, 405, "method_not_allowed", "/docs")


async def test_an_unexpected_error_tells_nothing_of_itself(
    served: Served, monkeypatch: pytest.MonkeyPatch, log_lines: LogLines
) -> None:
    """500 with the request's id; the log has the whole cause under that id, and the next request is answered."""

    def broken(*_args: object) -> None:
        raise RuntimeError("the secret of the service")

    with monkeypatch.context() as patch:
        patch.setattr("app.classification.top_k_labels", broken)
        response = await served.classify(JPEG, headers={"x-request-id": "find-me"})
    assert check_problem(response, 500, "internal_error", "log", "id").request_id == "find-me"
    assert "secret" not in response.text
    (logged,) = [line for line in log_lines() if line["event"] == "unexpected error"]
    assert logged["request_id"] == "find-me"
    assert "RuntimeError: the secret of the service" in logged["exception"]
    assert served.outcome("failed") == 1
    served.assert_nothing_in_flight()
    check_answer(await served.classify(JPEG))


async def test_an_unexpected_error_of_one_image_is_told_in_its_place(
    served: Served, monkeypatch: pytest.MonkeyPatch, log_lines: LogLines
) -> None:
    """The images beside it are answered; alone it is a 500 that tells nothing of the cause, which the log has."""

    def broken(data: bytes, *args: Any, **options: Any) -> Any:
        if data == PNG:
            raise MemoryError("the secret of the machine")
        return load_pixels(data, *args, **options)

    monkeypatch.setattr("app.classification.load_pixels", broken)
    answer = check_answer(await served.client.post(CLASSIFY, files=as_files([JPEG, PNG, JPEG])), num_results=3)
    assert [result.error and result.error.code for result in answer.results] == [None, "inference_failed", None]
    response = await served.classify(PNG, headers={"x-request-id": "find-me"})
    assert "secret" not in check_problem(response, 500, "inference_failed", "log").detail
    logged = [line for line in log_lines() if line.get("request_id") == "find-me" and "secret" in line.get("exception", "")]
    assert len(logged) == 1
    served.assert_nothing_in_flight()
    check_answer(await served.classify(JPEG))


async def test_overload_is_refused_at_once_with_a_time_to_come_back(tiny_repository: Path, gate: Gate) -> None:
    """503 with whole seconds in Retry-After, counted; who was admitted is answered, and then there is room again."""
    settings = make_settings(
        tiny_repository,
        limits={"max_in_flight": 2},
        batching={"max_batch_size": 2},
        http={"max_images_per_request": 2},
    )
    async with running(settings) as served:
        begun = len(gate.batches)
        with gate.held():
            async with in_background(served.classify(JPEG)) as (first,):
                await gate.began(begun + 1)
                # Two more images: all or none, and there is room for one.
                refused = await served.client.post(CLASSIFY, files=as_files([JPEG, PNG]))
                check_problem(refused, 503, "overloaded", "1 images", "at most 2")
                assert served.sample("fovea_in_flight") == 1
                async with in_background(served.classify(PNG)) as (second,):
                    await until(lambda: served.sample("fovea_in_flight") == 2)
                    refused = await served.classify(JPEG)
                    check_problem(refused, 503, "overloaded", "2 images", "try again")
                    assert refused.headers["retry-after"].isdecimal()
                    assert 1 <= int(refused.headers["retry-after"]) <= 60
                    gate.release()
                    check_answer(await first)
                    check_answer(await second)
        assert served.outcome("overloaded") == 2
        check_answer(await served.client.post(CLASSIFY, files=as_files([JPEG, PNG])), num_results=2)
        served.assert_nothing_in_flight()


@pytest.mark.parametrize("announced", [True, False])
async def test_too_many_bytes_in_flight_are_refused_too(tiny_repository: Path, gate: Gate, announced: bool) -> None:
    """Whether their number is announced or only found out while they come."""
    size = len(JPEG) + 10
    settings = make_settings(tiny_repository, limits={"max_in_flight_bytes": size}, http={"max_upload_bytes": size})

    async def chunked() -> Any:
        yield JPEG

    async with running(settings) as served:
        begun = len(gate.batches)
        with gate.held():
            async with in_background(served.classify(JPEG)) as (first,):
                await gate.began(begun + 1)
                refused = await served.client.post(CLASSIFY, content=JPEG if announced else chunked())
                check_problem(refused, 503, "overloaded", f"{len(JPEG)} bytes", str(size))
                assert refused.headers["retry-after"].isdecimal()
                gate.release()
                check_answer(await first)
        assert served.outcome("overloaded") == 1
        check_answer(await served.classify(JPEG))
        served.assert_nothing_in_flight()


async def test_a_request_beyond_its_time_is_ended_and_its_work_skipped(tiny_repository: Path, gate: Gate) -> None:
    """504, counted; the permits come back while the backend is still stuck, and what only waited is never computed."""
    settings = make_settings(tiny_repository, http={"request_timeout_s": 0.5}, batching={"max_batch_size": 1})
    async with running(settings) as served:
        begun = len(gate.batches)
        with gate.held():
            async with in_background(served.classify(JPEG)) as (first,):
                await gate.began(begun + 1)
                waiting = await served.client.post(CLASSIFY, files=as_files([JPEG, PNG]))
                for response in (await first, waiting):
                    check_problem(response, 504, "deadline_exceeded", "0.5 s", "try again")
            served.assert_nothing_in_flight()
        assert served.outcome("timeout") == 2
        await until(lambda: served.sample("fovea_queue_size", model=MODEL, stage="0") == 0)
        await until(lambda: served.sample("fovea_skipped_total", model=MODEL, stage="0") == 2)
        assert gate.batches[begun:] == [(0, 1)]
        assert (await served.client.get("/health/ready")).status_code == 200


async def test_an_upload_that_takes_too_long_is_ended(tiny_repository: Path) -> None:
    """The time budget includes the upload; what had come is given back."""

    async def slow() -> Any:
        yield JPEG[:100]
        await asyncio.Event().wait()

    settings = make_settings(tiny_repository, http={"request_timeout_s": 0.05})
    with going("plain ASGI"):  # over a socket httpx would go on sending before it reads
        async with running(settings) as served:
            check_problem(await served.client.post(CLASSIFY, content=slow()), 504, "deadline_exceeded", "0.05 s")
            assert served.outcome("timeout") == 1
            served.assert_nothing_in_flight()


async def test_nothing_of_a_request_that_failed_waits_for_the_collector(served: Served) -> None:
    """An error that holds its own frames would hold the body too: refused at a thousand a second, they fill the memory."""
    for options in ({}, {"params": {"timeout_ms": 60_000}}, {"headers": {"content-type": MULTIPART}}):  # what is made once
        await served.classify(JPEG, **options)
    gc.collect()
    gc.disable()
    try:
        for body, params, status in (
            (b"text", {}, 415),
            (truncated(JPEG), {}, 422),
            (JPEG, {"model": "nobody"}, 404),
            (JPEG, {"top_k": 0}, 422),
            (JPEG, {"timeout_ms": 10**8}, 422),
            (JPEG, {}, 200),
        ):
            assert (await served.classify(body, params=params)).status_code == status
        check_answer(await served.client.post(CLASSIFY, json={"images": [base64_of(JPEG)]}))  # decoded on another thread
        await until(lambda: not _alive(Call, Classification))
    finally:
        gc.enable()


def _alive(*kinds: type) -> list[object]:
    return [found for found in gc.get_objects() if issubclass(type(found), kinds)]


async def test_what_the_client_said_is_quoted_within_limits(served: Served) -> None:
    """A name of a million letters is not sent back whole."""
    body = b'{"images": ["aaaa"], "model": "' + b"m" * 900_000 + b'"}'
    response = await served.classify(body, headers={"content-type": "application/json"})
    found = check_problem(response, 404, "model_not_found", "mmmm")
    assert len(found.detail) <= MAX_DETAIL_CHARS + 1


def test_every_error_class_has_a_status() -> None:
    """A class added without a row in the table would be a KeyError in the handler."""
    abstract = {errors.ServiceError, errors.RequestError}
    classes = {value for value in vars(errors).values() if isinstance(value, type) and issubclass(value, errors.ServiceError)}
    assert {cls.code for cls in classes - abstract} <= STATUSES.keys()
    assert all(400 <= status < 600 and title for status, title in STATUSES.values())


def test_a_problem_holds_the_published_schema() -> None:
    """Outside of a request its id is null."""
    response = problem("not_found", "A sentence.", headers={"X-More": "1"})
    assert response.headers["x-more"] == "1"
    assert Problem.model_validate_json(bytes(response.body)).request_id is None


def test_validation_errors_become_one_sentence() -> None:
    """Where and what, without the part of the request that everybody knows."""
    found = describe_validation(
        [
            {"loc": ("query", "top_k"), "msg": "not a number"},
            {"loc": ("images", 3), "msg": "not text"},
            {"loc": (), "msg": "no"},
        ]
    )
    assert found == "top_k: not a number; images.3: not text; no"


async def test_a_mistyped_parameter_is_told_by_its_name(served: Served) -> None:
    """`topk` for `top_k` would otherwise be passed over, and the answer not be what was asked for."""
    response = await served.client.post(CLASSIFY, params={"topk": 3}, content=JPEG)
    check_problem(response, 422, "invalid_request", "topk: there is no such parameter")
