"""What the recipe asks of anything that can be exported, in stages or in one piece."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import onnx

from app.types import Array, FloatArray
from exporters.config import CalibrationConfig, QuantizationConfig
from exporters.progress import Progress
from models.manifest import StageSpec


@dataclass(frozen=True, slots=True)
class Quantized:
    """The INT8 variant."""

    graphs: list[onnx.ModelProto]
    kept_fp32: str  # what is not INT8, for its reader


class Exportable(Protocol):
    """A network that can be written as graphs."""

    def stages(self) -> tuple[StageSpec, ...]:
        """As the manifest has them."""
        ...

    def graphs(self) -> list[onnx.ModelProto]:
        """In fp32, one per stage."""
        ...

    def quantized(
        self, pixels: Array, calibration: CalibrationConfig, quantization: QuantizationConfig, progress: Progress
    ) -> Quantized:
        """In INT8.

        Args:
            pixels: (N, ...), what stage 0 takes; labels are not needed.
        """
        ...

    def answers(self, pixels: Array) -> list[FloatArray]:
        """Logits (N, C) of each exit by other means than these graphs: by PyTorch, or by the graph they were made of."""
        ...
