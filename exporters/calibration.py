"""Ranges of activations: real images through the fp32 stages, as ONNX Runtime computes them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import onnx
import onnxruntime as ort

from app.types import Array
from exporters.config import CalibrationConfig
from exporters.graph_writer import HIGH, LOW, ActivationRange
from exporters.progress import SILENT, Progress
from models.manifest import PIXELS


def spread(count: int, wanted: int) -> Array:
    """Indices of up to `wanted` images, evenly spread over all of them: a sorted set has every class in it."""
    return np.linspace(0, count - 1, min(count, wanted)).round().astype(np.int64)


@dataclass(slots=True)
class Extremes:
    """The smallest and largest values of a tensor so far: of each channel, (C,), or of all, (1,)."""

    low: Array
    high: Array

    def joined(self, other: Extremes) -> Extremes:
        """Of both."""
        return Extremes(np.minimum(self.low, other.low), np.maximum(self.high, other.high))

    def divided(self, factor: Array) -> Extremes:
        """When each channel is divided by a positive number of its own."""
        return Extremes(self.low / factor, self.high / factor)

    def range(self, config: CalibrationConfig) -> ActivationRange:
        """One range for all channels but the outliers."""
        outliers = outlier_channels(np.maximum(-self.low, self.high), config)
        kept = np.ones(self.low.shape, dtype=bool)
        kept[list(outliers)] = False
        return ActivationRange(float(self.low[kept].min()), float(self.high[kept].max()), outliers)


def collect_extremes(
    stages: Sequence[onnx.ModelProto], pixels: Array, config: CalibrationConfig, progress: Progress = SILENT
) -> list[dict[str, Extremes]]:
    """The smallest and largest input of each linear layer and output of each convolution, per stage.

    Min-max, not percentiles: percentiles were worse on real Vision Transformers (docs/adr/0005). Every image goes
    through every stage, a superset of the survivors that reach the later ones in use.

    Args:
        stages: fp32 graphs with `expose=True`.
        pixels: (N, ...), what stage 0 takes.
    """
    pixels = pixels[spread(len(pixels), config.num_images)]
    sessions = [ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"]) for model in stages]
    seen: list[dict[str, Extremes]] = [{} for _ in stages]
    for start in progress.track(range(0, len(pixels), config.batch_size), "calibrating"):
        inputs = {PIXELS: pixels[start : start + config.batch_size]}
        for index, session in enumerate(sessions):
            names = [node.name for node in session.get_outputs()]
            outputs = dict(zip(names, session.run(names, inputs), strict=True))
            wanted = [node.name for node in sessions[index + 1].get_inputs()] if index + 1 < len(sessions) else []
            inputs = {name: outputs[name] for name in wanted}
            for layer in [name.removesuffix(LOW) for name in names if name.endswith(LOW)]:
                now = Extremes(outputs[layer + LOW], outputs[layer + HIGH])
                seen[index][layer] = now if layer not in seen[index] else seen[index][layer].joined(now)
    return seen


def ranges_of(seen: Sequence[Mapping[str, Extremes]], config: CalibrationConfig) -> list[dict[str, ActivationRange]]:
    """What quantization needs of it."""
    return [{name: each.range(config) for name, each in stage.items()} for stage in seen]


def collect_ranges(
    stages: Sequence[onnx.ModelProto], pixels: Array, config: CalibrationConfig, progress: Progress = SILENT
) -> list[dict[str, ActivationRange]]:
    """`ranges_of` what `collect_extremes` sees."""
    return ranges_of(collect_extremes(stages, pixels, config, progress), config)


def outlier_channels(largest: Array, config: CalibrationConfig) -> tuple[int, ...]:
    """Channels without which the range is `outlier_ratio` times as small: as few as do that, or none.

    Args:
        largest: absolute value of each channel, (C,).
    """
    order = np.argsort(-largest, kind="stable")
    for count in range(1, min(config.max_outliers, len(order) - 1) + 1):
        if largest[order[count]] * config.outlier_ratio <= largest[order[0]]:
            return tuple(sorted(int(channel) for channel in order[:count]))
    return ()
