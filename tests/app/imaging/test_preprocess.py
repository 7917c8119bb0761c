"""The crop is that of torchvision, pixel by pixel; decoding at a reduced scale moves it by no more than docs/adr/0008 says."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from PIL import Image

from app.errors import ImageTooLarge
from app.imaging.decode import decode_image
from app.imaging.preprocess import load_pixels, preprocess
from models.manifest import PreprocessSpec
from tests.images import make_jpeg, make_png, orientation_exif, photo

MAX_PIXELS = 50_000_000
FILTERS = {
    "nearest": Image.Resampling.NEAREST,
    "bilinear": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC,
    "lanczos": Image.Resampling.LANCZOS,
}
MAX_DIFFERENCE = 1.5  # grey levels, mean over the crop of one photo: the bound of docs/adr/0008
SIZES = [(500, 375), (375, 500), (501, 333), (640, 427), (333, 499), (299, 299), (1023, 769)]


def make_spec(resize: int = 64, crop: tuple[int, int] | None = None, **fields: Any) -> PreprocessSpec:
    return PreprocessSpec.model_validate(
        {
            "resize": resize,
            "crop": crop or (resize, resize),
            "interpolation": "bicubic",
            "mean": (0.485, 0.456, 0.406),
            "std": (0.229, 0.224, 0.225),
            "layout": "uint8_nhwc",
        }
        | fields
    )


def resize_then_crop(image: Image.Image, spec: PreprocessSpec) -> np.ndarray:
    """torchvision's Resize(int) and CenterCrop in two steps, written from their documentation and rounding."""
    width, height = image.size
    if width <= height:
        resized = image.resize((spec.resize, int(spec.resize * height / width)), FILTERS[spec.interpolation])
    else:
        resized = image.resize((int(spec.resize * width / height), spec.resize), FILTERS[spec.interpolation])
    crop_height, crop_width = spec.crop
    top, left = round((resized.height - crop_height) / 2.0), round((resized.width - crop_width) / 2.0)
    return np.asarray(resized)[top : top + crop_height, left : left + crop_width]


def difference(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    return np.abs(first.astype(int) - second)


@pytest.mark.parametrize("size", [*SIZES, (40, 30), (65, 64), (2, 40), (40, 2)])
@pytest.mark.parametrize("crop", [(224, 224), (223, 200), (256, 256)])
@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic", "lanczos"])
def test_one_resampling_equals_resize_then_crop(size: tuple[int, int], crop: tuple[int, int], interpolation: str) -> None:
    """No shift, also for odd sides, enlarging and thin strips. The last bit may turn: Pillow rounds between its two passes,
    and version 13 does not always begin with the same one; sharp filters overshoot there, and are clipped.
    """
    pixels, spec = photo(*size), make_spec(256, crop, interpolation=interpolation)

    result = preprocess(pixels, spec)

    assert (*crop, 3) == result.shape
    off_by = difference(resize_then_crop(Image.fromarray(pixels), spec), result)
    assert off_by.mean() < 0.5  # half a pixel of shift would be 6
    assert (off_by > 1).mean() <= (0 if interpolation == "bilinear" else 0.01)


@pytest.mark.parametrize("size", SIZES)
def test_nearest_takes_the_same_pixels(size: tuple[int, int]) -> None:
    """Also from a JPEG file: at a reduced scale there would be only averages to take."""
    spec = make_spec(64, interpolation="nearest")
    data = make_jpeg(photo(*size))

    expected = resize_then_crop(Image.fromarray(decode_image(data, max_pixels=MAX_PIXELS)), spec)

    # A sample that falls between two pixels may go to either; elsewhere they are equal.
    assert (difference(expected, load_pixels(data, spec, max_pixels=MAX_PIXELS)) > 0).mean() < 0.05


def test_an_image_of_the_right_size_passes_unchanged() -> None:
    """Also when only the crop is left to do."""
    pixels = photo(80, 64)

    assert np.array_equal(pixels[:, 8:72], preprocess(pixels, make_spec(64)))
    assert np.array_equal(pixels[2:62, 10:70], preprocess(pixels, make_spec(64, (60, 60))))
    assert np.array_equal(pixels[:, 8:72], load_pixels(make_png(pixels), make_spec(64), max_pixels=MAX_PIXELS))


def test_layouts_differ_only_in_normalisation_and_order() -> None:
    """float32 (3, H, W) is (value * scale - mean) / std of the same pixels; both are contiguous."""
    pixels = photo(100, 70)
    whole, normalised = make_spec(64, (64, 48)), make_spec(64, (64, 48), layout="float32_nchw")

    image, tensor = preprocess(pixels, whole), preprocess(pixels, normalised)

    assert ((64, 48, 3), np.uint8) == (image.shape, image.dtype)
    assert ((3, 64, 48), np.float32) == (tensor.shape, tensor.dtype)
    assert image.flags.c_contiguous
    assert tensor.flags.c_contiguous
    expected = (image / 255 - np.array(normalised.mean)) / np.array(normalised.std)
    assert np.allclose(expected.transpose(2, 0, 1), tensor, rtol=0, atol=1e-5)  # float32 against float64


@pytest.mark.parametrize("grey", [False, True])
def test_loading_without_reduction_is_decoding_and_preprocessing(grey: bool) -> None:
    """A grey picture is resized as one channel, with the same result."""
    pixels, spec = photo(150, 100), make_spec(64)
    data = make_jpeg(pixels[..., 0] if grey else pixels)

    result = load_pixels(data, spec, max_pixels=MAX_PIXELS)

    assert np.array_equal(preprocess(decode_image(data, max_pixels=MAX_PIXELS), spec), result)


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic", "lanczos"])
@pytest.mark.parametrize(("resize", "crop"), [(32, 32), (64, 64), (146, 128)])
def test_a_reduced_jpeg_stays_within_the_bound(interpolation: str, resize: int, crop: int) -> None:
    """Against decoding in full, resizing and cropping: for all sizes, odd ones too, where rounding could shift the crop."""
    spec = make_spec(resize, (crop, crop), interpolation=interpolation)

    for seed, size in enumerate(SIZES):
        data = make_jpeg(photo(*size, seed=seed))
        in_full = resize_then_crop(Image.fromarray(decode_image(data, max_pixels=MAX_PIXELS)), spec)
        assert difference(in_full, load_pixels(data, spec, max_pixels=MAX_PIXELS)).mean() <= MAX_DIFFERENCE


@pytest.mark.parametrize("resize", [16, 32, 47])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_reduced_jpeg_is_cropped_at_the_same_place_in_every_orientation(orientation: int, resize: int) -> None:
    """The excess pixel of a reduced side lies before the picture when that is mirrored; a shift would show on a slope."""
    width, height = 505, 377  # by 8: 63.1 and 47.1, nearly a pixel too much
    slope = np.add.outer(np.linspace(0, 100, height), np.linspace(0, 150, width))
    pixels = np.repeat(slope[..., None], 3, axis=2).astype(np.uint8)
    data = make_jpeg(pixels, quality=100, exif=orientation_exif(orientation))
    spec = make_spec(resize)

    in_full = resize_then_crop(Image.fromarray(decode_image(data, max_pixels=MAX_PIXELS)), spec)
    result = load_pixels(data, spec, max_pixels=MAX_PIXELS)

    # A pixel of the result is 3 to 6 grey levels of slope, so half a level is a shift of about a tenth of a pixel.
    assert np.abs((result.astype(int) - in_full).mean()) < 0.5
    assert difference(in_full, result).mean() < 0.8


def test_a_very_large_picture_may_be_averaged_before_the_resize() -> None:
    """From six times the target on; the bound is the same."""
    pixels, spec = photo(1023, 769), make_spec(32)

    assert difference(resize_then_crop(Image.fromarray(pixels), spec), preprocess(pixels, spec)).mean() <= MAX_DIFFERENCE


@pytest.mark.parametrize("size", [(1, 1_000_000), (1_000_000, 1)])
def test_a_line_of_a_million_pixels_is_cropped_in_the_middle(size: tuple[int, int]) -> None:
    """Resized as a whole, it would be 32 million pixels long."""
    data = make_png(np.full((size[1], size[0], 3), 7, np.uint8))

    assert (load_pixels(data, make_spec(32), max_pixels=MAX_PIXELS) == 7).all()


def test_the_pixel_limit_reaches_the_decoder() -> None:
    with pytest.raises(ImageTooLarge):
        load_pixels(make_png(), make_spec(), max_pixels=100)


@pytest.mark.parametrize("size", [(500, 375), (375, 500), (90, 30), (64, 64)])
@pytest.mark.parametrize("crop", [64, 56])
def test_a_squashed_picture_is_the_whole_picture_whatever_its_proportions(size: tuple[int, int], crop: int) -> None:
    """Pillow's resize to a square, then its centre; a JPEG at a reduced scale stays within the bound."""
    image = photo(*size)
    spec = make_spec(64, (crop, crop), squash=True)
    offset = (64 - crop) // 2
    square = np.asarray(Image.fromarray(image).resize((64, 64), Image.Resampling.BICUBIC))
    expected = square[offset : offset + crop, offset : offset + crop]

    assert difference(expected, preprocess(image, spec)).mean() < MAX_DIFFERENCE
    loaded = load_pixels(make_jpeg(image, quality=98), spec, max_pixels=MAX_PIXELS)
    assert difference(expected, loaded).mean() < 2 * MAX_DIFFERENCE  # and what the JPEG itself costs


def test_an_odd_margin_is_rounded_as_the_network_was_trained() -> None:
    """Seven pixels too many: torchvision cuts four in front, transformers three."""
    image = photo(71, 64)
    half, down = (preprocess(image, make_spec(64, crop_rounding=rounding)) for rounding in ("half_to_even", "down"))

    np.testing.assert_array_equal(half, image[:, 4:68])
    np.testing.assert_array_equal(down, image[:, 3:67])
