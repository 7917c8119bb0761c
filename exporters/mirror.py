"""A last exit that looks at the mirror image too: the same network once more, and the mean of both answers.

Averaging over mirror images makes a network more accurate and costs every image a second run (Krizhevsky et al., ImageNet
Classification with Deep Convolutional Neural Networks, NeurIPS 2012, section 4.1; of ten crops there, half are mirrored). As a
stage it costs that for those images alone that no exit before was sure of. Nothing is trained, and weights are stored once.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import onnx
from onnx import TensorProto, compose, helper, numpy_helper

from app.types import Array, FloatArray
from exporters.config import CalibrationConfig, QuantizationConfig
from exporters.exportable import Exportable, Quantized
from exporters.progress import Progress
from models.manifest import BATCH, LOGITS, PIXELS, PreprocessSpec, StageSpec, TensorSpec

WIDTH_AXIS = {"uint8_nhwc": 2, "float32_nchw": 3}
KINDS = {"uint8": TensorProto.UINT8, "float32": TensorProto.FLOAT}


def image_name(stage: int) -> str:
    """The pixels, as a stage hands them on."""
    return f"image_{stage}"


def answer_name(stage: int) -> str:
    """The logits that a stage hands on."""
    return f"answer_{stage}"


@dataclass(frozen=True, slots=True)
class Mirrored:
    """Something that can be exported, with that exit behind it."""

    inner: Exportable
    preprocess: PreprocessSpec

    def stages(self) -> tuple[StageSpec, ...]:
        """As the manifest has them."""
        stages = self.inner.stages()
        last, found = len(stages) - 1, []
        for index, stage in enumerate(stages):
            taken = [self._image(index - 1)] if index else []
            given = [self._image(index), *([self._answer(last, stage)] if index == last else [])]
            found.append(StageSpec(inputs=(*stage.inputs, *taken), outputs=(*stage.outputs, *given), gmacs=stage.gmacs))
        mirror = StageSpec(
            inputs=(self._image(last), self._answer(last, stages[last])),
            outputs=(stages[last].logits,),
            gmacs=sum(stage.gmacs for stage in stages),
        )
        return (*found, mirror)

    def graphs(self) -> list[onnx.ModelProto]:
        """In fp32."""
        return with_mirror(self.inner.graphs(), self.preprocess)

    def quantized(
        self, pixels: Array, calibration: CalibrationConfig, quantization: QuantizationConfig, progress: Progress
    ) -> Quantized:
        """In INT8; the network sees the mirror image with the ranges of the image."""
        found = self.inner.quantized(pixels, calibration, quantization, progress)
        return Quantized(with_mirror(found.graphs, self.preprocess), found.kept_fp32)

    def answers(self, pixels: Array) -> list[FloatArray]:
        """By other means: of both images, one after the other."""
        mirrored = np.ascontiguousarray(np.flip(pixels, axis=WIDTH_AXIS[self.preprocess.layout]))
        answers, again = self.inner.answers(pixels), self.inner.answers(mirrored)
        mean: FloatArray = (answers[-1] + again[-1]) * np.float32(0.5)
        return [*answers, mean]

    def _image(self, stage: int) -> TensorSpec:
        return self.preprocess.pixels().model_copy(update={"name": image_name(stage)})

    def _answer(self, stage: int, of: StageSpec) -> TensorSpec:
        return TensorSpec(name=answer_name(stage), dtype="float32", shape=of.logits.shape)


def with_mirror(stages: Sequence[onnx.ModelProto], preprocess: PreprocessSpec) -> list[onnx.ModelProto]:
    """The stages of a network, which hand the pixels on, and one more.

    Args:
        stages: the first takes the pixels, each gives logits and what the next takes.
        preprocess: for the layout of the pixels.
    """
    pixels, last = preprocess.pixels(), len(stages) - 1
    kind = KINDS[pixels.dtype]
    found = []
    for index, stage in enumerate(stages):
        copy = onnx.ModelProto()
        copy.CopyFrom(stage)
        graph = copy.graph
        if index:
            graph.input.append(helper.make_tensor_value_info(image_name(index - 1), kind, pixels.shape))
        graph.node.append(helper.make_node("Identity", [image_name(index - 1) if index else PIXELS], [image_name(index)]))
        graph.output.append(helper.make_tensor_value_info(image_name(index), kind, pixels.shape))
        if index == last:
            graph.node.append(helper.make_node("Identity", [LOGITS], [answer_name(last)]))
            graph.output.append(helper.make_tensor_value_info(answer_name(last), TensorProto.FLOAT, _shape(_logits(graph))))
        found.append(copy)
    return [*found, _mirror(stages, preprocess)]


def _mirror(stages: Sequence[onnx.ModelProto], preprocess: PreprocessSpec) -> onnx.ModelProto:
    """All stages in one, on the mirror image; the mean of its logits and those that were handed on."""
    pixels, last = preprocess.pixels(), len(stages) - 1
    ends = {"starts": [-1], "ends": [np.iinfo(np.int64).min], "axes": [WIDTH_AXIS[preprocess.layout]], "steps": [-1]}
    weights = [numpy_helper.from_array(np.array(value, dtype=np.int64), name) for name, value in ends.items()]
    weights.append(numpy_helper.from_array(np.array(0.5, dtype=np.float32), "half"))
    nodes = [helper.make_node("Slice", [image_name(last), *ends], [f"0/{PIXELS}"])]
    for index, stage in enumerate(stages):
        renamed = compose.add_prefix(stage, f"{index}/").graph
        if index:
            nodes += [
                helper.make_node("Identity", [f"{index - 1}/{entry.name}"], [f"{index}/{entry.name}"])
                for entry in stage.graph.input
            ]
        nodes += renamed.node
        weights += renamed.initializer
    nodes.append(helper.make_node("Add", [answer_name(last), f"{last}/{LOGITS}"], ["sum"]))
    nodes.append(helper.make_node("Mul", ["sum", "half"], [LOGITS]))
    logits = _shape(_logits(stages[last].graph))
    graph = helper.make_graph(
        nodes,
        "mirror",
        [
            helper.make_tensor_value_info(image_name(last), KINDS[pixels.dtype], pixels.shape),
            helper.make_tensor_value_info(answer_name(last), TensorProto.FLOAT, logits),
        ],
        [helper.make_tensor_value_info(LOGITS, TensorProto.FLOAT, logits)],
        weights,
    )
    model = helper.make_model(graph, opset_imports=stages[last].opset_import, ir_version=stages[last].ir_version)
    onnx.checker.check_model(model)
    return model


def _logits(graph: onnx.GraphProto) -> onnx.ValueInfoProto:
    logits: onnx.ValueInfoProto = next(output for output in graph.output if output.name == LOGITS)
    return logits


def _shape(value: onnx.ValueInfoProto) -> tuple[int | str, ...]:
    return tuple(BATCH if axis == 0 else size.dim_value for axis, size in enumerate(value.type.tensor_type.shape.dim))
