"""Any image classifier of the transformers package: Swin, PVT, ConvNeXt, EfficientNet, LeViT, CvT, MobileViT and the like.

Preprocessing is what the folder's image processor does, found by asking it: how it changes values by its answer to plain
colours, where it cuts by comparing with what the service would do. A processor that does something else is refused.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from app.imaging.preprocess import preprocess
from app.types import Array, FloatArray
from exporters.sources.base import SourceError, WholeModel
from exporters.sources.torch_graph import answers, traced
from exporters.sources.transformers_vit import RESAMPLE, WEIGHTS
from exporters.whole_graph import first_line
from models.manifest import PreprocessSpec
from models.weights import sha256_of

PROBES = ((1.9, 1.5), (1.3, 2.3), (1.2, 1.2), (2.7, 1.1))  # heights and widths of pictures to compare on, by what comes out
# Grey levels, in the mean: the service resizes and crops at once, the processor rounds between. A cut a pixel beside is 5.
TOLERANCE = 0.25
Interpolation = Literal["nearest", "bilinear", "bicubic", "lanczos"]


@dataclass(frozen=True, slots=True)
class TransformersWholeSource:
    """A folder as `save_pretrained` writes it, with model and image processor."""

    folder: Path

    def load(self) -> WholeModel:
        """Read and trace it.

        Raises:
            SourceError: the package or a file is missing, there is no such classifier, or it has no ONNX.
        """
        transformers = package()
        weights = next((self.folder / name for name in WEIGHTS if (self.folder / name).exists()), None)
        if weights is None:
            raise SourceError(f"{self.folder.name} holds neither {' nor '.join(WEIGHTS)}")
        try:
            model, found = transformers.AutoModelForImageClassification.from_pretrained(
                self.folder, local_files_only=True, output_loading_info=True, dtype=torch.float32
            )
        except (OSError, ValueError, RuntimeError, KeyError, ImportError) as error:
            raise SourceError(f"transformers does not load {self.folder.name}: {first_line(error)}") from error
        if missing := sorted(found["missing_keys"]) + sorted(found["mismatched_keys"]):
            raise SourceError(f"the weights of {self.folder.name} lack {', '.join(map(str, missing[:5]))}: is it a classifier?")
        model.eval()
        spec, flipped = preprocessing(image_processor(self.folder))

        def forward(x: Tensor) -> Tensor:
            logits: Tensor = model(pixel_values=x.flip(1) if flipped else x).logits
            return logits

        labels, answer = self.labels(), answers(forward)
        try:
            num_classes = answer(np.zeros((1, 3, *spec.crop), np.float32)).shape[-1]
        except Exception as error:  # whatever a network's own code says of pictures of another size
            raise SourceError(
                f"{self.folder.name} does not take {spec.crop} pixels, which its processor gives: {first_line(error)}"
            ) from error
        if num_classes != len(labels):
            raise SourceError(f"{self.folder.name} names {len(labels)} classes, and its network has {num_classes}")
        graph = traced(model, forward, f"{model.config.model_type} ({self.folder.name})", spec.crop)
        return WholeModel(graph, answer, spec, labels, sha256_of(weights), self.folder.name)

    def labels(self) -> tuple[str, ...]:
        """Of the classes, in their order."""
        try:
            named = package().AutoConfig.from_pretrained(self.folder, local_files_only=True).id2label
        except (OSError, ValueError, KeyError) as error:
            raise SourceError(f"transformers does not know {self.folder.name}: {first_line(error)}") from error
        if not named:  # some configurations of transformers have none by default
            raise SourceError(f"{self.folder.name} names no classes: write id2label into its config.json")
        return tuple(named[number] for number in sorted(named))


def package() -> Any:
    """transformers, silent.

    Raises:
        SourceError: it is not installed.
    """
    try:
        import transformers
    except ModuleNotFoundError as error:
        raise SourceError("networks other than ViT and DeiT need a package: pip install 'fovea[transformers]'") from error
    found: Any = transformers
    found.logging.set_verbosity_error()
    found.logging.disable_progress_bar()
    return found


def image_processor(path: Path) -> Any:
    """What a folder, or a `preprocessor_config.json`, tells transformers.

    Raises:
        SourceError: the package or the file is missing, or it names no processor.
    """
    try:
        return package().AutoImageProcessor.from_pretrained(path, local_files_only=True, backend="pil")
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise SourceError(f"transformers finds no image processor in {path.name}: {first_line(error)}") from error


def preprocessing(processor: Any) -> tuple[PreprocessSpec, bool]:
    """What an image processor does, and whether it gives BGR.

    Raises:
        SourceError: it does something else than resize, cut the centre and change values channel by channel.
    """
    if not {"resample", "size"} <= set(dir(processor)) or processor.resample is None or processor.size is None:
        raise SourceError(f"{type(processor).__name__} does not say how it resizes")
    factor, offset, flipped = _values(processor)
    _, height, width = _answer(processor, _plain((0, 0, 0))).shape
    interpolation = RESAMPLE.get(int(processor.resample))
    if interpolation is None:
        raise SourceError(f"its image processor resamples with {processor.resample}, which is not known")
    for spec in _candidates(processor, (height, width), interpolation):
        # value * factor + offset = (value * scale - mean) / std
        std = spec.scale / factor
        told = spec.model_copy(update={"mean": _three(-offset * std), "std": _three(std)})
        if all(_agrees(processor, told, flipped, picture) for picture in _pictures(spec.crop)):
            return told, flipped
    raise SourceError(
        f"{type(processor).__name__} prepares pictures in a way that the service does not: "
        f"size {processor.size}, crop {getattr(processor, 'crop_size', None)}"
    )


def _candidates(processor: Any, crop: tuple[int, int], interpolation: Interpolation) -> Iterator[PreprocessSpec]:
    """Ways to come to the size: the picture squashed, or its shorter side brought to a length that the processor may mean."""
    plain = {"crop": crop, "interpolation": interpolation, "mean": (0, 0, 0), "std": (1, 1, 1), "layout": "uint8_nhwc"}
    size = processor.size
    edge = size.get("shortest_edge") or size.get("height") or crop[0]
    lengths = [edge, int(256 / 224 * edge)]  # LeViT's
    if getattr(processor, "crop_pct", None):
        lengths.append(int(edge / processor.crop_pct))  # ConvNeXt's
    for length in dict.fromkeys(lengths):
        if length < max(crop):
            continue
        for squash in (True, False):
            for rounding in ("down", "half_to_even"):
                yield PreprocessSpec.model_validate({**plain, "resize": length, "squash": squash, "crop_rounding": rounding})


def _values(processor: Any) -> tuple[FloatArray, FloatArray, bool]:
    """Factor and offset of each of the network's colours, in RGB's order, and whether it takes BGR."""

    def centre(colour: tuple[int, int, int]) -> Array:
        answer = _answer(processor, _plain(colour))
        return answer[:, answer.shape[1] // 2, answer.shape[2] // 2]

    black = centre((0, 0, 0))
    change = np.stack([centre(colour) - black for colour in ((255, 0, 0), (0, 255, 0), (0, 0, 255))])  # by picture's channel
    flipped = not np.allclose(change, np.diag(change.diagonal()), atol=1e-5)
    if flipped:
        change, black = change[:, ::-1], black[::-1]
    factor = change.diagonal() / np.float32(255)
    if not np.allclose(change, np.diag(change.diagonal()), atol=1e-5) or (factor <= 0).any():
        raise SourceError(f"{type(processor).__name__} mixes colours, which the service does not")
    return factor.astype(np.float32), black.astype(np.float32), flipped


def _agrees(processor: Any, spec: PreprocessSpec, flipped: bool, picture: Array) -> bool:
    expected = _answer(processor, picture)
    if flipped:
        expected = expected[::-1]
    if expected.shape[1:] != spec.crop:
        return False
    pixels = preprocess(picture, spec).astype(np.float32).transpose(2, 0, 1) * spec.scale
    mean, std = (np.array(v, dtype=np.float32).reshape(3, 1, 1) for v in (spec.mean, spec.std))
    difference = np.abs((pixels - mean) / std - expected) * std / spec.scale  # in grey levels
    return bool(difference.mean() <= TOLERANCE)


def _answer(processor: Any, picture: Array) -> FloatArray:
    """Normalised pixels (3, H, W) of an RGB picture (H, W, 3)."""
    pixels: FloatArray = np.asarray(
        processor(picture, return_tensors="np", input_data_format="channels_last")["pixel_values"][0]
    )
    return pixels


def _plain(colour: tuple[int, int, int]) -> Array:
    return np.full((300, 300, 3), colour, np.uint8)


def _pictures(size: tuple[int, int]) -> Iterator[Array]:
    """Patchy ones of several proportions, in which a shift by a pixel is seen."""
    generator = np.random.default_rng(0)
    for height, width in ((round(size[0] * down), round(size[1] * right)) for down, right in PROBES):
        coarse = generator.integers(0, 256, (height // 16 + 2, width // 16 + 2, 3)).astype(np.float64)
        fine = np.kron(coarse, np.ones((16, 16, 1)))[:height, :width]
        yield fine.astype(np.uint8)


def _three(values: Array) -> tuple[float, float, float]:
    red, green, blue = (float(value) for value in values)
    return red, green, blue
