"""Untrusted bytes -> RGB pixels: an allow-list of formats, the size checked before decoding, one kind of error per fault.

The first picture of an animation or of several pages is taken. EXIF orientation is applied, transparency is laid over
white, 16 bits become 8; colour profiles are ignored, as torchvision and timm do.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from io import BytesIO

import numpy as np
from numpy.typing import NDArray
from PIL import AvifImagePlugin, Image, ImageFile, JpegImagePlugin, features
from PIL.ExifTags import Base
from PIL.Image import Transpose
from PIL.TiffImagePlugin import ImageFileDirectory_v2

from app.errors import ImageTooLarge, InvalidImage, RequestError, UnsupportedImage

_PLUGINS = {"JPEG": "JPEG", "PNG": "PNG", "WEBP": "WebP", "GIF": "GIF", "TIFF": "TIFF", "BMP": "BMP", "AVIF": "AVIF"}
_OPTIONAL = {"WEBP": "webp", "AVIF": "avif"}  # a Pillow may be built without them
FORMATS = {name: title for name, title in _PLUGINS.items() if name not in _OPTIONAL or features.check(_OPTIONAL[name])}
ACCEPTED = ", ".join([*FORMATS.values()][:-1]) + " or " + [*FORMATS.values()][-1]

DRAFT_FACTOR = 2  # a reduced JPEG keeps at least this many times `min_side` (docs/adr/0008)
_MAX_JPEG_SCANS = 64  # a progressive file has about 10; each costs up to 35 ms at 50 megapixels, however few its bytes
_JPEG_SEGMENT = re.compile(rb"\xff[^\x00\x01\xd0-\xd7\xff]")  # the other markers stand alone, inside the pixels' data
_MAX_TIFF_PARTS = 65_536  # strips or tiles; Pillow takes 2.5 microseconds for each, before anything is decoded
# None, LZW, JPEG, Deflate, PackBits, Deflate (old number), Zstandard. Not fax: libtiff writes a line to stderr for every
# broken row, past all logging, and a small file may have millions.
_TIFF_COMPRESSIONS = {1, 5, 7, 8, 32773, 32946, 50000}
_MAX_LAYERS = 8  # how often the tiles of a file may cover the picture; a plane per channel needs 4

# What Pillow keeps for the whole process is set here, once: changing it per call would race between the decode threads.
Image.init()  # registers the formats, which `Image.open` would otherwise do during the first requests
Image.MAX_IMAGE_PIXELS = None  # it warns at its limit and raises only at twice it; ours is checked in `_check_size`
AvifImagePlugin.DEFAULT_MAX_THREADS = 1  # pictures are decoded side by side already
# Pillow warns of broken metadata, which does not harm the pixels.
warnings.filterwarnings("ignore", category=UserWarning, module=r"PIL\.")

# EXIF orientation -> how to turn the stored picture upright; whether that swaps its sides, mirrors x, mirrors y
_UPRIGHT = {
    2: (Transpose.FLIP_LEFT_RIGHT, False, True, False),
    3: (Transpose.ROTATE_180, False, True, True),
    4: (Transpose.FLIP_TOP_BOTTOM, False, False, True),
    5: (Transpose.TRANSPOSE, True, False, False),
    6: (Transpose.ROTATE_270, True, True, False),
    7: (Transpose.TRANSVERSE, True, True, True),
    8: (Transpose.ROTATE_90, True, False, True),
}


@dataclass(frozen=True, slots=True)
class Picture:
    """A decoded picture, upright, perhaps at a reduced scale: its point (x, y) lies in `image` at origin + (x, y) / scale.

    A reduced image has a fraction of a pixel too much at one edge, because its sides are rounded up; so geometry is
    computed from `size`, or the rounding would shift the crop.
    """

    image: Image.Image  # mode RGB, or L where the file is grey: three times cheaper to resize
    size: tuple[int, int]  # width, height at full scale
    origin: tuple[float, float] = (0.0, 0.0)
    scale: float = 1.0


def decode_image(data: bytes, *, max_pixels: int, min_side: int | None = None) -> NDArray[np.uint8]:
    """The picture as RGB uint8 (H, W, 3), upright; read-only.

    Args:
        data: a whole file in one of `FORMATS`.
        max_pixels: largest width times height, told from the header.
        min_side: where given, a JPEG may come out at 1/2, 1/4 or 1/8 of its size, rounded up, as long as its shorter
            side keeps `DRAFT_FACTOR` times this many pixels.

    Raises:
        UnsupportedImage: not one of the formats, or pixels without a known range.
        ImageTooLarge: more pixels than `max_pixels`.
        InvalidImage: broken, cut off, or empty.
    """
    image = open_picture(data, max_pixels=max_pixels, min_side=min_side).image
    return np.asarray(image if image.mode == "RGB" else image.convert("RGB"))


def open_picture(data: bytes, *, max_pixels: int, min_side: int | None = None) -> Picture:
    """As `decode_image`, with the full size kept beside the pixels and grey pictures left grey."""
    if not data:
        raise InvalidImage("The body is empty: send the bytes of an image file.")
    name = _format_of(data)
    if name is None:
        raise UnsupportedImage(
            f"This is not an image in an accepted format ({ACCEPTED}), whatever its name says: convert it to one of them."
        )
    with _blaming_the_file(FORMATS[name]):
        image = _identify(name, data)
        _check_size(image, max_pixels)
        full_size, drafted = image.size, None
        if min_side is not None:
            drafted = image.draft(None, (DRAFT_FACTOR * min_side, DRAFT_FACTOR * min_side))  # None where not a JPEG
        image.load()
        if drafted is None:
            picture = Picture(_plain(image), image.size)
        else:
            picture = Picture(_plain(image), full_size, scale=full_size[0] / drafted[1][2])
        return _upright(picture, _orientation(image))  # after load: a PNG may tell it at its very end


def _format_of(data: bytes) -> str | None:
    """The first of `FORMATS` whose signature the file has."""
    for name in FORMATS:
        accept = Image.OPEN[name][1]
        if accept is not None and accept(data[:16]):
            return name
    return None


def _identify(name: str, data: bytes) -> ImageFile.ImageFile:
    """Read the header and no pixels."""
    if name == "TIFF":
        _check_tiff(data)
    if name == "JPEG":
        _check_jpeg(data)
        # Image.open would also look for further pictures (MPO, as phones write it) and fail where only those are broken.
        return JpegImagePlugin.JpegImageFile(BytesIO(data))
    return Image.open(BytesIO(data), formats=(name,))


def _check_jpeg(data: bytes) -> None:
    """Refuse more passes over the picture than any encoder writes: ten bytes can ask for another one."""
    if data.count(b"\xff\xda") <= _MAX_JPEG_SCANS:
        return
    # Perhaps not all are scans: a phone appends a video, and metadata may hold any bytes. So go from segment to segment.
    num_scans, position = 0, 2
    while (segment := _JPEG_SEGMENT.search(data, position)) and segment[0] != b"\xff\xd9":  # end of image
        num_scans += segment[0] == b"\xff\xda"  # start of scan
        if num_scans > _MAX_JPEG_SCANS:
            raise InvalidImage(f"The JPEG file has more than {_MAX_JPEG_SCANS} scans: save it anew.")
        position = segment.end() + int.from_bytes(data[segment.end() : segment.end() + 2])  # its length, these two included


def _check_tiff(data: bytes) -> None:
    """Refuse what would cost time or flood the log; told from the directory, before Pillow unfolds it."""
    stream = BytesIO(data)
    header = stream.read(8)
    directory = ImageFileDirectory_v2(header + stream.read(8) if header[2] == 43 else header)  # 43: BigTIFF
    stream.seek(directory.next)
    directory.load(stream)
    if directory.get(Base.Compression, 1) not in _TIFF_COMPRESSIONS:
        raise UnsupportedImage("The TIFF file is compressed in an unusual way: save it with LZW or Deflate, or as PNG.")
    num_parts = max(len(directory.get(tag, ())) for tag in (Base.StripOffsets, Base.TileOffsets))
    if num_parts > _MAX_TIFF_PARTS:
        raise InvalidImage(
            f"The TIFF file has {num_parts} strips or tiles, more than {_MAX_TIFF_PARTS}: save it with larger ones."
        )


def _check_size(image: ImageFile.ImageFile, max_pixels: int) -> None:
    width, height = image.size
    if width * height > max_pixels:
        raise ImageTooLarge(
            f"The image has {width} x {height} = {width * height} pixels, more than the {max_pixels} accepted: "
            "scale it down and send it again."
        )
    # A TIFF may list the same rows many thousand times, and each mention is decoded.
    covered = sum((tile[1][2] - tile[1][0]) * (tile[1][3] - tile[1][1]) for tile in image.tile if tile[1])
    if covered > _MAX_LAYERS * width * height:
        raise InvalidImage(f"The {image.format} file lists its pixels more than {_MAX_LAYERS} times: save it anew.")


def _plain(image: Image.Image) -> Image.Image:
    """The same pixels in mode RGB, or L where they are grey and opaque."""
    if image.mode in ("I", "F"):
        raise UnsupportedImage(
            f"The {image.format} file stores 32-bit {'floats' if image.mode == 'F' else 'integers'}, "
            "whose black and white are not known: save it with 8 or 16 bits per channel."
        )
    if image.mode.startswith("I;16"):
        return Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))  # convert("L") would clip at 255
    if image.has_transparency_data:
        # Premultiplied grey (La) knows one conversion only.
        rgba = (image.convert("LA") if image.mode == "La" else image).convert("RGBA")
        white = Image.new("RGB", rgba.size, "white")
        white.paste(rgba, mask=rgba)
        return white
    if image.mode in ("RGB", "L"):
        return image
    return image.convert("L" if image.mode == "1" else "RGB")


def _orientation(image: Image.Image) -> int:
    """The EXIF orientation; 1 where there is none, or none that can be read."""
    try:
        value = image.getexif().get(Base.Orientation, 1)
    except Exception:  # as in `_blaming_the_file`; the pixels are whole, so the picture is taken as it is stored
        return 1
    return value if isinstance(value, int) else 1


def _upright(picture: Picture, orientation: int) -> Picture:
    if orientation not in _UPRIGHT:
        return picture
    method, swaps, mirrors_x, mirrors_y = _UPRIGHT[orientation]
    image = picture.image.transpose(method)
    width, height = reversed(picture.size) if swaps else picture.size
    # What a reduced image has too much stands at its right and lower edge; mirrored, it stands before the picture.
    left = image.width - width / picture.scale if mirrors_x else 0.0
    top = image.height - height / picture.scale if mirrors_y else 0.0
    return Picture(image, (width, height), (left, top), picture.scale)


@contextmanager
def _blaming_the_file(title: str) -> Iterator[None]:
    """Turn whatever Pillow raises on hostile bytes into InvalidImage."""
    try:
        yield
    except RequestError:
        raise
    except Exception as error:
        # Not a list of classes: besides OSError and SyntaxError, broken files give KeyError, AssertionError, struct.error,
        # MemoryError and, where warnings are errors, UserWarning. One left out is a server error that anybody can provoke.
        raise InvalidImage(
            f"The {title} image is broken or cut off: send the complete file, or save it anew with another program."
        ) from error
