"""What comes as graphs already: a classifier of another kind, in one stage, or the stages of a version that is published."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import onnx

from app.types import Array, FloatArray
from exporters.calibration import collect_ranges
from exporters.config import CalibrationConfig, QuantizationConfig
from exporters.exportable import Quantized
from exporters.progress import Progress
from exporters.quantization import exposed, layers_of, quantized
from exporters.sensitivity import Ranges, every_exit, select_layers
from exporters.sources.base import Published, WholeModel
from exporters.validation import ValidationError, normalised
from exporters.whole_graph import multiply_adds, stage_of
from models.manifest import BATCH, LOGITS, StageSpec, TensorSpec


@dataclass(frozen=True, slots=True)
class GraphsExport:
    """Graphs in fp32, and what they are compared with."""

    fp32: Sequence[onnx.ModelProto]
    specs: tuple[StageSpec, ...]
    reference: Callable[[Array], list[FloatArray]]  # what stage 0 takes -> logits of each exit

    def stages(self) -> tuple[StageSpec, ...]:
        """As the manifest has them."""
        return self.specs

    def graphs(self) -> list[onnx.ModelProto]:
        """In fp32."""
        return [*self.fp32]

    def quantized(
        self, pixels: Array, calibration: CalibrationConfig, quantization: QuantizationConfig, progress: Progress
    ) -> Quantized:
        """In INT8: calibrated, and without the layers that hurt."""
        layers = [layers_of(graph) for graph in self.fp32]
        count = sum(map(len, layers))
        if not count:
            raise ValidationError("nothing in this graph can be INT8: no linear layer or convolution of float32")
        watched = [exposed(graph, each) for graph, each in zip(self.fp32, layers, strict=True)]
        ranges = collect_ranges(watched, pixels, calibration, progress)

        def build(chosen: Ranges) -> list[onnx.ModelProto]:
            return [quantized(*each) for each in zip(self.fp32, layers, chosen, strict=True)]

        selection = select_layers(build, ranges, pixels, quantization, progress)
        kept = f"{selection.kept() or 'nothing'} of {count} linear layers and convolutions, and all that is neither"
        percent = f"{100 * selection.agreement:.1f} %"
        progress.step(f"int8 agrees with fp32 on {percent} of the fitting images; in fp32: {kept}")
        return Quantized(build(selection.ranges), kept)

    def answers(self, pixels: Array) -> list[FloatArray]:
        """By what the source says."""
        return self.reference(pixels)


def export_of(model: WholeModel | Published) -> GraphsExport:
    """In the layout that its preprocessing says."""
    if isinstance(model, Published):
        return GraphsExport(model.graphs, model.stages, lambda pixels: every_exit(model.graphs, pixels))
    graph = stage_of(model.graph, model.preprocess, len(model.labels))
    logits = TensorSpec(name=LOGITS, dtype="float32", shape=(BATCH, len(model.labels)))
    stage = StageSpec(inputs=(model.preprocess.pixels(),), outputs=(logits,), gmacs=multiply_adds(graph) / 1e9)
    return GraphsExport([graph], (stage,), lambda pixels: [model.answer(normalised(pixels, model.preprocess).numpy())])
