"""How much memory decoding a picture takes at most, and whether it is quick, told from its header.

The figures are measured (docs/adr/0011, docs/adr/0021).
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from itertools import islice
from typing import Any

from PIL import ImageFile
from PIL.ExifTags import Base

JPEG_SEGMENT = re.compile(rb"\xff[^\x00\x01\xd0-\xd7\xff]")  # the other markers stand alone, inside the pixels' data
START_OF_SCAN, END_OF_IMAGE = b"\xff\xda", b"\xff\xd9"

# What is quick to decode, some 10 ms at worst: a JPEG or PNG of few bytes, with little before its pixels, and of few pixels,
# or a few more in a JPEG that comes in one scan.
QUICK_BYTES, QUICK_PARTS, QUICK_PIXELS, QUICK_JPEG_PIXELS = 2**19, 64, 2**19, 2**22
_SEQUENTIAL_FRAMES = {0xC0, 0xC1, 0xC9}  # baseline, extended; the same with arithmetic coding
_OTHER_FRAMES = {0xC2, 0xC3, 0xC5, 0xC6, 0xC7, 0xCA, 0xCB, 0xCD, 0xCE, 0xCF}  # progressive, lossless, hierarchical
_FIXED_BYTES = 6 * 2**20  # tables and buffers of a decoder, rows of the resize, a band converted; whatever the size
_SMALL_BYTES = 2**20  # not worth a closer look
# Bytes per pixel while the decoder runs, where that is more than the picture itself: libwebp holds two canvases, a frame,
# and what it hands over; libavif the planes of 10 bits, twice if they come in parts, and what it hands over twice.
_DECODER = {("WEBP", "RGB"): 16, ("WEBP", "RGBA"): 16, ("AVIF", "L"): 7, ("AVIF", "RGB"): 19, ("AVIF", "RGBA"): 24}
_JPEG_IN_TIFF, _YCBCR = 7, 6  # TIFF's numbers for a compression and a colour space


def decode_cost(image: ImageFile.ImageFile, data: bytes, full_size: tuple[int, int]) -> int:
    """Bytes that `app.imaging.decode` and one resize take at their peak, with one copy of the file.

    Args:
        image: identified but not loaded; drafted, where it shall come out smaller.
        data: its file.
        full_size: width and height before it was drafted.
    """
    pixels, mode, transparent = image.width * image.height, image.mode, image.has_transparency_data
    stored = _bytes_per_pixel(mode)
    plain = 1 if not transparent and (mode in ("1", "L") or mode.startswith("I;16")) else 4
    converted = transparent or mode not in ("RGB", "L")
    peak = max(stored + plain if converted else stored, plain + 1)  # 1: the average before the resize
    peak = max(peak, _DECODER.get((image.format or "", mode), 0))
    extra = 0
    if image.format == "TIFF":
        peak = max(peak, 2 * stored)  # Pillow turns it upright itself
        extra = _tiff_buffer(image)
    elif image.format == "JPEG":
        extra = _jpeg_coefficients(image, data, full_size)
    return _FIXED_BYTES + len(data) + peak * pixels + extra


def plain_jpeg_cost(data: bytes, num_channels: int, sides: tuple[int, int]) -> int:
    """The same of what `app.imaging.plain_jpeg` decodes to these sides: as Pillow stores it, and averaged."""
    stored = 1 if num_channels == 1 else 4
    return _FIXED_BYTES + len(data) + (stored + 1) * sides[0] * sides[1]


def jpeg_segments(data: bytes) -> Iterator[re.Match[bytes]]:
    """The segments' markers, from the first behind the start of the image to its end; pixels' data are skipped."""
    position = 2
    while (segment := JPEG_SEGMENT.search(data, position)) and segment[0] != END_OF_IMAGE:
        yield segment
        position = segment.end() + int.from_bytes(data[segment.end() : segment.end() + 2])  # its length, these two included


def has_one_scan(data: bytes) -> bool:
    """Told by the head of a JPEG: sequential, and every channel in the first scan. libjpeg then stops behind it.

    False where it cannot be told. The head is a few segments; to count scans takes a search through all of the file.
    """
    num_channels = None
    for segment in jpeg_segments(data):
        marker, start = segment[0][1], segment.end()
        if marker in _SEQUENTIAL_FRAMES and num_channels is None:
            num_channels = data[start + 7 : start + 8]
        elif marker in _OTHER_FRAMES or marker in _SEQUENTIAL_FRAMES:
            return False
        elif segment[0] == START_OF_SCAN:
            return data[start + 2 : start + 3] == num_channels
    return False


def is_quick_to_read(name: str, data: bytes) -> bool:
    """Whether its header is: Pillow takes microseconds for each part of it, and a file may have hundreds of thousands."""
    if len(data) > QUICK_BYTES:
        return False
    if name == "JPEG":
        return any(segment[0] == START_OF_SCAN for segment in islice(jpeg_segments(data), QUICK_PARTS))
    return name == "PNG" and any(kind == b"IDAT" for kind in islice(_png_chunks(data), QUICK_PARTS))


def _png_chunks(data: bytes) -> Iterator[bytes]:
    position = 8
    while kind := data[position + 4 : position + 8]:
        yield kind
        position += 12 + int.from_bytes(data[position : position + 4])


def is_quick_jpeg(data: bytes, pixels: int) -> bool:
    """Of one scan."""
    return len(data) <= QUICK_BYTES and pixels <= QUICK_JPEG_PIXELS


def is_quick_to_decode(image: ImageFile.ImageFile, data: bytes, full_size: tuple[int, int]) -> bool:
    """What `is_quick_to_read` let through: by its pixels. Arguments as of `decode_cost`."""
    pixels = full_size[0] * full_size[1]
    return pixels <= QUICK_PIXELS or (pixels <= QUICK_JPEG_PIXELS and image.format == "JPEG" and has_one_scan(data))


def _bytes_per_pixel(mode: str) -> int:
    """As Pillow stores it: whatever has several channels takes four bytes."""
    if mode in ("1", "L", "P"):
        return 1
    return 2 if mode.startswith("I;16") else 4


def _jpeg_coefficients(image: Any, data: bytes, full_size: tuple[int, int]) -> int:
    """A picture that comes in several scans is held as 16-bit coefficients, in full size whatever was drafted."""
    num_channels: int = image.layers
    width, height = (-(-side // 32) * 32 for side in full_size)  # 32: the largest unit that sampling can make
    num_bytes = 2 * num_channels * width * height
    if num_bytes < _SMALL_BYTES or image.info.get("progressive"):
        return num_bytes
    scan = next((segment.end() for segment in jpeg_segments(data) if segment[0] == START_OF_SCAN), None)
    return num_bytes if scan is not None and data[scan + 2] < num_channels else 0  # as libjpeg: not all channels in the first


def _tiff_buffer(image: Any) -> int:
    """libtiff unpacks a whole strip or tile at a time, and those may be larger than the picture."""
    tags = image.tag_v2
    if image.tile[0].codec_name != "libtiff":
        return 0
    if Base.TileWidth in tags or Base.TileLength in tags:
        part = tags[Base.TileWidth] * tags[Base.TileLength]
    else:
        part = tags[Base.ImageWidth] * min(tags[Base.ImageLength], tags.get(Base.RowsPerStrip, tags[Base.ImageLength]))
    unpacked = tags.get(Base.SamplesPerPixel, 1) * max(tags.get(Base.BitsPerSample, (1,))) / 8
    if tags.get(Base.Compression) == _JPEG_IN_TIFF:
        unpacked *= 3  # coefficients, as above
    if tags.get(Base.PhotometricInterpretation) == _YCBCR:
        unpacked += 4  # converted by libtiff, into a buffer of its own
    return int(part * unpacked)
