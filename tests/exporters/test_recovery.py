"""Learning the former answers as a step of an export: said in the card, and never from the images that tell how good it is."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from typer.testing import CliRunner

from exporters import recipe
from exporters.cli import app as exporter
from exporters.images import ImageSetError
from exporters.plan import plan
from exporters.recovery import in_words
from exporters.sources.base import SourceError
from models.manifest import ModelManifest
from models.training.recovery import Recovered
from tests.exporters.exporting import make_config
from tests.exporters.listener import Listener
from tests.images import make_jpeg, photo


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """Of anything, in sub-folders."""
    for number in range(70):
        folder = tmp_path / "photos" / str(number % 3)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{number}.jpg").write_bytes(make_jpeg(photo(44, 40, seed=number)))
    return tmp_path / "photos"


def test_a_reduced_network_learns_and_the_card_says_from_what(inputs: Path, photos: Path, tmp_path: Path) -> None:
    """What it lost is still told against the network as it came."""
    said = Listener()
    config = replace(make_config(inputs, tmp_path / "repository"), reduction="tome:4x3", recovery=photos, int8=False)

    directory = recipe.run(config, said)

    assert any("learning the former answers from 70 photographs" in step for step in said.steps)
    told = ModelManifest.load(directory).provenance["training"]
    assert "with fewer tokens it learned its former answers from 70 photographs (sha256 " in told
    card = (directory / "MODEL_CARD.md").read_text()
    assert told in card
    assert "what is lost is told against fp32 without it" in card


@pytest.mark.parametrize("what", ["test_images", "calibration_images", "other_images"])
def test_nothing_is_learned_from_the_images_that_tell_how_good_it_is(
    what: str, inputs: Path, photos: Path, tmp_path: Path
) -> None:
    """Those to measure on, and those to fit exits on."""
    config = replace(make_config(inputs, tmp_path / "repository"), reduction="tome:4x3", recovery=photos / ".." / "photos")
    changed = {"other_images": {"more": photos}} if what == "other_images" else {what: photos}
    config = replace(config, **changed, unlabelled=what != "other_images", other_folders={"0": 0, "1": 1, "2": 2})

    with pytest.raises(ImageSetError, match="photos: the network would know images of photos"):
        recipe.run(config)


@pytest.mark.parametrize("nearer", ["photos", "measured"])
def test_nor_from_a_folder_that_holds_them_or_lies_in_them(nearer: str, inputs: Path, photos: Path, tmp_path: Path) -> None:
    """Told by a plan, too."""
    inside = photos / "0"
    recovery, measured = (inside, photos) if nearer == "photos" else (photos, inside)
    config = replace(make_config(inputs, tmp_path / "repository"), reduction="tome:4x3", recovery=recovery)

    with pytest.raises(ImageSetError, match=f"would know images of {measured.name}"):
        plan(replace(config, test_images=measured, unlabelled=True))


def test_too_few_and_none_to_recover_are_said(inputs: Path, photos: Path, tmp_path: Path) -> None:
    config = replace(make_config(inputs, tmp_path / "repository"), recovery=photos / "0")
    with pytest.raises(SourceError, match="--recover goes with --reduce"):
        recipe.run(config)
    with pytest.raises(ImageSetError, match="0: 24 photographs are too few"):
        recipe.run(replace(config, reduction="tome:4x3"))
    assert not [path for path in (tmp_path / "repository").rglob("*") if path.is_file()]


def test_a_plan_says_it(inputs: Path, photos: Path, tmp_path: Path) -> None:
    images = inputs / "images"
    arguments = ["export", "--model", "test_vit", "--weights", inputs / "weights.safetensors", "--version", "1"]
    arguments += [
        "--calibration",
        images,
        "--test",
        images,
        "--reduce",
        "tome:4x3",
        "--recover",
        photos,
        "--no-int8",
        "--dry-run",
    ]
    result = CliRunner().invoke(exporter, [*map(str, arguments), "--repository", str(tmp_path / "repository")])

    assert result.exit_code == 0, result.output
    assert "from 70 photographs of photos" in result.output


def test_what_did_not_help_is_said() -> None:
    assert in_words(Recovered(0.04, 0.05)) == (
        "it did not help (0.0400 nats from its former answer on photographs held out): left as it was"
    )
    assert "0.0300 nats from its former answer instead of 0.0400" in in_words(Recovered(0.04, 0.03))
