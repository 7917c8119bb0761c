"""Whole classifiers of the transformers package: the same answers, the same preprocessing, and a refusal where it cannot be."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers

from app.imaging.preprocess import preprocess
from exporters.golden import golden_images
from exporters.graphs_export import export_of
from exporters.sources.base import SourceError, WholeModel
from exporters.sources.transformers_whole import TransformersWholeSource, preprocessing
from exporters.validation import normalised
from exporters.whole_graph import run
from models.manifest import LOGITS, PIXELS
from tests.families import CLASSES, FAMILIES, write_family
from tests.images import photo


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the families are written."""
    return tmp_path_factory.mktemp("families")


def loaded(folder: Path, name: str) -> WholeModel:
    """Written once."""
    if not (folder / name).exists():
        write_family(folder, name)
    return TransformersWholeSource(folder / name).load()


@pytest.mark.parametrize("name", sorted(FAMILIES))
def test_every_family_answers_as_transformers_does(folder: Path, name: str) -> None:
    """From the file's picture to logits, at several batch sizes, against the package's own processor and network."""
    found = loaded(folder, name)
    network = transformers.AutoModelForImageClassification.from_pretrained(folder / name).eval()
    processor = transformers.AutoImageProcessor.from_pretrained(folder / name, backend="pil")
    pictures = [photo(90 + 13 * number, 121 - 6 * number, seed=number) for number in range(5)]
    with torch.no_grad():
        expected = network(**processor(pictures, return_tensors="pt")).logits.numpy()
    (graph,) = export_of(found).graphs()
    pixels = np.stack([preprocess(picture, found.preprocess) for picture in pictures])

    answers = {size: run(graph, {PIXELS: pixels[:size]})[LOGITS] for size in (1, 2, 5)}

    assert np.ptp(expected) > 1e-2
    assert found.labels == tuple(f"class {number}" for number in range(CLASSES))
    for size, answer in answers.items():
        # The service rounds once where the processor rounds twice: a grey level of some pixels.
        np.testing.assert_allclose(answer, expected[:size], atol=0.05 * np.ptp(expected))
        np.testing.assert_allclose(answer, export_of(found).answers(pixels[:size])[0], atol=1e-4)


@pytest.mark.parametrize(
    ("processor", "expected"),
    [
        (
            transformers.ViTImageProcessorPil(size={"height": 48, "width": 48}, rescale_factor=1 / 127.5, image_mean=[1] * 3),
            {"resize": 48, "squash": True, "crop": (48, 48), "mean": (0.5, 0.5, 0.5), "std": (0.25, 0.25, 0.25)},
        ),
        (
            transformers.BitImageProcessorPil(size={"shortest_edge": 73}, crop_size={"height": 64, "width": 64}),
            {"resize": 73, "squash": False, "crop": (64, 64), "crop_rounding": "down", "interpolation": "bicubic"},
        ),
        (
            transformers.ConvNextImageProcessorPil(size={"shortest_edge": 56}, crop_pct=0.875, resample=2),
            {"resize": 64, "squash": False, "crop": (56, 56), "interpolation": "bilinear"},
        ),
        (
            transformers.LevitImageProcessorPil(size={"shortest_edge": 56}, crop_size={"height": 56, "width": 56}),
            {"resize": 64, "squash": False, "crop": (56, 56)},
        ),
    ],
)
def test_preprocessing_is_what_the_processor_does(processor: Any, expected: dict[str, Any]) -> None:
    """Whatever its class calls it: found by asking, so that a rule of its own is seen."""
    spec, flipped = preprocessing(processor)

    found = {name: getattr(spec, name) for name in expected}
    assert not flipped
    for name, value in expected.items():
        assert found[name] == (pytest.approx(value, abs=1e-5) if name in {"mean", "std"} else value)


def test_a_network_that_takes_bgr_gets_bgr(folder: Path) -> None:
    """MobileViT's processor turns the colours and does not normalise; the graph turns them, the service does not."""
    found = loaded(folder, "mobilevit")
    network = transformers.AutoModelForImageClassification.from_pretrained(folder / "mobilevit").eval()
    pixels = golden_images(found.preprocess)
    with torch.no_grad():
        given, turned = (
            network(pixel_values=x).logits.numpy()
            for x in (normalised(pixels, found.preprocess), normalised(pixels, found.preprocess).flip(1))
        )

    answer = run(export_of(found).graphs()[0], {PIXELS: pixels})[LOGITS]

    np.testing.assert_allclose(answer, turned, atol=1e-4)
    assert np.abs(answer - given).max() > 1e-3
    assert (found.preprocess.mean, found.preprocess.std) == (pytest.approx((0, 0, 0)), pytest.approx((1, 1, 1)))


def test_a_processor_that_pads_is_refused() -> None:
    """What the service cannot do is never done another way in silence."""

    class Padded(transformers.ViTImageProcessorPil):
        def resize(self, image: np.ndarray, size: Any, resample: Any, **more: Any) -> np.ndarray:
            return super().resize(np.pad(image, ((0, 0), (40, 0), (0, 0))), size, resample, **more)

    with pytest.raises(SourceError, match="Padded prepares pictures in a way that the service does not"):
        preprocessing(Padded(size={"height": 48, "width": 48}))


def test_what_cannot_be_used_is_said(folder: Path, tmp_path: Path) -> None:
    """Weights that are missing, labels that are too few, no processor, a network that is no classifier."""
    loaded(folder, "resnet")

    def copy(name: str) -> Path:
        path = tmp_path / name
        path.mkdir()
        for file in (folder / "resnet").iterdir():
            (path / file.name).write_bytes(file.read_bytes())
        return path

    without = copy("without")
    (without / "model.safetensors").unlink()
    with pytest.raises(SourceError, match=r"holds neither model.safetensors nor"):
        TransformersWholeSource(without).load()
    blind = copy("blind")
    (blind / "preprocessor_config.json").unlink()
    with pytest.raises(SourceError, match="no image processor in blind"):
        TransformersWholeSource(blind).load()
    other = copy("other")
    told = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps(told | {"hidden_sizes": [8, 16, 16, 64]}))
    with pytest.raises(SourceError, match=r"weights of other|does not load other"):
        TransformersWholeSource(other).load()
    unknown = copy("unknown")
    (unknown / "config.json").write_text(json.dumps(told | {"model_type": "hourglass"}))
    with pytest.raises(SourceError, match="transformers does not know unknown"):
        TransformersWholeSource(unknown).labels()
    nameless = tmp_path / "nameless"
    nameless.mkdir()
    (nameless / "config.json").write_text(json.dumps({"model_type": "pvt"}))  # whose configuration names none by default
    with pytest.raises(SourceError, match="nameless names no classes: write id2label into its config"):
        TransformersWholeSource(nameless).labels()
