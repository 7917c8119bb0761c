"""Labelled images of a folder or a zip archive, read by the very code that serves."""

from __future__ import annotations

import hashlib
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path, PurePosixPath

import numpy as np

from app.errors import RequestError
from app.imaging.decode import SUFFIXES
from app.imaging.preprocess import Pixels, load_pixels
from app.types import Array
from exporters.progress import SILENT, Progress
from models.manifest import PreprocessSpec

MAX_PIXELS = 200_000_000  # of one image; the files are the user's own

Read = Callable[[], bytes]
File = tuple[str, Read]  # its name, with the folder it lies in


class ImageSetError(ValueError):
    """The images cannot be used: none there, an unknown class, or a broken file."""


@dataclass(frozen=True, slots=True)
class ImageSet:
    """What stage 0 takes, (N, ...), labels, int64 (N,), and the sha256 over all files in their order."""

    pixels: Array
    labels: Array
    sha256: str

    def __len__(self) -> int:
        return len(self.labels)


def read_images(
    path: Path,
    labels: Sequence[str],
    spec: PreprocessSpec,
    *,
    folders: Mapping[str, int] | None = None,
    progress: Progress = SILENT,
) -> ImageSet:
    """Read `<class>/<file>` from a folder or a zip archive, in the order of names; files named like no image are passed over.

    Args:
        folders: where given, the class of each folder; folders it does not name are passed over. Else folders are labels.

    Raises:
        ImageSetError: when there are none, a class is unknown, or a file is not an image.
    """
    pixels, targets, digest = [], [], hashlib.sha256()
    with _files(path, progress=progress) as files:
        chosen = _labelled(path, files, labels, folders)
        for name, read, target in progress.track(chosen, path.name):
            data = read()
            pixels.append(_load(name, data, spec))
            targets.append(target)
            digest.update(data)
    return ImageSet(np.stack(pixels), np.array(targets, dtype=np.int64), digest.hexdigest())


def read_unlabelled(path: Path, spec: PreprocessSpec, progress: Progress = SILENT, *, most: int | None = None) -> ImageSet:
    """Read a folder with its sub-folders, or a zip archive; labels are -1. Files named like no image are passed over.

    Args:
        most: where there are more files, so many of them, evenly spread over their names' order.

    Raises:
        ImageSetError: when there are none, or a file is not an image.
    """
    pixels, digest = [], hashlib.sha256()
    with _files(path, pattern="**/*", progress=progress) as files:
        count = len(files) if most is None else min(most, len(files))
        for name, read in progress.track([files[index * len(files) // count] for index in range(count)], path.name):
            data = read()
            pixels.append(_load(name, data, spec))
            digest.update(data)
    if not pixels:
        raise ImageSetError(f"{path.name} holds no images")
    return ImageSet(np.stack(pixels), np.full(len(pixels), -1, dtype=np.int64), digest.hexdigest())


def count_images(
    path: Path, labels: Sequence[str], *, folders: Mapping[str, int] | None = None, unlabelled: bool = False
) -> int:
    """How many `read_images` or `read_unlabelled` would read; none is decoded.

    Raises:
        ImageSetError: as those, but for broken files.
    """
    with _files(path, pattern="**/*" if unlabelled else "*/*") as files:
        count = len(files) if unlabelled else len(_labelled(path, files, labels, folders))
    if not count:
        raise ImageSetError(f"{path.name} holds no images")
    return count


def classes_by_folder(mapping: Mapping[str, str], labels: Sequence[str]) -> dict[str, int]:
    """{folder: label} as {folder: class}.

    Raises:
        ImageSetError: a folder is mapped to something that is none of the labels, or to one that several classes have.
    """
    if unknown := set(mapping.values()) - set(labels):
        raise ImageSetError(f"folders are mapped to {', '.join(sorted(unknown))}, which the model does not know")
    if twice := sorted(label for label in set(mapping.values()) if list(labels).count(label) > 1):
        raise ImageSetError(f"several classes are called {', '.join(twice)}; give the folders in the classes' order instead")
    return {folder: list(labels).index(label) for folder, label in mapping.items()}


def _labelled(
    path: Path, files: Sequence[File], labels: Sequence[str], folders: Mapping[str, int] | None
) -> list[tuple[str, Read, int]]:
    """With the class of each; those in folders that are not mapped are left out."""
    index = folders if folders is not None else {label: number for number, label in enumerate(labels)}
    chosen = []
    for name, read in files:
        label = name.split("/")[-2] if "/" in name else ""
        if label in index:
            chosen.append((name, read, index[label]))
        elif folders is None:
            raise ImageSetError(f"{name} lies in a folder {label!r}, which is none of the model's {len(labels)} classes")
    if not chosen:
        where = " in a folder that is mapped" if folders else ""
        raise ImageSetError(f"{path.name} holds no images of the form <class>/<file>{where}")
    return chosen


def _load(name: str, data: bytes, spec: PreprocessSpec) -> Pixels:
    try:
        return load_pixels(data, spec, max_pixels=MAX_PIXELS)
    except RequestError as error:
        raise ImageSetError(f"{name}: {error}") from error


@contextmanager
def _files(path: Path, *, pattern: str = "*/*", progress: Progress = SILENT) -> Iterator[list[File]]:
    """Names and how to read them, while the block runs; hidden ones are not spoken of."""
    if path.is_dir():
        entries = sorted(entry for entry in path.glob(pattern) if entry.is_file() and not entry.name.startswith("."))
        yield _named_like_images([(f"{file.parent.name}/{file.name}", file.read_bytes) for file in entries], progress)
    elif zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            names = [name for name in sorted(archive.namelist()) if not name.endswith("/")]
            shown = [name for name in names if not PurePosixPath(name).name.startswith(".")]
            yield _named_like_images([(name, partial(archive.read, name)) for name in shown], progress)
    else:
        raise ImageSetError(f"{path} is neither a folder nor a zip archive")


def _named_like_images(files: Sequence[File], progress: Progress) -> list[File]:
    """Those with a suffix of images or none at all; of others it is told how many there are."""
    found = [file for file in files if PurePosixPath(file[0]).suffix.lower() in {*SUFFIXES, ""}]
    if len(found) < len(files):
        kept = {name for name, _ in found}
        others = [name for name, _ in files if name not in kept]
        more = f" and {len(others) - 1} more" if len(others) > 1 else ""
        progress.step(f"not named like an image, so passed over: {others[0]}{more}")
    return found
