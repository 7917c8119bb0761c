"""Every answer under load is the one the same image gets alone, whatever batches and exits it went through."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import orjson
import pytest

from app.runtime.cpu import has_exact_int8
from tests.bench.http_client import Outcome
from tests.bench.load import closed_loop
from tests.e2e.servers import MODEL, Server, distinct_images, with_thresholds

pytestmark = pytest.mark.anyio

NUM_IMAGES = 192
CLIENTS = 64
VARIANTS = [
    "fp32",
    pytest.param("int8", marks=pytest.mark.skipif(not has_exact_int8(), reason="this CPU has no exact int8 products")),
]


async def answers_of(server: Server, images: list[bytes], *, clients: int, rounds: int) -> list[tuple[int, dict[str, Any]]]:
    """Which image was sent and the one result it got, for every request."""
    loaded = await closed_loop(
        f"{server.classify_url}?top_k=10", images, connections=clients, num_requests=rounds * len(images), keep_bodies=True
    )
    assert loaded.counts[Outcome.OK] == rounds * len(images) == loaded.num_requests
    return [
        (int(image), orjson.loads(answer.body)["results"][0])
        for image, answer in zip(loaded.image, loaded.answers, strict=True)
    ]


@pytest.mark.parametrize("variant", VARIANTS)
async def test_under_load_every_answer_is_the_one_of_the_image_alone(
    tiny_repository: Path, tmp_path: Path, variant: str
) -> None:
    """64 clients at once, exits on, batches mixed anew at each stage: same labels, same exit, probabilities to 1e-4."""
    images = distinct_images(NUM_IMAGES)
    assert len(set(images)) == NUM_IMAGES
    repository = with_thresholds(tiny_repository, tmp_path / "repository", variant, images)
    with Server(repository, tmp_path / "log", RUNTIME__VARIANT=variant, RUNTIME__INSTANCES=2) as server:
        alone = dict(await answers_of(server, images, clients=1, rounds=1))
        assert {"ok": float(NUM_IMAGES)} == outcomes(server)
        batches_alone = batches(server)
        assert batches_alone[1] == batches_alone[0]  # one image each
        together = await answers_of(server, images, clients=CLIENTS, rounds=3)
        num_batches, num_images = (after - before for after, before in zip(batches(server), batches_alone, strict=True))
        server.wait_idle()
        server.stop()
    by_exit = [[result["exit"]["stage"] for result in alone.values()].count(stage) for stage in range(3)]
    assert min(by_exit) > NUM_IMAGES / 5, by_exit
    assert len({tuple(p["probability"] for p in result["predictions"]) for result in alone.values()}) > 0.95 * NUM_IMAGES
    assert num_images > 2 * num_batches, "under load images should have shared batches"
    for image, result in together:
        expected = alone[image]
        assert expected["exit"]["stage"] == result["exit"]["stage"]
        assert expected["exit"]["confidence"] == pytest.approx(result["exit"]["confidence"], abs=1e-4)
        found = {p["label"]: p["probability"] for p in result["predictions"]}
        assert {p["label"]: pytest.approx(p["probability"], abs=1e-4) for p in expected["predictions"]} == found
        assert expected["predictions"][0]["label"] == result["predictions"][0]["label"]
        if variant == "int8":
            # Quantised by scales that do not depend on the batch, so what is computed does not either.
            assert expected["predictions"] == result["predictions"]


def outcomes(server: Server) -> dict[str, float]:
    return {dict(labels)["outcome"]: value for labels, value in server.samples("fovea_requests_total").items() if value}


def batches(server: Server) -> tuple[float, float]:
    """Executions of stage 0 and the images in them, so far."""
    labels = (("model", MODEL), ("stage", "0"))
    return server.samples("fovea_batch_size_count")[labels], server.samples("fovea_batch_size_sum")[labels]
