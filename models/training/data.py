"""CIFAR-10 from archives of JPEGs: train, a split held out for fitting exits, and test; further photographs beside it.

Krizhevsky, Learning Multiple Layers of Features from Tiny Images, 2009. The data stays outside the project.
"""

from __future__ import annotations

import io
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageOps
from torch import Tensor

HELD_OUT_PER_CLASS = 500  # of the 5,000 training images of a class; never trained on, exits are fitted on them


@dataclass(frozen=True, slots=True)
class Split:
    """Images, uint8 (N, H, W, 3), and labels, int64 (N,)."""

    images: np.ndarray
    labels: np.ndarray


def read_archive(path: Path, labels: Sequence[str]) -> Split:
    """Read `<class>/<number>.jpg` of a zip file, in the order of names.

    Raises:
        ValueError: when the archive holds a class that is not in `labels`.
    """
    images, targets = [], []
    with zipfile.ZipFile(path) as archive:
        for name in sorted(entry for entry in archive.namelist() if entry.endswith(".jpg")):
            folder = name.split("/")[-2]
            if folder not in labels:
                raise ValueError(f"{path.name} holds a class {folder!r}, which the model does not know")
            images.append(np.asarray(Image.open(io.BytesIO(archive.read(name))).convert("RGB")))
            targets.append(labels.index(folder))
    return Split(np.stack(images), np.array(targets, dtype=np.int64))


def read_photos(path: Path, labels: Sequence[str], classes: Mapping[str, str], side: int) -> Split:
    """Further photographs, reduced to side x side pixels as the service does: shorter side, centre, bicubic.

    Args:
        path: a zip file of `<folder>/<file>`.
        classes: the label of each folder; folders that it does not name are passed over.
        side: in pixels.

    Raises:
        ValueError: a folder is mapped to a class that is not in `labels`, or no file is in a folder that is mapped.
    """
    if unknown := set(classes.values()) - set(labels):
        raise ValueError(f"folders are mapped to {', '.join(sorted(unknown))}, which the model does not know")
    images, targets = [], []
    with zipfile.ZipFile(path) as archive:
        for name in sorted(entry for entry in archive.namelist() if "/" in entry and not entry.endswith("/")):
            label = classes.get(name.split("/")[-2])
            if label is not None:
                images.append(_read_photo(archive, name, side))
                targets.append(labels.index(label))
    if not images:
        raise ValueError(f"{path.name} holds no photographs in a folder that is mapped to a class")
    return Split(np.stack(images), np.array(targets, dtype=np.int64))


def read_unlabelled(path: Path, classes: Mapping[str, str], side: int) -> NDArray[np.uint8]:
    """Those photographs of the zip file that `read_photos` passes over, reduced alike: uint8 (N, side, side, 3).

    Raises:
        ValueError: there are none.
    """
    with zipfile.ZipFile(path) as archive:
        names = sorted(entry for entry in archive.namelist() if "/" in entry and not entry.endswith("/"))
        images = [_read_photo(archive, name, side) for name in names if name.split("/")[-2] not in classes]
    if not images:
        raise ValueError(f"{path.name} holds no photographs but those in folders that are mapped to a class")
    return np.stack(images)


def _read_photo(archive: zipfile.ZipFile, name: str, side: int) -> NDArray[np.uint8]:
    image = Image.open(io.BytesIO(archive.read(name))).convert("RGB")
    return np.asarray(ImageOps.fit(image, (side, side), Image.Resampling.BICUBIC))


def join(first: Split, second: Split) -> Split:
    """All images of both."""
    return Split(np.concatenate([first.images, second.images]), np.concatenate([first.labels, second.labels]))


def hold_out(split: Split, per_class: int = HELD_OUT_PER_CLASS) -> tuple[Split, Split]:
    """The last `per_class` images of each class as a split of their own: (train, held out)."""
    held = np.zeros(len(split.labels), dtype=bool)
    for label in np.unique(split.labels):
        held[np.flatnonzero(split.labels == label)[-per_class:]] = True
    return Split(split.images[~held], split.labels[~held]), Split(split.images[held], split.labels[held])


def write_held_out(archive: Path, target: Path, per_class: int = HELD_OUT_PER_CLASS) -> None:
    """Copy the files that `hold_out` keeps from training into an archive of their own, for fitting exits."""
    with zipfile.ZipFile(archive) as source, zipfile.ZipFile(target, "w") as held:
        names = sorted(entry for entry in source.namelist() if entry.endswith(".jpg"))
        for folder in sorted({name.split("/")[-2] for name in names}):
            for name in [entry for entry in names if entry.split("/")[-2] == folder][-per_class:]:
                held.writestr(name, source.read(name))


def load(directory: Path, labels: Sequence[str]) -> tuple[Split, Split, Split]:
    """(train, held out, test) from `train.zip` and `test.zip` in a directory."""
    train, held = hold_out(read_archive(directory / "train.zip", labels))
    return train, held, read_archive(directory / "test.zip", labels)


def to_tensor(images: np.ndarray, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """uint8 (N, H, W, 3) -> normalised float32 (N, 3, H, W), channels last in memory."""
    x = torch.from_numpy(images).permute(0, 3, 1, 2).float() / 255
    return (x - torch.tensor(mean).view(1, 3, 1, 1)) / torch.tensor(std).view(1, 3, 1, 1)
