"""Tracing: a free batch axis, or a refusal in words."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from exporters.sources.base import SourceError
from exporters.sources.torch_graph import answers, traced
from exporters.whole_graph import logits_of

NETWORK = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 5)).eval()


def test_the_graph_answers_as_the_network_does_at_any_batch_size() -> None:
    """With its weights inside, batch norms folded."""
    graph = traced(NETWORK, NETWORK, "small", (8, 8))
    pixels = np.random.default_rng(0).normal(size=(5, 3, 8, 8)).astype(np.float32)

    for size in (1, 2, 5):
        np.testing.assert_allclose(logits_of(graph, pixels[:size]), answers(NETWORK)(pixels[:size]), atol=1e-5)
    assert "BatchNormalization" not in {node.op_type for node in graph.graph.node}


def test_a_batch_size_inside_the_trace_is_found() -> None:
    """A reshape with a number that was the batch's."""

    def forward(x: torch.Tensor) -> torch.Tensor:
        return NETWORK(x).reshape(int(x.shape[0]), 5).reshape(2, 5)

    with pytest.raises(SourceError, match="fixed computes with the batch size it was traced with, 2"):
        traced(NETWORK, forward, "fixed", (8, 8))


def test_what_has_no_onnx_is_said_in_a_line() -> None:
    """An operator without one, and a network that raises by itself."""

    def unknown(x: torch.Tensor) -> torch.Tensor:
        return NETWORK(torch.special.bessel_j0(x))

    def broken(x: torch.Tensor) -> torch.Tensor:
        raise AssertionError("Input height (8) doesn't match model (16).")

    with pytest.raises(SourceError, match=r"odd could not be written as ONNX: .*bessel"):
        traced(NETWORK, unknown, "odd", (8, 8))
    with pytest.raises(SourceError, match=r"odd could not be written as ONNX: Input height \(8\)"):
        traced(NETWORK, broken, "odd", (8, 8))
