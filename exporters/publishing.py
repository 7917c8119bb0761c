"""Write a version directory aside, checksum it, rename it into place. A published version never changes."""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from models.manifest import MANIFEST_FILE, ModelManifest


class AlreadyPublished(ValueError):
    """The version exists; publish another number."""


@contextmanager
def build_directory(repository: Path, name: str, version: int) -> Iterator[Path]:
    """A fresh directory beside the final place; gone when the block fails.

    Raises:
        AlreadyPublished: before anything is computed.
    """
    if (repository / name / str(version)).exists():
        raise AlreadyPublished(f"{name} version {version} is already published; choose another version")
    partial = repository / name / f".{version}.partial"
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        yield partial
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def checksums(directory: Path) -> dict[str, str]:
    """sha256 of every file below a directory but the manifest, by its path with forward slashes."""
    return {
        path.relative_to(directory).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(directory.rglob("*"))
        if path.is_file() and path.name != MANIFEST_FILE
    }


def publish(build: Path, manifest: ModelManifest, repository: Path) -> Path:
    """Write the manifest and move the directory to `<repository>/<name>/<version>`; returns that path."""
    final = repository / manifest.name / str(manifest.version)
    path = build / MANIFEST_FILE
    with path.open("w") as file:
        file.write(manifest.model_dump_json(indent=2) + "\n")
        file.flush()
        os.fsync(file.fileno())
    if final.exists():
        raise AlreadyPublished(f"{manifest.name} version {manifest.version} was published meanwhile")
    build.rename(final)
    return final
