"""Layers that hurt are found and left in fp32; where none hurts, none is."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import onnx
import pytest
import torch

from exporters.calibration import collect_ranges
from exporters.config import CalibrationConfig, QuantizationConfig
from exporters.golden import golden_images
from exporters.graph_writer import ActivationRange
from exporters.sensitivity import Ranges, group_of, groups, last_logits, most_sensitive, select_layers
from exporters.vit_export import stage_graphs
from models.multi_exit import MultiExitViT
from models.zoo import ZOO

SPEC = ZOO["test_vit"].preprocess
CONFIG = QuantizationConfig(target_agreement=1.0, agreement_images=64, sensitivity_images=16)


@pytest.fixture(scope="module")
def pixels() -> np.ndarray:
    """Noise of several kinds."""
    noise = np.random.default_rng(0).integers(0, 256, (60, 4, 4, 3), dtype=np.uint8)
    return np.concatenate([golden_images(SPEC), np.kron(noise, np.ones((1, 8, 8, 1), np.uint8))])


def network() -> MultiExitViT:
    """Random weights, stages of one block and of three, with answers that differ from image to image."""
    torch.manual_seed(0)
    model = MultiExitViT(replace(ZOO["test_vit"].config, depth=4), (1, 4)).eval()
    torch.nn.init.normal_(model.stages[-1].head.fc.weight, std=0.5)
    return model


def ranges_of(model: MultiExitViT, pixels: np.ndarray) -> list[dict[str, ActivationRange]]:
    return collect_ranges(stage_graphs(model, SPEC, expose=True), pixels, CalibrationConfig())


def test_the_layer_that_hurts_is_left_in_fp32(pixels: np.ndarray) -> None:
    """One layer with a range a hundred times too wide: it alone is taken out."""
    model = network()
    ranges = ranges_of(model, pixels)
    bad = ranges[1]["blocks.1.mlp.fc2"]
    ranges[1]["blocks.1.mlp.fc2"] = replace(bad, low=-2000.0, high=2000.0)

    found = select_layers(
        lambda chosen: stage_graphs(model, SPEC, ranges=chosen), ranges, pixels, replace(CONFIG, target_agreement=0.95)
    )

    assert found.kept_fp32 == ("1.blocks.1.mlp.fc2",)
    assert "blocks.1.mlp.fc2" not in found.ranges[1]
    assert sum(map(len, found.ranges)) == sum(map(len, ranges)) - 1
    assert found.agreement >= 0.95


def test_where_int8_agrees_everything_is_int8(pixels: np.ndarray) -> None:
    """And no layer is tried alone."""
    model = network()
    ranges = ranges_of(model, pixels)
    built: list[int] = []

    def build(chosen: Ranges) -> list[onnx.ModelProto]:
        built.append(sum(map(len, chosen)))
        return stage_graphs(model, SPEC, ranges=chosen)

    found = select_layers(build, ranges, pixels, replace(CONFIG, target_agreement=0.8))

    assert found.kept_fp32 == ()
    assert found.ranges == ranges
    assert built == [0, sum(map(len, ranges))]


def test_what_costs_little_is_tried_before_layers_are_left_out(pixels: np.ndarray) -> None:
    """And told; where it is enough, nothing else is tried, and where it is not, it stays."""
    model = network()
    good = ranges_of(model, pixels)
    bad = [dict(stage) for stage in good]
    bad[1]["blocks.1.mlp.fc2"] = replace(bad[1]["blocks.1.mlp.fc2"], low=-2000.0, high=2000.0)
    gentler = [
        {name: replace(each, outliers=(3,)) if "fc1" in name else each for name, each in stage.items()} for stage in good
    ]

    def build(chosen: Ranges) -> list[onnx.ModelProto]:
        return stage_graphs(model, SPEC, ranges=chosen)

    asked = replace(CONFIG, target_agreement=0.95)
    assert select_layers(build, good, pixels, asked, gentler=gentler).ranges == good
    assert select_layers(build, bad, pixels, asked, gentler=gentler).ranges == gentler
    further = select_layers(build, bad, pixels, replace(asked, target_agreement=1.01), gentler=gentler)
    assert further.kept_fp32
    assert all(each.outliers == (3,) for stage in further.ranges for name, each in stage.items() if "fc1" in name)


def test_without_a_share_no_layer_is_tried_alone(pixels: np.ndarray) -> None:
    """What costs little is still taken; three networks are built, however many layers they have."""
    model = network()
    ranges = ranges_of(model, pixels)
    gentler = [{name: replace(each, outliers=(3,)) for name, each in stage.items()} for stage in ranges]
    built: list[Ranges] = []

    def build(chosen: Ranges) -> list[onnx.ModelProto]:
        built.append(chosen)
        return stage_graphs(model, SPEC, ranges=chosen)

    asked = replace(CONFIG, target_agreement=1.01, max_fp32_share=0.0)
    found = select_layers(build, ranges, pixels, asked, gentler=gentler)

    assert found.ranges == gentler
    assert (found.kept_fp32, len(built)) == ((), 3)


def test_there_is_a_limit_to_what_stays_fp32(pixels: np.ndarray) -> None:
    """A target out of reach leaves the most sensitive layers in fp32 and says how far that went."""
    model = network()
    ranges = ranges_of(model, pixels)

    def build(chosen: Ranges) -> list[onnx.ModelProto]:
        return stage_graphs(model, SPEC, ranges=chosen)

    found = select_layers(
        build,
        ranges,
        pixels,
        replace(CONFIG, target_agreement=1.01, max_fp32_share=0.2),
    )

    shares = dict(most_sensitive(build, ranges, pixels, CONFIG))
    kept = sum(shares[int(stage), layer] for stage, _, layer in (name.partition(".") for name in found.kept_fp32))
    assert 0.1 < kept <= 0.2
    assert all(kept + share > 0.2 for (stage, layer), share in shares.items() if f"{stage}.{layer}" not in found.kept_fp32)
    assert found.agreement <= 1


def test_what_hurts_most_for_its_share_is_first(pixels: np.ndarray) -> None:
    """Shares of the multiply-adds, by which larger layers are dearer."""
    model = network()
    ranges = ranges_of(model, pixels)
    few = pixels[: CONFIG.sensitivity_images]

    def build(chosen: Ranges) -> list[onnx.ModelProto]:
        return stage_graphs(model, SPEC, ranges=chosen)

    found = most_sensitive(build, ranges, few, CONFIG)

    reference = last_logits(build([{} for _ in ranges]), few)
    hurts = []
    for (stage, layer), share in found:
        alone = [
            {name: each for name, each in layers.items() if (number, group_of(name)) == (stage, layer)}
            for number, layers in enumerate(ranges)
        ]
        hurts.append(float(((last_logits(build(alone), few) - reference) ** 2).mean()) / share)
    assert hurts == sorted(hurts, reverse=True)
    shares = dict(found)
    ratio = model.config.hidden / model.config.width
    assert shares[0, "blocks.0.mlp.fc2"] == pytest.approx(ratio * shares[0, "blocks.0.attn.proj"])
    assert 0.9 < sum(shares.values()) < 1  # the heads and, with so few tokens, attention are never INT8


def test_a_stem_is_taken_out_as_a_whole() -> None:
    """Its convolutions hand bytes to each other."""
    one = ActivationRange(0, 1)
    assert groups([{"stem.0": one, "stem.1": one, "blocks.0.fc": one}, {"blocks.0.fc": one}]) == [
        (0, "stem"),
        (0, "blocks.0.fc"),
        (1, "blocks.0.fc"),
    ]


def test_logits_are_those_of_the_last_exit_in_the_order_of_the_images(pixels: np.ndarray) -> None:
    """Whatever the batches."""
    model = network()
    with torch.no_grad():
        from exporters.validation import normalised

        expected = model(normalised(pixels, SPEC))[-1].numpy()
    np.testing.assert_allclose(last_logits(stage_graphs(model, SPEC), pixels), expected, atol=1e-4)
