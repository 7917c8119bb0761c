"""Stages as ONNX graphs: the same numbers as PyTorch, a free batch axis, and INT8 that any batch leaves alone."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch

from exporters.calibration import collect_ranges, outlier_channels, spread
from exporters.config import CalibrationConfig
from exporters.golden import golden_images
from exporters.graph_writer import ActivationRange
from exporters.reduction_schedule import ReductionSchedule, apply_schedule
from exporters.sensitivity import every_exit
from exporters.staging import stage_specs
from exporters.stem import PATCH_EMBED, folded_patches
from exporters.validation import normalised
from exporters.vit_export import stage_graphs
from models.manifest import PIXELS
from models.multi_exit import MultiExitViT
from models.token_reduction import METHODS, TokenReduction
from models.vit import ConvLayer
from models.zoo import ZOO, create_model
from tests.images import plain_patches


def trained(name: str) -> MultiExitViT:
    """A network whose batch norms have seen something, as after training."""
    model = create_model(name)
    with torch.no_grad():
        for _ in range(3):
            model(torch.randn(16, 3, 32, 32) * 1.5 + 0.3)
    return model.eval()


@pytest.fixture(params=["test_vit", "vit_cifar10"], scope="module")
def model(request: pytest.FixtureRequest) -> MultiExitViT:
    """Both forms: patches and class token, convolutional stem and mean."""
    torch.manual_seed(0)
    return trained(request.param)


@pytest.mark.parametrize("layout", ["uint8_nhwc", "float32_nchw"])
@pytest.mark.parametrize("batch_size", [1, 2, 7])
def test_fp32_equals_pytorch(model: MultiExitViT, layout: str, batch_size: int) -> None:
    """Every exit's logits, at any batch size, with normalisation in the graph or before it."""
    spec = ZOO["test_vit"].preprocess.model_copy(update={"layout": layout})
    pixels = np.resize(golden_images(spec), (batch_size, *golden_images(spec).shape[1:]))
    with torch.no_grad():
        expected = model(normalised(pixels, spec))

    for mine, theirs in zip(every_exit(stage_graphs(model, spec), pixels), expected, strict=True):
        # 1e-4: float32 sums in another order over six blocks
        np.testing.assert_allclose(mine, theirs.numpy(), atol=1e-4)


def test_the_graph_has_the_interface_that_the_manifest_says(model: MultiExitViT) -> None:
    """Names and shapes of `stage_specs` are those of the files; batch is the only free axis."""
    spec = ZOO["test_vit"].preprocess
    for stage, graph in zip(stage_specs(model, spec), stage_graphs(model, spec), strict=True):
        for wanted, found in ((stage.inputs, graph.graph.input), (stage.outputs, graph.graph.output)):
            shapes = {v.name: tuple(d.dim_param or d.dim_value for d in v.type.tensor_type.shape.dim) for v in found}
            assert shapes == {tensor.name: tensor.shape for tensor in wanted}


def test_int8_is_near_fp32_and_smaller(model: MultiExitViT) -> None:
    """Every linear layer of every block is quantized; logits stay close."""
    spec = ZOO["test_vit"].preprocess
    pixels = golden_images(spec)
    ranges = collect_ranges(stage_graphs(model, spec, expose=True), pixels, CalibrationConfig())
    int8, fp32 = stage_graphs(model, spec, ranges=ranges), stage_graphs(model, spec)

    kinds = [node.op_type for stage in int8 for node in stage.graph.node]
    patches = not model.config.stem  # are a product too
    # Query, key and value are a product each, and share their bytes unless the class token asks alone.
    assert kinds.count("MatMulIntegerToFloat") == 6 * model.config.depth + patches
    of_the_class_token = model.config.num_prefix_tokens > 0
    assert kinds.count("QuantizeLinear") == 4 * model.config.depth + of_the_class_token
    assert sum(stage.ByteSize() for stage in int8) < 0.6 * sum(stage.ByteSize() for stage in fp32)
    for mine, theirs in zip(every_exit(int8, pixels), every_exit(fp32, pixels), strict=True):
        assert 0 < np.abs(mine - theirs).max() < 0.15 * np.ptp(theirs)


def test_ranges_are_the_extremes_of_each_layers_input(tmp_path: Path) -> None:
    """The first layer's input is the first norm's output: computed by hand with PyTorch."""
    torch.manual_seed(0)
    model, spec = trained("test_vit"), ZOO["test_vit"].preprocess
    pixels = golden_images(spec)
    ranges = collect_ranges(stage_graphs(model, spec, expose=True), pixels, CalibrationConfig(batch_size=3))

    stage = model.stages[0]
    with torch.no_grad():
        normed = stage.blocks[0].norm1(stage.embedding(normalised(pixels, spec)))

    found = ranges[0]["blocks.0.attn.qkv"]
    assert (found.low, found.high) == pytest.approx((normed.min().item(), normed.max().item()), abs=1e-4)
    assert [len(stage_ranges) for stage_ranges in ranges] == [9, 8, 9]  # the first has the patches, the last a query apart


def test_int8_patches_are_the_bytes_times_rounded_weights() -> None:
    """The error is at most half a step of a weight for all that a pixel differs from the middle: pixels are not rounded."""
    torch.manual_seed(0)
    model = trained("test_vit")
    spec = ZOO["test_vit"].preprocess.model_copy(update={"mean": (0.49, 0.48, 0.45), "std": (0.25, 0.24, 0.26)})
    pixels = golden_images(spec)
    projection = model.stages[0].embedding.patch_embed
    matrix, bias, middle = folded_patches(projection, spec)
    rows = pixels.reshape(-1, 4, 8, 4, 24).transpose(0, 1, 3, 2, 4).reshape(len(pixels), 16, -1).astype(np.float64) - middle
    with torch.no_grad():
        expected = projection(normalised(pixels, spec)).numpy()
    np.testing.assert_allclose(rows @ matrix + bias, expected, atol=1e-4)

    graph = stage_graphs(model, spec, ranges=[{PATCH_EMBED: ActivationRange(0, 1)}, {}, {}])[0]
    product = next(node for node in graph.graph.node if node.op_type == "MatMulIntegerToFloat").output[0]
    graph.graph.output.append(onnx.helper.make_tensor_value_info(product, onnx.TensorProto.FLOAT, None))
    found = ort.InferenceSession(graph.SerializeToString()).run([product], {PIXELS: pixels})[0]

    half_a_step = np.abs(matrix).max(axis=0) / 127 / 2
    assert (np.abs(found - expected) <= np.abs(rows).sum(axis=-1, keepdims=True) * half_a_step + 1e-4).all()
    assert "Conv" not in {node.op_type for node in graph.graph.node}
    elsewhere = spec.model_copy(update={"layout": "float32_nchw"})  # has no bytes to take
    ranges = collect_ranges(stage_graphs(model, elsewhere, expose=True), golden_images(elsewhere), CalibrationConfig())
    assert PATCH_EMBED not in ranges[0]


def test_zero_is_exact_in_every_quantization() -> None:
    """Also where all values are of one sign, or there is only one value."""
    for low, high in ((-3.0, 5.0), (0.5, 2.0), (-4.0, -1.0), (0.0, 0.0)):
        scale, zero_point = ActivationRange(low, high).scale_and_zero_point()
        assert scale > 0
        assert 0 <= zero_point <= 255
        steps = np.array([min(low, 0), max(high, 0)]) / scale + zero_point
        assert (np.round(steps) >= 0).all()
        assert (np.round(steps) <= 255).all()


def test_calibration_images_are_spread_over_all_classes() -> None:
    """A sorted folder's first images would all be of one class."""
    assert spread(100, 5).tolist() == [0, 25, 50, 74, 99]
    assert spread(3, 10).tolist() == [0, 1, 2]


@pytest.mark.parametrize("case", ["bytes", "unequal means", "normalised outside"])
def test_an_int8_stem_is_near_fp32_however_the_pixels_come(case: str) -> None:
    """Pixels are convolved as bytes where one byte is zero in every channel; else the first convolution stays fp32."""
    torch.manual_seed(0)
    model = trained("vit_cifar10")
    spec = ZOO["vit_cifar10"].preprocess
    if case == "unequal means":
        spec = spec.model_copy(update={"mean": (0.49, 0.48, 0.45), "std": (0.25, 0.24, 0.26)})
    elif case == "bytes":
        spec = spec.model_copy(update={"std": (0.25, 0.24, 0.26)})  # only the mean matters
    else:
        spec = spec.model_copy(update={"layout": "float32_nchw"})
    pixels = golden_images(spec)
    ranges = collect_ranges(stage_graphs(model, spec, expose=True), pixels, CalibrationConfig())
    stem_only = [{name: r for name, r in stage.items() if name.startswith("stem.")} for stage in ranges]
    int8, fp32 = stage_graphs(model, spec, ranges=stem_only), stage_graphs(model, spec)

    kinds = [node.op_type for node in int8[0].graph.node]
    depth = len(ZOO["vit_cifar10"].config.stem)
    assert (kinds.count("QLinearConv"), kinds.count("Conv")) == ((depth, 0) if case == "bytes" else (depth - 1, 1))
    assert "Relu" not in kinds or case != "bytes"
    for mine, theirs in zip(every_exit(int8, pixels), every_exit(fp32, pixels), strict=True):
        assert 0 < np.abs(mine - theirs).max() < 0.15 * np.ptp(theirs)


def test_an_int8_stem_pads_with_what_is_zero_to_the_network() -> None:
    """An image of the mean colour is zero everywhere, so its borders look like its middle."""
    model = create_model("vit_cifar10").eval()
    with torch.no_grad():
        for norm in (module for module in model.modules() if isinstance(module, torch.nn.BatchNorm2d)):
            norm.bias.fill_(0.25)  # else everything is zero
    spec = ZOO["vit_cifar10"].preprocess
    pixels = np.full((1, 32, 32, 3), 123, np.uint8)
    exposed = stage_graphs(model, spec, expose=True)
    ranges = collect_ranges(exposed, pixels, CalibrationConfig())
    stem_only = [{name: r for name, r in stage.items() if name == "stem.0" or "stem" in name} for stage in ranges]
    first = stage_graphs(model, spec, ranges=stem_only)[0]
    convolution = next(node for node in first.graph.node if node.op_type == "QLinearConv")
    first.graph.output.append(onnx.helper.make_tensor_value_info(convolution.output[0], onnx.TensorProto.UINT8, None))

    features = ort.InferenceSession(first.SerializeToString()).run([convolution.output[0]], {PIXELS: pixels})[0]

    assert [len(np.unique(features[:, channel])) for channel in range(32)] == [1] * 32
    assert features.max() > 0


def test_a_gain_behind_a_window_must_be_positive() -> None:
    """Else the largest of a window would become the smallest, and another graph would be written."""
    model = create_model("vit_cifar10").eval()
    pooled = next(module for module in model.modules() if isinstance(module, ConvLayer) and module.pool > 1)
    torch.nn.init.constant_(pooled.norm.weight[3], -1.0)
    with pytest.raises(ValueError, match="a gain that is not positive"):
        stage_graphs(model, ZOO["vit_cifar10"].preprocess)


REDUCED = {0: 12, 1: 9, 3: 6, 5: 4}  # blocks and how many of 16 patches are left; two within a stage, one at its end


def reduced(name: str, method: str, kept: dict[int, int]) -> MultiExitViT:
    """A network whose blocks reduce tokens; weights larger than at the start, so that tokens differ."""
    torch.manual_seed(1)
    model = trained(name)
    blocks = [block for stage in model.stages for block in stage.blocks]
    for block in blocks:
        torch.nn.init.normal_(block.attn.qkv.weight, std=0.2)
    for number, keep in kept.items():
        blocks[number].reduction = TokenReduction(method, keep, model.config.num_prefix_tokens)
    return model


@pytest.mark.parametrize("batch_size", [1, 2, 7])
@pytest.mark.parametrize("method", sorted(METHODS))
def test_reduced_tokens_equal_pytorch(method: str, batch_size: int) -> None:
    """Across stages, where sizes go along if the method needs them; batch is still the only free axis."""
    model, spec = reduced("test_vit", method, REDUCED), ZOO["test_vit"].preprocess
    pixels = np.resize(golden_images(spec), (batch_size, 32, 32, 3))
    with torch.no_grad():
        expected = model(normalised(pixels, spec))
        plain = reduced("test_vit", method, {})(normalised(pixels, spec))

    found = every_exit(stage_graphs(model, spec), pixels)

    for mine, theirs, unreduced in zip(found, expected, plain, strict=True):
        np.testing.assert_allclose(mine, theirs.numpy(), atol=2e-4)
        assert np.abs(mine - unreduced.numpy()).max() > 1e-2
    for stage, graph in zip(stage_specs(model, spec), stage_graphs(model, spec), strict=True):
        for wanted, given in ((stage.inputs, graph.graph.input), (stage.outputs, graph.graph.output)):
            shapes = {v.name: tuple(d.dim_param or d.dim_value for d in v.type.tensor_type.shape.dim) for v in given}
            assert shapes == {tensor.name: tensor.shape for tensor in wanted}


@pytest.mark.parametrize("batch_size", [1, 2, 7])
@pytest.mark.parametrize("schedule", ["evo_vit:0,7,9,0,7,8", "evo_vit:0,0,0,0,0,9"], ids=["across stages", "behind all"])
def test_slow_and_fast_tokens_equal_pytorch(schedule: str, batch_size: int) -> None:
    """The importance of patches goes along between stages; ranges for INT8 are collected as without."""
    model, spec = reduced("test_vit", "tome", {}), ZOO["test_vit"].preprocess
    plain = reduced("test_vit", "tome", {})
    apply_schedule(model, ReductionSchedule.parse(schedule, 6, 16))
    pixels = np.resize(golden_images(spec), (batch_size, 32, 32, 3))
    with torch.no_grad():
        expected, unreduced = (network(normalised(pixels, spec)) for network in (model, plain))

    graphs, specs = stage_graphs(model, spec), stage_specs(model, spec)
    found = every_exit(graphs, pixels)

    for mine, theirs in zip(found, expected, strict=True):
        np.testing.assert_allclose(mine, theirs.numpy(), atol=2e-4)
    assert np.abs(found[-1] - unreduced[-1].numpy()).max() > 1e-2
    assert sum(stage.gmacs for stage in specs) < sum(stage.gmacs for stage in stage_specs(plain, spec))
    for stage, graph in zip(specs, graphs, strict=True):
        for wanted, given in ((stage.inputs, graph.graph.input), (stage.outputs, graph.graph.output)):
            shapes = {v.name: tuple(d.dim_param or d.dim_value for d in v.type.tensor_type.shape.dim) for v in given}
            assert shapes == {tensor.name: tensor.shape for tensor in wanted}
    ranges = collect_ranges(stage_graphs(model, spec, expose=True), pixels, CalibrationConfig())
    int8 = every_exit(stage_graphs(model, spec, ranges=ranges), pixels)[-1]
    assert 0 < np.abs(int8 - found[-1]).max() < 0.25 * np.ptp(found[-1])


def test_merging_without_a_class_token_equals_pytorch() -> None:
    """As in the embedded model, whose head sees the mean."""
    model, spec = reduced("vit_cifar10", "tome", {0: 50, 2: 31, 5: 20}), ZOO["vit_cifar10"].preprocess
    pixels = plain_patches(3, across=8, side=4)  # no two pairs of patches are nearly as alike
    with torch.no_grad():
        expected = model(normalised(pixels, spec))

    for mine, theirs in zip(every_exit(stage_graphs(model, spec), pixels), expected, strict=True):
        np.testing.assert_allclose(mine, theirs.numpy(), atol=2e-4)


def test_fewer_tokens_cost_less_and_int8_goes_with_them() -> None:
    """Multiply-adds fall; ranges are collected and used as without reduction."""
    model, spec = reduced("test_vit", "tome", REDUCED), ZOO["test_vit"].preprocess
    pixels = golden_images(spec)
    costs = [sum(s.gmacs for s in stage_specs(m, spec)) for m in (model, reduced("test_vit", "tome", {}))]
    ranges = collect_ranges(stage_graphs(model, spec, expose=True), pixels, CalibrationConfig())

    int8, fp32 = (every_exit(stage_graphs(model, spec, ranges=r), pixels) for r in (ranges, None))

    assert costs[0] < 0.75 * costs[1]
    for mine, theirs in zip(int8, fp32, strict=True):
        assert 0 < np.abs(mine - theirs).max() < 0.25 * np.ptp(theirs)


def test_a_channel_that_ranges_far_beyond_the_others_stays_fp32() -> None:
    """With it in the range the others would have a handful of steps left; apart from it they have them all."""
    torch.manual_seed(0)
    model, spec = trained("test_vit"), ZOO["test_vit"].preprocess
    norm = model.stages[1].blocks[0].norm2
    with torch.no_grad():
        norm.weight[5] = 300.0
        model.stages[1].blocks[0].mlp.fc1.weight[:, 5] /= 300.0
    pixels = golden_images(spec)
    exposed = stage_graphs(model, spec, expose=True)
    fp32 = every_exit(stage_graphs(model, spec), pixels)
    errors = {}
    for name, config in (("apart", CalibrationConfig()), ("inside", CalibrationConfig(outliers=()))):
        ranges = collect_ranges(exposed, pixels, config)
        errors[name] = np.abs(every_exit(stage_graphs(model, spec, ranges=ranges), pixels)[-1] - fp32[-1]).max()
        layer = ranges[1]["blocks.0.mlp.fc1"]
        assert layer.outliers == ((5,) if name == "apart" else ())
        assert (layer.high > 100) == (name == "inside")

    assert errors["apart"] < errors["inside"] / 3


def test_outliers_are_as_few_as_make_the_range_much_smaller() -> None:
    """Two of a kind go together; a channel a little larger than the others is none; there is a limit."""
    config = CalibrationConfig(outliers=((1, 2.0), (2, 4.0)))
    assert outlier_channels(np.array([1, 9, 2, 1.0]), config) == (1,)
    assert outlier_channels(np.array([8, 9, 2, 1.0]), config) == (0, 1)
    assert outlier_channels(np.array([7, 8, 9, 2.0]), config) == ()
    assert outlier_channels(np.array([3, 2, 2, 2.0]), config) == ()
    assert outlier_channels(np.array([3.0]), config) == ()
