"""Random changes: seeded, of the right size, and none where the configuration says none."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from models.training.augmentation import AugmentConfig, augment, cutmix

NONE = AugmentConfig(
    zoom=(1.0, 1.0), aspect=0.0, shift=0.0, brightness=0.0, contrast=0.0, saturation=0.0, sharpness=0.0, erase_probability=0.0
)


def seeded(seed: int = 5) -> torch.Generator:
    """A generator of draws."""
    return torch.Generator().manual_seed(seed)


@pytest.fixture
def x() -> torch.Tensor:
    """Sixteen images of smooth noise in 0 .. 1, no two alike and none its own mirror image."""
    coarse = torch.rand(16, 3, 4, 4, generator=seeded(0))
    return torch.nn.functional.interpolate(coarse, size=32, mode="bilinear")


def test_the_same_seed_gives_the_same_pictures(x: torch.Tensor) -> None:
    """And another seed gives others, of the same shape, every one changed."""
    first, again, other = (augment(x, AugmentConfig(), seeded(seed)) for seed in (5, 5, 6))

    assert x.shape == first.shape
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert ((first - x).abs().amax(dim=(1, 2, 3)) > 0.01).all()


def test_without_any_change_an_image_is_only_mirrored_or_left_alone(x: torch.Tensor) -> None:
    """Half of the images are mirrored; resampling in place moves nothing."""
    y = augment(x, NONE, seeded())

    alone = [torch.allclose(mine, image, atol=1e-5) for mine, image in zip(y, x, strict=True)]
    mirrored = [torch.allclose(mine, image.flip(2), atol=1e-5) for mine, image in zip(y, x, strict=True)]
    assert all(a != m for a, m in zip(alone, mirrored, strict=True))
    assert 2 <= sum(mirrored) <= 14


def test_a_smaller_crop_shows_a_part_enlarged(x: torch.Tensor) -> None:
    """Half the side: the output's corners are the pixels a quarter in."""
    y = augment(x, replace(NONE, zoom=(0.5, 0.5), zoom_probability=1.0), seeded())
    corners = {round(float(v), 3) for v in (y[0, 0, 0, 0], y[0, 0, 0, -1])}
    expected = [x[0, 0, 7:9, a : a + 2] for a in (7, 23)]
    # Output pixel 0 lies at 7.75 of the input: a quarter of pixel 7, three quarters of pixel 8, in both directions.
    near, far = torch.tensor([0.25, 0.75]), torch.tensor([0.75, 0.25])
    assert corners == {
        round(float(near @ expected[0] @ near), 3),
        round(float(near @ expected[1] @ far), 3),
    }


def test_erasing_puts_a_square_to_the_mean_colour(x: torch.Tensor) -> None:
    """A quarter of the side: at most 64 of 1,024 pixels, fewer where the square is cut by the border."""
    config = replace(NONE, erase=0.25, erase_probability=1.0)
    y = augment(x, config, seeded())

    mean = x.mean(dim=(0, 2, 3)).view(1, 3, 1, 1)
    erased = ((y - mean).abs() < 1e-5).all(dim=1).sum(dim=(1, 2))
    assert (erased >= 16).all()
    assert (erased <= 64 + 4).all()  # a smooth image may have that colour itself


def test_cutmix_mixes_targets_by_the_area_that_it_pastes() -> None:
    """Images of one value each: the share of foreign pixels is the weight of the foreign target."""
    x = torch.arange(8.0).view(8, 1, 1, 1).expand(8, 3, 32, 32)
    targets = torch.eye(8)

    for seed in range(20):
        mixed, mixed_targets = cutmix(x, targets, 1.0, seeded(seed))
        own = (mixed == x).float().mean(dim=(1, 2, 3))
        torch.testing.assert_close(mixed_targets.diagonal(), own)
        torch.testing.assert_close(mixed_targets.sum(dim=1), torch.ones(8))


def test_cutmix_of_probability_zero_changes_nothing() -> None:
    """The very same tensors."""
    x, targets = torch.rand(4, 3, 8, 8), torch.eye(4)
    mixed, mixed_targets = cutmix(x, targets, 0.0, seeded())
    assert mixed is x
    assert mixed_targets is targets


def test_images_that_are_not_zoomed_move_by_whole_pixels(x: torch.Tensor) -> None:
    """Every pixel of the result is a pixel of the image: nothing is blurred."""
    y = augment(x, replace(NONE, shift=0.125, zoom_probability=0.0), seeded())

    for image, source in zip(y, x, strict=True):
        distance = (image.flatten(1).T.unsqueeze(1) - source.flatten(1).T.unsqueeze(0)).abs().amax(dim=-1)
        assert distance.min(dim=1).values.max() < 1e-4
        assert not torch.allclose(image, source)
