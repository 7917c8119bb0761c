"""Models on disk: `<root>/<model>/<version>/manifest.json`, read and verified before anything else is believed."""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass
from pathlib import Path

from pydantic import ValidationError

from app.errors import ModelInvalid, ModelNotFound
from models.manifest import MANIFEST_FILE, ModelManifest


@dataclass(frozen=True, slots=True)
class StoredModel:
    """A version on disk whose files are what its manifest says."""

    directory: Path
    manifest: ModelManifest
    labels: tuple[str, ...]


class ModelStore:
    """Reads a model repository; never writes."""

    def __init__(self, root: Path) -> None:
        self._root = root

    def names(self) -> list[str]:
        """Models with at least one version, in alphabetical order."""
        if not self._root.is_dir():
            return []
        return sorted(path.name for path in self._root.iterdir() if path.is_dir() and self.versions(path.name))

    def versions(self, name: str) -> list[int]:
        """Published versions, rising; a directory still being written has another name and is not seen."""
        directory = self._root / name
        if not directory.is_dir():
            return []
        return sorted(
            int(path.parent.name)
            for path in directory.glob(f"*/{MANIFEST_FILE}")
            if re.fullmatch(r"[1-9][0-9]*", path.parent.name)
        )

    def open(self, name: str, version: int | None = None) -> StoredModel:
        """Read a version, the highest when none is given, and check every file against its checksum.

        Raises:
            ModelNotFound: no such model or version.
            ModelInvalid: the manifest cannot be read, or a file is missing or not the one that was published.
        """
        versions = self.versions(name)
        if not versions or (version is not None and version not in versions):
            wanted = name if version is None else f"{name} version {version}"
            raise ModelNotFound(f"there is no model {wanted} in the repository, which has {', '.join(self.names()) or 'none'}")
        directory = self._root / name / str(versions[-1] if version is None else version)
        try:
            manifest = ModelManifest.load(directory)
        except (ValidationError, OSError) as error:
            raise ModelInvalid(f"the manifest of {name} version {directory.name} cannot be used: {error}") from error
        if (manifest.name, str(manifest.version)) != (name, directory.name):
            raise ModelInvalid(f"{name}/{directory.name} holds {manifest.name} version {manifest.version}")
        _verify_files(directory, manifest)
        labels = tuple((directory / manifest.labels_file).read_text(encoding="utf-8").splitlines())
        if len(labels) != manifest.num_classes:
            raise ModelInvalid(f"{name} version {manifest.version} has {manifest.num_classes} classes and {len(labels)} labels")
        return StoredModel(directory, manifest, labels)


def _verify_files(directory: Path, manifest: ModelManifest) -> None:
    for file, expected in manifest.files.items():
        try:
            with (directory / file).open("rb") as stream:
                found = hashlib.file_digest(stream, "sha256").hexdigest()
        except OSError as error:
            raise ModelInvalid(
                f"{manifest.name} version {manifest.version}: {file} cannot be read: {error.strerror}"
            ) from error
        if found != expected:
            raise ModelInvalid(
                f"{manifest.name} version {manifest.version}: {file} is not the file that was published "
                f"(sha256 {found[:12]}…, expected {expected[:12]}…); fetch it again"
            )
