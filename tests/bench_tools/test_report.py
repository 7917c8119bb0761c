"""What the benchmark writes, and the images it makes."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
from PIL import Image

from tests.bench.images import describe, read_folder, synthetic_photos, write_folder
from tests.bench.machine import command_line
from tests.bench.report import BEGIN, END, Table, markdown, write_section


def test_section_replaces_only_itself(tmp_path: Path) -> None:
    """The rest of the page stays byte for byte; a second run replaces the first."""
    page = tmp_path / "benchmarks.md"
    page.write_text(f"# Mine\n\nabove\n{BEGIN}\nold\n{END}\nbelow\n")

    write_section(page, "new\n")
    write_section(page, "newer\n")

    assert page.read_text() == f"# Mine\n\nabove\n{BEGIN}\nnewer\n{END}\nbelow\n"


def test_page_without_markers_gets_them_at_its_end(tmp_path: Path) -> None:
    """Nothing that was written by hand is lost; a missing page is made."""
    page = tmp_path / "benchmarks.md"
    page.write_text("# Mine\n")
    new = tmp_path / "docs" / "benchmarks.md"

    write_section(page, "new\n")
    write_section(new, "new\n")

    assert page.read_text() == f"# Mine\n\n{BEGIN}\nnew\n{END}\n"
    assert new.read_text() == f"# Benchmarks\n\n{BEGIN}\nnew\n{END}\n"


def test_markdown_of_a_table() -> None:
    """Facts, then each table with its note."""
    section = markdown({"Date": "today"}, [Table("Speed", ("", "images/s"), [("served", "9")], "Measured.")])

    assert "- Date: today\n\n### Speed\n\n|  | images/s |\n| --- | ---: |\n| served | 9 |\n\nMeasured.\n" in section


@pytest.mark.parametrize(
    ("arguments", "environment", "expected"),
    [
        (["--rounds", "3"], {"HOME": "/root"}, "python -m tests.bench --rounds 3"),
        (["--images", "photos", "--quick"], {}, "python -m tests.bench --images DIR --quick"),
        (["--images=/data/photos"], {}, "python -m tests.bench --images=DIR"),
        (["--url", "http://box:1"], {}, "python -m tests.bench --url URL"),
        ([], {"FOVEA_REPOSITORY__ROOT": "/m", "FOVEA_HTTP__PORT": "1"}, "FOVEA_REPOSITORY__ROOT=DIR python -m tests.bench"),
    ],
)
def test_command_names_no_path(arguments: list[str], environment: dict[str, str], expected: str) -> None:
    """A published command repeats the run and tells nothing of the machine."""
    assert command_line(arguments, environment) == expected


def test_synthetic_photos_are_like_photos(tmp_path: Path) -> None:
    """Distinct JPEGs of a photo's size in pixels and bytes, the same every time, read back in their order."""
    images = synthetic_photos(4)
    write_folder(images, tmp_path)

    assert images == synthetic_photos(4) == read_folder(tmp_path)
    assert len(set(images)) == 4
    for data in images:
        with Image.open(io.BytesIO(data)) as image:
            assert (image.format, image.mode, image.size) == ("JPEG", "RGB", (500, 375))
        assert 80_000 < len(data) < 170_000
    assert describe(images, synthetic=True).startswith("4 synthetic photo-like JPEGs of quality 95, 500 x 375 pixels, ")


def test_folder_without_images(tmp_path: Path) -> None:
    """Said before anything is started."""
    with pytest.raises(ValueError, match="no image"):
        read_folder(tmp_path)
