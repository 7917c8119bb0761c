"""CIFAR-10 from an archive of JPEGs to tensors: train, a split held out for fitting exits, and test.

Krizhevsky, Learning Multiple Layers of Features from Tiny Images, 2009. The data stays outside the project.
"""

from __future__ import annotations

import io
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

HELD_OUT_PER_CLASS = 500  # of the 5,000 training images of a class; never trained on, exits are fitted on them
CROP_PADDING = 4  # pixels of reflection around the image before a random crop (He et al., 2016)
CUTOUT = 8  # side of the square put to the mean, in pixels (DeVries and Taylor, 2017: half of the best for long training)


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


def augment(x: Tensor, generator: torch.Generator) -> Tensor:
    """Random flip, random crop out of a reflected border, cutout; each drawn per image. (B, 3, H, W) -> the same."""
    batch, _, height, width = x.shape
    flip = torch.rand(batch, generator=generator) < 0.5
    x = torch.where(flip.view(-1, 1, 1, 1), x.flip(3), x)

    x = F.pad(x, (CROP_PADDING,) * 4, mode="reflect")
    offset = torch.randint(0, 2 * CROP_PADDING + 1, (2, batch, 1), generator=generator)
    rows = offset[0] + torch.arange(height)  # (B, H)
    columns = offset[1] + torch.arange(width)
    x = x[torch.arange(batch).view(-1, 1, 1), :, rows.unsqueeze(2), columns.unsqueeze(1)]  # (B, H, W, 3)
    x = x.permute(0, 3, 1, 2)  # channels last in memory, as convolutions like it

    centre = torch.rand(2, batch, 1, generator=generator) * torch.tensor([height, width]).view(2, 1, 1)
    in_rows = (torch.arange(height) - centre[0]).abs() < CUTOUT / 2
    in_columns = (torch.arange(width) - centre[1]).abs() < CUTOUT / 2
    return x.masked_fill((in_rows.unsqueeze(2) & in_columns.unsqueeze(1)).unsqueeze(1), 0.0)
