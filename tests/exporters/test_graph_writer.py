"""What stays exact inside a layer of INT8."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import onnx
import pytest
from onnx import TensorProto

from app.types import FloatArray
from exporters.graph_writer import ActivationRange, GraphWriter
from exporters.vit_export import with_exact_class_token
from exporters.whole_graph import run
from models.multi_exit import MultiExitViT
from models.vit import ViTConfig

WIDTH, TOKENS = 8, 5
COARSE = ActivationRange(-40.0, 40.0)  # of what goes to 3 or so


def layer(known: ActivationRange | None) -> onnx.ModelProto:
    """A linear layer alone."""
    rng = np.random.default_rng(0)
    graph = GraphWriter({} if known is None else {"fc": known}, expose=False)
    weight, bias = rng.normal(size=(WIDTH, 3)).astype(np.float32), rng.normal(size=3).astype(np.float32)
    given = graph.linear("fc", "x", weight, bias)
    return graph.model([("x", TensorProto.FLOAT, ("batch", TOKENS, WIDTH))], [(given, ("batch", TOKENS, 3))])


def answer(known: ActivationRange | None) -> FloatArray:
    x = np.random.default_rng(1).normal(size=(2, TOKENS, WIDTH)).astype(np.float32)
    (found,) = run(layer(known), {"x": x}).values()
    return found


@pytest.mark.parametrize("count", [1, 2])
def test_tokens_in_front_may_be_exact(count: int) -> None:
    """And the others are what they are without that."""
    fp32, rounded, mixed = answer(None), answer(COARSE), answer(replace(COARSE, exact_tokens=count))

    assert np.abs(rounded[:, :count] - fp32[:, :count]).max() > 0.05
    np.testing.assert_allclose(mixed[:, :count], fp32[:, :count], atol=1e-5)
    np.testing.assert_array_equal(mixed[:, count:], rounded[:, count:])


def test_tokens_in_front_may_be_exact_beside_channels_that_are() -> None:
    """Neither takes the other's place."""
    fp32, mixed = answer(None), answer(replace(COARSE, outliers=(2,), exact_tokens=1))
    np.testing.assert_allclose(mixed[:, :1], fp32[:, :1], atol=1e-5)
    np.testing.assert_array_equal(mixed[:, 1:], answer(replace(COARSE, outliers=(2,)))[:, 1:])


@pytest.mark.parametrize(("pooling", "expected"), [("cls", {0: [0, 1], 1: [0]}), ("mean", None)])
def test_class_tokens_are_exact_where_they_are_among_patches(pooling: str, expected: dict[int, list[int]] | None) -> None:
    """In the last block they are alone already, and a network that takes the mean has none."""
    config = ViTConfig(32, 8, 16, 4, 2, 10, mlp_ratio=2.0, pooling=pooling)  # type: ignore[arg-type]
    ranges = [{f"blocks.{block}.mlp.{part}": COARSE for block in (0, 1) for part in ("fc1", "fc2")} for _ in range(2)]

    found = with_exact_class_token(MultiExitViT(config, (2, 4)), ranges)

    if expected is None:
        assert found is None
        return
    assert found is not None
    for stage, blocks in expected.items():
        exact = {name for name, each in found[stage].items() if each.exact_tokens}
        assert exact == {f"blocks.{block}.mlp.fc2" for block in blocks}
    assert all(each == COARSE for stage in ranges for each in stage.values())
