"""Measuring a published version again."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from PIL import Image
from typer.testing import CliRunner

from app.runtime.cpu import has_exact_int8
from exporters.cli import app as exporter
from exporters.published import remeasure
from models.zoo import CIFAR10_LABELS
from tests.images import make_archive


@pytest.fixture
def images(tmp_path: Path) -> Path:
    """Three images a class."""
    make_archive(tmp_path / "images.zip", CIFAR10_LABELS, per_class=3)
    return tmp_path / "images.zip"


def test_figures_are_those_of_the_report_when_the_images_are(tiny_repository: Path) -> None:
    """The report of the export and a later measurement on the same images tell the same."""
    report = json.loads((tiny_repository / "test_vit" / "1" / "report.json").read_text())

    found = remeasure(tiny_repository, "test_vit", 1, tiny_repository.parent / "test")

    assert found.sha256 == report["tested_on"]["sha256"]
    assert json.loads(json.dumps(found.variants)) == report["variants"]


def test_every_variant_that_runs_here_is_measured(tiny_repository: Path, images: Path) -> None:
    """On all images, with the version's own thresholds."""
    found = remeasure(tiny_repository, "test_vit", None, images)

    assert (["fp32", "int8"] if has_exact_int8() else ["fp32"]) == list(found.variants)
    assert found.num_images == 30
    for name, figures in found.variants.items():
        assert sum(figures["operating_point"]["exit_rates"]) == pytest.approx(1, abs=1e-3)
        assert found.ms_per_image[name]["with_exits"] > 0


def test_folders_of_other_names_are_mapped_and_others_passed_over(tiny_repository: Path, images: Path) -> None:
    """As with ImageNet's folders."""
    found = remeasure(tiny_repository, "test_vit", None, images, classes={"cat": "cat", "truck": "automobile"})

    assert found.num_images == 6
    classes = {str(CIFAR10_LABELS.index("cat")), str(CIFAR10_LABELS.index("automobile"))}
    assert classes == set(found.variants["fp32"]["top1_by_class"])


def test_the_command_prints_tables_and_writes_figures_and_a_diagram(
    tiny_repository: Path, images: Path, tmp_path: Path
) -> None:
    """One command for what the card says."""
    arguments = ["evaluate", "--images", str(images), "--model", "test_vit", "--repository", str(tiny_repository)]
    arguments += ["--diagram", str(tmp_path / "r.png"), "--json", str(tmp_path / "r.json")]

    result = CliRunner().invoke(exporter, arguments)

    assert result.exit_code == 0, result.output
    figures = json.loads((tmp_path / "r.json").read_text())
    assert figures["images"]["number"] == 30
    assert f"{100 * figures['variants']['fp32']['operating_point']['top1']:.2f} %" in result.output
    with Image.open(tmp_path / "r.png") as picture:
        assert picture.width > 500


@pytest.mark.parametrize(
    ("model", "classes", "message"),
    [("none_such", "{}", "no model none_such"), ("test_vit", '{"cat": "zebra"}', "zebra"), ("test_vit", "{", "Expecting")],
)
def test_what_cannot_be_measured_is_said_in_a_line(
    tiny_repository: Path, images: Path, tmp_path: Path, model: str, classes: str, message: str
) -> None:
    """No traceback for what its user can mend."""
    (tmp_path / "classes.json").write_text(classes)
    arguments = ["evaluate", "--images", str(images), "--model", model, "--repository", str(tiny_repository)]

    result = CliRunner().invoke(exporter, [*arguments, "--classes", str(tmp_path / "classes.json")])

    assert result.exit_code == 1
    assert message in result.output
    assert "Traceback" not in result.output
