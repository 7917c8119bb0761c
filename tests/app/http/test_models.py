"""GET /v1/models and what is below it."""

from __future__ import annotations

import shutil
from pathlib import Path

import orjson
import pytest

from app.http.schemas import ModelBody, ModelsResponse
from app.settings import BatchingSettings
from models.manifest import MANIFEST_FILE, Certificate, ModelManifest
from tests.app.http.served import MODEL, Served, check_problem, make_settings, running

pytestmark = pytest.mark.anyio


async def test_a_model_tells_what_it_is_and_what_it_runs_on(served: Served, tiny_repository: Path) -> None:
    """The same by list, by name and by version, and true to its manifest."""
    manifest = ModelManifest.load(tiny_repository / MODEL / "1")
    listed = await served.client.get("/v1/models")
    (body,) = listed.json()["models"]
    ModelsResponse.model_validate(listed.json(), strict=True)
    for path in (f"/v1/models/{MODEL}", f"/v1/models/{MODEL}/versions/1"):
        response = await served.client.get(path)
        assert (200, body) == (response.status_code, response.json())
    model = ModelBody.model_validate(body, strict=True)
    assert body == model.model_dump()
    assert (model.name, model.version, model.default, model.ready, model.variant) == (MODEL, 1, True, True, "fp32")
    assert model.target in {"cpu", "cpu_vnni"}
    assert "fp32" in model.variant_reason
    assert model.labels == (tiny_repository / MODEL / "1" / "labels.txt").read_text().split()
    assert (len(model.labels), len(manifest.stages)) == (model.classes, model.stages)
    assert all(1 <= cost.batch_size <= BatchingSettings().max_batch_size for cost in model.stage_costs)
    assert [cost.fixed_ms + cost.per_image_ms > 0 for cost in model.stage_costs] == [True] * 3
    assert [pytest.approx(stage.gmacs, abs=1e-6) for stage in manifest.stages] == model.gmacs_by_stage
    assert [exit_.threshold for exit_ in manifest.variant("fp32").exits] == [exit_["threshold"] for exit_ in model.exits]
    assert manifest.provenance == model.provenance


async def test_a_certificate_is_told_in_full_and_in_words(tiny_repository: Path, tmp_path: Path) -> None:
    """What its exits cost at most; nothing where nothing was proved."""
    directory = tmp_path / MODEL / "1"
    shutil.copytree(tiny_repository / MODEL / "1", directory)
    manifest = ModelManifest.load(directory)
    certificate = Certificate(
        risk="accuracy",
        compared_with="the last exit of the same variant",
        epsilon=0.005,
        delta=0.05,
        images=2500,
        images_sha256="0" * 64,
        method="a test",
        limits="everything else",
    )
    variants = tuple(variant.model_copy(update={"certificate": certificate}) for variant in manifest.variants)
    certified = manifest.model_copy(update={"variants": variants})
    async with running(make_settings(tmp_path)) as served:
        (plain,) = (await served.client.get("/v1/models")).json()["models"]
    (directory / MANIFEST_FILE).write_text(certified.model_dump_json())
    async with running(make_settings(tmp_path)) as served:
        (told,) = (await served.client.get("/v1/models")).json()["models"]

    assert [each["name"] for each in plain["qualities"]] == ["full", "balanced", "fast"]
    assert [each["default"] for each in plain["qualities"]] == [False, True, False]
    assert plain["qualities"][0]["thresholds"] == [None, None]
    assert (plain["qualities"][1]["bound"], plain["qualities"][1]["certificate"]) == ("", None)
    assert told["qualities"][1]["bound"] == (
        "loses at most 0.5 points of accuracy against the last exit of the same variant, with 95 % confidence (2500 images)"
    )
    assert told["qualities"][1]["certificate"] == certificate.model_dump()


@pytest.mark.parametrize(
    ("path", "status", "code", "word"),
    [
        ("/v1/models/nobody", 404, "model_not_found", "'nobody'"),
        ("/v1/models/nobody/versions/1", 404, "model_not_found", "'nobody'"),
        (f"/v1/models/{MODEL}/versions/2", 404, "model_not_found", "loaded: 1"),
        (f"/v1/models/{MODEL}/versions/0", 404, "model_not_found", "loaded: 1"),
        (f"/v1/models/{MODEL}/versions/latest", 422, "invalid_request", "version"),
        ("/v1/models/%00%ff%0a", 404, "model_not_found", MODEL),
    ],
)
async def test_what_is_not_there_is_a_problem(served: Served, path: str, status: int, code: str, word: str) -> None:
    """That says what is there."""
    check_problem(await served.client.get(path), status, code, word)


async def test_several_models_are_listed_by_name(tiny_repository: Path, tmp_path: Path) -> None:
    """Of each the highest version; none is the default until one is told."""
    for name, version in (("zebra", 1), ("ant", 1), ("ant", 12)):
        directory = tmp_path / name / str(version)
        shutil.copytree(tiny_repository / MODEL / "1", directory)
        manifest = orjson.loads((directory / MANIFEST_FILE).read_bytes())
        (directory / MANIFEST_FILE).write_bytes(orjson.dumps(manifest | {"name": name, "version": version}))
    for default in (None, "zebra"):
        async with running(make_settings(tmp_path, repository={"default_model": default})) as served:
            models = (await served.client.get("/v1/models")).json()["models"]
            found = [(model["name"], model["version"], model["default"]) for model in models]
            assert [("ant", 12, False), ("zebra", 1, default == "zebra")] == found
            check_problem(await served.client.get("/v1/models/ant/versions/1"), 404, "model_not_found", "loaded: 12")
