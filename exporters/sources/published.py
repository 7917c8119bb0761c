"""A version that is published already, as it serves in fp32: to be made INT8, or calibrated anew on other images."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import onnx

from app.errors import ModelInvalid, ModelNotFound
from app.repository.store import ModelStore, StoredModel
from app.runtime.golden import verify_golden
from app.runtime.ort_backend import OrtBackend
from app.runtime.targets import resolve_profile
from exporters.sources.base import Published, SourceError

FP32 = "fp32"


@dataclass(frozen=True, slots=True)
class PublishedSource:
    """Where it is, its name, and its number; None: the highest."""

    repository: Path
    name: str
    version: int | None

    def load(self) -> Published:
        """Read and verify it.

        Raises:
            SourceError: there is no such version, it is damaged, it has no fp32 variant, or does not compute here as it did.
        """
        stored = self.open()
        manifest = stored.manifest
        found = next((variant for variant in manifest.variants if variant.name == FP32), None)
        if found is None:
            raise SourceError(f"{manifest.name} version {manifest.version} has no {FP32} variant to start from")
        try:
            backend = OrtBackend(stored.directory, manifest, FP32, resolve_profile("cpu", instances=1, intra_op_threads=1))
            verify_golden(backend, stored.directory, manifest, FP32)
        except ModelInvalid as error:
            raise SourceError(str(error)) from error
        told = manifest.provenance
        return Published(
            tuple(onnx.load(stored.directory / file) for file in found.files),
            manifest.stages,
            manifest.preprocess,
            stored.labels,
            told.get("weights_sha256", "not stated"),
            f"{manifest.name} version {manifest.version}, made from {told.get('origin', 'what it does not state')}",
            told.get("token_reduction", "none"),
            told.get("fitting_images_sha256", ""),
        )

    def open(self) -> StoredModel:
        """Its manifest and labels, its files verified.

        Raises:
            SourceError: there is no such version, or it is damaged.
        """
        try:
            return ModelStore(self.repository).open(self.name, self.version)
        except (ModelNotFound, ModelInvalid) as error:
            raise SourceError(str(error)) from error
