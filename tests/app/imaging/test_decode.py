"""Any bytes become RGB pixels or one of three errors of the caller; nothing else."""

from __future__ import annotations

import contextlib
import struct
import threading
import zlib
from collections.abc import Callable

import numpy as np
import pytest
from PIL import Image, ImageFile

from app.errors import ImageTooLarge, InvalidImage, RequestError, UnsupportedImage
from app.imaging.budget import NeedsTime
from app.imaging.cost import QUICK_BYTES, QUICK_PIXELS
from app.imaging.decode import FORMATS, decode_image, open_picture
from tests.images import (
    encode,
    flipped,
    make_jpeg,
    make_png,
    orientation_exif,
    photo,
    png_bomb_header,
    png_with_chunk,
    truncated,
)

MAX_PIXELS = 1_000_000
PHOTO = photo()
GREY = np.asarray(Image.fromarray(PHOTO).convert("L"))


def decode(data: bytes, min_side: int | None = None) -> np.ndarray:
    image = decode_image(data, max_pixels=MAX_PIXELS, min_side=min_side)
    assert np.uint8 == image.dtype
    assert image.shape[2:] == (3,)
    return image


def difference(first: np.ndarray, second: np.ndarray) -> float:
    """Mean absolute difference in grey levels."""
    return float(np.abs(first.astype(int) - second).mean())


@pytest.mark.parametrize(
    ("file_format", "options", "tolerance"),
    [
        ("JPEG", {"quality": 95}, 3),
        ("JPEG", {"quality": 95, "progressive": True}, 3),
        ("MPO", {"quality": 95, "save_all": True, "append_images": [Image.new("RGB", (60, 40))]}, 3),
        ("PNG", {}, 0),
        ("PNG", {"save_all": True, "append_images": [Image.new("RGB", (120, 80))]}, 0),
        ("WEBP", {"lossless": True}, 0),
        ("WEBP", {"lossless": True, "save_all": True, "append_images": [Image.new("RGB", (120, 80))]}, 0),
        ("GIF", {"save_all": True, "append_images": [Image.new("RGB", (120, 80))]}, 9),
        ("TIFF", {}, 0),
        ("TIFF", {"compression": "tiff_lzw"}, 0),
        ("TIFF", {"compression": "tiff_adobe_deflate", "save_all": True, "append_images": [Image.new("RGB", (9, 9))]}, 0),
        ("BMP", {}, 0),
        ("AVIF", {"quality": 95}, 3),
    ],
)
def test_every_accepted_format_gives_its_first_picture(file_format: str, options: dict, tolerance: float) -> None:
    """Animations, pages and the several pictures of a phone's JPEG (MPO) give the first; lossless formats exactly."""
    if file_format not in {*FORMATS, "MPO"}:
        pytest.skip(f"this Pillow is built without {file_format}")

    image = decode(encode(Image.fromarray(PHOTO), file_format, **options))

    assert PHOTO.shape == image.shape
    assert difference(PHOTO, image) <= tolerance


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize(("file_format", "options"), [("PNG", {}), ("TIFF", {}), ("WEBP", {"lossless": True}), ("JPEG", {})])
@pytest.mark.parametrize("min_side", [None, 8])
def test_orientation_is_applied(orientation: int, file_format: str, options: dict, min_side: int | None) -> None:
    """A picture stored in any of the eight EXIF orientations comes out upright, at full and at reduced scale."""
    upright = {
        1: lambda a: a,
        2: lambda a: a[:, ::-1],
        3: lambda a: a[::-1, ::-1],
        4: lambda a: a[::-1],
        5: lambda a: a.transpose(1, 0, 2),
        6: lambda a: np.rot90(a, -1),
        7: lambda a: np.rot90(a, 2).transpose(1, 0, 2),
        8: np.rot90,
    }[orientation]
    stored = Image.fromarray(PHOTO)

    image = decode(encode(stored, file_format, exif=orientation_exif(orientation), **options), min_side)

    expected = upright(decode(encode(stored, file_format, **options), min_side))
    assert np.array_equal(expected, image)


def test_a_jpeg_may_come_out_reduced_but_never_below_twice_the_shorter_side_needed() -> None:
    """Sides are rounded up, colour stays, other formats keep their size."""
    pixels = photo(501, 375)

    assert decode(make_jpeg(pixels)).shape == (375, 501, 3)
    assert decode(make_jpeg(pixels), 94).shape == (375, 501, 3)
    assert decode(make_jpeg(pixels), 93).shape == (188, 251, 3)
    assert decode(make_jpeg(pixels), 1).shape == (47, 63, 3)
    assert decode(make_png(pixels), 1).shape == (375, 501, 3)
    assert decode(make_jpeg(pixels), 93).std(axis=2).any()


@pytest.mark.parametrize(
    ("mode", "file_format"),
    [("L", "JPEG"), ("L", "PNG"), ("L", "BMP"), ("L", "AVIF"), ("LA", "PNG"), ("LA", "TIFF"), ("1", "PNG"), ("1", "TIFF")],
)
def test_grey_pictures_have_three_equal_channels(mode: str, file_format: str) -> None:
    """Grey, grey with alpha, and black and white."""
    if file_format not in FORMATS:
        pytest.skip(f"this Pillow is built without {file_format}")
    source = Image.fromarray(PHOTO).convert(mode)

    image = decode(encode(source, file_format, **({"quality": 95} if mode == "L" else {})))

    assert (image == image[..., :1]).all()
    assert difference(np.asarray(source.convert("L")), image[..., 0]) < 3


@pytest.mark.parametrize("file_format", ["JPEG", "TIFF"])
@pytest.mark.parametrize("min_side", [None, 40])
def test_cmyk_is_not_inverted(file_format: str, min_side: int | None) -> None:
    """CMYK, in a JPEG stored inverted as Adobe does, gives the colours of the picture."""
    image = decode(encode(Image.fromarray(PHOTO).convert("CMYK"), file_format, quality=95), min_side)

    assert difference(PHOTO, image) < 5


@pytest.mark.parametrize("file_format", ["PNG", "TIFF"])
@pytest.mark.parametrize("byte_order", ["<", ">"])
def test_sixteen_bits_are_scaled_not_clipped(file_format: str, byte_order: str) -> None:
    """The high byte counts: half of the range stays half of the range."""
    deep = (GREY.astype(np.uint16) * 257).astype(f"{byte_order}u2")

    image = decode(encode(Image.fromarray(deep), file_format))

    assert np.array_equal(GREY, image[..., 0])


@pytest.mark.parametrize(("mode", "file_format"), [("RGBA", "PNG"), ("RGBA", "WEBP"), ("RGBA", "TIFF"), ("LA", "PNG")])
def test_transparency_is_laid_over_white(mode: str, file_format: str) -> None:
    """Transparent is white, half transparent black is grey, opaque is itself."""
    source = Image.new(mode, (3, 1), (0, 0, 0, 255)[-len(mode) :])
    source.putalpha(Image.frombytes("L", (3, 1), bytes([0, 127, 255])))

    image = decode(encode(source, file_format, **({"lossless": True, "exact": True} if file_format == "WEBP" else {})))

    assert image[0].tolist() == [[255] * 3, [128] * 3, [0] * 3]


@pytest.mark.parametrize(
    ("mode", "file_format", "transparency"),
    [("P", "PNG", 0), ("P", "PNG", b"\x00\xff"), ("P", "GIF", 0), ("L", "PNG", 0), ("RGB", "PNG", (0, 0, 0)), ("1", "PNG", 0)],
)
def test_a_transparent_colour_is_white(mode: str, file_format: str, transparency: int | bytes | tuple[int, ...]) -> None:
    """Palettes and colour keys: the colour declared transparent turns white, the other stays."""
    source = Image.new("L", (2, 1), 0)
    source.putpixel((1, 0), 1)
    if mode == "P":
        source = source.convert("P")
        source.putpalette([0, 0, 0, 200, 100, 50])
    else:
        source = source.point([0, 255] * 128).convert(mode)

    image = decode(encode(source, file_format, transparency=transparency))

    assert image[0, 0].tolist() == [255, 255, 255]
    assert ([200, 100, 50] if mode == "P" else [255, 255, 255]) == image[0, 1].tolist()


@pytest.mark.parametrize("mode", ["I", "F"])
def test_pixels_without_a_known_range_are_refused(mode: str) -> None:
    """Nobody can say what white is in 32-bit integers and floats."""
    with pytest.raises(UnsupportedImage, match="8 or 16 bits"):
        decode(encode(Image.fromarray(PHOTO).convert(mode), "TIFF"))


@pytest.mark.parametrize(
    "data", [b"<!doctype html>", b"GIF", b"\x00" * 1000, b"%PDF-1.7", encode(Image.fromarray(PHOTO), "PPM")]
)
def test_other_formats_are_refused_with_the_accepted_ones_named(data: bytes) -> None:
    """A text or a PDF named .jpg ends here, and so does an image format that Pillow reads and we do not."""
    with pytest.raises(UnsupportedImage, match=r"JPEG, PNG, WebP, GIF, TIFF, BMP"):
        decode(data)


def test_an_empty_body_is_named_as_such() -> None:
    with pytest.raises(InvalidImage, match="body is empty"):
        decode(b"")


@pytest.mark.parametrize("file_format", FORMATS)
@pytest.mark.parametrize("share", [0.2, 0.5, 0.9])
def test_a_cut_off_file_is_invalid(file_format: str, share: float) -> None:
    """No half picture, and the cause is kept for the log."""
    with pytest.raises(InvalidImage, match="broken or cut off") as caught:
        decode(truncated(encode(Image.fromarray(PHOTO), file_format), share))

    assert caught.value.__cause__ is not None
    assert not ImageFile.LOAD_TRUNCATED_IMAGES


@pytest.mark.parametrize(("width", "height"), [(0, 0), (0, 10), (10, 0)])
def test_an_image_without_pixels_is_invalid(width: int, height: int) -> None:
    with pytest.raises(InvalidImage):
        decode(png_bomb_header(width, height))


@pytest.mark.parametrize(
    ("width", "height"), [(1001, 1000), (100_000, 100_000), (1, 2**31 - 1), (2**31 - 1, 2**31 - 1), (13_400, 13_400)]
)
def test_too_many_pixels_are_refused_before_decoding(width: int, height: int) -> None:
    """Both numbers are told. The file has no pixels at all, so decoding it would have failed with another error."""
    with pytest.raises(ImageTooLarge, match=rf"{width} x {height} = {width * height} pixels.* {MAX_PIXELS} "):
        decode(png_bomb_header(width, height))


@pytest.mark.parametrize("file_format", ["JPEG", "PNG", "GIF", "WEBP", "TIFF", "BMP", "AVIF"])
def test_the_pixel_limit_holds_for_every_format(file_format: str) -> None:
    """One pixel too many is too many; exactly the limit is accepted."""
    if file_format not in FORMATS:
        pytest.skip(f"this Pillow is built without {file_format}")
    data = encode(Image.new("RGB", (40, 30)), file_format)

    with pytest.raises(ImageTooLarge):
        decode_image(data, max_pixels=1199, min_side=1)

    assert decode_image(data, max_pixels=1200).shape == (30, 40, 3)


@pytest.mark.parametrize("frame", [(0, 0, 2000, 2000), (60_000, 60_000, 10, 10)])
def test_a_gif_whose_frame_outgrows_its_screen_is_measured_by_the_frame(frame: tuple[int, int, int, int]) -> None:
    """The header says 1 x 1; what would be decoded counts."""
    data = b"GIF89a" + struct.pack("<HHBBB", 1, 1, 0x80, 0, 0) + bytes(6)
    data += b"," + struct.pack("<HHHHB", *frame, 0) + b"\x02\x02\x4c\x01\x00;"

    with pytest.raises(ImageTooLarge):
        decode(data)


@pytest.mark.parametrize("kind", [b"zTXt", b"iCCP"])
def test_a_decompression_bomb_in_png_metadata_does_no_harm(kind: bytes) -> None:
    """64 MiB of text out of 64 kB: refused, or left unread; never an error of ours."""
    bomb = png_with_chunk(kind, b"bomb\x00\x00" + zlib.compress(bytes(64 * 2**20)))

    with contextlib.suppress(InvalidImage):
        assert PHOTO.shape == decode(bomb).shape


def test_a_jpeg_with_absurdly_many_scans_is_refused() -> None:
    """Ten bytes make libjpeg pass once more over the whole picture: a small file could keep a thread busy for hours."""
    data = encode(Image.new("L", (64, 64)), "JPEG", progressive=True)
    last_scan = data[data.rindex(b"\xff\xda") : -2]

    with pytest.raises(InvalidImage, match="scans"):
        decode(data[:-2] + 100 * last_scan + data[-2:])


def test_what_a_phone_appends_to_a_jpeg_does_not_count_as_scans() -> None:
    """A video behind the picture holds any bytes, also those that would start a scan."""
    assert PHOTO.shape == decode(make_jpeg() + 100 * b"\xff\xda\x00\x08").shape


def tiff(width: int, height: int, rows_per_strip: int, num_strips: int, compression: int = 1) -> bytes:
    """A grey TIFF all of whose strips are the same bytes."""
    start = 8 + 2 + 9 * 12 + 4
    entries = [(256, width), (257, height), (258, 8), (259, compression), (262, 1)]
    values = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in entries)
    values += struct.pack("<HHII", 273, 4, num_strips, start) + struct.pack("<HHII", 277, 4, 1, 1)
    values += struct.pack("<HHII", 278, 4, 1, rows_per_strip)
    values += struct.pack("<HHII", 279, 4, num_strips, start + 4 * num_strips)
    strip, size = start + 8 * num_strips, width * rows_per_strip
    tables = struct.pack("<I", strip) * num_strips + struct.pack("<I", size) * num_strips
    return b"II*\x00" + struct.pack("<IH", 8, 9) + values + bytes(4) + tables + bytes(size)


def test_a_tiff_of_some_strips_is_fine() -> None:
    assert not decode(tiff(100, 100, 50, 2)).any()


@pytest.mark.parametrize(("num_strips", "message"), [(1000, "8 times"), (70_000, "70000 strips")])
def test_a_tiff_that_repeats_its_strips_is_refused(num_strips: int, message: str) -> None:
    """Each mention of the same bytes would be decoded anew."""
    with pytest.raises(InvalidImage, match=message):
        decode(tiff(100, 100, 99, num_strips))


def test_a_fax_tiff_is_refused(capfd: pytest.CaptureFixture[str]) -> None:
    """Its decoder writes a line to stderr for each broken row, which no logging setting holds back."""
    with pytest.raises(UnsupportedImage, match="LZW"):
        decode(tiff(1, 10_000, 10_000, 1, compression=4))

    assert capfd.readouterr().err == ""


@pytest.mark.filterwarnings("ignore::UserWarning:PIL")  # as the module sets it; pytest's own filters come before
@pytest.mark.parametrize("segment", [b"Exif\x00\x00garbage", b"Exif\x00\x00II*\x00\x08\x00\x00\x00\xff\xff\x12\x01"])
def test_broken_exif_leaves_the_picture_as_stored(segment: bytes) -> None:
    """As browsers do: the pixels are whole."""
    whole = make_jpeg()
    broken = whole[:2] + b"\xff\xe1" + struct.pack(">H", len(segment) + 2) + segment + whole[2:]

    assert np.array_equal(decode(whole), decode(broken))


def test_a_broken_list_of_further_pictures_does_no_harm() -> None:
    """Phones write such lists (MPO); only the first picture is wanted, so only that has to be whole."""
    whole, segment = make_jpeg(), b"MPF\x00II*\x00\x08\x00\x00\x00garbage"
    broken = whole[:2] + b"\xff\xe2" + struct.pack(">H", len(segment) + 2) + segment + whole[2:]

    assert np.array_equal(decode(whole), decode(broken))


SEEDS: dict[str, Callable[[Image.Image], bytes]] = {
    "jpeg": lambda image: encode(image, "JPEG", exif=orientation_exif(6)),
    "progressive": lambda image: encode(image, "JPEG", progressive=True),
    "cmyk": lambda image: encode(image.convert("CMYK"), "JPEG"),
    "mpo": lambda image: encode(image, "MPO", save_all=True, append_images=[image]),
    "png": lambda image: encode(image, "PNG", exif=orientation_exif(3)),
    "apng": lambda image: encode(image, "PNG", save_all=True, append_images=[image.rotate(90)]),
    "palette": lambda image: encode(image.convert("P"), "PNG", transparency=3),
    "webp": lambda image: encode(image, "WEBP"),
    "webp-animation": lambda image: encode(image, "WEBP", save_all=True, append_images=[image.rotate(90)]),
    "gif": lambda image: encode(image, "GIF", save_all=True, append_images=[image.rotate(90)]),
    "tiff": lambda image: encode(image, "TIFF", exif=orientation_exif(6)),
    "tiff-lzw": lambda image: encode(image, "TIFF", compression="tiff_lzw"),
    "tiff-jpeg": lambda image: encode(image, "TIFF", compression="jpeg"),
    "bmp": lambda image: encode(image, "BMP"),
    "avif": lambda image: encode(image, "AVIF"),
}


@pytest.mark.parametrize("name", SEEDS)
def test_broken_bytes_give_an_array_or_an_error_of_the_caller(name: str) -> None:
    """Files cut off and files with replaced bytes: no other exception, and no warning, which pytest would raise."""
    if name == "avif" and "AVIF" not in FORMATS:
        pytest.skip("this Pillow is built without AVIF")
    data, rng = SEEDS[name](Image.fromarray(photo(64, 48))), np.random.default_rng(len(name))

    for index in range(60):
        broken = truncated(data, rng.random()) if index % 5 == 0 else flipped(data, rng, int(rng.integers(1, 6)))
        try:
            assert decode(broken, 8 if index % 2 else None).size
        except RequestError as error:
            assert str(error).endswith(".")  # noqa: PT017  both ends are good, so `raises` does not fit


def test_threads_do_not_disturb_each_other() -> None:
    """Nothing of Pillow's is switched per call: good, large and broken files at once each get their own answer."""
    errors: list[BaseException] = []

    def work() -> None:
        try:
            for _ in range(20):
                decode(make_jpeg(), 8)
                with pytest.raises(ImageTooLarge):
                    decode(png_bomb_header(20_000, 20_000))
                with pytest.raises(InvalidImage):
                    decode(truncated(make_png()))
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    assert errors == []


def png_with_chunks(count: int) -> bytes:
    """Empty ones before the pixels."""
    png = make_png(photo(seed=1))
    chunk = b"\0\0\0\0teSt" + zlib.crc32(b"teSt").to_bytes(4)
    return png[:33] + chunk * count + png[33:]


def jpeg_with_segments(count: int) -> bytes:
    """Empty comments before the pixels."""
    jpeg = make_jpeg(photo(seed=1))
    return jpeg[:2] + b"\xff\xfe\0\2" * count + jpeg[2:]


@pytest.mark.parametrize(
    ("data", "quick"),
    [
        (make_jpeg(photo(seed=1)), True),
        (make_png(photo(seed=1)), True),
        (jpeg_with_segments(20), True),
        (jpeg_with_segments(100), False),
        (png_with_chunks(20), True),
        (png_with_chunks(100), False),
        (make_jpeg(photo(seed=1)) + bytes(QUICK_BYTES), False),
        (make_png(np.zeros((1, QUICK_PIXELS + 1, 3), np.uint8)), False),
        (make_jpeg(np.zeros((1000, 1000, 3), np.uint8)), True),
        (make_jpeg(np.zeros((1000, 1000, 3), np.uint8), progressive=True), False),
        (make_jpeg(np.zeros((2100, 2100, 3), np.uint8)), False),
        (encode(Image.fromarray(photo(seed=1)), "BMP"), False),
    ],
)
def test_only_what_is_quick_is_decoded_where_others_wait(data: bytes, quick: bool) -> None:
    """Told before anything is done that takes time; else the picture is the same."""
    with contextlib.nullcontext() if quick else pytest.raises(NeedsTime):
        with open_picture(data, max_pixels=10**7, quick=True) as picture:
            found = np.asarray(picture.image)
        with open_picture(data, max_pixels=10**7) as picture:
            assert np.array_equal(found, np.asarray(picture.image))
