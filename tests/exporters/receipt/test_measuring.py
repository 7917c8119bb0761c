"""A tiny version measured: every operating point of every variant, and figures that agree with each other."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from app.repository.store import ModelStore
from exporters import recipe
from exporters.config import ExitConfig
from exporters.evaluation import logits_per_exit
from exporters.images import ImageSet, read_images
from exporters.published import backends_here
from exporters.receipt.examples import PER_EXIT, find_examples
from exporters.receipt.measuring import Subject, leaves_at, measure
from models.manifest import ModelManifest
from tests.exporters.exporting import make_config


@pytest.fixture(scope="module")
def measured(inputs: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Subject, ImageSet]:
    """A version whose tokens are merged, and whose exits are all taken by some images; and its images."""
    repository = tmp_path_factory.mktemp("receipt")
    generous = ExitConfig(max_accuracy_drop=0.2)
    recipe.run(replace(make_config(inputs, repository), reduction="tome:4x2", exits=generous, fast_drop=0.4))
    stored = ModelStore(repository).open("test_vit", 1)
    images = read_images(inputs / "images", stored.labels, stored.manifest.preprocess)
    backends = backends_here(stored)
    logits = {name: logits_per_exit(backend, 3, images.pixels) for name, backend in backends.items()}
    return Subject(stored.directory, stored.manifest, backends, logits), images


def test_every_point_of_every_variant_is_measured(measured: tuple[Subject, ImageSet]) -> None:
    """Against the first at its full depth; who leaves where adds up."""
    subject, images = measured
    receipt = measure(subject, images, command="again")

    names = [variant.name for variant in subject.manifest.variants]
    assert [(p.variant, p.point) for p in receipt.points] == [(n, p) for n in names for p in ("full", "balanced", "fast")]
    first = receipt.points[0]
    assert (first.times_as_fast, first.lost, first.exit_rates) == (1.0, 0.0, (0.0, 0.0, 1.0))
    right = subject.logits[names[0]][-1].argmax(axis=1) == images.labels
    assert first.top1 == right.mean()
    for point in receipt.points:
        assert sum(point.exit_rates) == pytest.approx(1)
        assert point.lost == pytest.approx(first.top1 - point.top1)
        assert point.images_per_s == pytest.approx(1000 / point.ms_per_image)
        assert point.cpu_s_per_1000_images > 0
    assert [(p.variant, p.stage) for p in receipt.profile] == [(names[-1], stage) for stage in range(3)]
    assert all(ms > 0 for stage in receipt.profile for ms in stage.operators.values())
    assert receipt.provenance == subject.manifest.provenance
    assert receipt.command == "again"


def test_photos_are_of_the_exit_where_they_leave(measured: tuple[Subject, ImageSet]) -> None:
    """Some of each exit that is taken, with a map of their tokens where tokens were merged before it."""
    subject, images = measured
    stages, _ = leaves_at(subject)
    examples = find_examples(subject, images, [str(number) for number in range(10)], labelled=True)

    counts = {int(stage): min(PER_EXIT, int((stages == stage).sum())) for stage in np.unique(stages)}
    assert {stage: sum(example.stage == stage for example in examples) for stage in counts} == counts
    for example in examples:
        merged_before = example.stage >= 1  # the last two of four blocks; the first stage has none of them
        assert (example.token_map is not None) == merged_before or example.stage == 0
        assert example.right == (example.answer == example.label)
        assert example.photo.startswith(b"\xff\xd8")
    assert all(example.right is None for example in find_examples(subject, images, ["x"] * 10, labelled=False))


def test_an_optimized_version_carries_its_receipt(inputs: Path, tmp_path: Path) -> None:
    """The page is one of its files, with a checksum, and the figures stand in its report."""
    directory = recipe.run(replace(make_config(inputs, tmp_path), int8=False, receipt=True))
    assert "report.html" in ModelManifest.load(directory).files
    assert '"receipt": {' in (directory / "report.json").read_text()
