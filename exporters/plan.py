"""What an export would make, before it is made."""

from __future__ import annotations

from exporters.config import ExportConfig
from exporters.exportable import Exportable
from exporters.graphs_export import export_of
from exporters.images import count_images
from exporters.mirror import Mirrored
from exporters.recipe import check, vit_of
from exporters.recovery import MAX_PHOTOS, check_photos
from exporters.reduction_schedule import ReductionSchedule, apply_schedule, check_method, wish_of
from exporters.sources.base import Network
from exporters.vit_export import ViTExport


def plan(config: ExportConfig) -> dict[str, str]:
    """What `run` would make of it, in words; nothing is computed, nothing written.

    Raises:
        AlreadyPublished, SourceError, ScheduleError, ImageSetError, WeightsError, ValidationError: what `run` would find too.
    """
    check(config)
    network = config.source.load()
    if config.reduction is not None:
        model = vit_of(network).model
        check_photos(config, vit_of(network))
        if (wish := wish_of(config.reduction)) is not None:
            check_method(model, wish.method)
        else:
            schedule = ReductionSchedule.parse(config.reduction, model.config.depth, model.config.num_patches)
            apply_schedule(model, schedule)
    spec = network.preprocess
    exported: Exportable = ViTExport(network.model, spec) if isinstance(network, Network) else export_of(network)
    stages = exported.stages()
    with_mirror = Mirrored(exported, spec).stages() if config.mirror else stages
    size = sum(graph.ByteSize() for graph in exported.graphs())
    counts = [
        count_images(path, network.labels, folders=config.folders, unlabelled=config.unlabelled)
        for path in (config.calibration_images, config.test_images)
    ]
    wished = {"fp32": True, "int8": config.int8, "int8_qdq": config.qdq, "fp16": config.fp16}
    resized = "squashed to" if spec.squash else "shorter side to"
    tokens = [str(stage.outputs[1].shape[1]) for stage in stages[:-1]]
    return {
        "network": f"{network.origin}, {len(network.labels)} classes ({', '.join(network.labels[:3])}, …)",
        "pictures": f"{resized} {spec.resize}, centre {spec.crop[0]} x {spec.crop[1]}, {spec.interpolation}",
        "stages": f"{len(with_mirror)}, of {', '.join(f'{stage.gmacs:.3g}' for stage in with_mirror)} billion multiply-adds",
        "token reduction": config.reduction or "none",
        "recovered": _recovery(config),
        "tokens between them": ", ".join(tokens) or "none",
        "exits": "fitted" if not isinstance(network, Network) or network.has_exits else "heads are fitted first",
        "variants": ", ".join(name for name, wanted in wished.items() if wanted),
        "size": f"fp32 {size / 2**20:.1f} MiB",
        "images": f"{counts[0]} to fit on, {counts[1]} to measure on",
        "goes to": f"{config.repository / config.name / str(config.version)}",
    }


def _recovery(config: ExportConfig) -> str:
    if config.recovery is None:
        return "no"
    count = min(MAX_PHOTOS, count_images(config.recovery, (), unlabelled=True))
    return f"from {count} photographs of {config.recovery.name}"
