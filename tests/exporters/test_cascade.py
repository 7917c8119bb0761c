"""Two published models one behind the other: as the stages of one version, exported, certified and served."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from app.repository.store import ModelStore
from app.runtime.golden import verify_golden
from app.runtime.ort_backend import OrtBackend
from exporters import recipe
from exporters.cli import app as exporter
from exporters.config import BoundConfig, ExitConfig, ExportConfig
from exporters.evaluation import logits_per_exit
from exporters.golden import golden_images
from exporters.published import one_thread, remeasure
from exporters.sources.base import SourceError
from exporters.sources.cascade import CascadeSource, Part
from models.manifest import MANIFEST_FILE, PIXELS, ModelManifest
from tests.app.http.served import Served, check_answer, make_settings, running
from tests.exporters.exporting import make_config
from tests.images import make_jpeg, photo

JPEG = make_jpeg()


@pytest.fixture
def repository(inputs: Path, tmp_path: Path) -> Path:
    """The tiny network, and the same with fewer tokens."""
    plain = replace(make_config(inputs, tmp_path / "repository"), int8=False)
    recipe.run(plain)
    recipe.run(replace(plain, version=2, reduction="tome:5x3"))
    return tmp_path / "repository"


def cascade(inputs: Path, repository: Path, **changes: object) -> ExportConfig:
    """Version 2, then version 1; measured on images that neither was fitted on."""
    source = CascadeSource(repository, (Part("test_vit", 2), Part("test_vit", 1)))
    test = others(inputs, repository.parent / "test")
    config = replace(make_config(inputs, repository), name="both", source=source, int8=False, test_images=test)
    return replace(config, **changes)  # type: ignore[arg-type]


def others(inputs: Path, folder: Path) -> Path:
    """Two images of each class that are not among the inputs."""
    for number, name in enumerate(sorted(path.name for path in (inputs / "images").iterdir())):
        (folder / name).mkdir(parents=True, exist_ok=True)
        for copy in range(2):
            (folder / name / f"{copy}.jpg").write_bytes(make_jpeg(photo(40 + number, 36 + copy, seed=len(folder.name))))
    return folder


def test_a_cascade_is_a_version_like_any_other(inputs: Path, repository: Path) -> None:
    """Its stages are those of both; the last exit says what the dear model says, and the golden pair can be replayed."""
    directory = recipe.run(cascade(inputs, repository))

    manifest = ModelManifest.load(directory)
    dear = ModelManifest.load(repository / "test_vit" / "1")
    cheap = ModelManifest.load(repository / "test_vit" / "2")
    assert manifest.stages == (*cheap.stages, *dear.stages)
    assert manifest.entries == (0, 3)
    assert [variant.name for variant in manifest.variants] == ["fp32"]
    assert manifest.provenance["origin"] == "a cascade: test_vit version 2 (fp32), then test_vit version 1 (fp32)"
    stored = ModelStore(repository).open("both", 1)
    backend = OrtBackend(stored.directory, manifest, "fp32", one_thread())
    assert verify_golden(backend, stored.directory, manifest, "fp32") < 1e-4
    pixels = golden_images(manifest.preprocess)
    mine = logits_per_exit(backend, 6, pixels)
    for part, logits in ((cheap, mine[:3]), (dear, mine[3:])):
        alone = OrtBackend(repository / "test_vit" / str(part.version), part, "fp32", one_thread())
        for found, expected in zip(logits, logits_per_exit(alone, 3, pixels), strict=True):
            np.testing.assert_allclose(found, expected, atol=1e-5)
    output = backend.run(1, backend.run(0, {PIXELS: pixels}).state)
    assert np.array_equal(output.state[PIXELS], pixels)


def test_what_is_saved_is_told_against_the_dear_model_alone(inputs: Path, repository: Path) -> None:
    """Its cost is that of its own stages, and images that are to have its answer do not pass the cheap one."""
    directory = recipe.run(cascade(inputs, repository))

    report = json.loads((directory / "report.json").read_text())
    point, costs = report["variants"]["fp32"]["operating_point"], report["gmacs_by_stage"]
    assert point["compute_saved"] == pytest.approx(1 - point["mean_gmacs"] / sum(costs[3:]), abs=1e-3)
    assert report["variants"]["fp32"]["agreement_with_fp32"] == 1.0
    again = remeasure(repository, "both", 1, repository.parent / "test")
    assert again.variants["fp32"]["operating_point"]["exit_rates"] == point["exit_rates"]


def test_its_exits_are_certified_on_images_that_neither_part_has_seen(inputs: Path, repository: Path, tmp_path: Path) -> None:
    """On the images that a part was fitted on nothing can be proved, and the export says so."""
    bound = {"bound": BoundConfig(delta=0.2), "exits": ExitConfig(max_accuracy_drop=0.6), "fast_drop": 0.8}
    seen = recipe.run(cascade(inputs, repository, **bound))
    fresh = recipe.run(cascade(inputs, repository, version=2, calibration_images=others(inputs, tmp_path / "fitting"), **bound))

    (variant,) = ModelManifest.load(seen).variants
    assert variant.certificate is None
    assert "fitted on these images before; certify on others" in (seen / "MODEL_CARD.md").read_text()
    (variant,) = ModelManifest.load(fresh).variants
    assert variant.certificate is not None
    assert variant.certificate.images == 10


@pytest.mark.anyio
async def test_a_cascade_is_served(inputs: Path, repository: Path) -> None:
    """At the full depth an image goes to the dear model at once; else it begins with the cheap one."""
    directory = recipe.run(cascade(inputs, repository))
    manifest = json.loads((directory / MANIFEST_FILE).read_text())
    for exit_ in manifest["variants"][0]["exits"][:-1]:
        exit_["threshold"] = 1.01
    manifest["variants"][0]["points"] = [{"name": "fast", "thresholds": [1.01, 1.01, 0.0, 1.01, 1.01], "certificate": None}]
    (directory / MANIFEST_FILE).write_text(json.dumps(manifest))

    async with running(make_settings(repository, repository={"root": repository, "models": ["both", "test_vit"]})) as served:
        answers = {name: await ask(served, name) for name in ("full", "balanced", "fast")}
        alone = check_answer(await served.classify(JPEG, params={"model": "test_vit", "version": 2, "quality": "full"}))
        dear = check_answer(await served.classify(JPEG, params={"model": "both", "quality": "full"}))

    stages = {name: (answer["exit"]["stage"], len(answer["timings_ms"]["stages"])) for name, answer in answers.items()}
    assert stages == {"full": (5, 3), "balanced": (5, 3), "fast": (2, 3)}
    fast = [score["probability"] for score in answers["fast"]["predictions"]]
    assert fast == pytest.approx([score.probability for score in alone.results[0].predictions], abs=0.2)
    assert dear.results[0].predictions is not None


async def ask(served: Served, quality: str) -> Mapping[str, object]:
    response = await served.classify(JPEG, params={"model": "both", "quality": quality})
    check_answer(response)
    assert f"stage_{5 if quality != 'fast' else 2};" in response.headers["server-timing"]
    (result,) = response.json()["results"]
    found: Mapping[str, object] = result
    return found


@pytest.mark.parametrize(
    ("cheap", "dear", "word"),
    [
        ("nobody", "test_vit/1", "nobody"),
        ("test_vit/7", "test_vit/1", "version"),
        ("test_vit/x", "test_vit/1", "say NAME/VERSION/VARIANT"),
        ("test_vit/1/fp32/0", "test_vit/1", "say NAME/VERSION/VARIANT"),
        ("test_vit/1/int4", "test_vit/1", "say which variant of test_vit version 1: test_vit/1/fp32"),
        ("other/1", "test_vit/1", "have other classes"),
        ("small/1", "test_vit/1", "have other preprocessing"),
    ],
)
def test_parts_that_do_not_go_together_are_refused(repository: Path, cheap: str, dear: str, word: str) -> None:
    """With what is wrong with them."""
    for name, change in (("other", "labels"), ("small", "preprocess")):
        _changed(repository, name, change)
    with pytest.raises(SourceError, match=word):
        CascadeSource(repository, (Part.parse(cheap), Part.parse(dear))).load()


def _changed(repository: Path, name: str, what: str) -> None:
    """A copy of version 1 that knows other classes, or wants other pictures."""
    import hashlib
    import shutil

    target = repository / name / "1"
    shutil.copytree(repository / "test_vit" / "1", target)
    manifest = json.loads((target / MANIFEST_FILE).read_text()) | {"name": name}
    if what == "labels":
        (target / "labels.txt").write_text("\n".join(f"thing {number}" for number in range(10)) + "\n")
        manifest["files"]["labels.txt"] = hashlib.sha256((target / "labels.txt").read_bytes()).hexdigest()
    else:
        manifest["preprocess"]["interpolation"] = "nearest"
    (target / MANIFEST_FILE).write_text(json.dumps(manifest))


def test_the_command_makes_one(inputs: Path, repository: Path) -> None:
    """And says in the card how."""
    arguments = ["cascade", "--model", "both", "--version", "1", "--repository", str(repository)]
    arguments += ["--cheap", "test_vit/2", "--dear", "test_vit/1/fp32"]
    arguments += ["--calibration", str(inputs / "images"), "--test", str(others(inputs, repository.parent / "test"))]

    done = CliRunner().invoke(exporter, arguments)

    assert done.exit_code == 0, done.output
    card = (repository / "both" / "1" / "MODEL_CARD.md").read_text()
    assert "python -m exporters cascade --model both --version 1 --cheap test_vit/2 --dear test_vit/1/fp32" in card
    assert CliRunner().invoke(exporter, [*arguments, "--version", "2", "--cheap", "nobody"]).exit_code == 1
