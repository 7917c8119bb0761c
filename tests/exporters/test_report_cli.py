"""`fovea report` on a published version."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from typer.testing import CliRunner

from exporters import recipe
from exporters.cli import app as exporter
from tests.exporters.exporting import make_config


@pytest.fixture(scope="module")
def repository(inputs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("repository")
    recipe.run(replace(make_config(inputs, directory), int8=False))
    return directory


def report(repository: Path, out: Path, *arguments: str) -> tuple[int, str]:
    options = ["report", "--model", "test_vit", "--repository", str(repository), "--out", str(out)]
    done = CliRunner().invoke(exporter, [*options, *arguments])
    return done.exit_code, done.output


def test_a_page_is_written_and_the_points_are_told(inputs: Path, repository: Path, tmp_path: Path) -> None:
    """With the command that repeats it, without folders of this machine."""
    code, said = report(repository, tmp_path / "out", "--images", str(inputs / "images"))
    assert code == 0, said
    assert "fp32, full: 1.00 times as fast, 0.00 ± 0.00 points lost" in said
    figures = json.loads((tmp_path / "out" / "report.json").read_text())
    assert figures["command"] == "python -m exporters report --model test_vit --version 1 --images images --out out"
    assert str(tmp_path) not in (tmp_path / "out" / "report.html").read_text()


def test_images_need_no_labels(inputs: Path, repository: Path, tmp_path: Path) -> None:
    """The full depth's own answers stand for them, so it is always right."""
    code, said = report(repository, tmp_path, "--images", str(inputs / "images"), "--unlabelled")
    assert code == 0, said
    figures = json.loads((tmp_path / "report.json").read_text())
    assert (figures["labelled"], figures["points"][0]["top1"]) == (False, 1.0)


def test_folders_may_have_other_names(inputs: Path, repository: Path, tmp_path: Path) -> None:
    """Those that are mapped count; an unknown class, and a model that is not there, are told in a line."""
    mapping = tmp_path / "classes.json"
    mapping.write_text('{"cat": "dog"}')
    code, said = report(repository, tmp_path / "a", "--images", str(inputs / "images"), "--classes", str(mapping))
    assert code == 0, said
    assert json.loads((tmp_path / "a" / "report.json").read_text())["images"] == 2
    mapping.write_text('{"cat": "unicorn"}')
    code, said = report(repository, tmp_path / "b", "--images", str(inputs / "images"), "--classes", str(mapping))
    assert (code, "unicorn" in said) == (1, True)
    code, said = report(repository / "nowhere", tmp_path / "c", "--images", str(inputs / "images"))
    assert code == 1, said
