"""A classifier that comes as an ONNX file: prepared as its owner says, refused where it cannot be batched."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from exporters.graphs_export import export_of
from exporters.sources.base import SourceError
from exporters.sources.onnx_file import OnnxSource
from exporters.whole_graph import run
from models.manifest import LOGITS, PIXELS
from tests.checkpoints import LABELS, SIDE, TOLD
from tests.families import CLASSES, write_family


def write_onnx(path: Path, *, fixed: bool = False) -> Path:
    """Pixels (1, 3, SIDE, SIDE) -> probabilities of five classes; `fixed`: the batch of one is written into a Reshape."""
    weight = np.random.default_rng(0).normal(size=(3 * SIDE * SIDE, len(LABELS))).astype(np.float32) * 0.05
    nodes = [
        helper.make_node("Reshape", ["x", "shape"], ["flat"]),
        helper.make_node("MatMul", ["flat", "weight"], ["y"]),
        helper.make_node("Softmax", ["y"], ["p"], axis=-1),
    ]
    graph = helper.make_graph(
        nodes,
        "theirs",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, (1, 3, SIDE, SIDE))],
        [helper.make_tensor_value_info("p", TensorProto.FLOAT, (1, len(LABELS)))],
        [
            numpy_helper.from_array(weight, "weight"),
            numpy_helper.from_array(np.array([1 if fixed else 0, 3 * SIDE * SIDE]), "shape"),
        ],
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), path)
    return path


@pytest.fixture
def timms(tmp_path: Path) -> Path:
    """A configuration as timm writes it."""
    (tmp_path / "config.json").write_text(json.dumps(TOLD))
    return tmp_path / "config.json"


def test_a_file_and_how_to_prepare_pictures_are_enough(tmp_path: Path, timms: Path) -> None:
    """The answers are the file's own, one by one, without its softmax."""
    file = write_onnx(tmp_path / "theirs.onnx")
    found = OnnxSource(file, timms, LABELS).load()
    pixels = np.random.default_rng(1).integers(0, 256, (3, SIDE, SIDE, 3), dtype=np.uint8)

    mine = run(export_of(found).graphs()[0], {PIXELS: pixels})[LOGITS]

    np.testing.assert_allclose(mine, export_of(found).answers(pixels)[0], atol=1e-4)
    told = TOLD["pretrained_cfg"]
    normal = ((pixels / 255 - np.array(told["mean"])) / np.array(told["std"])).transpose(0, 3, 1, 2).astype(np.float32)
    theirs = np.concatenate([run(onnx.load(file), {"x": normal[i : i + 1]})["p"] for i in range(3)])
    np.testing.assert_allclose(np.exp(mine) / np.exp(mine).sum(axis=1, keepdims=True), theirs, atol=1e-5)
    assert (found.preprocess.resize, found.preprocess.crop, found.origin) == (17, (SIDE, SIDE), "theirs.onnx")


def test_transformers_file_says_it_too(tmp_path: Path) -> None:
    """By its image processor; one that asks for BGR or another size is refused."""
    folder = write_family(tmp_path, "swin")
    file = write_onnx(tmp_path / "theirs.onnx")
    told = json.loads((folder / "preprocessor_config.json").read_text())
    right = tmp_path / "preprocessor_config.json"
    right.write_text(json.dumps(told | {"size": {"height": SIDE, "width": SIDE}}))

    assert OnnxSource(file, right, LABELS).load().preprocess.squash
    with pytest.raises(SourceError, match=r"gives \(64, 64\) pixels and the network takes \(16, 16\)"):
        OnnxSource(file, folder / "preprocessor_config.json", LABELS).load()
    with pytest.raises(SourceError, match="asks for BGR"):
        OnnxSource(file, write_family(tmp_path, "mobilevit") / "preprocessor_config.json", LABELS).load()
    assert len(LABELS) == CLASSES


def test_weights_beside_the_file_are_part_of_its_checksum(tmp_path: Path, timms: Path) -> None:
    """Two trainings of one graph are two."""
    sums = []
    for name, factor in (("a", 1.0), ("b", 2.0)):
        (tmp_path / name).mkdir()
        model = onnx.load(write_onnx(tmp_path / name / "theirs.onnx"))
        weight = numpy_helper.to_array(model.graph.initializer[0]) * np.float32(factor)
        model.graph.initializer[0].CopyFrom(numpy_helper.from_array(weight, "weight"))
        onnx.save(model, tmp_path / name / "theirs.onnx", save_as_external_data=True, location="theirs.data", size_threshold=0)
        sums.append(OnnxSource(tmp_path / name / "theirs.onnx", timms, LABELS).load().weights_sha256)
    assert (tmp_path / "a" / "theirs.onnx").read_bytes() == (tmp_path / "b" / "theirs.onnx").read_bytes()
    assert sums[0] != sums[1]


def test_probabilities_by_another_way_are_refused(tmp_path: Path, timms: Path) -> None:
    """Softmax of probabilities would make every answer unsure."""
    file = write_onnx(tmp_path / "theirs.onnx")
    model = onnx.load(file)
    model.graph.node[-1].CopyFrom(helper.make_node("Exp", ["y"], ["e"]))
    model.graph.initializer.append(numpy_helper.from_array(np.array([-1]), "last"))
    model.graph.node.append(helper.make_node("ReduceSum", ["e", "last"], ["sum"], keepdims=1))
    model.graph.node.append(helper.make_node("Div", ["e", "sum"], ["p"]))
    onnx.save(model, file)
    with pytest.raises(SourceError, match="gives probabilities by other means than a softmax at its end"):
        OnnxSource(file, timms, LABELS).load()


def test_what_cannot_be_used_is_said(tmp_path: Path, timms: Path) -> None:
    """No ONNX, a batch of one written into the graph, labels that do not fit, a configuration that says nothing."""
    (tmp_path / "text.onnx").write_text("hello")
    with pytest.raises(SourceError, match=r"text.onnx is no ONNX model"):
        OnnxSource(tmp_path / "text.onnx", timms, LABELS).load()
    with pytest.raises(SourceError, match="cannot take 2 pictures at once: export it with a free batch axis"):
        OnnxSource(write_onnx(tmp_path / "fixed.onnx", fixed=True), timms, LABELS).load()
    with pytest.raises(SourceError, match=r"there are 2 labels, and theirs.onnx gives \(2, 5\) for 2 pictures"):
        OnnxSource(write_onnx(tmp_path / "theirs.onnx"), timms, ("a", "b")).load()
    for content, words in (
        ("{", "is no JSON"),
        ('{"pretrained_cfg": {}}', "as timm writes it"),
        ("{}", "no image processor in"),
    ):
        (tmp_path / "odd.json").write_text(content)
        with pytest.raises(SourceError, match=words):
            OnnxSource(write_onnx(tmp_path / "theirs.onnx"), tmp_path / "odd.json", LABELS).load()
