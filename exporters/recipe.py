"""The steps of an export in their order, from weights to a published version."""

from __future__ import annotations

import copy
import json
import re
import shutil
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np

from app.runtime.cpu import has_exact_int8
from app.runtime.ort_backend import OrtBackend
from app.types import Array
from exporters.certificate import ALREADY_SEEN, split, too_few
from exporters.config import ExportConfig
from exporters.evaluation import logits_per_exit
from exporters.exit_fitting import NEVER
from exporters.exit_heads import as_text, fit_exit_heads
from exporters.exportable import Exportable
from exporters.fitting import fit_variants
from exporters.golden import golden_images, write_golden
from exporters.graphs_export import export_of
from exporters.images import ImageSet, ImageSetError, read_images, read_unlabelled
from exporters.mirror import Mirrored
from exporters.model_card import model_card
from exporters.other_targets import as_fp16, as_qdq
from exporters.progress import SILENT, Progress
from exporters.published import one_thread
from exporters.publishing import AlreadyPublished, build_directory, checksums, publish
from exporters.receipt.examples import find_examples
from exporters.receipt.measuring import Subject, measure
from exporters.receipt.page import PAGE_FILE, as_page
from exporters.recovery import photos_to_learn_from, recover_answers
from exporters.reduction_schedule import apply_schedule, wish_of
from exporters.reporting import FULL, FittedVariant, Images, provenance, report
from exporters.schedule_search import schedule_of
from exporters.sources.base import Loaded, Network, Published, SourceError
from exporters.stage_files import write_stages
from exporters.validation import ValidationError, validate
from exporters.vit_export import ViTExport
from models.manifest import (
    NAME_PATTERN,
    ExitSpec,
    HardwareTarget,
    ModelManifest,
    PreprocessSpec,
    StageSpec,
    VariantSpec,
)

FP32, INT8, QDQ, FP16 = "fp32", "int8", "int8_qdq", "fp16"
MIXED = "int8_mixed"  # of a search: the layers that INT8 hurts most stay in fp32
UNSEEN_EVERY = 5
LABELS_FILE, GOLDEN_FILE = "labels.txt", "golden.npz"
# Largest difference of a logit when replayed elsewhere. fp32: another order of summation. INT8: a value on the edge
# between two steps may fall to the other side; an instruction that saturates goes far beyond.
INEXACT = 0.25
GOLDEN_ATOL = {FP32: 1e-3, FULL: 1e-3}
EVERYWHERE = tuple(HardwareTarget)
# u8 x s8 saturates on x86 without VNNI, and MatMulIntegerToFloat is a CPU operator (docs/adr/0005).
TARGETS = {
    FP32: EVERYWHERE,
    INT8: (HardwareTarget.CPU_VNNI,),
    MIXED: (HardwareTarget.CPU_VNNI,),
    QDQ: (HardwareTarget.OPENVINO,),
    FP16: (HardwareTarget.CUDA, HardwareTarget.TENSORRT, HardwareTarget.COREML),
}


def run(config: ExportConfig, progress: Progress = SILENT, *, images: Images | None = None) -> Path:
    """Export, quantize, validate, fit, evaluate and publish; the directory of the new version.

    Args:
        config: what is made.
        progress: told of every step.
        images: where they were read before.

    Raises:
        AlreadyPublished, SourceError, ScheduleError, ImageSetError, WeightsError, ValidationError: nothing is published then.
    """
    check(config)
    with build_directory(config.repository, config.name, config.version) as build:
        progress.step("loading weights")
        network = config.source.load()
        spec = network.preprocess
        if images is None:
            progress.step("reading images")
            images = read_sets(config, network, progress)
        full, schedule = None, network.token_reduction if isinstance(network, Published) else "none"
        if isinstance(network, Published) and images.test.sha256 == network.fitting_images_sha256:
            raise ImageSetError(f"the exits of {network.origin} were fitted on these test images: measure on others")
        if config.reduction is not None:
            full, schedule, learned = _reduce(config, config.reduction, vit_of(network), images.fitting, build, progress)
            config = config.having_learned(learned)
        unseen = _unseen_by_heads(network, len(images.fitting))
        exported = _exportable(config, network, images.fitting.pixels[~unseen], progress)
        first = network.variant if isinstance(network, Published) else FP32
        variants, kept_fp32 = _write_variants(config, exported, images.fitting, build, progress, first=first)
        (build / LABELS_FILE).write_text("\n".join(network.labels) + "\n")
        (build / GOLDEN_FILE).touch()  # the draft names it; its content needs the backends first
        stages = exported.stages()
        base, targets = variants[0], network.targets if isinstance(network, Published) else None
        draft = manifest_of(config, stages, spec, build, variants, {}, targets)
        profile = one_thread()
        backends = {name: OrtBackend(build, draft, name, profile) for name in variants}
        progress.step("validating")
        golden = golden_images(spec)
        difference = validate(backends[base], draft.stages, exported.answers, golden, atol=GOLDEN_ATOL.get(base, INEXACT))
        write_golden(build / GOLDEN_FILE, golden, backends, draft)

        progress.step("fitting exits and evaluating")
        if config.unlabelled:
            images = _answered(images, full or backends[base], len(stages))
        fitted = fit_variants(config, stages, backends, images, unseen, progress)
        found = report(fitted, draft, images, difference, full)
        shutil.rmtree(build / FULL, ignore_errors=True)
        origin = provenance(config, network, images) | {"kept_fp32": kept_fp32, "token_reduction": schedule}
        if config.receipt:
            told = manifest_of(config, stages, spec, build, fitted, origin, targets)
            found["receipt"] = _write_receipt(config, told, network.labels, fitted, images.test, build, progress)
        (build / "report.json").write_text(json.dumps(found, indent=2) + "\n")
        (build / "MODEL_CARD.md").write_text(model_card(config, draft, network.labels, found, origin))
        progress.step("publishing")
        return publish(build, manifest_of(config, stages, spec, build, fitted, origin, targets), config.repository)


def _write_receipt(
    config: ExportConfig,
    manifest: ModelManifest,
    labels: Sequence[str],
    fitted: Mapping[str, FittedVariant],
    test: ImageSet,
    build: Path,
    progress: Progress,
) -> dict[str, object]:
    """The page beside what is built, and its figures."""
    backends = {name: variant.backend for name, variant in fitted.items()}
    subject = Subject(build, manifest, backends, {name: variant.test_logits for name, variant in fitted.items()})
    labelled, tried = not config.unlabelled, () if config.chosen is None else config.chosen.tried
    receipt = measure(subject, test, labelled=labelled, tried=tried, progress=progress)
    (build / PAGE_FILE).write_text(as_page(receipt, find_examples(subject, test, labels, labelled=labelled)))
    return asdict(receipt)


def check(config: ExportConfig) -> None:
    """What can be known before anything is read.

    Raises:
        AlreadyPublished, SourceError, ValidationError.
    """
    if (config.repository / config.name / str(config.version)).exists():
        raise AlreadyPublished(f"{config.name} version {config.version} is already published; choose another version")
    if config.qdq and not config.int8:
        raise ValidationError("QDQ pairs are made of the INT8 variant: not without it (--no-int8)")
    if config.int8 and not has_exact_int8():
        raise ValidationError(
            "this CPU sums 8-bit products with saturation, so an INT8 variant could not be validated here: "
            "export on one with VNNI, or without INT8 (--no-int8)"
        )
    if config.recovery is not None and config.reduction is None:
        raise SourceError("there is nothing to recover: --recover goes with --reduce")
    if not re.fullmatch(NAME_PATTERN, config.name):
        raise SourceError(
            f"{config.name!r} is no name for a model: small letters, digits, dots, dashes and underscores, at most 64"
        )


def vit_of(network: Loaded) -> Network:
    """For what only a ViT of ours can do.

    Raises:
        SourceError: it comes as graphs.
    """
    if not isinstance(network, Network):
        raise SourceError(f"token reduction is for ViT, DeiT and CaiT, from weights; {network.origin} can be exported as it is")
    return network


def _reduce(
    config: ExportConfig, reduction: str, network: Network, fitting: ImageSet, build: Path, progress: Progress
) -> tuple[OrtBackend, str, list[str]]:
    """Reduces tokens in the network; what it was before, in fp32, the schedule, and what was learned since, in words."""
    photos = photos_to_learn_from(config, network, progress)
    schedule = schedule_of(network.model, reduction, fitting.pixels, network.preprocess, config.search, progress)
    full, learned = _unreduced(config, network, build), []
    former = copy.deepcopy(network.model)
    apply_schedule(network.model, schedule)
    if photos is not None:
        found = recover_answers(
            network.model, former, photos, network.preprocess, has_exits=network.has_exits, progress=progress
        )
        learned.append(found)
    return full, reduction if wish_of(reduction) is None else str(schedule), learned


def _unseen_by_heads(network: Loaded, count: int) -> Array:
    """Which of the fitting images thresholds are fitted on, bool (N,).

    All, where heads came with the network; else every fifth, which heads are not fitted on: of what they know by heart they are
    far too sure.
    """
    if not isinstance(network, Network) or network.has_exits:
        return np.ones(count, dtype=bool)
    unseen: Array = np.arange(count) % UNSEEN_EVERY == 0
    return unseen


def _exportable(config: ExportConfig, network: Loaded, seen: Array, progress: Progress) -> Exportable:
    """The network, with heads where it came without, fitted on the images that may be seen; mirrored where that is wanted."""
    exported = _as_it_is(config, network, seen, progress)
    return Mirrored(exported, network.preprocess) if config.mirror else exported


def _as_it_is(config: ExportConfig, network: Loaded, seen: Array, progress: Progress) -> Exportable:
    if not isinstance(network, Network):
        return export_of(network)
    if not network.has_exits:
        heads = fit_exit_heads(network.model, seen, network.preprocess, config.exit_heads, progress)
        progress.step(f"heads agree with the last exit, on images they were not fitted on: {as_text(heads)}")
    return ViTExport(network.model, network.preprocess)


def _write_variants(
    config: ExportConfig, exported: Exportable, fitting: ImageSet, build: Path, progress: Progress, *, first: str
) -> tuple[list[str], str]:
    """The stages of each variant, on disk; the variants, the graphs as they come first, and what is not INT8, in words."""
    graphs, kept_fp32 = {first: exported.graphs()}, "everything" if first == FP32 else "what is so in its parts"
    if config.int8:
        progress.step("calibrating and writing int8 stages")
        quantized = exported.quantized(fitting.pixels, config.calibration, config.quantization, progress)
        graphs[INT8], kept_fp32 = quantized.graphs, quantized.kept_fp32
        if config.qdq:
            graphs[QDQ] = [as_qdq(graph) for graph in quantized.graphs]
    if config.fp16:
        graphs[FP16] = [as_fp16(graph) for graph in graphs[FP32]]
    for name, stages in graphs.items():
        write_stages(build / name, stages)
    return [*graphs], kept_fp32


def read_sets(config: ExportConfig, network: Loaded, progress: Progress, *, of_a_search: bool = False) -> Images:
    """Read, and half of those to fit on set apart where something is to be certified and there are enough.

    Args:
        config: where they are.
        network: for its pixels and classes.
        progress: told how far it is.
        of_a_search: something is to be certified though the network has no exit but its end.

    Raises:
        ImageSetError: a set cannot be used.
    """
    spec, labels = network.preprocess, network.labels
    fitting, test = (
        read_unlabelled(path, spec, progress)
        if config.unlabelled
        else read_images(path, labels, spec, folders=config.folders, progress=progress)
        for path in (config.calibration_images, config.test_images)
    )
    others = {
        name: read_images(path, labels, spec, folders=config.other_folders, progress=progress)
        for name, path in config.other_images.items()
    }
    if config.bound is None or (network.num_stages == 1 and not of_a_search):
        return Images(fitting, None, test, others)
    bound = replace(config.bound, epsilon=config.exits.max_accuracy_drop)
    seen = isinstance(network, Published) and fitting.sha256 in network.fitted_on
    apart = None if seen else split(len(fitting), bound)
    if apart is None:
        why = ALREADY_SEEN if seen else too_few(len(fitting), bound)
        progress.step(f"{why}; losses are estimates")
        return Images(fitting, None, test, others, why)
    return Images(_part(fitting, ~apart), _part(fitting, apart), test, others)


def _part(images: ImageSet, chosen: Array) -> ImageSet:
    return replace(images, pixels=images.pixels[chosen], labels=images.labels[chosen])


def _answered(images: Images, backend: OrtBackend, num_stages: int) -> Images:
    """With the network's own answers for labels."""

    def answered(each: ImageSet) -> ImageSet:
        return replace(each, labels=logits_per_exit(backend, num_stages, each.pixels)[-1].argmax(axis=1))

    apart = None if images.apart is None else answered(images.apart)
    return replace(images, fitting=answered(images.fitting), apart=apart, test=answered(images.test))


def _unreduced(config: ExportConfig, network: Network, build: Path) -> OrtBackend:
    """The network as it came, in fp32, beside what is built."""
    exported: Exportable = ViTExport(network.model, network.preprocess)
    if config.mirror:
        exported = Mirrored(exported, network.preprocess)
    write_stages(build / FULL, exported.graphs())
    for file in (LABELS_FILE, GOLDEN_FILE):
        (build / file).touch()  # the manifest must name them
    manifest = manifest_of(config, exported.stages(), network.preprocess, build, [FULL], {})
    return OrtBackend(build, manifest, FULL, one_thread())


def manifest_of(
    config: ExportConfig,
    stages: tuple[StageSpec, ...],
    preprocess: PreprocessSpec,
    build: Path,
    fitted: Iterable[str] | Mapping[str, FittedVariant],
    origin: Mapping[str, str],
    targets: tuple[HardwareTarget, ...] | None = None,
) -> ModelManifest:
    """Of variants that were fitted, or, before that, of their names alone: then nobody leaves early."""
    variants = []
    for name in fitted:
        found = fitted[name] if isinstance(fitted, Mapping) else None
        variants.append(
            VariantSpec(
                name=name,
                targets=targets or TARGETS.get(name, EVERYWHERE),
                files=tuple(f"{name}/stage_{index}.onnx" for index in range(len(stages))),
                exits=_no_exits(stages) if found is None else found.exits,
                golden_atol=GOLDEN_ATOL.get(name, INEXACT),
                certificate=None if found is None else found.certificate,
                points=() if found is None else found.points,
            )
        )
    return ModelManifest(
        name=config.name,
        version=config.version,
        labels_file=LABELS_FILE,
        golden_file=GOLDEN_FILE,
        preprocess=preprocess,
        stages=stages,
        variants=tuple(variants),
        files=checksums(build),
        provenance=dict(origin),
    )


def _no_exits(stages: Sequence[StageSpec]) -> tuple[ExitSpec, ...]:
    last = len(stages) - 1
    return tuple(
        ExitSpec(score="max_softmax", temperature=1.0, threshold=None if index == last else NEVER) for index in range(last + 1)
    )
