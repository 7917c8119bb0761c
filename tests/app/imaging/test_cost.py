"""What a picture is said to cost in memory is more than what it takes, for the worst that each format can do."""

from __future__ import annotations

import json
import struct
import subprocess
import sys
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from app.errors import InferenceFailed, InvalidImage
from app.imaging import decode, preprocess
from app.imaging.cost import START_OF_SCAN, has_one_scan
from app.imaging.decode import FORMATS
from tests.images import encode, make_jpeg, make_png, orientation_exif, photo, png_chunk, truncated
from tests.peak_memory import SPEC

SIDE = 2000  # 4 megapixels: 16 MB in Pillow, so that what is multiplied by pixels stands out from what is not


def wrapped_tiff(width: int, height: int, tile: int) -> bytes:
    """An RGB TIFF in one Deflate tile that may be far larger than the picture."""
    packed = zlib.compress(bytes(3 * tile * tile), 1)
    start = 8 + 2 + 11 * 12 + 4
    entries = [(256, width), (257, height), (258, start), (259, 8), (262, 2), (277, 3), (284, 1), (322, tile), (323, tile)]
    values = b"".join(struct.pack("<HHII", tag, 3 if tag == 258 else 4, 3 if tag == 258 else 1, v) for tag, v in entries)
    values += struct.pack("<HHII", 324, 4, 1, start + 6) + struct.pack("<HHII", 325, 4, 1, len(packed))
    return b"II*\x00" + struct.pack("<IH", 8, 11) + values + bytes(4) + struct.pack("<3H", 8, 8, 8) + packed


def text_bomb() -> bytes:
    """60 kB; each chunk unfolds to a megabyte, kept as four bytes per letter for the sake of the first."""
    text = zlib.compress("\U0001f600".encode() + bytes(2**20 - 10))
    chunks = b"".join(png_chunk(b"iTXt", b"%d\x00\x01\x00\x00\x00" % index + text) for index in range(63))
    whole = make_png()
    return whole[:33] + chunks + whole[33:]


def gif_that_prepares(side: int) -> bytes:
    """50 bytes: the area of its first picture is to be cleared before the second."""
    data = b"GIF89a" + struct.pack("<HHBBB", side, side, 0x80, 0, 0) + bytes(6)
    return data + b"\x21\xf9\x04\x08\x00\x00\x00\x00," + struct.pack("<HHHHB", 0, 0, side, side, 0) + b"\x02\x02\x4c\x01\x00;"


def peaks(folder: Path, files: dict[str, bytes]) -> dict[str, dict[str, int | str | None]]:
    """Measured in another process."""
    for name, data in files.items():
        (folder / name).write_bytes(data)
    command = [sys.executable, "-W", "ignore", "-m", "tests.peak_memory", *(str(folder / name) for name in files)]
    done = subprocess.run(command, check=True, capture_output=True, text=True, cwd=Path(__file__).resolve().parents[3])
    return {result["file"]: result for result in map(json.loads, done.stdout.splitlines())}


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_no_picture_takes_more_memory_than_estimated(tmp_path: Path) -> None:
    """And what is saved by converting in bands and by letting go early stays saved."""
    blocks = np.kron(np.random.default_rng(0).integers(0, 256, (50, 50, 4), np.uint8), np.ones((40, 40, 1), np.uint8))
    rgba = Image.fromarray(blocks)
    rgb, palette, exif = rgba.convert("RGB"), rgba.convert("RGB").convert("P"), orientation_exif(6)
    deep = Image.fromarray(blocks[..., 0].astype(np.uint16) * 257)
    one_strip = {"compression": "tiff_adobe_deflate", "strip_size": 2**30}
    files = {
        "baseline": encode(rgb, "JPEG"),
        "progressive": encode(rgb, "JPEG", progressive=True, subsampling=0, exif=exif),
        "cmyk": encode(rgb.convert("CMYK"), "JPEG", progressive=True),
        "png-rgba": encode(rgba, "PNG", exif=exif, compress_level=1),
        "png-palette": encode(palette, "PNG", transparency=bytes(range(256)), compress_level=1),
        "png-deep": encode(deep, "PNG", compress_level=1),
        "webp-solid": encode(Image.new("RGBA", rgba.size, (1, 2, 3, 4)), "WEBP", lossless=True),
        "webp": encode(rgba, "WEBP", lossless=True, method=0, exif=exif),
        "gif": encode(palette, "GIF", transparency=3),
        "tiff-rgba": encode(rgba, "TIFF", exif=exif, **one_strip),
        "tiff-ycbcr": encode(rgb.convert("YCbCr"), "TIFF", **one_strip),
        "tiff-tile": wrapped_tiff(16, 16, 4000),
        "bmp": encode(rgba, "BMP"),
    }
    if "AVIF" in FORMATS:
        files["avif"] = encode(rgba, "AVIF", speed=10, subsampling="4:4:4", exif=exif)

    measured = peaks(tmp_path, files)

    assert set(files) == set(measured)
    for name, result in measured.items():
        assert result["error"] is None, name
        assert result["peak"] < result["cost"], name
    # Bytes per pixel as in docs/adr/0011, and 2 for what does not grow with the picture.
    assert measured["png-rgba"]["peak"] < 10 * SIDE**2
    assert measured["webp-solid"]["peak"] < 18 * SIDE**2
    assert measured["baseline"]["peak"] < 4 * SIDE**2


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_reading_a_hostile_header_takes_little(tmp_path: Path) -> None:
    """Before the size is known nothing is held back, so it must be cheap by itself; gigabytes if it were not."""
    strips = struct.pack("<HHII", 273, 4, 2_400_000, 8) + struct.pack("<HHII", 256, 3, 4_000_000, 8)
    files = {
        "text": text_bomb(),
        "gif": gif_that_prepares(12_000),
        "tiff": b"II*\x00" + struct.pack("<IH", 8, 2) + strips + bytes(range(1, 255)) * 40_000,
    }

    for name, result in peaks(tmp_path, files).items():
        assert result["error"] in {"invalid_image", "image_too_large"}, name
        assert result["peak"] < 50 * 2**20, name


@pytest.mark.parametrize("error", [InvalidImage, InferenceFailed])
def test_an_error_that_is_kept_keeps_no_picture(error: type[Exception], monkeypatch: pytest.MonkeyPatch) -> None:
    """A request may have 64 broken images, whose errors live until it is answered."""
    images: list[Image.Image] = []
    data = make_png()

    def remember(image: Image.Image, real: Callable[[Image.Image], Image.Image] = decode._plain) -> Image.Image:
        images.append(image)
        if error is InvalidImage:
            raise OSError("broken")
        images.append(real(image))
        return images[-1]

    def without_memory(*_args: object) -> None:
        raise MemoryError

    monkeypatch.setattr(decode, "_plain", remember)
    if error is InferenceFailed:
        monkeypatch.setattr(preprocess, "_resize_and_crop", without_memory)

    with pytest.raises(error):
        preprocess.load_pixels(data, SPEC, max_pixels=10**6)

    assert images
    for image in images:
        with pytest.raises(ValueError, match="closed"):
            image.tobytes()


def test_frames_of_a_failed_decode_are_cleared() -> None:
    """Pillow's own hold the half picture."""
    with pytest.raises(InvalidImage) as caught:
        decode.decode_image(truncated(make_png(photo(300, 200))), max_pixels=10**6)

    cause = caught.value.__cause__
    assert cause is not None
    traceback, names = cause.__traceback__, []
    while traceback is not None:
        names.append(traceback.tb_frame.f_code.co_name)
        if "PIL" in traceback.tb_frame.f_code.co_filename:
            assert not traceback.tb_frame.f_locals
        traceback = traceback.tb_next
    assert "load" in names  # still told for the log


@pytest.mark.parametrize("place", ["load", "resize"])
def test_running_out_of_memory_is_not_the_files_fault(place: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The header was accepted; the cause is kept."""

    def without_memory(*_args: object) -> None:
        raise MemoryError

    if place == "load":
        monkeypatch.setattr(decode, "_load", without_memory)
    else:
        monkeypatch.setattr(preprocess, "_resize_and_crop", without_memory)

    with pytest.raises(InferenceFailed, match="ran out of memory") as caught:
        preprocess.load_pixels(make_png(), SPEC, max_pixels=10**6)

    assert isinstance(caught.value.__cause__, MemoryError)


def test_one_scan_is_told_by_the_head_of_a_jpeg() -> None:
    """Colour and grey; not progressive files, not those whose first scan lacks a channel, not what cannot be told."""
    colour, grey = make_jpeg(), make_jpeg(photo()[..., 0])
    scan = colour.index(START_OF_SCAN)
    of_one_channel = bytearray(colour)
    of_one_channel[scan + 4] = 1
    second_frame = colour[:scan] + b"\xff\xc2\x00\x0b\x08\x00\x01\x00\x01\x01\x01\x11\x00" + colour[scan:]

    assert has_one_scan(colour)
    assert has_one_scan(grey)
    assert not has_one_scan(make_jpeg(progressive=True))
    assert not has_one_scan(bytes(of_one_channel))
    assert not has_one_scan(second_frame)
    assert not has_one_scan(colour[: scan + 4])
    assert not has_one_scan(b"\xff\xd8")
