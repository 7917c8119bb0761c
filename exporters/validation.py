"""ONNX against PyTorch: the same names, shapes and values, at several batch sizes. A kind of error per kind of failure."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch

from app.runtime.backend import Backend
from app.types import Array, FloatArray
from exporters.config import QuantizationConfig
from models.manifest import LOGITS, PIXELS, PreprocessSpec, StageSpec

CLEARLY = 2.0  # standard deviations above chance
FEWEST_IMAGES = 100  # of which that can be said


class ValidationError(Exception):
    """The exported model is not the one that was given."""


class ShapeMismatch(ValidationError):
    """An output has another shape than the manifest says."""


class ValueMismatch(ValidationError):
    """An output differs from the network's own by more than the tolerance."""


class UnknownImages(ValidationError):
    """The images to fit on are not such as the network knows, or their classes are others."""


class AccuracyLoss(ValidationError):
    """Quantization costs more than it may."""


def validate(
    backend: Backend,
    stages: Sequence[StageSpec],
    answers: Callable[[Array], Sequence[FloatArray]],
    pixels: Array,
    *,
    batch_sizes: Sequence[int] = (1, 2, 8),
    atol: float = 1e-3,
) -> float:
    """Run the whole chain both ways; the largest absolute difference of a logit.

    Args:
        answers: logits (B, C) of each exit, by other means than the graphs: PyTorch, or a file as it came.
        pixels: (N, ...), what stage 0 takes.

    Raises:
        ShapeMismatch, ValueMismatch: with the stage and the numbers.
    """
    worst = 0.0
    for batch_size in batch_sizes:
        batch = np.resize(pixels, (batch_size, *pixels.shape[1:]))
        expected = answers(batch)
        inputs: dict[str, Array] = {PIXELS: batch}
        for index, stage in enumerate(stages):
            output = backend.run(index, inputs)
            arrays = {LOGITS: output.logits, **output.state}
            for tensor in stage.outputs:
                shape = (batch_size, *tensor.shape[1:])
                if arrays[tensor.name].shape != shape:
                    raise ShapeMismatch(f"stage {index}: {tensor.name} has shape {arrays[tensor.name].shape}, not {shape}")
            difference = float(np.abs(output.logits - expected[index]).max())
            if not difference <= atol:
                raise ValueMismatch(
                    f"stage {index}, batch {batch_size}: logits differ from the network's own by {difference:.3g}, "
                    f"allowed {atol:.3g}"
                )
            worst = max(worst, difference)
            inputs = dict(output.state)
    return worst


def validate_quantized(
    name: str, reference: FloatArray, quantized: FloatArray, labels: Array, config: QuantizationConfig
) -> None:
    """Hold a variant of less precision to what it may cost.

    Args:
        name: of the variant.
        reference, quantized: logits (N, C) of the last exit.
        labels: int64 (N,).

    Raises:
        AccuracyLoss: with the numbers.
    """
    before, after = reference.argmax(axis=1), quantized.argmax(axis=1)
    agreement = float((before == after).mean())
    drop = float((before == labels).mean() - (after == labels).mean())
    if agreement < config.min_agreement or drop > config.max_accuracy_drop:
        raise AccuracyLoss(
            f"{name} agrees with fp32 on {100 * agreement:.1f} % of {len(labels)} images (at least "
            f"{100 * config.min_agreement:.1f} % is asked for) and loses {100 * drop:.2f} points of accuracy (at most "
            f"{100 * config.max_accuracy_drop:.2f}): publish without it (--no-int8, --no-fp16), or find the layer that hurts"
        )


def validate_images(logits: FloatArray, labels: Array) -> float:
    """The share of the images that are classified rightly; they must be such as the network knows.

    Args:
        logits: (N, C) of the last exit in fp32; labels: int64 (N,).

    Raises:
        UnknownImages: it is not clearly better than chance.
    """
    count, classes = logits.shape
    right = float((logits.argmax(axis=1) == labels).mean())
    chance = 1 / classes
    clearly = chance + CLEARLY * float(np.sqrt(chance * (1 - chance) / count))
    if count >= FEWEST_IMAGES and right <= clearly:
        raise UnknownImages(
            f"the network is right on {100 * right:.1f} % of {count} images to fit on, no better than chance: are they of its "
            "classes, and are classes and folders in the same order (--labels, --folders)?"
        )
    return right


def normalised(pixels: Array, preprocess: PreprocessSpec) -> torch.Tensor:
    """What the network itself takes: float32 (B, 3, H, W), from either layout."""
    x = torch.from_numpy(np.ascontiguousarray(pixels))
    if preprocess.layout == "float32_nchw":
        return x
    x = x.permute(0, 3, 1, 2).float() * preprocess.scale
    return (x - torch.tensor(preprocess.mean).view(1, 3, 1, 1)) / torch.tensor(preprocess.std).view(1, 3, 1, 1)
