"""The recipe's data: which image is in which split, and what is refused."""

from __future__ import annotations

import io
import zipfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from models.training.data import hold_out, join, read_archive, read_photos, read_unlabelled, to_tensor, write_held_out
from models.zoo import CIFAR10_LABELS
from tests.images import make_archive, make_jpeg, photo


def test_an_archive_gives_images_with_the_index_of_their_class(tmp_path: Path) -> None:
    """The folder's name is the label."""
    make_archive(tmp_path / "train.zip", CIFAR10_LABELS, per_class=2)
    split = read_archive(tmp_path / "train.zip", CIFAR10_LABELS)

    assert split.images.shape == (20, 32, 32, 3)
    assert [label for label in range(10) for _ in range(2)] == split.labels.tolist()


def test_an_unknown_class_in_the_archive_is_refused(tmp_path: Path) -> None:
    """Rather than given some number."""
    make_archive(tmp_path / "train.zip", ("zebra",), per_class=1)
    with pytest.raises(ValueError, match="zebra"):
        read_archive(tmp_path / "train.zip", CIFAR10_LABELS)


def test_held_out_images_are_the_last_of_each_class_and_the_written_archive_has_the_same(tmp_path: Path) -> None:
    """What exits are fitted on is never trained on; file and arrays agree on which images these are."""
    make_archive(tmp_path / "train.zip", CIFAR10_LABELS, per_class=5)
    split = read_archive(tmp_path / "train.zip", CIFAR10_LABELS)

    rest, held = hold_out(split, per_class=2)
    write_held_out(tmp_path / "train.zip", tmp_path / "held.zip", per_class=2)

    assert (len(rest.labels), len(held.labels)) == (30, 20)
    assert np.array_equal(held.images, read_archive(tmp_path / "held.zip", CIFAR10_LABELS).images)
    assert not {image.tobytes() for image in held.images} & {image.tobytes() for image in rest.images}


def test_photographs_are_reduced_and_take_the_class_their_folder_is_mapped_to(tmp_path: Path) -> None:
    """Folders that are not mapped are passed over; a photograph that is not square loses its ends."""
    wide = Image.new("RGB", (90, 45), "red")
    wide.paste((0, 0, 255), (22, 0, 68, 45))  # the central square, and a pixel more
    with zipfile.ZipFile(tmp_path / "photos.zip", "w") as archive:
        buffer = io.BytesIO()
        wide.save(buffer, "PNG")
        archive.writestr("n2/wide.png", buffer.getvalue())
        archive.writestr("n1/a.jpg", make_jpeg(photo(64, 64)))
        archive.writestr("n3/c.jpg", b"never read")

    split = read_photos(tmp_path / "photos.zip", CIFAR10_LABELS, {"n1": "cat", "n2": "ship"}, 32)

    assert [CIFAR10_LABELS.index("cat"), CIFAR10_LABELS.index("ship")] == split.labels.tolist()
    assert split.images.shape == (2, 32, 32, 3)
    assert (split.images[1] == (0, 0, 255)).all()


def test_photographs_in_other_folders_are_unlabelled(tmp_path: Path) -> None:
    """Those that are passed over otherwise, reduced alike; there must be some."""
    with zipfile.ZipFile(tmp_path / "photos.zip", "w") as archive:
        archive.writestr("n1/a.jpg", b"never read")
        for name in ("n7/b.jpg", "n8/c.jpg"):
            archive.writestr(name, make_jpeg(photo(64, 80)))

    found = read_unlabelled(tmp_path / "photos.zip", {"n1": "cat"}, 32)

    as_cats = read_photos(tmp_path / "photos.zip", CIFAR10_LABELS, {"n7": "cat", "n8": "cat"}, 32)
    assert found.shape == (2, 32, 32, 3)
    assert np.array_equal(found, as_cats.images)
    with pytest.raises(ValueError, match="no photographs but those"):
        read_unlabelled(tmp_path / "photos.zip", {"n1": "cat", "n7": "cat", "n8": "cat"}, 32)


def test_photographs_of_unknown_classes_or_none_at_all_are_refused(tmp_path: Path) -> None:
    """A mistake in the mapping is not found out after hours of training."""
    with zipfile.ZipFile(tmp_path / "photos.zip", "w") as archive:
        archive.writestr("n1/a.jpg", make_jpeg(photo(8, 8)))

    with pytest.raises(ValueError, match="zebra"):
        read_photos(tmp_path / "photos.zip", CIFAR10_LABELS, {"n1": "zebra"}, 32)
    with pytest.raises(ValueError, match="no photographs"):
        read_photos(tmp_path / "photos.zip", CIFAR10_LABELS, {"n9": "cat"}, 32)


def test_joined_splits_keep_images_and_labels_together(tmp_path: Path) -> None:
    """First those of the one, then those of the other."""
    make_archive(tmp_path / "a.zip", CIFAR10_LABELS, per_class=1)
    first = read_archive(tmp_path / "a.zip", CIFAR10_LABELS)

    both = join(first, first)

    assert np.array_equal(both.images[10:], first.images)
    assert both.labels.tolist() == [*range(10), *range(10)]


def test_normalisation_is_value_over_255_minus_mean_over_std() -> None:
    """Channels first, as the network takes them."""
    images = np.zeros((1, 2, 2, 3), np.uint8)
    images[..., 0] = 255

    x = to_tensor(images, (0.5, 0.25, 0.0), (0.5, 0.5, 1.0))

    assert x[0, :, 0, 0].tolist() == [1.0, -0.5, 0.0]
