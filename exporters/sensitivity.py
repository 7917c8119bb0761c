"""Which layers may not be INT8: found by making one at a time INT8, and left in fp32 until the network agrees with itself."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import onnx
import onnxruntime as ort

from app.types import Array, FloatArray
from exporters.calibration import spread
from exporters.config import QuantizationConfig
from exporters.graph_writer import ActivationRange
from exporters.progress import SILENT, Progress
from models.manifest import LOGITS, PIXELS

Ranges = Sequence[Mapping[str, ActivationRange]]  # by stage, then by layer
Build = Callable[[Ranges], list[onnx.ModelProto]]  # the network with just these layers in INT8
Layer = tuple[int, str]  # its stage and its name there
STEM = "stem"  # its convolutions are INT8 together or not at all
BATCH_SIZE = 32


@dataclass(frozen=True, slots=True)
class Selection:
    """What is quantized in the end."""

    ranges: list[dict[str, ActivationRange]]
    kept_fp32: tuple[str, ...]  # `stage.layer`, worst first
    agreement: float  # with fp32, at the last exit, on the images of the pass

    def kept(self) -> str:
        """What of the layers is not INT8, in words: whole layers, and channels of others; may be empty."""
        channels = [
            f"{len(each.outliers)} of {stage}.{name}'s channels"
            for stage, layers in enumerate(self.ranges)
            for name, each in layers.items()
            if each.outliers
        ]
        return ", ".join([*self.kept_fp32, *channels])


def select_layers(
    build: Build, ranges: Ranges, pixels: Array, config: QuantizationConfig, progress: Progress = SILENT
) -> Selection:
    """Leave as few layers in fp32 as make the network agree with fp32 on `target_agreement` of the images.

    Args:
        ranges: of all layers that could be INT8.
        pixels: (N, ...), what stage 0 takes; no labels are needed.

    Returns:
        All layers, if that agrees well enough; else without the most sensitive ones, up to `max_fp32_layers` of them.
    """
    pixels = pixels[spread(len(pixels), config.agreement_images)]
    reference = last_logits(build([{} for _ in ranges]), pixels)

    def agreement(chosen: Ranges) -> float:
        return float((last_logits(build(chosen), pixels).argmax(axis=1) == reference.argmax(axis=1)).mean())

    chosen = [dict(stage) for stage in ranges]
    reached = agreement(chosen)
    if reached >= config.target_agreement:
        return Selection(chosen, (), reached)
    kept: list[str] = []
    for stage, layer in most_sensitive(build, ranges, pixels, config, progress)[: config.max_fp32_layers]:
        chosen = without(chosen, [(stage, layer)])
        kept.append(f"{stage}.{layer}")
        reached = agreement(chosen)
        if reached >= config.target_agreement:
            break
    return Selection(chosen, tuple(kept), reached)


def most_sensitive(
    build: Build, ranges: Ranges, pixels: Array, config: QuantizationConfig, progress: Progress = SILENT
) -> list[Layer]:
    """All layers, that first which changes the logits most when it alone is INT8; as `select_layers`."""
    few = pixels[spread(len(pixels), config.sensitivity_images)]
    reference = last_logits(build([{} for _ in ranges]), few)
    errors = {}
    for stage, layer in progress.track(groups(ranges), "one layer at a time in int8"):
        alone = [_only(each, layer) if number == stage else {} for number, each in enumerate(ranges)]
        errors[stage, layer] = float(((last_logits(build(alone), few) - reference) ** 2).mean())
    return sorted(errors, key=errors.__getitem__, reverse=True)


def without(ranges: Ranges, layers: Sequence[Layer]) -> list[dict[str, ActivationRange]]:
    """The ranges of all others: those stay in fp32."""
    return [
        {name: each for name, each in stage.items() if (number, group_of(name)) not in layers}
        for number, stage in enumerate(ranges)
    ]


def groups(ranges: Ranges) -> list[Layer]:
    """(stage, layer) of all that can be left in fp32; what can only be INT8 together is one."""
    return [(stage, name) for stage, layers in enumerate(ranges) for name in dict.fromkeys(map(group_of, layers))]


def group_of(name: str) -> str:
    """The layer that a range is of; a stem's convolutions are one."""
    return STEM if name.startswith(f"{STEM}.") else name.partition(":")[0]


def last_logits(stages: Sequence[onnx.ModelProto], pixels: Array) -> FloatArray:
    """Logits (N, C) of the last exit."""
    return every_exit(stages, pixels)[-1]


def every_exit(stages: Sequence[onnx.ModelProto], pixels: Array) -> list[FloatArray]:
    """Logits (N, C) of each exit."""
    sessions = [ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"]) for model in stages]
    collected: list[list[FloatArray]] = [[] for _ in stages]
    for start in range(0, len(pixels), BATCH_SIZE):
        outputs: dict[str, Array] = {PIXELS: pixels[start : start + BATCH_SIZE]}
        for index, session in enumerate(sessions):
            wanted = {node.name for node in session.get_inputs()}
            names = [node.name for node in session.get_outputs()]
            inputs = {name: outputs[name] for name in wanted}
            pixels_again = {PIXELS: outputs[PIXELS]}  # for the next network of a cascade
            outputs = pixels_again | dict(zip(names, session.run(names, inputs), strict=True))
            collected[index].append(outputs[LOGITS])
    return [np.concatenate(parts) for parts in collected]


def _only(layers: Mapping[str, ActivationRange], layer: str) -> dict[str, ActivationRange]:
    return {name: each for name, each in layers.items() if group_of(name) == layer}
