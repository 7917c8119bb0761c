"""RGB uint8 -> what stage 0 takes: resize the shorter side, crop the centre, normalise where the graph does not.

Geometry and rounding are those of torchvision's `Resize` and `CenterCrop`, which timm uses too, or of transformers' image
processors; both happen in one resampling of the cropped part, with Pillow's antialiased filters.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from PIL.Image import Resampling

from app.imaging.budget import DecodeBudget
from app.imaging.decode import Picture, open_picture
from models.manifest import PreprocessSpec

_FILTERS = {
    "nearest": Resampling.NEAREST,
    "bilinear": Resampling.BILINEAR,
    "bicubic": Resampling.BICUBIC,
    "lanczos": Resampling.LANCZOS,
}
# From six times the target on, first average whole pixels, down to no less than three times the target (docs/adr/0008).
REDUCING_GAP: float | None = 3.0

Pixels = NDArray[np.uint8] | NDArray[np.float32]


def preprocess(image: NDArray[np.uint8], spec: PreprocessSpec) -> Pixels:
    """What stage 0 takes, without the batch axis; C-contiguous, perhaps read-only.

    Args:
        image: RGB uint8 (H, W, 3).
        spec: from the manifest.

    Returns:
        uint8 (H, W, 3) where the layout is `uint8_nhwc`, float32 (3, H, W), normalised, where it is `float32_nchw`.
    """
    picture = Image.fromarray(image)
    return _normalise(_resize_and_crop(Picture(picture, picture.size), spec), spec)


def load_pixels(
    data: bytes, spec: PreprocessSpec, *, max_pixels: int, budget: DecodeBudget | None = None, quick: bool = False
) -> Pixels:
    """`preprocess` of `decode_image`, in one hop and with a JPEG decoded no larger than needed (docs/adr/0008).

    Args:
        data, max_pixels: as `decode_image`.
        spec: as `preprocess`.
        budget: what it may hold of memory, shared with other threads; waits for room in it (docs/adr/0011).
        quick: others wait for the calling thread, so it has some milliseconds and no more.

    Raises:
        RequestError, InferenceFailed: as `decode_image`; ImageTooLarge also where it needs more than the whole budget.
        NeedsTime: where it is to be quick and cannot be, told from its header.
    """
    # The nearest pixel of a reduced image is an average: it would no longer be the nearest pixel.
    min_side = None if spec.interpolation == "nearest" else spec.resize
    with open_picture(data, max_pixels=max_pixels, min_side=min_side, budget=budget, quick=quick) as picture:
        cropped = _resize_and_crop(picture, spec)
    return _normalise(cropped, spec)


def _resize_and_crop(picture: Picture, spec: PreprocessSpec) -> NDArray[np.uint8]:
    width, height = picture.size
    short = min(width, height)
    # torchvision and transformers cut the longer side to a whole number.
    new_width, new_height = spec.resize * width // short, spec.resize * height // short
    if spec.squash:
        new_width = new_height = spec.resize
    crop_height, crop_width = spec.crop
    left, top = _offset(new_width - crop_width, spec), _offset(new_height - crop_height, spec)
    if (new_width, new_height) == picture.size:
        cut = picture.image.crop(picture.stored_box(left, top, left + crop_width, top + crop_height))
    else:
        pixel_width, pixel_height = width / new_width, height / new_height
        x0, y0, x1, y1 = picture.stored_box(
            left * pixel_width,
            top * pixel_height,
            (left + crop_width) * pixel_width,
            (top + crop_height) * pixel_height,
        )
        # Rounding may lead past the edge, which Pillow refuses.
        box = max(x0, 0.0), max(y0, 0.0), min(x1, picture.image.width), min(y1, picture.image.height)
        size = (crop_height, crop_width) if picture.turn is not None and picture.turn.swaps else (crop_width, crop_height)
        gap = REDUCING_GAP if picture.scale == 1 else None  # one approximation at a time: the decoder reduced it already
        cut = picture.image.resize(size, _FILTERS[spec.interpolation], box, gap)
    return picture.pixels(cut)


def _offset(margin: int, spec: PreprocessSpec) -> int:
    return margin // 2 if spec.crop_rounding == "down" else round(margin / 2)


def _normalise(pixels: NDArray[np.uint8], spec: PreprocessSpec) -> Pixels:
    if spec.layout == "uint8_nhwc":
        return pixels
    mean, std = np.array(spec.mean, np.float32), np.array(spec.std, np.float32)
    result = np.empty((3, *pixels.shape[:2]), np.float32)
    # (value * scale - mean) / std, as one multiplication and one subtraction
    np.multiply(pixels.transpose(2, 0, 1), (np.float32(spec.scale) / std)[:, None, None], out=result)
    result -= (mean / std)[:, None, None]
    return result
