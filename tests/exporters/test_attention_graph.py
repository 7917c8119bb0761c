"""Attention other than the plain kind, as graphs: the efficient ones, heads that talk, and class attention."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from exporters.calibration import collect_ranges
from exporters.config import CalibrationConfig
from exporters.golden import golden_images
from exporters.graph_writer import IN_FP32
from exporters.quantization import layers_of
from exporters.reduction_schedule import ReductionSchedule, ScheduleError, apply_schedule
from exporters.sensitivity import every_exit
from exporters.staging import stage_specs
from exporters.validation import normalised
from exporters.vit_export import stage_graphs
from exporters.whole_graph import multiply_adds
from models.efficient_attention import GATHERS
from models.multi_exit import MultiExitViT
from models.vit import Head, ViTConfig
from models.zoo import ZOO


@pytest.mark.parametrize("pooling", ["cls", "mean"])
@pytest.mark.parametrize("kind", sorted(GATHERS))
def test_efficient_attention_equals_pytorch_and_costs_what_is_told(kind: str, pooling: str) -> None:
    """At several batch sizes, in fp32, and near it in INT8; multiply-adds are those of the graph."""
    torch.manual_seed(0)
    config = ViTConfig(32, 4, 32, 3, 4, 5, mlp_ratio=2.0, pooling=pooling, attention=kind, attention_rank=6)  # type: ignore[arg-type]
    model, spec = MultiExitViT(config, (1, 3)).eval(), ZOO["test_vit"].preprocess
    for module in model.modules():
        if isinstance(module, torch.nn.Linear):
            torch.nn.init.normal_(module.weight, std=0.2)
    pixels = np.resize(golden_images(spec), (5, 32, 32, 3))
    with torch.no_grad():
        expected = [logits.numpy() for logits in model(normalised(pixels, spec))]

    stages = stage_graphs(model, spec)

    for size in (1, 5):
        for mine, theirs in zip(every_exit(stages, pixels[:size]), expected, strict=True):
            np.testing.assert_allclose(mine, theirs[:size], atol=1e-3)
    told = [stage.gmacs for stage in stage_specs(model, spec)]
    whole = MultiExitViT(config, (3,)).eval()  # so that its last block answers what the head sees
    assert told[0] == pytest.approx(multiply_adds(stages[0]) / 1e9, rel=1e-6)
    assert stage_specs(whole, spec)[0].gmacs == pytest.approx(multiply_adds(stage_graphs(whole, spec)[0]) / 1e9, rel=1e-6)
    ranges = collect_ranges(stage_graphs(model, spec, expose=True), pixels, CalibrationConfig())
    int8 = every_exit(stage_graphs(model, spec, ranges=ranges), pixels)[-1]
    assert 0 < np.abs(int8 - expected[-1]).max() < 0.3 * np.ptp(expected[-1])


def test_token_reduction_needs_softmax_attention() -> None:
    """There are no weights of all pairs to score by."""
    config = ViTConfig(32, 4, 32, 3, 4, 5, mlp_ratio=2.0, attention="performer", attention_rank=6)
    with pytest.raises(ScheduleError, match="the network has performer"):
        apply_schedule(MultiExitViT(config, (3,)), ReductionSchedule.parse("tome:3", 3, 64))


@pytest.mark.parametrize("boundaries", [(3,), (1, 3)])
def test_class_attention_and_talking_heads_equal_pytorch(boundaries: tuple[int, ...]) -> None:
    """CaiT: fp32, INT8 near it, with fewer tokens, and multiply-adds as in the graph."""
    torch.manual_seed(0)
    config = ViTConfig(32, 4, 32, 3, 4, 5, mlp_ratio=2.0, pooling="class_attention", class_depth=2, talking_heads=True)
    model, spec = MultiExitViT(config, boundaries).eval(), ZOO["test_vit"].preprocess
    for module in model.modules():
        if isinstance(module, torch.nn.Linear):
            torch.nn.init.normal_(module.weight, std=0.2)
            torch.nn.init.normal_(module.bias, std=0.1)
    for stage in model.stages:
        torch.nn.init.normal_(stage.head.cls_token)
    colours = np.random.default_rng(0).integers(0, 256, (5, 8, 8, 3), dtype=np.uint8)
    pixels = np.kron(colours, np.ones((1, 4, 4, 1), np.uint8))  # a patch is a colour: no two are nearly as alike as another two
    told = stage_specs(model, spec)[0].gmacs
    assert told == pytest.approx(multiply_adds(stage_graphs(model, spec)[0]) / 1e9, rel=1e-6)
    for reduction in (None, "token_pooling:9", "tome:9"):
        if reduction:
            apply_schedule(model, ReductionSchedule.parse(reduction, 3, 64))
        with torch.no_grad():
            expected = [logits.numpy() for logits in model(normalised(pixels, spec))]
        for size in (1, 5):
            for mine, theirs in zip(every_exit(stage_graphs(model, spec), pixels[:size]), expected, strict=True):
                # Where two tokens are as good as each other another order of summation may choose the other.
                difference = np.abs(mine - theirs[:size]).max(axis=1)
                assert np.median(difference) < 1e-3
                assert difference.max() < (0.02 if reduction else 1e-3)
    ranges = collect_ranges(stage_graphs(model, spec, expose=True), pixels, CalibrationConfig())
    int8 = every_exit(stage_graphs(model, spec, ranges=ranges), pixels)[-1]
    assert 0 < np.abs(int8 - expected[-1]).max() < 0.3 * np.ptp(expected[-1])


def test_the_class_token_sees_merged_patches_as_all_that_they_stand_for() -> None:
    """Two patches that are alike, or one of size two: class attention gives the same answer."""
    torch.manual_seed(0)
    config = ViTConfig(32, 16, 32, 1, 4, 5, mlp_ratio=2.0, pooling="class_attention", class_depth=2)
    head = Head(config).eval()
    torch.nn.init.normal_(head.cls_token)
    torch.nn.init.normal_(head.fc.weight)
    patches = torch.randn(2, 3, 32)
    twice = torch.cat([patches, patches[:, 1:2]], dim=1)
    sizes = torch.tensor([1.0, 2.0, 1.0]).view(1, 3, 1).expand(2, 3, 1)

    with torch.no_grad():
        torch.testing.assert_close(head(patches, sizes), head(twice), atol=1e-5, rtol=1e-5)
        assert (head(patches) - head(twice)).abs().max() > 1e-3


def test_heads_that_talk_stay_fp32_in_a_published_version_too() -> None:
    """What works inside attention is marked, so that quantizing the graph of a stage leaves it alone."""
    for more in (
        {"talking_heads": True},
        {"attention": "linformer", "attention_rank": 6},
        {"attention": "performer", "attention_rank": 6},
    ):
        config = ViTConfig(32, 4, 32, 2, 4, 5, mlp_ratio=2.0, **more)  # type: ignore[arg-type]
        (graph,) = stage_graphs(MultiExitViT(config, (2,)).eval(), ZOO["test_vit"].preprocess)
        for index, node in enumerate(graph.graph.node):
            node.name = f"{node.op_type}_{index}"
        layers = layers_of(graph)
        class_token_asks_alone = more.get("attention") != "nystromformer"
        assert len(layers) == 1 + 2 * 4 + class_token_asks_alone  # the patches, and four a block
        assert not any(IN_FP32 in layer.node.input[1] for layer in layers)
