"""Attention as graphs: its products in INT8, the efficient kinds, heads that talk, and class attention."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from exporters import vit_graph
from exporters.calibration import collect_extremes, collect_ranges
from exporters.config import CalibrationConfig
from exporters.golden import golden_images
from exporters.graph_writer import IN_FP32, REACHES
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

SPEC = ZOO["test_vit"].preprocess


@pytest.fixture
def small_attention_in_int8(monkeypatch: pytest.MonkeyPatch) -> None:
    """As that of larger networks is."""
    monkeypatch.setattr(vit_graph, "INT8_FROM_TOKENS", 1)


def plain_vit(**changes: object) -> MultiExitViT:
    """Three blocks, 64 patches and a class token, with attention that is not the same for all."""
    torch.manual_seed(0)
    config = ViTConfig(32, 4, 32, 3, 4, 5, mlp_ratio=2.0, **changes)  # type: ignore[arg-type]
    model = MultiExitViT(config, (1, 3)).eval()
    for module in model.modules():
        if isinstance(module, torch.nn.Linear):
            torch.nn.init.normal_(module.weight, std=0.3)
    return model


@pytest.mark.usefixtures("small_attention_in_int8")
def test_products_of_attention_are_near_fp32_in_int8_and_alike_in_any_batch() -> None:
    """Two a block, but in the last, where only the class token asks; with merged tokens too."""
    for schedule in (None, ReductionSchedule.parse("tome:6", 3, 64)):
        model = plain_vit()
        if schedule is not None:
            apply_schedule(model, schedule)
        pixels = np.resize(golden_images(SPEC), (5, 32, 32, 3))
        ranges = collect_ranges(stage_graphs(model, SPEC, expose=True), pixels, CalibrationConfig(batch_size=2))
        products = [{name: each for name, each in stage.items() if ".attn." in name and ":" in name} for stage in ranges]
        assert [len(stage) for stage in products] == [4, 4]

        int8, fp32 = stage_graphs(model, SPEC, ranges=products), every_exit(stage_graphs(model, SPEC), pixels)

        assert [[node.op_type for node in stage.graph.node].count("MatMulIntegerToFloat") for stage in int8] == [2, 2]
        together = every_exit(int8, pixels)
        for number, (mine, theirs) in enumerate(zip(together, fp32, strict=True)):
            assert 0 < np.abs(mine - theirs).max() < 0.15 * np.ptp(theirs)
            alone = [every_exit(int8, pixels[i : i + 1])[number] for i in range(5)]
            np.testing.assert_array_equal(np.concatenate(alone), mine)


@pytest.mark.usefixtures("small_attention_in_int8")
def test_bytes_for_weights_of_attention_reach_as_far_as_errs_least() -> None:
    """Each reach tried by hand on the first block, with values around their mean."""
    model = plain_vit()
    pixels, block = golden_images(SPEC), model.stages[0].blocks[0]
    with torch.no_grad():
        tokens = block.norm1(model.stages[0].embedding(normalised(pixels, SPEC)))
        q, k, v = block.attn.qkv(tokens).unflatten(-1, (3, 4, 8)).permute(2, 0, 3, 1, 4)
        weights = (q @ k.transpose(-1, -2) / 8**0.5).softmax(-1).numpy()
        values = (v - v.mean(dim=(0, 2), keepdim=True)).numpy()
    by_hand = []
    for reach in REACHES:
        rounded = np.clip(np.rint(weights * 255 / reach), 0, 255) * reach / 255
        by_hand.append(float((((rounded - weights) @ values) ** 2).sum()))

    seen = collect_extremes(stage_graphs(model, SPEC, expose=True), pixels, CalibrationConfig(batch_size=len(pixels)))
    found = seen[0]["blocks.0.attn.mix:weight"]

    np.testing.assert_allclose(found.errors, by_hand, rtol=1e-2)
    assert found.range(CalibrationConfig()).high == REACHES[int(np.argmin(by_hand))]
    assert found.high[0] == pytest.approx(weights.max(), rel=1e-4)


@pytest.mark.usefixtures("small_attention_in_int8")
def test_attention_that_has_other_steps_stays_fp32() -> None:
    """Heads that talk, and products that were replaced."""
    for changes in ({"talking_heads": True}, {"attention": "performer", "attention_rank": 6}):
        ranges = collect_ranges(stage_graphs(plain_vit(**changes), SPEC, expose=True), golden_images(SPEC), CalibrationConfig())
        assert not [name for stage in ranges for name in stage if ":" in name]


def test_attention_of_few_tokens_stays_fp32() -> None:
    """There is little to save."""
    ranges = collect_ranges(stage_graphs(plain_vit(), SPEC, expose=True), golden_images(SPEC), CalibrationConfig())
    assert not [name for stage in ranges for name in stage if ":" in name]


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
        assert len(layers) == 1 + 2 * 6  # the patches; query, key, value, projection and two of the MLP a block
        assert not any(IN_FP32 in layer.node.input[1] for layer in layers)
