"""Labelled images from folders and archives, through the imaging that serves."""

from __future__ import annotations

import zipfile
from pathlib import Path

import numpy as np
import pytest

from exporters.images import ImageSetError, classes_by_folder, count_images, read_images, read_unlabelled
from exporters.progress import Progress
from models.zoo import ZOO
from tests.images import make_jpeg, photo

ENTRY = ZOO["test_vit"]


def test_a_folder_and_a_zip_of_it_give_the_same(tmp_path: Path) -> None:
    """Pixels, labels and checksum; a hidden file is no image."""
    for name in ("cat/1.jpg", "dog/2.jpg", "dog/10.jpg"):
        file = tmp_path / "set" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(make_jpeg(photo(48, 40, seed=len(name))))
    with zipfile.ZipFile(tmp_path / "set.zip", "w") as archive:
        for file in (tmp_path / "set").rglob("*.jpg"):
            archive.write(file, f"{file.parent.name}/{file.name}")
    (tmp_path / "set" / "cat" / ".DS_Store").write_bytes(b"no image")

    folder, zipped = (read_images(tmp_path / name, ENTRY.labels, ENTRY.preprocess) for name in ("set", "set.zip"))

    assert folder.pixels.shape == (3, 32, 32, 3)
    assert folder.labels.tolist() == [3, 5, 5]
    assert np.array_equal(folder.pixels, zipped.pixels)
    assert folder.sha256 == zipped.sha256


class Told(Progress):
    """Keeps what it is told."""

    def __init__(self) -> None:
        self.steps: list[str] = []

    def step(self, text: str) -> None:
        self.steps.append(text)


@pytest.mark.parametrize("zipped", [False, True], ids=["folder", "zip"])
def test_what_is_not_named_like_an_image_is_passed_over(tmp_path: Path, zipped: bool) -> None:
    """A README, a table: told, and not counted either; a file without a suffix is an image like any other."""
    files = {
        "cat/1.JPEG": make_jpeg(),
        "cat/0c7a": make_jpeg(),
        "cat/2.jfif": make_jpeg(),
        "cat/README.md": b"cats",
        "dog/credits.csv": b"a,b",
    }
    path = tmp_path / ("set.zip" if zipped else "set")
    if zipped:
        with zipfile.ZipFile(path, "w") as archive:
            for name, content in [*files.items(), ("__MACOSX/cat/._1.JPEG", b"no image")]:
                archive.writestr(name, content)
    else:
        for name, content in files.items():
            (path / name).parent.mkdir(parents=True, exist_ok=True)
            (path / name).write_bytes(content)
    told, told_again = Told(), Told()

    labelled = read_images(path, ENTRY.labels, ENTRY.preprocess, progress=told)
    unlabelled = read_unlabelled(path, ENTRY.preprocess, told_again)

    assert labelled.labels.tolist() == [3, 3, 3]
    assert len(unlabelled) == count_images(path, ENTRY.labels) == count_images(path, ENTRY.labels, unlabelled=True) == 3
    assert told.steps == told_again.steps == ["not named like an image, so passed over: cat/README.md and 1 more"]


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [("zebra/1.jpg", b"", "zebra"), ("cat/1.jpg", b"not a picture", "cat/1.jpg"), ("1.txt", b"", "no images")],
)
def test_what_cannot_be_used_is_refused_by_name(tmp_path: Path, name: str, content: bytes, says: str) -> None:
    """An export on half a folder would be an export on other images than its owner thinks."""
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ImageSetError, match=says):
        read_images(tmp_path, ENTRY.labels, ENTRY.preprocess)


def test_folders_may_have_names_of_their_own(tmp_path: Path) -> None:
    """Each with the number of its class; those without are passed over, and not even read."""
    for name, content in (("n1/1.jpg", make_jpeg()), ("n2/2.jpg", make_jpeg()), ("n3/3.jpg", b"no picture")):
        (tmp_path / name).parent.mkdir()
        (tmp_path / name).write_bytes(content)

    found = read_images(tmp_path, ENTRY.labels, ENTRY.preprocess, folders={"n1": 7, "n2": 0})

    assert found.labels.tolist() == [7, 0]
    with pytest.raises(ImageSetError, match="in a folder that is mapped"):
        read_images(tmp_path, ENTRY.labels, ENTRY.preprocess, folders={"n9": 1})


def test_labels_of_folders_become_class_numbers() -> None:
    """An unknown label is refused, and one that two classes share: nobody could tell which is meant."""
    assert classes_by_folder({"n1": "b", "n2": "c"}, ("a", "b", "c")) == {"n1": 1, "n2": 2}
    with pytest.raises(ImageSetError, match="zebra"):
        classes_by_folder({"n1": "zebra"}, ("a",))
    with pytest.raises(ImageSetError, match="several classes are called crane"):
        classes_by_folder({"n1": "crane"}, ("crane", "crow", "crane"))


def test_a_file_that_is_neither_is_refused(tmp_path: Path) -> None:
    """For instance a tar archive."""
    (tmp_path / "set.tar").write_bytes(b"tar")
    with pytest.raises(ImageSetError, match="neither a folder nor a zip"):
        read_images(tmp_path / "set.tar", ENTRY.labels, ENTRY.preprocess)
