"""Which layers may not be INT8: found by making one at a time INT8, and left in fp32 until the network agrees with itself.

First those that change the logits most for the time they take: what gathers values hurts half as much as a layer of an MLP that
has four times the multiply-adds (docs/adr/0005).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import onnx
import onnxruntime as ort

from app.types import Array, FloatArray
from exporters.calibration import spread
from exporters.config import QuantizationConfig
from exporters.graph_writer import ActivationRange
from exporters.progress import SILENT, Progress
from exporters.whole_graph import multiply_adds
from models.manifest import LOGITS, PIXELS

Ranges = Sequence[Mapping[str, ActivationRange]]  # by stage, then by layer
Build = Callable[[Ranges], list[onnx.ModelProto]]  # the network with just these layers in INT8
Layer = tuple[int, str]  # its stage and its name there
STEM = "stem"  # its convolutions are INT8 together or not at all
BATCH_SIZE = 32
LEAST_SHARE = 0.001  # of the multiply-adds: what a layer has at least of the time, however small it is
LOOK_EVERY = 0.01  # of the multiply-adds left in fp32, before it is looked again how well the network agrees


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
        tokens = sum(each.exact_tokens > 0 for layers in self.ranges for each in layers.values())
        return ", ".join([*self.kept_fp32, *channels, *([f"the class token in {tokens} layers more"] if tokens else [])])


def select_layers(
    build: Build,
    ranges: Ranges,
    pixels: Array,
    config: QuantizationConfig,
    progress: Progress = SILENT,
    *,
    gentler: Ranges | None = None,
) -> Selection:
    """Leave as few layers in fp32 as make the network agree with fp32 on `target_agreement` of the images.

    Args:
        ranges: of all layers that could be INT8.
        pixels: (N, ...), what stage 0 takes; no labels are needed.
        gentler: the same, with what stays exact at little cost: taken before whole layers stay in fp32.

    Returns:
        All layers, if that agrees well enough; else without the most sensitive ones, up to `max_fp32_share` of multiply-adds.
    """
    pixels = pixels[spread(len(pixels), config.agreement_images)]
    reference = last_logits(build([{} for _ in ranges]), pixels)

    def agreement(chosen: Ranges) -> float:
        return float((last_logits(build(chosen), pixels).argmax(axis=1) == reference.argmax(axis=1)).mean())

    chosen = [dict(stage) for stage in ranges]
    reached = agreement(chosen)
    if reached < config.target_agreement and gentler is not None:
        ranges = gentler
        chosen = [dict(stage) for stage in ranges]
        reached = agreement(chosen)
    if reached >= config.target_agreement or not config.max_fp32_share:
        return Selection(chosen, (), reached)
    kept: list[str] = []
    spent = looked_at = 0.0  # in fp32 now, and when it was last asked how well that agrees
    order = affordable(most_sensitive(build, ranges, pixels, config, progress), config.max_fp32_share)
    for (stage, layer), share in progress.track(order, "the worst layers back in fp32"):
        chosen = without(chosen, [(stage, layer)])
        kept.append(f"{stage}.{layer}")
        spent += share
        if spent - looked_at >= LOOK_EVERY:
            looked_at, reached = spent, agreement(chosen)
            if reached >= config.target_agreement:
                break
    if spent != looked_at:
        reached = agreement(chosen)
    return Selection(chosen, tuple(kept), reached)


def most_sensitive(
    build: Build, ranges: Ranges, pixels: Array, config: QuantizationConfig, progress: Progress = SILENT
) -> list[tuple[Layer, float]]:
    """All layers with their shares of the multiply-adds; as `select_layers`.

    That first whose INT8 alone changes the logits most for its share.
    """
    few = pixels[spread(len(pixels), config.sensitivity_images)]
    fp32 = build([{} for _ in ranges])
    reference, inputs = last_logits(fp32, few), _inputs(fp32, few[:1])
    counts = [multiply_adds(*each) for each in zip(fp32, inputs, strict=True)]
    shares, errors = {}, {}
    for stage, layer in progress.track(groups(ranges), "one layer at a time in int8"):
        alone = build([_only(each, layer) if number == stage else {} for number, each in enumerate(ranges)])
        errors[stage, layer] = float(((last_logits(alone, few) - reference) ** 2).mean())
        count = counts[stage] - multiply_adds(alone[stage], inputs[stage])
        shares[stage, layer] = max(count / sum(counts), LEAST_SHARE)
    order = sorted(errors, key=lambda each: errors[each] / shares[each], reverse=True)
    return [(each, shares[each]) for each in order]


def affordable(order: Sequence[tuple[Layer, float]], most: float) -> list[tuple[Layer, float]]:
    """Of layers and their shares, in their order, those that fit into this share together with the ones before."""
    found, spent = [], 0.0
    for layer, share in order:
        if spent + share <= most:
            found.append((layer, share))
            spent += share
    return found


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
    sessions = _sessions(stages)
    collected: list[list[FloatArray]] = [[] for _ in stages]
    for start in range(0, len(pixels), BATCH_SIZE):
        for index, (_, outputs) in enumerate(_through(sessions, pixels[start : start + BATCH_SIZE])):
            collected[index].append(outputs[LOGITS])
    return [np.concatenate(parts) for parts in collected]


def _sessions(stages: Sequence[onnx.ModelProto]) -> list[ort.InferenceSession]:
    return [ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"]) for model in stages]


def _inputs(stages: Sequence[onnx.ModelProto], pixels: Array) -> list[dict[str, Array]]:
    """What each stage takes."""
    return [inputs for inputs, _ in _through(_sessions(stages), pixels)]


def _through(sessions: Sequence[ort.InferenceSession], pixels: Array) -> Iterator[tuple[dict[str, Array], dict[str, Array]]]:
    """What each stage takes and gives."""
    outputs: dict[str, Array] = {PIXELS: pixels}
    for session in sessions:
        inputs = {node.name: outputs[node.name] for node in session.get_inputs()}
        names = [node.name for node in session.get_outputs()]
        pixels_again = {PIXELS: pixels}  # for the next network of a cascade
        outputs = pixels_again | dict(zip(names, session.run(names, inputs), strict=True))
        yield inputs, outputs


def _only(layers: Mapping[str, ActivationRange], layer: str) -> dict[str, ActivationRange]:
    return {name: each for name, each in layers.items() if group_of(name) == layer}
