"""A network of our own as something that can be exported: a graph per stage, channels evened out before INT8."""

from __future__ import annotations

from dataclasses import dataclass, replace

import onnx
import torch

from app.types import Array, FloatArray
from exporters.calibration import collect_extremes, ranges_of
from exporters.config import CalibrationConfig, QuantizationConfig
from exporters.equalization import equalize
from exporters.exportable import Quantized
from exporters.progress import Progress
from exporters.sensitivity import Build, Ranges, select_layers
from exporters.staging import stage_specs, stages_of, token_counts
from exporters.validation import normalised
from exporters.vit_graph import asks_for_prefix_only, stage_graph
from models.manifest import PreprocessSpec, StageSpec
from models.multi_exit import MultiExitViT


@dataclass(frozen=True, slots=True)
class ViTExport:
    """In evaluation mode; its heads fitted, its tokens reduced where that is wanted."""

    model: MultiExitViT
    preprocess: PreprocessSpec

    def stages(self) -> tuple[StageSpec, ...]:
        """As the manifest has them."""
        return stage_specs(self.model, self.preprocess)

    def graphs(self) -> list[onnx.ModelProto]:
        """In fp32, one per stage."""
        return stage_graphs(self.model, self.preprocess)

    def quantized(
        self, pixels: Array, calibration: CalibrationConfig, quantization: QuantizationConfig, progress: Progress
    ) -> Quantized:
        """In INT8: calibrated, evened out, and without the layers that hurt."""
        build, ranges = self.calibrated(pixels, calibration, progress)
        gentler = with_exact_class_token(self.model, ranges)
        selection = select_layers(build, ranges, pixels, quantization, progress, gentler=gentler)
        percent, kept = f"{100 * selection.agreement:.1f} %", selection.kept() or "nothing but the heads"
        progress.step(f"int8 agrees with fp32 on {percent} of the fitting images; in fp32: {kept}")
        return Quantized(build(selection.ranges), kept)

    def calibrated(self, pixels: Array, calibration: CalibrationConfig, progress: Progress) -> tuple[Build, Ranges]:
        """Writes graphs with the layers of given ranges in INT8, channels evened out; and the ranges of all."""
        exposed = stage_graphs(self.model, self.preprocess, expose=True)
        model, extremes = equalize(self.model, collect_extremes(exposed, pixels, calibration, progress))

        def build(chosen: Ranges) -> list[onnx.ModelProto]:
            return stage_graphs(model, self.preprocess, ranges=chosen)

        return build, ranges_of(extremes, calibration)

    @torch.no_grad()
    def answers(self, pixels: Array) -> list[FloatArray]:
        """By PyTorch."""
        return [logits.numpy() for logits in self.model(normalised(pixels, self.preprocess))]


def with_exact_class_token(model: MultiExitViT, ranges: Ranges) -> Ranges | None:
    """The ranges with which class tokens leave every MLP unrounded; None where there are no such tokens among patches.

    A quarter of the squared error that INT8 makes in the answer of an AugReg ViT-Tiny is what these layers round in this one
    token (docs/adr/0005).
    """
    count, config = model.config.num_prefix_tokens, model.config
    if not count:
        return None
    changed = [dict(stage) for stage in ranges]
    for index, (stage, known) in enumerate(zip(stages_of(model), changed, strict=True)):
        for number in range(len(stage.blocks)):
            alone = index == len(changed) - 1 and number == len(stage.blocks) - 1 and asks_for_prefix_only(config)
            name = f"blocks.{number}.mlp.fc2"
            if name in known and not alone:
                known[name] = replace(known[name], exact_tokens=count)
    return changed


def stage_graphs(
    model: MultiExitViT, preprocess: PreprocessSpec, *, ranges: Ranges | None = None, expose: bool = False
) -> list[onnx.ModelProto]:
    """A graph per stage.

    Args:
        ranges: of the layers that become INT8.
        expose: give the extremes that calibration wants.
    """
    graphs, counts = [], token_counts(model)
    for index, stage in enumerate(stages_of(model)):
        graphs.append(
            stage_graph(
                stage,
                index,
                model.config,
                preprocess,
                entering=counts[index],
                leaving=counts[index + 1],
                last=index == len(model.stages) - 1,
                ranges=ranges[index] if ranges else None,
                expose=expose,
            )
        )
    return graphs
