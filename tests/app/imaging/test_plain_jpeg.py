"""What is decoded past Pillow comes out as Pillow has it, bit for bit; and everything unusual is left to Pillow."""

from __future__ import annotations

import struct
import warnings
from io import BytesIO
from typing import Any

import numpy as np
import pytest
from PIL import Image
from PIL.JpegImagePlugin import JpegImageFile

from app.imaging import decode, plain_jpeg
from app.imaging.budget import DecodeBudget, NeedsTime
from app.imaging.cost import QUICK_BYTES, QUICK_PARTS, START_OF_SCAN, jpeg_segments
from app.imaging.decode import decode_image, open_picture
from app.imaging.plain_jpeg import SCALES, decode_plain_jpeg, read_head
from tests.images import encode, flipped, make_jpeg, orientation_exif, photo, truncated

PHOTO = Image.fromarray(photo(203, 150))
SCAN_OF_THREE = START_OF_SCAN + b"\x00\x0c\x03"
EXIF_START = b"Exif\0\0"


def by_pillow(data: bytes, least: int | None = None) -> np.ndarray:
    image = JpegImageFile(BytesIO(data))
    if least is not None:
        image.draft(None, (least, least))
    return np.asarray(image)


def with_part(part: bytes, marker: int = 0xE1, data: bytes | None = None) -> bytes:
    """A good file with one more segment at its front."""
    whole = make_jpeg() if data is None else data
    return whole[:2] + bytes([0xFF, marker]) + struct.pack(">H", len(part) + 2) + part + whole[2:]


def tiff(order: str, entries: list[tuple[int, int, int, int]]) -> bytes:
    head = {"<": b"II*\0", ">": b"MM\0*"}[order]
    body = b"".join(struct.pack(f"{order}HHLHxx", *entry) for entry in entries)
    return head + struct.pack(f"{order}LH", 8, len(entries)) + body + bytes(4)


def frame_changed(offset: int, value: int) -> bytes:
    """With another byte in the frame's header: 2 is the precision, 7 the number of channels."""
    data = bytearray(make_jpeg())
    frame = next(segment.end() for segment in jpeg_segments(bytes(data)) if segment[0][1] == 0xC0)
    data[frame + offset] = value
    return bytes(data)


def seen(pixels: np.ndarray) -> np.ndarray:
    """Without the byte that says nothing."""
    return pixels if pixels.ndim == 2 else pixels[..., :3]


@pytest.mark.parametrize(
    ("mode", "options"),
    [
        ("RGB", {"subsampling": 0}),
        ("RGB", {"subsampling": 1}),
        ("RGB", {"subsampling": 2}),
        ("RGB", {"quality": 30, "restart_marker_blocks": 3}),
        ("RGB", {"keep_rgb": True}),
        ("RGB", {"exif": orientation_exif(6)}),
        ("L", {}),
        ("L", {"optimize": True}),
    ],
)
@pytest.mark.parametrize("least", [None, 1, 30, 75, 76, 150, 400])
def test_the_pixels_are_pillows(mode: str, options: dict[str, Any], least: int | None) -> None:
    """At every scale, for every way of sampling colours, and for sides that no scale divides."""
    data = encode(PHOTO.convert(mode), "JPEG", **options)
    head = read_head(data)
    assert head is not None
    assert PHOTO.size == head.size

    pixels = decode_plain_jpeg(data, head, head.scale(least))

    assert pixels is not None
    assert np.array_equal(by_pillow(data, least), seen(pixels))


def test_every_scale_is_taken() -> None:
    """Else the test above would not be of all of them."""
    head = read_head(encode(PHOTO, "JPEG"))
    assert head is not None

    assert {head.scale(least) for least in (1, 30, 75, 400)} == set(SCALES)


@pytest.mark.parametrize("file", range(4))
def test_of_broken_files_it_reads_only_what_pillow_reads_alike(file: int) -> None:
    """Bytes changed at random and ends cut off: the same pixels and orientation, or none."""
    rng = np.random.default_rng(file)
    grey = encode(PHOTO.convert("L"), "JPEG")
    data = [make_jpeg(), make_jpeg(subsampling=0, restart_marker_blocks=4), grey, make_jpeg(exif=orientation_exif(8))][file]
    read = 0
    for number in range(400):
        broken = flipped(data, rng, 1 + number % 3) if number % 4 else truncated(data, rng.random())
        head = read_head(broken)
        if head is None or head.num_pixels > 10**6:
            continue
        pixels = decode_plain_jpeg(broken, head, 1)
        if pixels is not None:
            read += 1
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                image = JpegImageFile(BytesIO(broken))
                assert np.array_equal(np.asarray(image), seen(pixels))
                assert image.getexif().get(0x0112, 1) == head.orientation
    assert read > 20


@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize(
    ("entries", "orientation"), [([], 1), ([(0x0100, 3, 1, 9)], 1), ([(0x0110, 3, 1, 2), (0x0112, 3, 1, 7)], 7)]
)
def test_the_orientation_is_read(order: str, entries: list[tuple[int, int, int, int]], orientation: int) -> None:
    head = read_head(with_part(EXIF_START + tiff(order, entries)))

    assert head is not None
    assert orientation == head.orientation


@pytest.mark.parametrize(
    "data",
    [
        pytest.param(make_jpeg(progressive=True), id="several scans"),
        pytest.param(encode(PHOTO.convert("CMYK"), "JPEG"), id="four channels"),
        pytest.param(frame_changed(2, 12), id="12 bits"),
        pytest.param(frame_changed(7, 2), id="two channels"),
        pytest.param(
            make_jpeg().replace(START_OF_SCAN + b"\x00\x0c\x03", START_OF_SCAN + b"\x00\x0c\x01"), id="a channel a scan"
        ),
        pytest.param(make_jpeg().replace(b"\xff\xc0", b"\xff\xc9"), id="arithmetic coding"),
        pytest.param(with_part(b"\x00" * 20, 0xC0), id="two frames"),
        pytest.param(with_part(EXIF_START + tiff("<", []), data=with_part(EXIF_START + tiff("<", []))), id="two EXIF blocks"),
        pytest.param(with_part(EXIF_START + b"II"), id="EXIF cut off"),
        pytest.param(with_part(EXIF_START + b"MM\0*\0\0\0\x08\0\x09"), id="EXIF with fewer entries than it says"),
        pytest.param(with_part(EXIF_START + b"MM\0*\0\0\xff\x08\0\x09"), id="EXIF that points behind itself"),
        pytest.param(with_part(EXIF_START + tiff("<", [(0x0112, 4, 1, 6)])), id="orientation of another kind"),
        pytest.param(with_part(EXIF_START + tiff("<", [(0x0112, 3, 1, 6)] * 2)), id="orientation twice"),
        pytest.param(with_part(b"http://ns.adobe.com/xap/1.0/\0<x tiff:Orientation='6'/>"), id="orientation in XMP"),
        pytest.param(make_jpeg()[: make_jpeg().index(START_OF_SCAN) + 4], id="cut off in the scan's header"),
        pytest.param(make_jpeg()[:30], id="cut off before"),
        pytest.param(b"\xff\xd8\xff", id="nothing"),
    ],
)
def test_what_is_unusual_is_left_to_pillow(data: bytes) -> None:
    assert read_head(data) is None


def test_many_parts_before_the_pixels_are_not_read_here() -> None:
    data = make_jpeg()
    for _ in range(QUICK_PARTS):
        data = with_part(b"", 0xFE, data)

    assert read_head(data) is None
    assert np.array_equal(decode_image(make_jpeg(), max_pixels=10**6), decode_image(data, max_pixels=10**6))


def test_a_plain_file_is_read_past_pillow(monkeypatch: pytest.MonkeyPatch) -> None:
    """And a broken one that Pillow bears with is read by Pillow, its bytes given back before."""
    opened: list[bytes] = []

    def identify(name: str, data: bytes, real: Any = decode._identify) -> Any:
        opened.append(data)
        return real(name, data)

    monkeypatch.setattr(decode, "_identify", identify)
    data = make_jpeg(photo(64, 64))
    bearable = bytearray(data)
    bearable[-200] ^= 0xFF  # which libjpeg has a warning for
    budget = DecodeBudget(7 * 2**20)  # for one at a time

    with open_picture(data, max_pixels=10**6, budget=budget) as plain:
        assert np.array_equal(by_pillow(data), seen(np.asarray(plain.image)))
        assert not opened
    with open_picture(bytes(bearable), max_pixels=10**6, budget=budget) as picture:
        assert np.array_equal(by_pillow(bytes(bearable)), np.asarray(picture.image))
    assert opened == [bearable]


def test_what_takes_long_is_not_quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """By its bytes, or its pixels."""
    many_bytes = make_jpeg() + bytes(QUICK_BYTES)
    with pytest.raises(NeedsTime), open_picture(many_bytes, max_pixels=10**6, quick=True):
        pass
    monkeypatch.setattr("app.imaging.cost.QUICK_JPEG_PIXELS", 120 * 80 - 1)
    with pytest.raises(NeedsTime), open_picture(make_jpeg(), max_pixels=10**6, quick=True):
        pass
    with open_picture(make_jpeg(), max_pixels=10**6) as picture:
        assert picture.size == (120, 80)


def test_another_size_than_the_head_says_is_no_picture(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever decodes may not read the head as we do; then its pixels are not taken."""
    data = make_jpeg()
    head = read_head(data)
    assert head is not None
    monkeypatch.setattr(plain_jpeg.simplejpeg, "decode_jpeg", lambda *_args, **_options: np.zeros((80, 119, 3), np.uint8))

    assert decode_plain_jpeg(data, head, 1) is None
