"""A cascade of published models: a cheap one first, and a dear one for the images that the cheap one is not sure of.

Nothing is trained. The cheap one may be the same network with fewer tokens, or in INT8, or a smaller one; to the service
both are stages of one version, with an exit after each.

Viola and Jones, Rapid Object Detection using a Boosted Cascade of Simple Features, CVPR 2001; for networks: Wang et al., Wisdom
of Committees: An Overlooked Approach To Faster and More Accurate Models, ICLR 2022.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import onnx

from app.repository.store import StoredModel
from exporters.sources.base import Published, SourceError
from exporters.sources.published import PublishedSource
from models.manifest import VariantSpec

AS_ITS_PARTS = "as its parts have it"


@dataclass(frozen=True, slots=True)
class Part:
    """A variant of a published version; without a number the highest version, without a variant the only one."""

    name: str
    version: int | None = None
    variant: str | None = None

    @classmethod
    def parse(cls, text: str) -> Part:
        """`NAME`, `NAME/VERSION` or `NAME/VERSION/VARIANT`.

        Raises:
            SourceError: it is none of these.
        """
        name, *rest = text.split("/")
        try:
            version = int(rest[0]) if rest else None
        except ValueError as error:
            raise SourceError(f"{text!r} is no version of a model: say NAME/VERSION/VARIANT") from error
        if len(rest) > 2:
            raise SourceError(f"{text!r} is no version of a model: say NAME/VERSION/VARIANT")
        return cls(name, version, rest[1] if len(rest) > 1 else None)


@dataclass(frozen=True, slots=True)
class CascadeSource:
    """Where its parts are published, the cheapest first."""

    repository: Path
    parts: tuple[Part, ...]

    def load(self) -> Published:
        """Their stages, one after the other.

        Raises:
            SourceError: a part is not there, or they do not go together.
        """
        opened = [self._open(part) for part in self.parts]
        dear, dear_variant = opened[-1]
        targets = dear_variant.targets
        for stored, variant in opened[:-1]:
            for what, mine, theirs in (
                ("classes", stored.labels, dear.labels),
                ("preprocessing", stored.manifest.preprocess, dear.manifest.preprocess),
            ):
                if mine != theirs:
                    raise SourceError(f"{_called(stored)} and {_called(dear)} have other {what}: they cannot share an image")
            targets = tuple(target for target in targets if target in variant.targets)
        names = [variant.name for _, variant in opened]
        if not targets:
            raise SourceError(f"{', '.join(names)} have no hardware in common")
        told = dear.manifest.provenance
        return Published(
            graphs=tuple(onnx.load(stored.directory / file) for stored, variant in opened for file in variant.files),
            stages=tuple(stage for stored, _ in opened for stage in stored.manifest.stages),
            preprocess=dear.manifest.preprocess,
            labels=dear.labels,
            weights_sha256=told.get("weights_sha256", "not stated"),
            origin="a cascade: " + ", then ".join(f"{_called(stored)} ({variant.name})" for stored, variant in opened),
            token_reduction=AS_ITS_PARTS,
            fitting_images_sha256=told.get("fitting_images_sha256", ""),
            variant="_then_".join(dict.fromkeys(names)),
            targets=targets,
            fitted_on=tuple(stored.manifest.provenance.get("fitting_images_sha256", "") for stored, _ in opened),
        )

    def open_dear(self) -> StoredModel:
        """What the dearest part states of itself.

        Raises:
            SourceError: it is not there.
        """
        return self._open(self.parts[-1])[0]

    def _open(self, part: Part) -> tuple[StoredModel, VariantSpec]:
        stored = PublishedSource(self.repository, part.name, part.version).open()
        variants = {variant.name: variant for variant in stored.manifest.variants}
        if part.variant is None and len(variants) == 1:
            return stored, next(iter(variants.values()))
        if part.variant not in variants:
            choice = ", ".join(f"{part.name}/{stored.manifest.version}/{variant}" for variant in variants)
            raise SourceError(f"say which variant of {_called(stored)}: {choice}")
        return stored, variants[part.variant]


def _called(stored: StoredModel) -> str:
    return f"{stored.manifest.name} version {stored.manifest.version}"
