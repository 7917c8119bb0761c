"""The JPEGs that cameras and browsers write, decoded in one call; what is unusual in any way is left to Pillow.

Pillow takes a file's head apart in Python and decodes it in several steps, each of which asks for the interpreter lock: for a
photo that a small model sees that is a good part of the time. libjpeg-turbo by way of simplejpeg gives the same pixels, bit for
bit, at the same scale (docs/adr/0008).
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from itertools import islice
from typing import Any

import numpy as np
import simplejpeg
from numpy.typing import NDArray
from PIL.ExifTags import Base

from app.imaging.cost import QUICK_PARTS, START_OF_SCAN, jpeg_segments

SCALES = 8, 4, 2, 1  # at one of which a JPEG is decoded
_SEQUENTIAL_FRAMES = {0xC0, 0xC1}  # baseline, extended; with Huffman coding
_FRAMES = {*range(0xC0, 0xD0)} - {0xC4, 0xC8, 0xCC}  # those three are tables, and kept for later
_APP1, _EXIF, _SHORT = 0xE1, b"Exif\0\0", 3
_BYTE_ORDERS = {b"II*\0": "<", b"MM\0*": ">"}
_MAX_EXIF_ENTRIES = 256  # of the first directory; cameras write some twenty


@dataclass(frozen=True, slots=True)
class PlainJpeg:
    """What the head of a JPEG says that has one scan, of 8 bits, grey or in three colours."""

    size: tuple[int, int]  # width, height, as it is stored
    num_channels: int
    orientation: int  # EXIF's; 1 where there is none

    @property
    def num_pixels(self) -> int:
        return self.size[0] * self.size[1]

    def scale(self, least: int | None) -> int:
        """The largest of `SCALES` at which the shorter side keeps so many pixels, as Pillow's `draft` chooses it."""
        return 1 if least is None else next((scale for scale in SCALES if min(self.size) // least >= scale), 1)

    def sides(self, scale: int) -> tuple[int, int]:
        """Width and height at 1 / scale, as libjpeg rounds them."""
        width, height = self.size
        return -(-width // scale), -(-height // scale)


def read_head(data: bytes) -> PlainJpeg | None:
    """None: it is another JPEG than that, or its head has more than a few parts."""
    frame: bytes | None = None
    exif: bytes | None = None
    for segment in islice(jpeg_segments(data), QUICK_PARTS):
        marker, start = segment[0][1], segment.end()
        if segment[0] == START_OF_SCAN:
            # All channels are in the first scan, so it is the only one: libjpeg stops behind it.
            return None if frame is None or data[start + 2 : start + 3] != frame[7:] else _plain_jpeg(frame, exif)
        if marker in _FRAMES:
            if frame is not None or marker not in _SEQUENTIAL_FRAMES:
                return None
            frame = data[start : start + 8]
        elif marker == _APP1:
            part = data[start + 2 : start + int.from_bytes(data[start : start + 2])]
            if exif is None and part.startswith(_EXIF):
                exif = part[len(_EXIF) :]
            elif part.startswith(_EXIF) or b"Orientation" in part:  # XMP may say it, too
                return None
    return None


def decode_plain_jpeg(data: bytes, head: PlainJpeg, scale: int) -> NDArray[np.uint8] | None:
    """Its pixels at 1 / scale: uint8 (H, W, 4), RGB and a byte without meaning, or (H, W) where it is grey. None: it is broken.

    So does Pillow store them, and can take these for its own.

    Args:
        data: a file of which `read_head` gave `head`.
        scale: of `SCALES`.

    Raises:
        MemoryError: there is none for the pixels.
    """
    width, height = head.sides(scale)
    colours = "GRAY" if head.num_channels == 1 else "RGBX"
    try:
        pixels: NDArray[np.uint8] = simplejpeg.decode_jpeg(data, colours, min_height=height, min_width=width)
    except ValueError:  # also where libjpeg had only a warning: whether it is bearable is Pillow's to say
        return None
    if pixels.shape[:2] != (height, width):
        return None
    return pixels[:, :, 0] if head.num_channels == 1 else pixels


def _plain_jpeg(frame: bytes, exif: bytes | None) -> PlainJpeg | None:
    if len(frame) < 8:
        return None
    precision, height, width, channels = struct.unpack(">2xBHHB", frame)
    orientation = 1 if exif is None else _orientation(exif)
    if precision != 8 or channels not in (1, 3) or not width or not height or orientation is None:
        return None
    return PlainJpeg((width, height), channels, orientation)


def _orientation(exif: bytes) -> int | None:
    """Of the first directory, 1 where it says nothing; None where it is not written as it should be."""
    order = _BYTE_ORDERS.get(exif[:4])
    if order is None or len(exif) < 8:
        return None
    (start,) = struct.unpack_from(f"{order}L", exif, 4)
    if start + 2 > len(exif):
        return None
    (count,) = struct.unpack_from(f"{order}H", exif, start)
    entries = exif[start + 2 : start + 2 + 12 * count]
    if count > _MAX_EXIF_ENTRIES or len(entries) < 12 * count:
        return None
    found: list[Any] = [entry for entry in struct.iter_unpack(f"{order}HHLH2x", entries) if entry[0] == Base.Orientation]
    if not found:
        return 1
    _, kind, values, orientation = found[0]
    return orientation if len(found) == 1 and kind == _SHORT and values == 1 else None
