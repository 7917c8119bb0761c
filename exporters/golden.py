"""The golden pair: a few inputs and every stage's outputs, replayed at each start of a service."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np

from app.imaging.preprocess import preprocess
from app.runtime.golden import golden_key
from app.runtime.ort_backend import OrtBackend
from app.types import Array
from models.manifest import LOGITS, PIXELS, ModelManifest, PreprocessSpec

GOLDEN_IMAGES = 2


def golden_images(spec: PreprocessSpec) -> Array:
    """Seeded smooth noise of full contrast: nobody's photographs, yet it drives the whole range of the network."""
    generator = np.random.default_rng(0)
    height, width = spec.crop
    coarse = generator.integers(0, 256, (GOLDEN_IMAGES, -(-height // 8), -(-width // 8), 3))
    smooth = np.kron(coarse, np.ones((1, 8, 8, 1)))[:, :height, :width]
    images = np.clip(smooth + generator.normal(0, 12, smooth.shape), 0, 255).astype(np.uint8)
    # Already of the right size, so this only brings them into the layout; it wants the size before the crop.
    uncropped = spec.model_copy(update={"resize": min(spec.crop)})
    return np.stack([preprocess(image, uncropped) for image in images])


def write_golden(path: Path, pixels: Array, backends: Mapping[str, OrtBackend], manifest: ModelManifest) -> None:
    """The pixels, and every stage's outputs of every variant.

    What goes from stage to stage is rounded to float16 first, so that the file stays small beside the weights: a stage's logits
    are stored as it gives them for the rounded values.
    """
    arrays: dict[str, Array] = {PIXELS: pixels}
    for name, backend in backends.items():
        inputs: dict[str, Array] = {PIXELS: pixels}
        for index in range(len(manifest.stages)):
            output = backend.run(index, inputs)
            rounded: dict[str, Array] = {key: _small(value) for key, value in output.state.items() if key != PIXELS}
            inputs = {key: value.astype(output.state[key].dtype) for key, value in rounded.items()}
            if PIXELS in output.state:  # of a cascade, for its next network
                inputs[PIXELS] = pixels
            arrays[golden_key(name, index, LOGITS)] = output.logits
            arrays |= {golden_key(name, index, key): value for key, value in rounded.items()}
    np.savez_compressed(path, **arrays)  # type: ignore[arg-type]  # its stub takes no mapping of arrays


def _small(value: Array) -> Array:
    """Floats in float16, where it reaches so far."""
    if value.dtype != np.float32:
        return value
    return value.astype(np.float16) if np.abs(value).max() <= np.finfo(np.float16).max else value
