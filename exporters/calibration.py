"""Ranges of activations: real images through the fp32 stages, as ONNX Runtime computes them."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx
import onnxruntime as ort

from app.types import Array
from exporters.config import CalibrationConfig
from exporters.graph_writer import ActivationRange
from models.manifest import LOGITS, PIXELS


def spread(count: int, wanted: int) -> Array:
    """Indices of up to `wanted` images, evenly spread over all of them: a sorted set has every class in it."""
    return np.linspace(0, count - 1, min(count, wanted)).round().astype(np.int64)


def collect_ranges(
    stages: Sequence[onnx.ModelProto], pixels: Array, config: CalibrationConfig
) -> list[dict[str, ActivationRange]]:
    """The smallest and largest input of each linear layer and output of each convolution, per stage.

    Min-max, not percentiles: percentiles were worse on real Vision Transformers (docs/adr/0005). Every image goes
    through every stage, a superset of the survivors that reach the later ones in use.

    Args:
        stages: fp32 graphs with `expose=True`.
        pixels: (N, ...), what stage 0 takes.
    """
    pixels = pixels[spread(len(pixels), config.num_images)]
    sessions = [ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"]) for model in stages]
    seen: list[dict[str, _Seen]] = [{} for _ in stages]
    for start in range(0, len(pixels), config.batch_size):
        inputs = {PIXELS: pixels[start : start + config.batch_size]}
        for index, session in enumerate(sessions):
            names = [node.name for node in session.get_outputs()]
            outputs = dict(zip(names, session.run(names, inputs), strict=True))
            wanted = {node.name for node in sessions[index + 1].get_inputs()} if index + 1 < len(sessions) else set()
            inputs = {name: outputs[name] for name in wanted}
            for name in set(names) - wanted - {LOGITS}:
                seen[index].setdefault(name, _Seen()).add(outputs[name])
    return [{name: each.range(config) for name, each in stage.items()} for stage in seen]


class _Seen:
    """The extremes of a tensor so far: of each channel of tokens (B, N, C), else of all."""

    def __init__(self) -> None:
        self._low: Array = np.array(np.inf)
        self._high: Array = np.array(-np.inf)

    def add(self, values: Array) -> None:
        axes = (0, 1) if values.ndim == 3 else None
        self._low = np.minimum(self._low, values.min(axis=axes))
        self._high = np.maximum(self._high, values.max(axis=axes))

    def range(self, config: CalibrationConfig) -> ActivationRange:
        outliers = outlier_channels(np.maximum(-self._low, self._high), config) if self._low.ndim else ()
        kept = np.ones(self._low.shape, dtype=bool)
        if outliers:
            kept[list(outliers)] = False
        return ActivationRange(float(self._low[kept].min()), float(self._high[kept].max()), outliers)


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
