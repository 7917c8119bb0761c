"""Validation fails when it should."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import pytest
import torch

from app.types import Array, StageOutput
from exporters.config import QuantizationConfig
from exporters.golden import golden_images
from exporters.staging import stage_specs
from exporters.validation import (
    AccuracyLoss,
    ShapeMismatch,
    UnknownImages,
    ValueMismatch,
    normalised,
    validate,
    validate_images,
    validate_quantized,
)
from exporters.vit_export import ViTExport
from models.zoo import ZOO, create_model

SPEC = ZOO["test_vit"].preprocess


class TorchBackend:
    """The network itself as a backend, with something done to its logits."""

    def __init__(self, change: float = 0.0, cut: bool = False) -> None:
        self.model = create_model("test_vit").eval()
        self.change, self.cut = change, cut

    def run(self, stage: int, inputs: Mapping[str, Array]) -> StageOutput:
        (value,) = inputs.values()
        x = normalised(value, SPEC) if stage == 0 else torch.from_numpy(value)
        with torch.no_grad():
            logits, tokens, _ = self.model.stages[stage](x)
        logits = logits.numpy() + np.float32(self.change if stage == 1 else 0)
        state = {} if stage == 2 else {f"tokens_{stage}": tokens.numpy()}
        return StageOutput(logits[:, :9] if self.cut else logits, state)


def run(backend: TorchBackend) -> float:
    """Validate against an untouched network."""
    model = create_model("test_vit").eval()
    return validate(backend, stage_specs(model, SPEC), ViTExport(model, SPEC).answers, golden_images(SPEC))  # type: ignore[arg-type]


def test_an_equal_network_passes() -> None:
    """The largest difference is returned."""
    assert run(TorchBackend()) < 1e-5


@pytest.mark.parametrize("change", [0.002, float("nan")])
def test_values_beyond_the_tolerance_are_refused_with_the_stage(change: float) -> None:
    """NaN is beyond any tolerance."""
    with pytest.raises(ValueMismatch, match="stage 1, batch 1"):
        run(TorchBackend(change))


def test_another_shape_is_refused() -> None:
    """One class too few."""
    with pytest.raises(ShapeMismatch, match="logits has shape"):
        run(TorchBackend(cut=True))


def one_hot(classes: list[int]) -> np.ndarray:
    """Logits that say these classes."""
    return np.eye(4, dtype=np.float32)[classes]


def test_int8_within_its_limits_passes() -> None:
    """One of four images differs, none that was right before."""
    labels = np.array([0, 1, 2, 3])
    limits = QuantizationConfig(min_agreement=0.75, max_accuracy_drop=0.0)
    validate_quantized("int8", one_hot([0, 1, 2, 0]), one_hot([0, 1, 2, 1]), labels, limits)


@pytest.mark.parametrize(
    ("after", "limits"),
    [
        ([0, 1, 2, 1], QuantizationConfig(min_agreement=0.76, max_accuracy_drop=1)),
        ([0, 1, 3, 0], QuantizationConfig(min_agreement=0, max_accuracy_drop=0.24)),
    ],
)
def test_int8_that_costs_too_much_is_refused_with_both_figures(after: list[int], limits: QuantizationConfig) -> None:
    """Agreement and accuracy are limits of their own."""
    with pytest.raises(AccuracyLoss, match=r"agrees with fp32 on 75\.0 %.*loses (0|25)\.00 points"):
        validate_quantized("int8", one_hot([0, 1, 2, 0]), one_hot(after), np.array([0, 1, 2, 3]), limits)


@pytest.mark.parametrize(("right", "count"), [(0.1, 1000), (0.02, 100), (0.15, 100)])
def test_images_that_the_network_does_not_know_are_refused(right: float, count: int) -> None:
    """Of ten classes it is right on a tenth by chance, of few images on some more."""
    labels = np.arange(count) % 10
    logits = np.eye(10, dtype=np.float32)[(labels + (np.arange(count) >= right * count)) % 10]
    with pytest.raises(
        UnknownImages, match=rf"right on {100 * right:.1f} % of {count} images to fit on, no better than chance"
    ):
        validate_images(logits, labels)


@pytest.mark.parametrize(("right", "count"), [(0.2, 1000), (0.5, 100), (0.0, 90)])
def test_images_that_it_knows_a_little_are_taken(right: float, count: int) -> None:
    """It need not be good; and of ten images nothing can be said."""
    labels = np.arange(count) % 10
    logits = np.eye(10, dtype=np.float32)[(labels + (np.arange(count) >= right * count)) % 10]
    assert validate_images(logits, labels) == right
