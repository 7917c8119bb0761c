"""Images for tests, made in memory: whole files as bytes, and files broken on purpose."""

from __future__ import annotations

import struct
import zipfile
import zlib
from collections.abc import Sequence
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image


def photo(width: int = 120, height: int = 80, seed: int = 0) -> NDArray[np.uint8]:
    """Something like a photo, RGB (height, width, 3): noise whose power falls with the square of the frequency."""
    rng = np.random.default_rng(seed)
    frequency = np.hypot(np.fft.fftfreq(height)[:, None], np.fft.rfftfreq(width)[None, :])
    frequency[0, 0] = np.inf  # no constant part: it is added below
    spectrum = np.fft.rfft2(rng.standard_normal((3, height, width))) / frequency
    planes = np.fft.irfft2(spectrum, (height, width))
    planes = 0.95 * planes.mean(0) + 0.05 * planes  # colours go together, as in nature
    return np.clip(128 + 48 * planes / planes.std(), 0, 255).astype(np.uint8).transpose(1, 2, 0)


def plain_patches(number: int, *, across: int = 4, side: int = 8) -> NDArray[np.uint8]:
    """Images of patches in one colour each, uint8 (number, across * side, across * side, 3)."""
    colours = np.random.default_rng(0).integers(0, 256, (number, across, across, 3), dtype=np.uint8)
    return np.kron(colours, np.ones((1, side, side, 1), np.uint8))


def encode(image: Image.Image, file_format: str, **options: Any) -> bytes:
    """The image as a file of that format."""
    buffer = BytesIO()
    image.save(buffer, file_format, **options)
    return buffer.getvalue()


def make_jpeg(pixels: NDArray[np.uint8] | None = None, **options: Any) -> bytes:
    return encode(Image.fromarray(photo() if pixels is None else pixels), "JPEG", **{"quality": 90, **options})


def make_archive(path: Path, classes: Sequence[str], per_class: int) -> None:
    """A zip of `<class>/<n>.jpg`, 32 x 32, each class a colour of its own, no two images alike."""
    with zipfile.ZipFile(path, "w") as archive:
        for label, name in enumerate(classes):
            for number in range(per_class):
                colour = (25 * label, 255 - 25 * label, 17 * number % 256)
                archive.writestr(f"{name}/{number:04}.jpg", encode(Image.new("RGB", (32, 32), colour), "JPEG"))


def make_png(pixels: NDArray[np.uint8] | None = None, **options: Any) -> bytes:
    return encode(Image.fromarray(photo() if pixels is None else pixels), "PNG", **options)


def orientation_exif(orientation: int) -> Image.Exif:
    """EXIF data with nothing but the orientation (1 to 8)."""
    exif = Image.Exif()
    exif[0x0112] = orientation
    return exif


def png_chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png_bomb_header(width: int, height: int) -> bytes:
    """A PNG of some bytes that promises width x height pixels; right up to the pixels, of which it has none."""
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + png_chunk(b"IHDR", header) + png_chunk(b"IDAT", zlib.compress(b"")) + png_chunk(b"IEND", b"")


def png_with_chunk(kind: bytes, data: bytes) -> bytes:
    """A good PNG with one more chunk behind its header."""
    whole = make_png()
    end_of_header = 8 + 25
    return whole[:end_of_header] + png_chunk(kind, data) + whole[end_of_header:]


def truncated(data: bytes, share: float = 0.5) -> bytes:
    """The first part of a file."""
    return data[: int(len(data) * share)]


def flipped(data: bytes, rng: np.random.Generator, num_bytes: int) -> bytes:
    """The file with some bytes replaced by others, half of them near its start, where the headers are."""
    broken = bytearray(data)
    for index in range(num_bytes):
        reach = min(len(broken), 64) if index % 2 else len(broken)
        broken[int(rng.integers(reach))] = int(rng.integers(256))
    return bytes(broken)
