"""Variants for other hardware: the same answers from graphs in other forms."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from typer.testing import CliRunner

from app.runtime.cpu import has_exact_int8
from exporters import vit_graph
from exporters.calibration import collect_ranges
from exporters.cli import app as exporter
from exporters.config import CalibrationConfig
from exporters.golden import golden_images
from exporters.other_targets import as_fp16, as_qdq
from exporters.sensitivity import every_exit
from exporters.vit_export import stage_graphs
from models.manifest import PIXELS, HardwareTarget, ModelManifest
from models.multi_exit import MultiExitViT
from models.zoo import CIFAR10_LABELS, ZOO, create_model
from tests.images import make_archive

MICROSOFTS = {"MatMulIntegerToFloat", "QLinearConv"}


@pytest.fixture(params=["test_vit", "vit_cifar10"])
def model(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> MultiExitViT:
    """With products of attention in INT8; a convolutional stem in one of them."""
    monkeypatch.setattr(vit_graph, "INT8_FROM_TOKENS", 1)
    torch.manual_seed(0)
    found = create_model(request.param)
    with torch.no_grad():
        for _ in range(3):
            found(torch.randn(16, 3, 32, 32) * 1.5 + 0.3)  # batch norms have seen something
    return found.eval()


def run_as_written(stages: list[onnx.ModelProto], pixels: np.ndarray) -> np.ndarray:
    """Logits of the last stage, without ONNX Runtime making one operator of several: that would be the other form again."""
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    outputs: dict[str, np.ndarray] = {PIXELS: pixels}
    for stage in stages:
        session = ort.InferenceSession(stage.SerializeToString(), options, providers=["CPUExecutionProvider"])
        names = [node.name for node in session.get_outputs()]
        wanted = {node.name: outputs[node.name] for node in session.get_inputs()}
        outputs = dict(zip(names, session.run(names, wanted), strict=True))
    return outputs["logits"]


def test_qdq_pairs_say_what_the_integer_operators_do(model: MultiExitViT) -> None:
    """Only standard operators are left, and weights stay bytes."""
    spec = ZOO["test_vit"].preprocess
    pixels = golden_images(spec)
    ranges = collect_ranges(stage_graphs(model, spec, expose=True), pixels, CalibrationConfig())
    int8, fp32 = stage_graphs(model, spec, ranges=ranges), stage_graphs(model, spec)

    qdq = [as_qdq(stage) for stage in int8]

    assert {opset.domain for stage in qdq for opset in stage.opset_import} == {""}
    assert not MICROSOFTS & {node.op_type for stage in qdq for node in stage.graph.node}
    assert MICROSOFTS & {node.op_type for stage in int8 for node in stage.graph.node}
    assert sum(stage.ByteSize() for stage in qdq) < 0.6 * sum(stage.ByteSize() for stage in fp32)  # weights stay bytes
    # ONNX Runtime's optimisations make the integer operators of them again, where they say exactly that.
    for mine, theirs in zip(every_exit(qdq, pixels), every_exit(int8, pixels), strict=True):
        np.testing.assert_allclose(mine, theirs, atol=1e-6)
    # As written they are sums of floats: one layer alone, for a rounding to the other side goes on through all others; at the
    # first exit, before such sums drift apart through all blocks.
    alone = [{name: each for name, each in stage.items() if name == "blocks.0.attn.qkv"} for stage in ranges]
    one_layer = stage_graphs(model, spec, ranges=alone)[:1]
    (expected,) = every_exit(one_layer, pixels)
    np.testing.assert_allclose(run_as_written([as_qdq(stage) for stage in one_layer], pixels), expected, atol=1e-5)
    assert np.abs(expected - every_exit(fp32[:1], pixels)[0]).max() > 1e-4


def test_half_precision_is_near_fp32_and_half_its_size(model: MultiExitViT) -> None:
    """Names, types and shapes of inputs and outputs are as they were, and so is the graph it is made of."""
    spec = ZOO["test_vit"].preprocess
    pixels, fp32 = golden_images(spec), stage_graphs(model, spec)
    before = [stage.SerializeToString() for stage in fp32]

    fp16 = [as_fp16(stage) for stage in fp32]

    assert [stage.SerializeToString() for stage in fp32] == before
    assert sum(stage.ByteSize() for stage in fp16) < 0.6 * sum(stage.ByteSize() for stage in fp32)
    for mine, theirs in zip(fp16, fp32, strict=True):
        assert list(mine.graph.input) == list(theirs.graph.input)
        assert list(mine.graph.output) == list(theirs.graph.output)
    for half, full in zip(every_exit(fp16, pixels), every_exit(fp32, pixels), strict=True):
        assert 0 < np.abs(half - full).max() < 0.02 * np.ptp(full)


@pytest.mark.skipif(not has_exact_int8(), reason="INT8 is not exact on this CPU")
def test_a_version_is_published_with_them(tmp_path: Path) -> None:
    """Each for its own targets, with exits and golden answers of its own; QDQ pairs are not made of nothing."""
    torch.manual_seed(0)
    network = create_model("test_vit").eval()
    for stage in network.stages:
        torch.nn.init.normal_(stage.head.fc.weight, std=0.5)  # answers that a rounding does not change
    torch.save(network.state_dict(), tmp_path / "weights.pt")
    make_archive(tmp_path / "images.zip", CIFAR10_LABELS, per_class=3)
    images, weights, repository = (str(tmp_path / name) for name in ("images.zip", "weights.pt", "repository"))
    arguments = ["export", "--model", "test_vit", "--weights", weights, "--repository", repository, "--version", "1"]
    arguments += ["--calibration", images, "--test", images, "--unlabelled", "--qdq", "--fp16"]

    refused = CliRunner().invoke(exporter, [*arguments, "--no-int8"])
    planned = CliRunner().invoke(exporter, [*arguments, "--dry-run"])
    result = CliRunner().invoke(exporter, arguments)

    assert refused.exit_code == 1
    assert "QDQ pairs are made of the INT8 variant" in refused.output
    assert "fp32, int8, int8_qdq, fp16" in planned.output
    assert result.exit_code == 0, result.output
    manifest = ModelManifest.load(tmp_path / "repository" / "test_vit" / "1")
    targets = {variant.name: set(variant.targets) for variant in manifest.variants}
    assert targets["int8_qdq"] == {HardwareTarget.OPENVINO}
    assert HardwareTarget.CUDA in targets["fp16"]
    assert not targets["fp16"] & {HardwareTarget.CPU, HardwareTarget.CPU_VNNI}
    with np.load(tmp_path / "repository" / "test_vit" / "1" / manifest.golden_file) as golden:
        assert {name for name in targets if any(name in key for key in golden.files)} == set(targets)
    assert "--qdq --fp16 --unlabelled" in manifest.provenance["command"]
