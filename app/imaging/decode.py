"""Untrusted bytes -> RGB pixels: an allow-list of formats, size and memory checked before decoding, one error per fault.

The first picture of an animation or of several pages is taken. EXIF orientation is applied, transparency is laid over
white, 16 bits become 8; colour profiles are ignored, as torchvision and timm do.
"""

from __future__ import annotations

import struct
import traceback
import warnings
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from io import BytesIO

import numpy as np
from numpy.typing import NDArray
from PIL import AvifImagePlugin, GifImagePlugin, Image, ImageFile, JpegImagePlugin, PngImagePlugin, features
from PIL.ExifTags import Base
from PIL.Image import Transpose
from PIL.TiffImagePlugin import ImageFileDirectory_v2

from app.errors import ImageTooLarge, InferenceFailed, InvalidImage, ServiceError, UnsupportedImage
from app.imaging.budget import DecodeBudget, NeedsTime
from app.imaging.cost import (
    START_OF_SCAN,
    decode_cost,
    has_one_scan,
    is_quick_jpeg,
    is_quick_to_decode,
    is_quick_to_read,
    jpeg_segments,
    plain_jpeg_cost,
)
from app.imaging.plain_jpeg import PlainJpeg, decode_plain_jpeg, read_head

_PLUGINS = {"JPEG": "JPEG", "PNG": "PNG", "WEBP": "WebP", "GIF": "GIF", "TIFF": "TIFF", "BMP": "BMP", "AVIF": "AVIF"}
_OPTIONAL = {"WEBP": "webp", "AVIF": "avif"}  # a Pillow may be built without them
FORMATS = {name: title for name, title in _PLUGINS.items() if name not in _OPTIONAL or features.check(_OPTIONAL[name])}
# In lower case.
SUFFIXES = frozenset({".avif", ".bmp", ".gif", ".jfif", ".jpe", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp"})
ACCEPTED = ", ".join([*FORMATS.values()][:-1]) + " or " + [*FORMATS.values()][-1]

DRAFT_FACTOR = 2  # a reduced JPEG keeps at least this many times `min_side` (docs/adr/0008)
_MAX_JPEG_SCANS = 64  # a progressive file has about 10; each costs up to 35 ms at 50 megapixels, however few its bytes
_MAX_TIFF_PARTS = 65_536  # strips or tiles; Pillow takes 2.5 microseconds for each, before anything is decoded
# None, LZW, JPEG, Deflate, PackBits, Deflate (old number), Zstandard. Not fax: libtiff writes a line to stderr for every
# broken row, past all logging, and a small file may have millions.
_TIFF_COMPRESSIONS = {1, 5, 7, 8, 32773, 32946, 50000}
_MAX_TIFF_VALUES = 3 * 65_536  # of any other tag: the colour map of 16 bits; Pillow makes 40 bytes of each
_TIFF_SIDES = {Base.ImageWidth, Base.ImageLength, Base.RowsPerStrip, Base.TileWidth, Base.TileLength}
_BAND_PIXELS = 2**16  # converted at a time, so that a large picture is never there three times
_MAX_LAYERS = 8  # how often the tiles of a file may cover the picture; a plane per channel needs 4

# What Pillow keeps for the whole process is set here, once: changing it per call would race between the decode threads.
Image.init()  # registers the formats, which `Image.open` would otherwise do during the first requests
Image.MAX_IMAGE_PIXELS = None  # it warns at its limit and raises only at twice it; ours is checked in `_check_size`
AvifImagePlugin.DEFAULT_MAX_THREADS = 1  # pictures are decoded side by side already
PngImagePlugin.MAX_TEXT_MEMORY = 8 * 2**20  # of 64: 60 kB of compressed text took 260 MB, before any size is known
# Pillow warns of broken metadata, which does not harm the pixels.
warnings.filterwarnings("ignore", category=UserWarning, module=r"PIL\.")


@dataclass(frozen=True, slots=True)
class Turn:
    """One of the eight ways a camera may be held; mirrored first, swapped last, seen from the upright picture."""

    method: Transpose
    mirrors_x: bool = False
    mirrors_y: bool = False
    swaps: bool = False


# EXIF orientation -> how to turn the stored picture upright
_UPRIGHT = {
    2: Turn(Transpose.FLIP_LEFT_RIGHT, mirrors_x=True),
    3: Turn(Transpose.ROTATE_180, mirrors_x=True, mirrors_y=True),
    4: Turn(Transpose.FLIP_TOP_BOTTOM, mirrors_y=True),
    5: Turn(Transpose.TRANSPOSE, swaps=True),
    6: Turn(Transpose.ROTATE_270, mirrors_x=True, swaps=True),
    7: Turn(Transpose.TRANSVERSE, mirrors_x=True, mirrors_y=True, swaps=True),
    8: Turn(Transpose.ROTATE_90, mirrors_y=True, swaps=True),
}


@dataclass(frozen=True, slots=True)
class Picture:
    """A decoded picture as it is stored, perhaps lying on its side, perhaps at a reduced scale.

    A reduced image has a fraction of a pixel too much at its right and lower edge, because its sides are rounded up; so
    geometry is computed from `size`, or the rounding would shift the crop.
    """

    image: Image.Image  # mode RGB or RGBX, or L where the file is grey: three times cheaper to resize
    size: tuple[int, int]  # width, height at full scale, upright
    scale: float = 1.0
    turn: Turn | None = None  # what makes it upright: done last, when it is small

    def stored_box(self, left: float, top: float, right: float, bottom: float) -> tuple[float, float, float, float]:
        """Where a box, upright and at full scale, lies in `image`."""
        width, height = self.size
        if self.turn is not None:
            if self.turn.mirrors_x:
                left, right = width - right, width - left
            if self.turn.mirrors_y:
                top, bottom = height - bottom, height - top
            if self.turn.swaps:
                left, top, right, bottom = top, left, bottom, right
        return left / self.scale, top / self.scale, right / self.scale, bottom / self.scale

    def pixels(self, part: Image.Image) -> NDArray[np.uint8]:
        """A part of `image` turned upright: RGB uint8 (H, W, 3), read-only."""
        if self.turn is not None:
            part = part.transpose(self.turn.method)
        if part.mode == "L":
            part = part.convert("RGB")
        # In one step, without a second image and without giving up the interpreter lock (docs/adr/0008).
        return np.frombuffer(part.tobytes("raw", "RGB"), np.uint8).reshape(part.height, part.width, 3)


class _FirstOfGif(GifImagePlugin.GifImageFile):
    """Only the first picture is wanted. Pillow would prepare for the second while it reads the header, a byte per pixel."""

    disposal_method = property(lambda _self: 0, lambda _self, _value: None)


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
        InferenceFailed: there was no memory for it.
    """
    with open_picture(data, max_pixels=max_pixels, min_side=min_side) as picture:
        return picture.pixels(picture.image)


@contextmanager
def open_picture(
    data: bytes, *, max_pixels: int, min_side: int | None = None, budget: DecodeBudget | None = None, quick: bool = False
) -> Iterator[Picture]:
    """As `decode_image`, for the block that follows: grey pictures left grey, and the sides as they are stored.

    The memory it takes is held from `budget`, where there is one, until the block ends; then the picture is closed.

    Raises:
        ImageTooLarge: also where it would take more than the whole budget.
        InferenceFailed: also where the block itself runs out of memory.
        NeedsTime: where it is to be quick and cannot be.
    """
    if not data:
        raise InvalidImage("The body is empty: send the bytes of an image file.")
    name = _format_of(data)
    if name is None:
        raise UnsupportedImage(
            f"This is not an image in an accepted format ({ACCEPTED}), whatever its name says: convert it to one of them."
        )
    least = None if min_side is None else DRAFT_FACTOR * min_side
    if name == "JPEG" and (head := read_head(data)) is not None and head.num_pixels <= max_pixels:
        with _open_plain_jpeg(data, head, least, budget, quick) as plain:
            if plain is not None:
                yield plain
                return
    if quick and not is_quick_to_read(name, data):
        raise NeedsTime
    with _blaming_the_file(FORMATS[name]):
        image = _identify(name, data)
        _check_size(image, max_pixels)
        _check_mode(image)
        full_size, scale = image.size, 1.0
        if least is not None:
            drafted = image.draft(None, (least, least))  # None where not a JPEG
            scale = 1.0 if drafted is None else full_size[0] / drafted[1][2]
        cost = decode_cost(image, data, full_size)
    if quick and not is_quick_to_decode(image, data, full_size):
        raise NeedsTime
    with _held(budget, cost, quick), _blaming_the_memory():
        try:
            with _blaming_the_file(FORMATS[name]), _blaming_the_memory():
                picture = _load(image, full_size, scale)
            try:
                yield picture
            finally:
                picture.image.close()
        finally:
            _release(image)


@contextmanager
def _open_plain_jpeg(
    data: bytes, head: PlainJpeg, least: int | None, budget: DecodeBudget | None, quick: bool
) -> Iterator[Picture | None]:
    """As `open_picture`; None where the file is broken."""
    if quick and not is_quick_jpeg(data, head.num_pixels):
        raise NeedsTime
    scale = head.scale(least)
    with _held(budget, plain_jpeg_cost(data, head.num_channels, head.sides(scale)), quick), _blaming_the_memory():
        pixels = decode_plain_jpeg(data, head, scale)
        if pixels is None:
            yield None
            return
        mode, (height, width) = "L" if pixels.ndim == 2 else "RGBX", pixels.shape[:2]
        # Not a copy: to make one asks for the interpreter lock once more.
        image = Image.frombuffer(mode, (width, height), pixels, "raw", mode, 0, 1)
        del pixels  # the image keeps them, until it is closed
        try:
            yield _picture(image, head.size, scale, _UPRIGHT.get(head.orientation))
        finally:
            image.close()


def _held(budget: DecodeBudget | None, cost: int, quick: bool) -> AbstractContextManager[None]:
    return nullcontext() if budget is None else budget.hold(cost, wait=not quick)


def _load(image: ImageFile.ImageFile, full_size: tuple[int, int], scale: float) -> Picture:
    image.load()
    vars(image).pop("_decoder", None)  # of WebP and AVIF: up to 8 bytes per pixel, no longer needed
    turn = _UPRIGHT.get(_orientation(image))  # after load: a PNG may tell it at its very end
    size = image.size if scale == 1 else full_size  # load may have turned a TIFF already
    plain = _plain(image)
    if plain is not image:
        image.close()
    return _picture(plain, size, scale, turn)


def _picture(image: Image.Image, size: tuple[int, int], scale: float, turn: Turn | None) -> Picture:
    """Of what is stored, and its size at full scale."""
    width, height = size
    return Picture(image, (height, width) if turn is not None and turn.swaps else size, scale, turn)


def _release(image: ImageFile.ImageFile) -> None:
    """Free its memory now: references remain, in a traceback for one."""
    vars(image).pop("_decoder", None)
    image.close()


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
        image = JpegImagePlugin.JpegImageFile(BytesIO(data))
        image.decodermaxblock = len(data)  # in one call: each gives up the interpreter lock and waits to have it back
        return image
    if name == "GIF":
        return _FirstOfGif(BytesIO(data))
    return Image.open(BytesIO(data), formats=(name,))


def _check_jpeg(data: bytes) -> None:
    """Refuse more passes over the picture than any encoder writes: ten bytes can ask for another one."""
    if has_one_scan(data) or data.count(START_OF_SCAN) <= _MAX_JPEG_SCANS:
        return
    # Perhaps not all are scans: a phone appends a video, and metadata may hold any bytes. So go from segment to segment.
    num_scans = 0
    for segment in jpeg_segments(data):
        num_scans += segment[0] == START_OF_SCAN
        if num_scans > _MAX_JPEG_SCANS:
            raise InvalidImage(f"The JPEG file has more than {_MAX_JPEG_SCANS} scans: save it anew.")


def _check_tiff(data: bytes) -> None:
    """Refuse what would cost time or memory, or flood the log; told from the directory, before Pillow unfolds it."""
    for tag, kind, count in _tiff_entries(data):
        if tag in (Base.StripOffsets, Base.TileOffsets) and count > _MAX_TIFF_PARTS:
            raise InvalidImage(
                f"The TIFF file has {count} strips or tiles, more than {_MAX_TIFF_PARTS}: save it with larger ones."
            )
        # Numbers as Pillow and libtiff both read them, for `decode_cost` has them from the one and the other obeys them.
        odd = tag in _TIFF_SIDES and (kind not in (3, 4, 16) or count != 1)  # short, long, long of 8 bytes
        if odd or (kind not in (1, 2, 7) and count > _MAX_TIFF_VALUES):  # bytes, text, anything: not unfolded
            raise InvalidImage(f"The TIFF file's tag {tag} has {count} values of kind {kind}: save it anew.")
    stream = BytesIO(data)
    header = stream.read(8)
    directory = ImageFileDirectory_v2(header + stream.read(8) if header[2] == 43 else header)  # 43: BigTIFF
    stream.seek(directory.next)
    directory.load(stream)
    if directory.get(Base.Compression, 1) not in _TIFF_COMPRESSIONS:
        raise UnsupportedImage("The TIFF file is compressed in an unusual way: save it with LZW or Deflate, or as PNG.")


def _tiff_entries(data: bytes) -> Iterator[tuple[int, int, int]]:
    """Tag, kind and number of values of each entry in the first directory."""
    order, big = "<" if data[:2] == b"II" else ">", data[2] == 43
    (start,) = struct.unpack_from(f"{order}{'Q' if big else 'L'}", data, 8 if big else 4)
    (num_entries,) = struct.unpack_from(f"{order}{'Q' if big else 'H'}", data, start)
    entry = struct.Struct(f"{order}{'HHQ8x' if big else 'HHL4x'}")
    start += 8 if big else 2
    for index in range(num_entries):
        yield entry.unpack_from(data, start + index * entry.size)


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


def _check_mode(image: Image.Image) -> None:
    if image.mode in ("I", "F"):
        raise UnsupportedImage(
            f"The {image.format} file stores 32-bit {'floats' if image.mode == 'F' else 'integers'}, "
            "whose black and white are not known: save it with 8 or 16 bits per channel."
        )


def _plain(image: Image.Image) -> Image.Image:
    """The same pixels in mode RGB, or L where they are grey and opaque; itself, or converted band by band."""
    if image.mode in ("RGB", "L") and not image.has_transparency_data:
        return image
    num_rows = max(1, _BAND_PIXELS // image.width)
    if image.height <= num_rows:
        return _plain_band(image)
    grey = image.mode.startswith("I;16") or (image.mode == "1" and not image.has_transparency_data)
    plain = Image.new("L" if grey else "RGB", image.size)
    for top in range(0, image.height, num_rows):
        band = image.crop((0, top, image.width, min(top + num_rows, image.height)))
        plain.paste(_plain_band(band), (0, top))
    return plain


def _plain_band(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I;16"):
        return Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))  # convert("L") would clip at 255
    if image.has_transparency_data:
        # Premultiplied grey (La) knows one conversion only.
        rgba = (image.convert("LA") if image.mode == "La" else image).convert("RGBA")
        white = Image.new("RGB", rgba.size, "white")
        white.paste(rgba, mask=rgba)
        return white
    return image.convert("L" if image.mode == "1" else "RGB")


def _orientation(image: Image.Image) -> int:
    """The EXIF orientation; 1 where there is none, or none that can be read."""
    try:
        value = image.getexif().get(Base.Orientation, 1)
    except Exception:  # as in `_blaming_the_file`; the pixels are whole, so the picture is taken as it is stored
        return 1
    return value if isinstance(value, int) else 1


@contextmanager
def _blaming_the_file(title: str) -> Iterator[None]:
    """Turn whatever Pillow raises on hostile bytes into InvalidImage."""
    try:
        yield
    except ServiceError:
        raise
    except Exception as error:
        traceback.clear_frames(error.__traceback__)  # they hold half a picture, as long as somebody holds the error
        # Not a list of classes: besides OSError and SyntaxError, broken files give KeyError, AssertionError, struct.error,
        # MemoryError and, where warnings are errors, UserWarning. One left out is a server error that anybody can provoke.
        raise InvalidImage(
            f"The {title} image is broken or cut off: send the complete file, or save it anew with another program."
        ) from error


@contextmanager
def _blaming_the_memory() -> Iterator[None]:
    """Size and cost have been found acceptable, so that there is no memory is not the file's fault."""
    try:
        yield
    except MemoryError as error:
        traceback.clear_frames(error.__traceback__)
        raise InferenceFailed("The service ran out of memory while it decoded the image: try again later.") from error
