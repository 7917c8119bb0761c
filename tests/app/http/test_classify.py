"""POST /v1/classify: every form of a request, and every part of its answer."""

from __future__ import annotations

import asyncio
import re
import shutil
from collections.abc import AsyncIterator
from pathlib import Path

import httpx
import numpy as np
import orjson
import pytest

from app.http.application import create_app
from models.manifest import MANIFEST_FILE
from tests.app.http.served import (
    CLASSIFY,
    JPEG,
    MODEL,
    MULTIPART,
    PNG,
    Gate,
    Served,
    as_files,
    base64_of,
    check_answer,
    check_problem,
    in_background,
    labels_of,
    make_settings,
    multipart,
    part,
    running,
    until,
)
from tests.images import make_jpeg, photo, png_bomb_header, truncated

pytestmark = [pytest.mark.anyio, pytest.mark.usefixtures("both_ways")]

DURATION = re.compile(r"([a-z_0-9]+);dur=([0-9]+(?:\.[0-9]+)?)")
MIXED = [JPEG, b"text", PNG, truncated(JPEG), png_bomb_header(50_000, 50_000)]
MIXED_CODES = [None, "unsupported_image", None, "invalid_image", "image_too_large"]


async def test_an_image_gets_labels_exit_and_timings(served: Served) -> None:
    """Five labels by default, the exit it took, and what ran."""
    answer = check_answer(await served.classify(JPEG, headers={"content-type": "image/jpeg"}))
    assert (answer.model, answer.version, answer.variant) == (MODEL, 1, "fp32")
    (result,) = answer.results
    assert result.exit is not None
    assert result.timings_ms is not None
    assert len(labels_of(answer)) == 5
    assert result.exit.stages == 3
    assert result.exit.stage + 1 == len(result.timings_ms.stages)
    assert served.outcome("ok") == 1
    served.assert_nothing_in_flight()


@pytest.mark.parametrize(
    "content_type",
    ["image/jpeg", "image/png", "application/x-www-form-urlencoded", "text/plain", "application/octet-stream", None],
)
async def test_a_raw_image_is_told_by_its_bytes_not_by_its_label(served: Served, content_type: str | None) -> None:
    """`curl --data-binary @photo.jpg` without a header says x-www-form-urlencoded, for one."""
    headers = {} if content_type is None else {"content-type": content_type}
    assert labels_of(check_answer(await served.classify(JPEG, headers=headers))) == labels_of(
        check_answer(await served.classify(JPEG))
    )


async def test_every_form_of_a_request_gives_the_same_answer(served: Served) -> None:
    """Raw, multipart, base64 and a data: URL carry the same image."""
    answers = [
        await served.classify(JPEG),
        await served.client.post(CLASSIFY, files=as_files([JPEG])),
        await served.client.post(CLASSIFY, files={"any name": JPEG}),
        await served.classify(multipart(part(JPEG)), headers={"content-type": MULTIPART.replace("multipart", "Multipart")}),
        await served.classify(multipart(part(JPEG))[:-2], headers={"content-type": MULTIPART}),  # no line end at its end
        await served.client.post(CLASSIFY, json={"images": [base64_of(JPEG)]}),
        await served.client.post(CLASSIFY, json={"images": [f"data:image/jpeg;base64,{base64_of(JPEG)}"]}),
        await served.classify(
            orjson.dumps({"images": [base64_of(JPEG)]}), headers={"content-type": "Application/JSON; charset=utf-8"}
        ),
    ]
    expected = labels_of(check_answer(answers[0]))
    for answer in answers:
        assert expected == labels_of(check_answer(answer))


@pytest.mark.parametrize("form", ["multipart", "json"])
async def test_bad_images_have_their_errors_in_their_places(served: Served, form: str) -> None:
    """Three bad images among five: 200, results in order, an error beside the image it belongs to."""
    if form == "multipart":
        response = await served.client.post(CLASSIFY, files=as_files(MIXED))
    else:
        response = await served.client.post(CLASSIFY, json={"images": [base64_of(image) for image in MIXED]})
    answer = check_answer(response, num_results=5)
    assert [None if result.error is None else result.error.code for result in answer.results] == MIXED_CODES
    for index in (0, 2):
        assert labels_of(check_answer(await served.classify(MIXED[index]))) == labels_of(answer, index)
    for result in answer.results:
        assert result.error is None or len(result.error.detail) > 10
    assert served.sample("fovea_images_total", model=MODEL, outcome="client_error") == 3
    served.assert_nothing_in_flight()


async def test_json_that_is_not_base64_is_an_error_in_its_place(served: Served) -> None:
    """The images beside it are answered."""
    images = ["no base64!", base64_of(JPEG), "data:text/plain,hello"]
    answer = check_answer(await served.client.post(CLASSIFY, json={"images": images}), num_results=3)
    assert [result.error and result.error.code for result in answer.results] == ["invalid_image", None, "invalid_image"]
    assert served.sample("fovea_images_total", model=MODEL, outcome="client_error") == 2
    assert served.sample("fovea_images_total", model=MODEL, outcome="ok") == 1


async def test_only_bad_images_among_several_are_answered_with_200(served: Served) -> None:
    """A list is answered as a list; it carries no Server-Timing, because nothing was computed."""
    response = await served.client.post(CLASSIFY, files=as_files([b"text", b""]))
    answer = check_answer(response, num_results=2)
    assert [result.error and result.error.code for result in answer.results] == ["unsupported_image", "invalid_image"]
    assert "server-timing" not in response.headers


async def test_results_are_in_the_order_of_the_images(served: Served) -> None:
    """As many as may be sent at once, all different, from several exits: each gets what it gets alone."""
    images = [make_jpeg(photo(seed=seed)) for seed in range(64)]
    together = check_answer(await served.client.post(CLASSIFY, files=as_files(images)), num_results=64)
    for index in range(0, 64, 7):
        alone = labels_of(check_answer(await served.classify(images[index])))
        assert [label for label, _ in alone] == [label for label, _ in labels_of(together, index)]
        np.testing.assert_allclose(
            [p for _, p in labels_of(together, index)], [p for _, p in alone], atol=1e-4
        )  # another batch size sums in another order


@pytest.mark.parametrize("top_k", [1, 3, 10])
async def test_top_k_gives_so_many_labels(served: Served, top_k: int) -> None:
    """In the query, in a form field and in JSON; the shorter list is the beginning of the longer."""
    everything = labels_of(check_answer(await served.classify(JPEG, params={"top_k": 10})))
    for response in (
        await served.classify(JPEG, params={"top_k": top_k}),
        await served.client.post(CLASSIFY, files=as_files([JPEG]), data={"top_k": str(top_k)}),
        await served.client.post(CLASSIFY, json={"images": [base64_of(JPEG)], "top_k": top_k}),
    ):
        assert everything[:top_k] == labels_of(check_answer(response))


@pytest.mark.parametrize("zeros", [0, 1000])
async def test_a_query_is_read_the_same_every_time(served: Served, zeros: int) -> None:
    """Of any length; what is wrong with it is told every time too."""
    wanted, wrong = "0" * zeros + "2", "0" * zeros + "x"
    for _ in range(2):
        assert len(labels_of(check_answer(await served.classify(JPEG, params={"top_k": wanted})))) == 2
        check_problem(await served.classify(JPEG, params={"top_k": wrong}), 422, "invalid_request", "top_k")
        assert len(labels_of(check_answer(await served.classify(JPEG)))) == 5


async def test_model_and_version_may_be_named_anywhere(served: Served) -> None:
    """In the query, in form fields, in JSON, or the same in two places."""
    named = {"model": MODEL, "version": "1"}
    for response in (
        await served.classify(JPEG, params=named),
        await served.client.post(CLASSIFY, files=as_files([JPEG]), data=named),
        await served.client.post(CLASSIFY, json={"images": [base64_of(JPEG)], "model": MODEL, "version": 1}),
        await served.client.post(CLASSIFY, files=as_files([JPEG]), data=named, params=named),
    ):
        assert (check_answer(response).model, check_answer(response).version) == (MODEL, 1)


async def test_a_request_chooses_its_operating_point(served: Served) -> None:
    """In the query, in a form field and in JSON; the answer says which it was and what it costs, and the metric counts it."""
    before = [served.sample("fovea_answered_total", model=MODEL, quality=name) or 0 for name in ("full", "balanced", "fast")]
    plain = check_answer(await served.classify(JPEG))
    full = [
        check_answer(response)
        for response in (
            await served.classify(JPEG, params={"quality": "full"}),
            await served.client.post(CLASSIFY, files=as_files([JPEG]), data={"quality": "full"}),
            await served.client.post(CLASSIFY, json={"images": [base64_of(JPEG)], "quality": "full"}),
        )
    ]
    fast = check_answer(await served.classify(JPEG, params={"quality": "fast"}))

    assert (plain.quality, fast.quality) == ("balanced", "fast")
    assert {(answer.quality, answer.bound) for answer in full} == {("full", "every image has the answer of the last exit")}
    assert {answer.results[0].exit.stage for answer in full} == {2}
    assert fast.results[0].exit.stage <= plain.results[0].exit.stage
    after = [served.sample("fovea_answered_total", model=MODEL, quality=name) or 0 for name in ("full", "balanced", "fast")]
    assert [now - then for now, then in zip(after, before, strict=True)] == [3, 1, 1]


@pytest.mark.parametrize(
    "values",
    [
        {"quality": "full"},
        {"quality": "best"},
        {"quality": ""},
        {"top_k": "3"},
        {"top_k": "0"},
        {"top_k": ""},
        {"top_k": "3.0"},
        {"top_k": "3.5"},
        {"top_k": "abc"},
        {"version": "1"},
        {"version": "0"},
        {"version": "9" * 30},
        {"version": "9" * 5000},
        {"model": ""},
        {"model": MODEL, "version": "2"},
        {"modle": MODEL},
    ],
    ids=lambda values: str(values)[:40],
)
async def test_a_parameter_means_the_same_wherever_it_stands(served: Served, values: dict[str, str]) -> None:
    """In the query, in a form field, or in JSON: the same answer, or the same refusal in the same words."""
    responses = [
        await served.classify(JPEG, params=values),
        await served.client.post(CLASSIFY, files=as_files([JPEG]), data=values),
        await served.client.post(CLASSIFY, json={"images": [base64_of(JPEG)], **values}),
    ]
    if responses[0].status_code == 200:
        assert len({tuple(labels_of(check_answer(response))) for response in responses}) == 1
    else:
        bodies = [response.json() for response in responses]
        assert len({(body["status"], body["code"], body["detail"]) for body in bodies}) == 1
        assert {404, 422} >= {response.status_code for response in responses}


@pytest.mark.parametrize(
    ("query", "body"),
    [
        ({"top_k": 3}, {"top_k": 4}),
        ({"model": MODEL}, {"model": "other"}),
        ({"version": 1}, {"version": 2}),
        ({"quality": "full"}, {"quality": "fast"}),
    ],
)
@pytest.mark.parametrize("form", ["multipart", "json"])
async def test_a_parameter_said_twice_differently_is_refused(
    served: Served, query: dict[str, object], body: dict[str, object], form: str
) -> None:
    """Which of the two was meant is not for us to guess."""
    (name,) = query
    if form == "multipart":
        data = {name: str(body[name])}
        response = await served.client.post(CLASSIFY, params=query, files=as_files([JPEG]), data=data)
    else:
        response = await served.client.post(CLASSIFY, params=query, json={"images": [base64_of(JPEG)], **body})
    check_problem(response, 422, "invalid_request", name, str(query[name]), str(body[name]), "query", "body")


async def test_server_timing_agrees_with_the_timings_of_the_answer(served: Served) -> None:
    """Every entry is `name;dur=milliseconds`, and is the number the body has."""
    response = await served.classify(JPEG)
    timings = check_answer(response).results[0].timings_ms
    assert timings is not None
    entries = [entry.strip() for entry in response.headers["server-timing"].split(",")]
    parsed = {match[1]: float(match[2]) for match in map(DURATION.fullmatch, entries) if match is not None}
    stages = {f"stage_{index}": stage.compute for index, stage in enumerate(timings.stages)}
    assert {"decode": timings.decode, "queue": timings.queue, **stages, "total": timings.total} == parsed
    assert len(entries) == len(parsed)
    rounding = 0.0005 * (2 + 2 * len(stages))
    assert timings.queue == pytest.approx(sum(stage.queue for stage in timings.stages), abs=rounding)
    assert timings.compute == pytest.approx(sum(stages.values()), abs=rounding)
    assert timings.decode + timings.queue + timings.compute <= timings.total + rounding


@pytest.mark.parametrize("num_images", [1, 2])
async def test_the_total_begins_before_the_upload(served: Served, num_images: int) -> None:
    """As the request's duration in the metrics does: a client sees in it what it waited for."""
    body = multipart(*[part(JPEG)] * num_images)

    async def slow() -> AsyncIterator[bytes]:
        yield body[:10]
        await asyncio.sleep(0.03)
        yield body[10:]

    response = await served.client.post(CLASSIFY, content=slow(), headers={"content-type": MULTIPART})
    for result in check_answer(response, num_results=num_images).results:
        assert result.timings_ms is not None
        assert result.timings_ms.total >= 30
        assert result.timings_ms.total - result.timings_ms.decode >= 29
    assert served.sample("fovea_request_duration_seconds_sum", model=MODEL) >= 0.03


async def test_server_timing_of_several_images_is_that_of_the_slowest(served: Served) -> None:
    """A client waits for the slowest, so that is the one that explains its wait."""
    response = await served.client.post(CLASSIFY, files=as_files([JPEG, PNG, b"text", JPEG]))
    answer = check_answer(response, num_results=4)
    totals = [result.timings_ms.total for result in answer.results if result.timings_ms is not None]
    assert f"total;dur={max(totals)}" in response.headers["server-timing"]


async def test_several_models_are_told_apart_by_name(tiny_repository: Path, tmp_path: Path) -> None:
    """With two and no default, a request must name one; each answers for itself."""
    shutil.copytree(tiny_repository / MODEL, tmp_path / MODEL)
    shutil.copytree(tiny_repository / MODEL / "1", tmp_path / "other" / "2")
    manifest = tmp_path / "other" / "2" / MANIFEST_FILE
    manifest.write_bytes(orjson.dumps(orjson.loads(manifest.read_bytes()) | {"name": "other", "version": 2}))
    async with running(make_settings(tmp_path)) as served:
        check_problem(await served.classify(JPEG), 404, "model_not_found", "name a model", "other", MODEL)
        answer = check_answer(await served.classify(JPEG, params={"model": "other"}))
        assert (answer.model, answer.version) == ("other", 2)
        assert check_answer(await served.classify(JPEG, params={"model": MODEL})).model == MODEL
    async with running(make_settings(tmp_path, repository={"default_model": "other"})) as served:
        assert check_answer(await served.classify(JPEG)).model == "other"


async def test_requests_at_the_same_time_share_batches(tiny_repository: Path, gate: Gate) -> None:
    """What waits while the instance is busy is computed together, and each request gets its own answer."""
    images = [make_jpeg(photo(seed=seed)) for seed in range(5)]
    async with running(make_settings(tiny_repository)) as served:
        alone = [labels_of(check_answer(await served.classify(image))) for image in images]
        begun = len(gate.batches)
        with gate.held():
            async with in_background(served.classify(images[0])) as (first,):
                await gate.began(begun + 1)
                async with in_background(*(served.classify(image) for image in images[1:])) as others:
                    await until(lambda: served.sample("fovea_queue_size", model=MODEL, stage="0") == 4)
                    gate.release()
                    answers = await asyncio.gather(first, *others)
    assert (0, 4) in gate.batches[begun:]
    for expected, answer in zip(alone, answers, strict=True):
        found = labels_of(check_answer(answer))
        assert [label for label, _ in expected] == [label for label, _ in found]
        np.testing.assert_allclose([p for _, p in found], [p for _, p in expected], atol=1e-4)


async def test_a_failed_run_fails_its_own_batch_only(tiny_repository: Path, gate: Gate) -> None:
    """The request whose run failed gets 500, the one behind it its answer, and the next as well."""
    async with running(make_settings(tiny_repository)) as served:
        expected = labels_of(check_answer(await served.classify(PNG)))
        begun = len(gate.batches)
        with gate.held():
            gate.failures.append(RuntimeError("the secret of the machine"))
            async with in_background(served.classify(JPEG)) as (failing,):
                await gate.began(begun + 1)
                async with in_background(served.classify(PNG)) as (behind,):
                    await until(lambda: served.sample("fovea_queue_size", model=MODEL, stage="0") == 1)
                    gate.release()
                    problem = check_problem(await failing, 500, "inference_failed", "stage 0")
                    assert "secret" not in problem.detail
                    assert expected == labels_of(check_answer(await behind))
        assert served.outcome("failed") == 1
        assert served.sample("fovea_stage_failures_total", model=MODEL, stage="0") == 1
        check_answer(await served.classify(JPEG))
        assert (await served.client.get("/health/ready")).status_code == 200
        served.assert_nothing_in_flight()


async def test_a_failed_run_among_several_images_is_an_error_in_its_place(tiny_repository: Path, gate: Gate) -> None:
    """The other images of the request, in other batches, keep their answers."""
    settings = make_settings(tiny_repository, batching={"max_batch_size": 1})
    async with running(settings) as served:
        begun = len(gate.batches)
        with gate.held():
            async with in_background(served.client.post(CLASSIFY, files=as_files([JPEG, PNG, JPEG]))) as (request,):
                await gate.began(begun + 1)  # this run goes well, the next one does not
                await until(lambda: served.sample("fovea_queue_size", model=MODEL, stage="0") == 2)
                gate.failures.append(RuntimeError("the secret of the machine"))
                gate.release()
                answer = check_answer(await request, num_results=3)
    errors = [result.error.code for result in answer.results if result.error is not None]
    assert errors == ["inference_failed"]
    served.assert_nothing_in_flight()


async def test_an_application_is_made_from_the_environment_alone(
    tiny_repository: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`uvicorn app.http.application:create_app --factory` works too."""
    monkeypatch.setenv("FOVEA_REPOSITORY__ROOT", str(tiny_repository))
    monkeypatch.setenv("FOVEA_RUNTIME__VARIANT", "fp32")
    app = create_app()
    async with (
        app.router.lifespan_context(app),
        httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://fovea") as client,
    ):
        assert check_answer(await client.post(CLASSIFY, content=JPEG)).model == MODEL
