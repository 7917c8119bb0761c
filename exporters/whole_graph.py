"""Any classifier as one ONNX graph: brought into the form that is served, and measured."""

from __future__ import annotations

import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
import onnx
import onnx.version_converter
import onnxruntime as ort
from onnx import ModelProto, NodeProto, TensorProto, helper, numpy_helper

from app.types import Array, FloatArray
from models.manifest import BATCH, LOGITS, PIXELS, PreprocessSpec

PROVIDERS = ["CPUExecutionProvider"]
LOG_FATAL = 4  # ONNX Runtime writes what it raises to the console too
OWN = "fovea."  # in front of the names of what is added, so that none of them is one of the graph's own
MIN_OPSET, MIN_IR = 13, 4  # QuantizeLinear per channel; initializers that are no inputs
# What may stand between the softmax at the end and the output.
NO_CHANGE = {"Identity", "Reshape", "Flatten", "Squeeze", "Cast", "Dropout"}


class GraphError(ValueError):
    """The graph is not one of an image classifier, or not one that can be batched."""


def simplified(model: ModelProto) -> ModelProto:
    """The same graph as ONNX Runtime's basic optimisations leave it: constants folded, batch norms inside convolutions.

    Raises:
        GraphError: ONNX Runtime cannot load it.
    """
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_BASIC
    options.log_severity_level = LOG_FATAL
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "simplified.onnx"
        options.optimized_model_filepath = str(path)
        try:
            ort.InferenceSession(model.SerializeToString(), options, providers=PROVIDERS)
        except Exception as error:  # ONNX Runtime's errors have no common base
            raise GraphError(f"ONNX Runtime does not take the graph: {error}") from error
        return onnx.load(path)


def classifier(model: ModelProto) -> ModelProto:
    """The graph with a free batch axis, float32 (B, 3, H, W) in, logits (B, C) out, and a softmax at its end taken off.

    Raises:
        GraphError: it has other inputs or outputs than a classifier's.
    """
    graph = _modern(model)
    weights = {tensor.name for tensor in graph.graph.initializer}
    inputs = [value for value in graph.graph.input if value.name not in weights]
    if len(inputs) != 1 or len(graph.graph.output) != 1:
        names = [value.name for value in (*inputs, *graph.graph.output)]
        raise GraphError(f"a classifier has one input and one output, and this has {', '.join(names)}")
    del graph.graph.input[:]
    graph.graph.input.extend(inputs)
    (pixels,), (answer,) = graph.graph.input, graph.graph.output
    shape = [dimension.dim_value for dimension in pixels.type.tensor_type.shape.dim]
    if pixels.type.tensor_type.elem_type != TensorProto.FLOAT or len(shape) != 4 or shape[1] != 3:
        kind = TensorProto.DataType.Name(pixels.type.tensor_type.elem_type)
        raise GraphError(f"{pixels.name} is {kind} {shape}; float32 (batch, 3, height, width) is what is understood")
    if not shape[2] or not shape[3]:
        raise GraphError(f"{pixels.name} leaves height and width open; say them in the graph, the service has one size")
    _take_softmax_off(graph)
    for value in (pixels, answer):
        value.type.tensor_type.shape.dim[0].dim_param = BATCH
    del graph.graph.value_info[:]  # it may say batch sizes
    return graph


def _modern(model: ModelProto) -> ModelProto:
    """A copy of an opset that has all that is added."""
    version = next((opset.version for opset in model.opset_import if opset.domain in {"", "ai.onnx"}), 0)
    graph = ModelProto()
    graph.CopyFrom(model)
    graph.ir_version = max(graph.ir_version, MIN_IR)
    if version >= MIN_OPSET:
        return graph
    try:
        return onnx.version_converter.convert_version(graph, MIN_OPSET)
    except Exception as error:  # the converter's errors have no common base
        raise GraphError(f"its opset is {version}, and it cannot be brought to {MIN_OPSET}: {first_line(error)}") from error


def _take_softmax_off(graph: ModelProto) -> None:
    """Where the last thing that changes values is a softmax, it becomes nothing; another way to probabilities is refused."""
    makers = {name: node for node in graph.graph.node for name in node.output}
    last = makers.get(graph.graph.output[0].name)
    while last is not None and last.op_type in NO_CHANGE:
        last = makers.get(last.input[0])
    if last is None:
        return
    if last.op_type in {"Sigmoid", "HardSigmoid"}:
        raise GraphError("it ends with a sigmoid, a yes or no for each class; one class for a picture is what is served")
    if last.op_type in {"Softmax", "LogSoftmax"}:  # the latter is a softmax's logits as well
        last.op_type = "Identity"
        del last.attribute[:]


def height_and_width(model: ModelProto) -> tuple[int, int]:
    """Of what a `classifier` takes."""
    dimensions = model.graph.input[0].type.tensor_type.shape.dim
    return dimensions[2].dim_value, dimensions[3].dim_value


def stage_of(model: ModelProto, preprocess: PreprocessSpec, num_classes: int) -> ModelProto:
    """A `classifier` as stage: takes `pixels` in the layout of the preprocessing, gives `logits`."""
    graph = ModelProto()
    graph.CopyFrom(model)
    (source,), (answer,) = graph.graph.input, graph.graph.output
    theirs = {PIXELS: f"{OWN}theirs.{PIXELS}", LOGITS: f"{OWN}theirs.{LOGITS}"}
    inner, outer = theirs.get(source.name, source.name), theirs.get(answer.name, answer.name)
    _rename(graph.graph, theirs)
    front: list[NodeProto] = []
    if preprocess.layout == "uint8_nhwc":
        mean, std = (np.array(v, dtype=np.float32).reshape(1, 3, 1, 1) for v in (preprocess.mean, preprocess.std))
        scale, offset = np.float32(preprocess.scale) / std, mean / std
        for name, value in (("scale", scale), ("offset", offset)):
            graph.graph.initializer.append(numpy_helper.from_array(value.astype(np.float32), f"{OWN}{name}"))
        names = [f"{OWN}{step}" for step in ("float", "nchw", "scaled")]
        front = [
            helper.make_node("Cast", [PIXELS], [names[0]], to=TensorProto.FLOAT),
            helper.make_node("Transpose", [names[0]], [names[1]], perm=[0, 3, 1, 2]),
            helper.make_node("Mul", [names[1], f"{OWN}scale"], [names[2]]),
            helper.make_node("Sub", [names[2], f"{OWN}offset"], [inner]),
        ]
    else:
        front = [helper.make_node("Identity", [PIXELS], [inner])]
    nodes = wanted_nodes([*front, *graph.graph.node, helper.make_node("Identity", [outer], [LOGITS])], {LOGITS})
    for index, node in enumerate(nodes):
        node.name = f"{node.op_type}_{index}"  # exporters leave it out, or say the path of a module
    del graph.graph.node[:]
    graph.graph.node.extend(nodes)
    spec = preprocess.pixels()
    kind = TensorProto.UINT8 if preprocess.layout == "uint8_nhwc" else TensorProto.FLOAT
    source.CopyFrom(helper.make_tensor_value_info(PIXELS, kind, spec.shape))
    answer.CopyFrom(helper.make_tensor_value_info(LOGITS, TensorProto.FLOAT, [BATCH, num_classes]))
    graph.producer_name = "fovea"
    onnx.checker.check_model(graph)
    return graph


def _rename(graph: onnx.GraphProto, names: dict[str, str]) -> None:
    """Every tensor of one of these names, in branches too."""
    for node in graph.node:
        for values in (node.input, node.output):
            for index, name in enumerate(values):
                values[index] = names.get(name, name)
        for attribute in node.attribute:
            if attribute.type == onnx.AttributeProto.GRAPH:
                _rename(attribute.g, names)
                for value in attribute.g.output:
                    value.name = names.get(value.name, value.name)
    for tensor in graph.initializer:
        tensor.name = names.get(tensor.name, tensor.name)


def names_used(node: NodeProto) -> Iterator[str]:
    """What a node takes, and what its branches take from outside or from each other."""
    yield from node.input
    for attribute in node.attribute:
        if attribute.type == onnx.AttributeProto.GRAPH:
            yield from (value.name for value in attribute.g.output)
            for inner in attribute.g.node:
                yield from names_used(inner)


def first_line(error: Exception) -> str:
    """Of what an error says, or its kind where it says nothing: libraries go on for pages."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def constants(model: ModelProto) -> dict[str, Array]:
    """Weights by name."""
    return {tensor.name: numpy_helper.to_array(tensor) for tensor in model.graph.initializer}


def run(model: ModelProto, inputs: Mapping[str, Array]) -> dict[str, Array]:
    """Every output, by name.

    Raises:
        GraphError: ONNX Runtime cannot load or run it.
    """
    return next(_runs(model, [inputs]))


def _runs(model: ModelProto, batches: Iterable[Mapping[str, Array]]) -> Iterator[dict[str, Array]]:
    """Of each batch, by one session."""
    options = ort.SessionOptions()
    options.log_severity_level = LOG_FATAL
    try:
        session = ort.InferenceSession(model.SerializeToString(), options, providers=PROVIDERS)
        names = [value.name for value in session.get_outputs()]
        for inputs in batches:
            yield dict(zip(names, session.run(names, {**inputs}), strict=True))
    except Exception as error:  # ONNX Runtime's errors have no common base
        raise GraphError(f"the graph does not run: {error}") from error


def logits_of(model: ModelProto, pixels: FloatArray, *, at_once: bool = True) -> FloatArray:
    """What a `classifier` answers to normalised pixels, all at once or one by one.

    Raises:
        GraphError: it does not run.
    """
    name = model.graph.input[0].name
    parts = [pixels] if at_once else [pixels[index : index + 1] for index in range(len(pixels))]
    return np.concatenate([logits for found in _runs(model, ({name: part} for part in parts)) for logits in found.values()])


def multiply_adds(model: ModelProto, inputs: Mapping[str, Array] | None = None) -> int:
    """Convolutions and products of matrices in fp32, by the shapes they have when it runs.

    Args:
        inputs: what goes in; None: one image, through a `stage_of`.

    Raises:
        GraphError: it does not run.
    """
    weights = constants(model)
    probe = ModelProto()
    probe.CopyFrom(model)
    counted = list(_products(model))
    shapes: list[NodeProto] = []
    for number, node in enumerate(counted):
        for role, name in (("taken", node.input[0]), ("given", node.output[0])):
            if name not in weights:
                shapes.append(helper.make_node("Shape", [name], [f"{role}_{number}"]))
    probe.graph.node.extend(shapes)
    probe.graph.output.extend(helper.make_tensor_value_info(node.output[0], TensorProto.INT64, None) for node in shapes)
    if inputs is None:
        (pixels,) = model.graph.input
        shape = [1, *(dimension.dim_value for dimension in pixels.type.tensor_type.shape.dim[1:])]
        inputs = {pixels.name: np.zeros(shape, dtype=helper.tensor_dtype_to_np_dtype(pixels.type.tensor_type.elem_type))}
    seen = run(probe, inputs)
    total = 0
    for number, node in enumerate(counted):
        given = int(np.prod(seen[f"given_{number}"]))
        if node.op_type == "Conv":
            weight = weights[node.input[1]]
            total += given * weight.size // len(weight)
        elif node.op_type == "Gemm":
            total += given * weights[node.input[1]].size // int(seen[f"given_{number}"][-1])
        else:
            left = weights[node.input[0]].shape if node.input[0] in weights else seen[f"taken_{number}"]
            total += given * int(left[-1])
    return total


def _products(model: ModelProto) -> Iterator[NodeProto]:
    weights = constants(model)
    for node in model.graph.node:
        if node.op_type == "MatMul" or (node.op_type in {"Conv", "Gemm"} and node.input[1] in weights):
            yield node


def wanted_nodes(nodes: Sequence[NodeProto], outputs: set[str]) -> list[NodeProto]:
    """Those whose result is used, in their order."""

    def reached() -> Iterator[NodeProto]:
        needed = set(outputs)
        for node in reversed(nodes):
            if needed & set(node.output):
                needed.update(names_used(node))
                yield node

    return [*reached()][::-1]
