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
    ranges: list[dict[str, ActivationRange]] = [{} for _ in stages]
    for start in range(0, len(pixels), config.batch_size):
        inputs = {PIXELS: pixels[start : start + config.batch_size]}
        for index, session in enumerate(sessions):
            names = [node.name for node in session.get_outputs()]
            outputs = dict(zip(names, session.run(names, inputs), strict=True))
            wanted = {node.name for node in sessions[index + 1].get_inputs()} if index + 1 < len(sessions) else set()
            inputs = {name: outputs[name] for name in wanted}
            for name in set(names) - wanted - {LOGITS}:
                ranges[index][name] = _widen(ranges[index].get(name), outputs[name])
    return ranges


def _widen(known: ActivationRange | None, values: Array) -> ActivationRange:
    low, high = float(values.min()), float(values.max())
    return ActivationRange(low, high) if known is None else ActivationRange(min(low, known.low), max(high, known.high))
