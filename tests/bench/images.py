"""The images that a benchmark sends: a folder of photos, or photo-like JPEGs made up on the spot, always the same."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw, ImageFilter

NUM_SYNTHETIC = 64
SIZE = (500, 375)  # width, height in pixels: the usual photo of ImageNet and of the figures in RESEARCH.md
QUALITY = 95
SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".avif"})
_LAYERS = ((3, 60.0), (8, 32.0), (24, 18.0), (96, 10.0))  # cells across the width, amplitude in grey levels: about 1 / f
# Of single pixels, in grey levels, from image to image. With the quality it sets the size of the file and with it the time to
# decode: 500 photos of ImageNet have a median of 0.58 bytes a pixel, those of this size 0.73.
_GRAIN = (7.0, 11.0)


def read_folder(folder: Path) -> list[bytes]:
    """The bytes of every image below a folder, in the order of their names.

    Raises:
        ValueError: there is none.
    """
    files = sorted(path for path in folder.rglob("*") if path.suffix.lower() in SUFFIXES and path.is_file())
    if not files:
        raise ValueError(f"no image ({', '.join(sorted(SUFFIXES))}) in {folder}")
    return [path.read_bytes() for path in files]


def synthetic_photos(number: int = NUM_SYNTHETIC, *, seed: int = 0) -> list[bytes]:
    """Distinct photo-like JPEGs of 500 x 375, 90 to 160 kB each; the same for the same seed and Pillow."""
    return [_jpeg(_photo(np.random.default_rng([seed, index]))) for index in range(number)]


def write_folder(images: list[bytes], folder: Path) -> None:
    """Write JPEGs so that `read_folder` gives them back in the same order."""
    for index, data in enumerate(images):
        (folder / f"{index:04d}.jpg").write_bytes(data)


def describe(images: list[bytes], *, synthetic: bool) -> str:
    """Number, dimensions and sizes of the images, in words; names no folder."""
    sizes_kb = np.array([len(data) / 1000 for data in images])
    with Image.open(io.BytesIO(images[0])) as first:
        kind, width, height = first.format, first.width, first.height
    shapes = {(width, height)}
    for data in images[1:]:
        with Image.open(io.BytesIO(data)) as image:
            shapes.add(image.size)
    shape = f"{width} x {height}" if len(shapes) == 1 else f"{len(shapes)} different sizes"
    source = f"synthetic photo-like {kind}s of quality {QUALITY}" if synthetic else "photos of a folder"
    size = f"{sizes_kb.min():.0f} to {sizes_kb.max():.0f} kB (median {np.median(sizes_kb):.0f})"
    return f"{len(images)} {source}, {shape} pixels, {size}"


def _photo(rng: np.random.Generator) -> Image.Image:
    """Noise with a photo's falling spectrum, some solid and some soft shapes over it, and a little grain."""
    width, height = SIZE
    pixels = np.full((height, width, 3), rng.uniform(70, 180, size=3), dtype=np.float32)
    for cells, amplitude in _LAYERS:
        pixels += amplitude * _smooth_noise(rng, cells)
    canvas = Image.fromarray(pixels.clip(0, 255).astype(np.uint8))
    draw = ImageDraw.Draw(canvas)
    for _ in range(rng.integers(6, 14)):
        x, y = rng.uniform(-40, width), rng.uniform(-40, height)
        box = (x, y, x + rng.uniform(20, 200), y + rng.uniform(20, 160))
        colour = tuple(int(value) for value in rng.integers(0, 256, size=3))
        draw.ellipse(box, fill=colour) if rng.random() < 0.6 else draw.rectangle(box, fill=colour)
    soft = np.asarray(canvas.filter(ImageFilter.GaussianBlur(0.8)), dtype=np.float32)
    grain = rng.uniform(*_GRAIN)
    soft += rng.normal(0, grain, size=(height, width, 1)) + rng.normal(0, grain / 3, size=soft.shape)
    return Image.fromarray(soft.clip(0, 255).astype(np.uint8))


def _smooth_noise(rng: np.random.Generator, cells: int) -> npt.NDArray[np.float32]:
    """Noise of unit size (H, W, 3) whose details are a width / `cells` across; grey for the most part, as photos are."""
    width, height = SIZE
    rows = max(2, round(cells * height / width))
    coarse = rng.normal(0, 1, size=(rows, cells, 1)) + 0.4 * rng.normal(0, 1, size=(rows, cells, 3))
    planes = [Image.fromarray(coarse[..., c].astype(np.float32)).resize(SIZE, Image.Resampling.BICUBIC) for c in range(3)]
    return np.stack([np.asarray(plane, dtype=np.float32) for plane in planes], axis=-1)


def _jpeg(image: Image.Image) -> bytes:
    out = io.BytesIO()
    image.save(out, format="JPEG", quality=QUALITY)
    return out.getvalue()
