"""The export of a tiny network, which tests change in one place each."""

from __future__ import annotations

from pathlib import Path

from app.runtime.cpu import has_exact_int8
from exporters.config import ExportConfig, QuantizationConfig
from exporters.sources.zoo import ZooSource


def make_config(inputs: Path, repository: Path, version: int = 1) -> ExportConfig:
    """An export of the tiny network."""
    images = inputs / "images"
    lenient = QuantizationConfig(min_agreement=0, max_accuracy_drop=1)  # nothing can be asked of random weights
    return ExportConfig(
        "test_vit",
        ZooSource("test_vit", inputs / "weights.safetensors"),
        images,
        images,
        repository,
        version,
        better_than_chance=False,
        int8=has_exact_int8(),
        quantization=lenient,
    )
