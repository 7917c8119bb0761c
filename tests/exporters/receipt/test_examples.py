"""Photos and maps of tokens: colours, lines, dropped patches, and pixels made a photo again."""

from __future__ import annotations

import io

import numpy as np
import pytest
from PIL import Image

from app.imaging.preprocess import load_pixels
from exporters.receipt.examples import SIDE, as_photo, draw_tokens, grid
from exporters.receipt.token_maps import DROPPED
from models.zoo import ZOO
from tests.images import make_png, photo, plain_patches


def test_patches_of_a_token_have_its_mean_colour_and_a_line_around() -> None:
    """Two tokens of half a picture each, and a patch that was dropped."""
    (picture,) = plain_patches(1)  # four by four patches
    into = np.repeat([0, 0, 1, 1], 4)
    into[15] = DROPPED

    drawn = draw_tokens(picture, into)

    cell = SIDE // 4
    assert drawn.shape == (SIDE, SIDE, 3)
    patches = picture[::8, ::8].reshape(16, 3).astype(float)
    middle = drawn[cell // 2 :: cell, cell // 2 :: cell].reshape(16, 3)
    for token in (0, 1):
        assert np.abs(middle[into == token] - patches[into == token].mean(axis=0)).max() <= 0.5
    assert np.abs(middle[15] - patches[15] / 4).max() <= 0.5
    assert (drawn[2 * cell - 1 : 2 * cell + 1] == 255).all()  # between the halves, and nowhere else in its first column
    assert (drawn[:, 0] == 255).all(axis=1).sum() == 2
    assert (drawn[3 * cell :, 3 * cell - 1 : 3 * cell + 1] == 255).all()


@pytest.mark.parametrize(("height", "width", "patches", "expected"), [(224, 224, 196, (14, 14)), (32, 64, 32, (4, 8))])
def test_patches_are_as_square_as_can_be(height: int, width: int, patches: int, expected: tuple[int, int]) -> None:
    """Of rows and columns that give so many."""
    assert grid(height, width, patches) == expected


def test_no_patches_are_no_picture() -> None:
    with pytest.raises(ValueError, match="0 patches are no picture"):
        grid(32, 32, 0)


@pytest.mark.parametrize("layout", ["uint8_nhwc", "float32_nchw"])
def test_what_a_stage_takes_is_a_photo_again(layout: str) -> None:
    """Whoever normalises, the service or the graph."""
    picture = photo(32, 32)
    spec = ZOO["test_vit"].preprocess.model_copy(update={"layout": layout, "resize": 32, "crop": (32, 32)})
    pixels = load_pixels(make_png(picture), spec, max_pixels=10_000)

    assert np.abs(as_photo(pixels, spec).astype(int) - picture).max() <= 1
    assert Image.open(io.BytesIO(make_png(as_photo(pixels, spec)))).size == (32, 32)
