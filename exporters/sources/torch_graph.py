"""A PyTorch classifier -> one ONNX graph, by tracing."""

from __future__ import annotations

import logging
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path

import onnx
import torch
from torch import Tensor, nn

from app.types import FloatArray
from exporters.sources.base import SourceError
from exporters.whole_graph import GraphError, classifier, simplified

OPSET = 20  # as exporters.graph_writer: the first with Gelu


class _Logits(nn.Module):
    """Pixels -> logits and nothing else, whatever the network takes and gives."""

    def __init__(self, network: nn.Module, forward: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.network = network  # registered, so that its weights are weights of the graph
        self._forward = forward

    def forward(self, x: Tensor) -> Tensor:
        return self._forward(x)


def traced(network: nn.Module, forward: Callable[[Tensor], Tensor], name: str, size: tuple[int, int]) -> onnx.ModelProto:
    """The graph of a function of pixels (B, 3, H, W), with B free, simplified.

    By torch's tracing exporter (docs/adr/0014). What a trace cannot follow, a branch on a batch size for instance, is found by
    validation, which runs several batch sizes.

    Args:
        network: in evaluation mode.
        forward: gives logits (B, C) by it.
        name: of the network, for the error.
        size: height and width.

    Raises:
        SourceError: the network uses something that has no ONNX.
    """
    try:
        with tempfile.TemporaryDirectory() as directory, warnings.catch_warnings(), _quiet(), torch.no_grad():
            warnings.simplefilter("ignore")  # on tracing, which validation answers
            path = Path(directory) / "traced.onnx"
            torch.onnx.export(
                _Logits(network, forward).eval(),
                (torch.zeros(2, 3, *size),),
                path,
                dynamo=False,
                opset_version=OPSET,
                input_names=["x"],
                output_names=["y"],
                dynamic_axes={"x": {0: "B"}, "y": {0: "B"}},
            )
            return simplified(classifier(onnx.load(path)))
    except (torch.onnx.errors.OnnxExporterError, GraphError, RuntimeError, TypeError) as error:
        first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise SourceError(f"{name} could not be written as ONNX: {first}") from error


def answers(forward: Callable[[Tensor], Tensor]) -> Callable[[FloatArray], FloatArray]:
    """The same function of arrays."""

    @torch.no_grad()
    def answer(pixels: FloatArray) -> FloatArray:
        logits: FloatArray = forward(torch.from_numpy(pixels)).numpy()
        return logits

    return answer


class _quiet:  # noqa: N801 - used as a function
    """torch prints a whole graph where an operator is not known."""

    def __enter__(self) -> None:
        self._before = logging.root.manager.disable
        logging.disable(logging.ERROR)

    def __exit__(self, *_: object) -> None:
        logging.disable(self._before)
