"""Candidates of a search: one network with fewer tokens in one way or another, as graphs that a cascade can be made of.

Larger patches are fewer tokens from the first block on, as a smaller picture would be, from the same pixels (weights resampled
as in FlexiViT, Beyer et al., CVPR 2023); merging makes them fewer on the way; both go together.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import onnx

from app.repository.store import ModelStore, StoredModel
from app.runtime.ort_backend import OrtBackend
from app.types import FloatArray
from exporters import recipe
from exporters.calibration import spread
from exporters.config import ExportConfig
from exporters.golden import golden_images, write_golden
from exporters.images import ImageSet
from exporters.progress import Progress
from exporters.published import one_thread
from exporters.publishing import build_directory, publish
from exporters.recovery import recover_answers
from exporters.reduction_schedule import apply_schedule
from exporters.schedule_search import schedule_of
from exporters.sensitivity import affordable, every_exit, last_logits, most_sensitive, without
from exporters.sources.base import Source, SourceError
from exporters.sources.timm_vit import TimmSource
from exporters.sources.transformers_vit import TransformersSource
from exporters.stage_files import write_stages
from exporters.validation import ValueMismatch
from exporters.vit_export import ViTExport, with_exact_class_token
from models.manifest import ModelManifest

CANDIDATE = "candidate"
MADE_FROM = "candidate_made_from"  # in their provenance
TRAINING = "training"  # likewise: what was learned since, in words
FP32, INT8, MIXED = recipe.FP32, recipe.INT8, recipe.MIXED
KEPT_SHARE = 0.1  # of the multiply-adds: what the latter leaves in fp32
ATOL = 1e-3  # of a logit between the fp32 graph and PyTorch
COMPARED = 16  # images for that
RESIZABLE = (TimmSource, TransformersSource)
Worth = Callable[[FloatArray], bool]  # whether logits (N, C) on the images that are fitted on lose little enough to go on


@dataclass(frozen=True, slots=True)
class Trial:
    """A way to have fewer tokens; neither: the network as it came.

    patch_size: pixels of a side; None: as it was trained. reduction: a schedule as `exporters.reduction_schedule` reads it.
    """

    patch_size: int | None = None
    reduction: str | None = None

    def __str__(self) -> str:
        patches = [] if self.patch_size is None else [f"patches of {self.patch_size} pixels"]
        return ", ".join([*patches, *([] if self.reduction is None else [self.reduction])]) or "all tokens"

    @property
    def as_it_came(self) -> bool:
        return self.patch_size is None and self.reduction is None


@dataclass(frozen=True, slots=True)
class Workshop:
    """Where candidates are made, and of what."""

    config: ExportConfig
    folder: Path
    fitting: ImageSet
    progress: Progress
    photos: ImageSet | None = None  # of anything: what candidates learn the network's answers from

    def make(self, trial: Trial, number: int, worth: Worth) -> StoredModel | None:
        """Made now, or found as an earlier search left it, whatever its budget; None where it is not worth INT8.

        Args:
            trial: what is wanted; number: its own, the same in every search.
            worth: asked of the fp32 network.

        Raises:
            SourceError: the folder holds candidates made of something else, or the source has no such patches.
            ScheduleError, WeightsError, ValueMismatch: as `exporters.recipe.run`.
        """
        directory, given_up = self.folder / CANDIDATE / str(number), self.folder / CANDIDATE / f"{number}.given_up.npz"
        made_from = self._made_from(trial)
        if directory.exists():
            stored = self.open(number)
            self._check(stored.manifest.provenance.get(MADE_FROM), made_from)
            return stored
        if given_up.exists():
            with np.load(given_up) as kept:
                self._check(str(kept["made_from"]), made_from)
                if not worth(kept["logits"]):
                    return None
        self.progress.step(f"candidate {number}: {trial}")
        network = recipe.vit_of(_with_patches(self.config.source, trial.patch_size).load())
        told = {
            "command": f"{self.config.command} ({trial})",
            "weights_sha256": network.weights_sha256,
            "token_reduction": "none",
            MADE_FROM: made_from,
        }
        if trial.reduction is not None:
            search = self.config.search
            schedule = schedule_of(
                network.model, trial.reduction, self.fitting.pixels, network.preprocess, search, self.progress
            )
            apply_schedule(network.model, schedule)
            told["token_reduction"] = str(schedule)
        if self.photos is not None and not trial.as_it_came:
            former = recipe.vit_of(self.config.source.load()).model
            told[TRAINING] = recover_answers(network.model, former, self.photos, network.preprocess, progress=self.progress)
        exported = ViTExport(network.model, network.preprocess)
        fp32 = exported.graphs()
        self._compare(exported, fp32, reduced=trial.reduction is not None)
        logits = last_logits(fp32, self.fitting.pixels)
        if not worth(logits):
            given_up.parent.mkdir(parents=True, exist_ok=True)
            np.savez(given_up, logits=logits, made_from=np.array(made_from))
            return None
        graphs = {FP32: fp32} if trial.as_it_came or not self.config.int8 else {}
        if self.config.int8:
            graphs |= self._quantized(exported, told, sensitive=trial.as_it_came)
        self._publish(exported, graphs, network.labels, number, told)
        return self.open(number)

    def open(self, number: int) -> StoredModel:
        """One that was made."""
        return ModelStore(self.folder).open(CANDIDATE, number)

    @property
    def resizable(self) -> bool:
        """Whether the network may have patches of other sizes."""
        return isinstance(self.config.source, RESIZABLE)

    def _made_from(self, trial: Trial) -> str:
        """What a candidate hangs on, as a sha256: not on the budget, so that another one finds it again."""
        network, config = recipe.vit_of(self.config.source.load()), self.config
        told = (str(trial), network.weights_sha256, network.preprocess, network.model.config, config.int8)
        digest = hashlib.sha256(repr((*told, config.calibration, config.quantization, config.search)).encode())
        digest.update(self.fitting.pixels.tobytes())
        if self.photos is not None and not trial.as_it_came:
            digest.update(self.photos.sha256.encode())
        return digest.hexdigest()

    def _check(self, made_from: str | None, wanted: str) -> None:
        if made_from != wanted:
            raise SourceError(
                f"{self.folder} holds candidates of another network, other images or other settings; name another folder"
            )

    def _compare(self, exported: ViTExport, graphs: Sequence[onnx.ModelProto], *, reduced: bool) -> None:
        """ValueMismatch where the graphs are not the network.

        Where tokens are reduced it need not be so for every image: which of two patches that are as much alike goes first hangs
        on the last bit of a sum, and another choice is another answer.
        """
        pixels = self.fitting.pixels[spread(len(self.fitting), COMPARED)]
        (mine,), (theirs,) = every_exit(graphs, pixels), exported.answers(pixels)
        differences = np.abs(mine - theirs).max(axis=1)
        difference = float(np.median(differences) if reduced else differences.max())
        if not difference <= ATOL:
            raise ValueMismatch(f"logits differ from the network's own by {difference:.3g}, allowed {ATOL:.3g}")

    def _quantized(self, exported: ViTExport, told: dict[str, str], *, sensitive: bool) -> dict[str, list[onnx.ModelProto]]:
        """All layers in INT8, and all but those that it hurts most: as found with all tokens, where most images tell most."""
        self.progress.step("calibrating and writing int8")
        build, ranges = exported.calibrated(self.fitting.pixels, self.config.calibration, self.progress)
        gentler = with_exact_class_token(exported.model, ranges) or ranges
        if sensitive:
            order = most_sensitive(build, gentler, self.fitting.pixels, self.config.quantization, self.progress)
            told["sensitive_layers"] = ",".join(layer for (_, layer), _ in affordable(order, KEPT_SHARE))
        else:
            told["sensitive_layers"] = self.open(1).manifest.provenance["sensitive_layers"]
        kept = [(0, layer) for layer in told["sensitive_layers"].split(",")]
        return {INT8: build(ranges), MIXED: build(without(gentler, kept))}

    def _publish(
        self,
        exported: ViTExport,
        graphs: Mapping[str, list[onnx.ModelProto]],
        labels: Sequence[str],
        number: int,
        told: Mapping[str, str],
    ) -> None:
        config = replace(self.config, name=CANDIDATE, version=number, repository=self.folder)
        with build_directory(self.folder, CANDIDATE, number) as build:
            for variant, stages in graphs.items():
                write_stages(build / variant, stages)
            (build / recipe.LABELS_FILE).write_text("\n".join(labels) + "\n")
            (build / recipe.GOLDEN_FILE).touch()  # the draft names it

            def manifest() -> ModelManifest:
                return recipe.manifest_of(config, exported.stages(), exported.preprocess, build, [*graphs], told)

            backends = {variant: OrtBackend(build, manifest(), variant, one_thread()) for variant in graphs}
            write_golden(build / recipe.GOLDEN_FILE, golden_images(exported.preprocess), backends, manifest())
            publish(build, manifest(), self.folder)


def default_patch_sizes(image_size: int, patch_size: int) -> tuple[int, ...]:
    """Of patches that leave about three quarters, six tenths and half of them, largest number first."""
    across = image_size // patch_size
    sizes = (image_size // round(across * share) for share in (6 / 7, 11 / 14, 5 / 7) if round(across * share))
    return tuple(dict.fromkeys(size for size in sizes if size > patch_size))


def _with_patches(source: Source, patch_size: int | None) -> Source:
    """The same network with patches of another size.

    Raises:
        SourceError: it comes as it is.
    """
    if patch_size is None:
        return source
    if not isinstance(source, RESIZABLE):
        raise SourceError("patches of other sizes are for checkpoints of ViT, DeiT and CaiT")
    return replace(source, asked=replace(source.asked, patch_size=patch_size))
