"""Ranges of activations: real images through the fp32 stages, as ONNX Runtime computes them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import onnx
import onnxruntime as ort

from app.types import Array
from exporters.config import CalibrationConfig
from exporters.graph_writer import ERRORS, HIGH, LOW, MEAN, REACHES, ActivationRange
from exporters.progress import SILENT, Progress
from models.manifest import PIXELS


def spread(count: int, wanted: int) -> Array:
    """Indices of up to `wanted` images, evenly spread over all of them: a sorted set has every class in it."""
    return np.linspace(0, count - 1, min(count, wanted)).round().astype(np.int64)


@dataclass(frozen=True, slots=True)
class Extremes:
    """What was seen of a tensor so far: of each channel, (C,), or of all of them, (1,)."""

    low: Array  # the smallest value
    high: Array
    mean: Array | None = None  # where it is wanted
    images: int = 1  # that it is the mean of
    errors: Array | None = None  # sum of squares by which each of `REACHES` is off, (len(REACHES),), where that is wanted

    def joined(self, other: Extremes) -> Extremes:
        """Of both."""
        images, mean, errors = self.images + other.images, None, None
        if self.mean is not None and other.mean is not None:
            mean = (self.images * self.mean + other.images * other.mean) / images
        if self.errors is not None and other.errors is not None:
            errors = self.errors + other.errors
        return Extremes(np.minimum(self.low, other.low), np.maximum(self.high, other.high), mean, images, errors)

    def divided(self, factor: Array) -> Extremes:
        """When each channel is divided by a positive number of its own."""
        mean = None if self.mean is None else self.mean / factor
        return replace(self, low=self.low / factor, high=self.high / factor, mean=mean)

    def moved(self, offset: Array) -> Extremes:
        """When a number of its own is added to each channel."""
        mean = None if self.mean is None else self.mean + offset
        return replace(self, low=self.low + offset, high=self.high + offset, mean=mean)

    def range(self, config: CalibrationConfig) -> ActivationRange:
        """The reach that is off least; or one range for all channels but the outliers."""
        if self.errors is not None:
            return ActivationRange(0.0, REACHES[int(self.errors.argmin())])
        outliers = outlier_channels(np.maximum(-self.low, self.high), config)
        kept = np.ones(self.low.shape, dtype=bool)
        kept[list(outliers)] = False
        return ActivationRange(float(self.low[kept].min()), float(self.high[kept].max()), outliers)

    def all_channels(self) -> Extremes:
        """Of all channels together, where none can be split off."""
        return replace(self, low=self.low.min(keepdims=True), high=self.high.max(keepdims=True))


def collect_extremes(
    stages: Sequence[onnx.ModelProto], pixels: Array, config: CalibrationConfig, progress: Progress = SILENT
) -> list[dict[str, Extremes]]:
    """The smallest and largest input of each linear layer and product and output of each convolution, per stage.

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
        images = len(inputs[PIXELS])
        for index, session in enumerate(sessions):
            names = [node.name for node in session.get_outputs()]
            outputs = dict(zip(names, session.run(names, inputs), strict=True))
            wanted = [node.name for node in sessions[index + 1].get_inputs()] if index + 1 < len(sessions) else []
            inputs = {name: outputs[name] for name in wanted}
            _look(seen[index], outputs, images)
    return seen


def _look(seen: dict[str, Extremes], outputs: Mapping[str, Array], images: int) -> None:
    """Add what a run of one stage gave."""
    for layer in [name.removesuffix(LOW) for name in outputs if name.endswith(LOW)]:
        mean, errors = outputs.get(layer + MEAN), outputs.get(layer + ERRORS)
        now = Extremes(outputs[layer + LOW], outputs[layer + HIGH], mean, images, errors)
        seen[layer] = now if layer not in seen else seen[layer].joined(now)


def ranges_of(seen: Sequence[Mapping[str, Extremes]], config: CalibrationConfig) -> list[dict[str, ActivationRange]]:
    """What quantization needs of it; only a linear layer can split channels off, and its name has no colon."""
    return [
        {name: (each.all_channels() if ":" in name else each).range(config) for name, each in stage.items()} for stage in seen
    ]


def collect_ranges(
    stages: Sequence[onnx.ModelProto], pixels: Array, config: CalibrationConfig, progress: Progress = SILENT
) -> list[dict[str, ActivationRange]]:
    """`ranges_of` what `collect_extremes` sees."""
    return ranges_of(collect_extremes(stages, pixels, config, progress), config)


def outlier_channels(largest: Array, config: CalibrationConfig) -> tuple[int, ...]:
    """Channels without which the range is so many times as small as `outliers` wants it: as few as do that, or none.

    Args:
        largest: absolute value of each channel, (C,).
    """
    order = np.argsort(-largest, kind="stable")
    for most, ratio in config.outliers:
        for count in range(1, min(most, len(order) - 1) + 1):
            if largest[order[count]] * ratio <= largest[order[0]]:
                return tuple(sorted(int(channel) for channel in order[:count]))
    return ()
