"""The whole export: what is published is complete, verified and never half there."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from app.runtime.cpu import has_exact_int8
from exporters import recipe
from exporters.config import BoundConfig, ExitConfig
from exporters.publishing import AlreadyPublished
from exporters.sources.base import SourceError
from exporters.validation import ValueMismatch
from models.manifest import ModelManifest
from models.zoo import CIFAR10_LABELS
from tests.exporters.exporting import make_config
from tests.exporters.listener import Listener
from tests.images import make_jpeg, photo


def test_a_published_version_is_complete(inputs: Path, tmp_path: Path) -> None:
    """Manifest, checksums, golden pair, report and card agree with each other."""
    said = Listener()
    directory = recipe.run(make_config(inputs, tmp_path), said)

    manifest = ModelManifest.load(directory)
    found = {path.relative_to(directory).as_posix() for path in directory.rglob("*") if path.is_file()}
    assert found == {"manifest.json", *manifest.files}
    variants = ["fp32", "int8"] if has_exact_int8() else ["fp32"]
    assert variants == [variant.name for variant in manifest.variants]
    assert (len(CIFAR10_LABELS), 3) == (manifest.num_classes, len(manifest.stages))
    report = json.loads((directory / "report.json").read_text())
    assert report["tested_on"]["images"] == 20
    card = (directory / "MODEL_CARD.md").read_text()
    for variant in variants:
        assert f"{100 * report['variants'][variant]['operating_point']['top1']:.2f} %" in card
    assert said.steps[-1] == "publishing"
    assert {"images", "every exit of every image"} <= set(said.tracked)
    assert [directory] == list((tmp_path / "test_vit").iterdir())


def test_the_same_inputs_give_the_same_graphs(inputs: Path, tmp_path: Path) -> None:
    """Publishing again is the same computation: every file but the times is equal."""
    first, second = (recipe.run(make_config(inputs, tmp_path / name)) for name in ("a", "b"))
    files = {path.relative_to(first) for path in first.rglob("*.onnx")}
    assert files
    for file in files:
        assert (first / file).read_bytes() == (second / file).read_bytes()
    with np.load(first / "golden.npz") as mine, np.load(second / "golden.npz") as theirs:
        assert set(mine) == set(theirs)


def test_a_version_is_never_overwritten(inputs: Path, tmp_path: Path) -> None:
    """It may be being served."""
    directory = recipe.run(make_config(inputs, tmp_path))
    before = (directory / "manifest.json").stat().st_mtime_ns

    with pytest.raises(AlreadyPublished, match="version 1 is already published"):
        recipe.run(make_config(inputs, tmp_path))

    assert before == (directory / "manifest.json").stat().st_mtime_ns


def test_a_failed_export_leaves_nothing_behind(inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither a half version nor a partial directory."""

    def differs(*_: object, **__: object) -> float:
        raise ValueMismatch("stage 1")

    monkeypatch.setattr(recipe, "validate", differs)
    with pytest.raises(ValueMismatch):
        recipe.run(make_config(inputs, tmp_path))

    assert list((tmp_path / "test_vit").iterdir()) == []


def test_a_reduced_network_is_published_and_told_against_the_network_as_it_came(inputs: Path, tmp_path: Path) -> None:
    """Fewer multiply-adds; sizes cross the stages; the graphs it is compared with are not published."""
    plain = recipe.run(make_config(inputs, tmp_path))
    config = replace(make_config(inputs, tmp_path, version=2), reduction="tome:4,3,2,0,1,0")

    directory = recipe.run(config)

    manifest, before = ModelManifest.load(directory), ModelManifest.load(plain)
    assert sum(stage.gmacs for stage in manifest.stages) < 0.8 * sum(stage.gmacs for stage in before.stages)
    assert [tensor.name for tensor in manifest.stages[1].inputs] == ["tokens_0", "sizes_0"]
    assert "tome:4,3,2,0,1,0" in manifest.provenance.values()
    assert {path.relative_to(directory).as_posix() for path in directory.rglob("*") if path.is_file()} == {
        "manifest.json",
        *manifest.files,
    }
    assert not (directory / "full").exists()
    report, full = (json.loads((path / "report.json").read_text()) for path in (directory, plain))
    assert report["without_reduction"]["top1"] == full["variants"]["fp32"]["top1_by_exit"][-1]
    assert "`tome:4,3,2,0,1,0`" in (directory / "MODEL_CARD.md").read_text()


def test_a_searched_schedule_is_named_in_the_card(inputs: Path, tmp_path: Path) -> None:
    """What was asked for is a share; what was found is what can be said again."""
    directory = recipe.run(replace(make_config(inputs, tmp_path), reduction="tome:80%", int8=False))

    manifest = ModelManifest.load(directory)
    found = manifest.provenance["token_reduction"]
    assert re.fullmatch(r"tome:\d+(,\d+){5}", found)
    assert f"`{found}`" in (directory / "MODEL_CARD.md").read_text()


def test_without_labels_the_networks_own_answers_stand_for_them(inputs: Path, tmp_path: Path) -> None:
    """Images lie anywhere; fp32 agrees with itself, and the card says what the figures are."""
    images = tmp_path / "images"
    for number in range(12):
        (images / "deep" / "down").mkdir(parents=True, exist_ok=True)
        (images / ("deep/down" if number % 2 else "") / f"{number}.jpg").write_bytes(make_jpeg(photo(40, 36, seed=number)))
    config = replace(make_config(inputs, tmp_path), calibration_images=images, test_images=images, unlabelled=True)

    directory = recipe.run(config)

    report = json.loads((directory / "report.json").read_text())
    assert report["tested_on"]["images"] == 12
    assert report["variants"]["fp32"]["top1_by_exit"][-1] == 1.0
    assert "**The images had no labels.**" in (directory / "MODEL_CARD.md").read_text()
    exits = ModelManifest.load(directory).variant("fp32").exits
    assert exits[-1].temperature == 1.0  # own answers say nothing of how sure it may be
    assert "no bound" not in (directory / "MODEL_CARD.md").read_text()  # none was asked for


def test_exits_are_certified_where_there_are_images_enough(inputs: Path, tmp_path: Path) -> None:
    """On half of them, that had no part in fitting; manifest, report and card say what is promised, of every variant."""
    said = Listener()
    config = replace(make_config(inputs, tmp_path), bound=BoundConfig(delta=0.2), fast_drop=0.8)
    config = replace(config, exits=ExitConfig(max_accuracy_drop=0.6))

    directory = recipe.run(config, said)

    manifest = ModelManifest.load(directory)
    report, card = json.loads((directory / "report.json").read_text()), (directory / "MODEL_CARD.md").read_text()
    assert (report["fitted_on"]["images"], report["certified_on"]["images"]) == (10, 10)
    for variant in manifest.variants:
        assert variant.certificate is not None
        assert (variant.certificate.epsilon, variant.certificate.images) == (0.6, 10)
        assert variant.certificate.images_sha256 == manifest.provenance["fitting_images_sha256"]
        assert report["bounds"][variant.name]["balanced"] == str(variant.certificate)
        assert f"- {variant.name}, balanced: {variant.certificate}." in card
        assert f"{variant.name}, balanced: {variant.certificate}" in said.steps
        (fast,) = variant.points
        assert (fast.name, fast.certificate.epsilon) == ("fast", 0.8)
        assert f"| {variant.name}, fast | " in card
    assert "of other images, of single ones and of single classes it says nothing" in card


def test_too_few_images_to_certify_are_said_to_be_too_few(inputs: Path, tmp_path: Path) -> None:
    """All of them are fitted on then, and no variant has a certificate."""
    directory = recipe.run(replace(make_config(inputs, tmp_path), int8=False, bound=BoundConfig()))

    assert [variant.certificate for variant in ModelManifest.load(directory).variants] == [None]
    report = json.loads((directory / "report.json").read_text())
    assert (report["fitted_on"]["images"], report["certified_on"]["images"]) == (20, 0)
    assert (
        "to prove that exits cost at most 0.5 points, with 95 % confidence, takes at least"
        in report["bounds"]["fp32"]["balanced"]
    )
    assert "and there are 20" in (directory / "MODEL_CARD.md").read_text()
    assert "cost at most 2 points, with 95 % confidence, takes at least 436 images" in report["bounds"]["fp32"]["fast"]


def test_an_interrupted_export_leaves_nothing_behind(inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also not where it was killed: the next one takes what is left away."""

    def interrupt(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(recipe, "validate", interrupt)
        with pytest.raises(KeyboardInterrupt):
            recipe.run(make_config(inputs, tmp_path))
    assert list((tmp_path / "test_vit").iterdir()) == []
    (tmp_path / "test_vit" / ".1.partial" / "fp32").mkdir(parents=True)

    directory = recipe.run(make_config(inputs, tmp_path))

    assert [directory] == list((tmp_path / "test_vit").iterdir())


def test_a_name_that_could_not_be_served_is_refused_at_once(inputs: Path, tmp_path: Path) -> None:
    """Before minutes are spent."""
    with pytest.raises(SourceError, match="'My Model' is no name for a model"):
        recipe.run(replace(make_config(inputs, tmp_path), name="My Model"))
    assert list(tmp_path.iterdir()) == []
