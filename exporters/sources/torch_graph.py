"""A PyTorch classifier -> one ONNX graph, by tracing."""

from __future__ import annotations

import logging
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import torch
from torch import Tensor, nn

from app.types import FloatArray
from exporters.sources.base import SourceError
from exporters.whole_graph import GraphError, classifier, first_line, logits_of, simplified

TRACED_BATCH, OTHER_BATCHES = 2, (1, 3)
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
    running it at batch sizes other than the traced one.

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
            warnings.simplefilter("ignore")  # on tracing: what it fears is looked for below
            path = Path(directory) / "traced.onnx"
            torch.onnx.export(
                _Logits(network, forward).eval(),
                (torch.zeros(TRACED_BATCH, 3, *size),),
                path,
                dynamo=False,
                opset_version=OPSET,
                input_names=["x"],
                output_names=["y"],
                dynamic_axes={"x": {0: "B"}, "y": {0: "B"}},
            )
            graph = simplified(classifier(onnx.load(path)))
    except Exception as error:  # torch's, the network's own and ONNX's errors have no common base
        raise SourceError(f"{name} could not be written as ONNX: {first_line(error)}") from error
    for batch in OTHER_BATCHES:
        try:
            found = logits_of(graph, np.zeros((batch, 3, *size), np.float32))
        except GraphError as error:
            raise SourceError(f"{name} computes with the batch size it was traced with, {TRACED_BATCH}: {error}") from error
        if len(found) != batch:
            raise SourceError(f"{name} gives {len(found)} answers to {batch} pictures, as traced")
    return graph


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
