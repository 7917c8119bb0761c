"""A classifier of another kind as something that can be exported: one stage, no exit but its end."""

from __future__ import annotations

from functools import cached_property

import onnx

from app.types import Array, FloatArray
from exporters.calibration import collect_ranges
from exporters.config import CalibrationConfig, QuantizationConfig
from exporters.exportable import Quantized
from exporters.progress import Progress
from exporters.quantization import exposed, layers_of, quantized
from exporters.sensitivity import Ranges, select_layers
from exporters.sources.base import WholeModel
from exporters.validation import ValidationError, normalised
from exporters.whole_graph import multiply_adds, stage_of
from models.manifest import BATCH, LOGITS, StageSpec, TensorSpec


class WholeExport:
    """What a source gave, in the layout that its preprocessing says."""

    def __init__(self, model: WholeModel) -> None:
        self._model = model

    def stages(self) -> tuple[StageSpec, ...]:
        """As the manifest has them."""
        logits = TensorSpec(name=LOGITS, dtype="float32", shape=(BATCH, len(self._model.labels)))
        gmacs = multiply_adds(self._graph) / 1e9
        return (StageSpec(inputs=(self._model.preprocess.pixels(),), outputs=(logits,), gmacs=gmacs),)

    def graphs(self) -> list[onnx.ModelProto]:
        """In fp32."""
        return [self._graph]

    def quantized(
        self, pixels: Array, calibration: CalibrationConfig, quantization: QuantizationConfig, progress: Progress
    ) -> Quantized:
        """In INT8: calibrated, and without the layers that hurt."""
        layers = layers_of(self._graph)
        if not layers:
            raise ValidationError("nothing in this graph can be INT8: no linear layer or convolution of float32; say --no-int8")
        ranges = collect_ranges([exposed(self._graph, layers)], pixels, calibration, progress)

        def build(chosen: Ranges) -> list[onnx.ModelProto]:
            return [quantized(self._graph, layers, chosen[0])]

        selection = select_layers(build, ranges, pixels, quantization, progress)
        count = len(layers)
        kept = f"{selection.kept() or 'nothing'} of {count} linear layers and convolutions, and all that is neither"
        percent = f"{100 * selection.agreement:.1f} %"
        progress.step(f"int8 agrees with fp32 on {percent} of the fitting images; in fp32: {kept}")
        return Quantized(build(selection.ranges), kept)

    def answers(self, pixels: Array) -> list[FloatArray]:
        """By what the source says."""
        return [self._model.answer(normalised(pixels, self._model.preprocess).numpy())]

    @cached_property
    def _graph(self) -> onnx.ModelProto:
        return stage_of(self._model.graph, self._model.preprocess, len(self._model.labels))
