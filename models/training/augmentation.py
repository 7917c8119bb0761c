"""Random changes to a batch of training images, each drawn per image and all on tensors, so that they cost little.

After the DeiT line (Touvron et al., ICML 2021): random resized crops, colour, erasing, CutMix; made milder, since images of
32 x 32 pixels and schedules of some ten epochs leave less to throw away. Sharpness is there because photographs reduced by
the service are crisper than those of CIFAR-10, which were compressed twice.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812


@dataclass(frozen=True, slots=True)
class AugmentConfig:
    """How far each change may go; a change of 0 is none."""

    zoom: tuple[float, float] = (0.8, 1.1)  # side of the crop over the image's; above 1 the border is reflected
    zoom_probability: float = 0.5  # of an image; the others move by whole pixels, for resampling blurs what it touches
    aspect: float = 0.1  # largest natural logarithm of width over height
    shift: float = 0.125  # largest, as a share of the image's side (4 of 32 pixels: He et al., 2016)
    brightness: float = 0.15  # largest share added or taken
    contrast: float = 0.2
    saturation: float = 0.25
    sharpness: float = 0.5  # of the difference to the blurred image, added or taken
    colour_probability: float = 0.6
    erase: float = 0.25  # side of the erased square, as a share of the image's (DeVries and Taylor, 2017)
    erase_probability: float = 0.4
    cutmix_probability: float = 0.0  # of a batch (Yun et al., ICCV 2019); pays in runs of hundreds of epochs

    def rarer(self, factor: float) -> AugmentConfig:
        """The same changes to so many times as many images; flips and shifts stay as they are."""
        names = ("zoom_probability", "colour_probability", "erase_probability", "cutmix_probability")
        return replace(self, **{name: factor * getattr(self, name) for name in names})


def augment(x: Tensor, config: AugmentConfig, generator: torch.Generator) -> Tensor:
    """Flip, crop, colour, sharpness and erasing. Float32 (B, 3, H, W) in [0, 1] -> the same, mostly in [0, 1]."""
    x = _crop(x, config, generator)
    x = _colour(x, config, generator)
    return _erase(x, config, generator)


def cutmix(x: Tensor, targets: Tensor, probability: float, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Put one rectangle of other images of the batch into each, and mix the targets by its area.

    Args:
        x: float32 (B, 3, H, W); not changed.
        targets: class probabilities, float32 (B, C).
        probability: that this batch is mixed at all.
        generator: of the draws.

    Source: Yun et al., CutMix, ICCV 2019; the share of the pasted area is uniform.
    """
    if torch.rand((), generator=generator) >= probability:
        return x, targets
    height, width = x.shape[-2:]
    share, row, column = torch.rand(3, generator=generator).tolist()
    side = share**0.5  # of the rectangle, as a share of the image's
    top, bottom = (min(max(round(height * (row + half * side)), 0), height) for half in (-0.5, 0.5))
    left, right = (min(max(round(width * (column + half * side)), 0), width) for half in (-0.5, 0.5))
    pasted = (bottom - top) * (right - left) / (height * width)  # less than the share where the border cuts it
    order = torch.randperm(len(x), generator=generator)
    x = x.clone()
    x[:, :, top:bottom, left:right] = x[order, :, top:bottom, left:right]
    return x, (1 - pasted) * targets + pasted * targets[order]


def _uniform(generator: torch.Generator, batch: int, low: float, high: float) -> Tensor:
    return low + (high - low) * torch.rand(batch, generator=generator)


def _crop(x: Tensor, config: AugmentConfig, generator: torch.Generator) -> Tensor:
    """Flip, and look at another part of the image at another scale, by one bilinear resampling."""
    batch, side = len(x), x.shape[-1]
    flip = torch.where(torch.rand(batch, generator=generator) < 0.5, -1.0, 1.0)
    low, high = torch.tensor(config.zoom).log().tolist()
    zooms = torch.rand(batch, generator=generator) < config.zoom_probability
    zoom = torch.where(zooms, _uniform(generator, batch, low, high).exp(), 1.0)
    aspect = torch.where(zooms, (_uniform(generator, batch, -config.aspect, config.aspect) / 2).exp(), 1.0)
    shift = _uniform(generator, 2 * batch, -config.shift, config.shift).view(batch, 2)
    shift = torch.where(zooms.unsqueeze(1), shift, (shift * side).round() / side)
    theta = torch.zeros(batch, 2, 3)  # output coordinates in [-1, 1] -> input coordinates
    theta[:, 0, 0] = flip * zoom * aspect
    theta[:, 1, 1] = zoom / aspect
    theta[:, :, 2] = 2 * shift
    grid = F.affine_grid(theta, list(x.shape), align_corners=False)
    return F.grid_sample(x, grid, mode="bilinear", padding_mode="reflection", align_corners=False)


def _colour(x: Tensor, config: AugmentConfig, generator: torch.Generator) -> Tensor:
    batch = len(x)
    on = (torch.rand(batch, generator=generator) < config.colour_probability).float()

    def amount(largest: float) -> Tensor:
        return (on * _uniform(generator, batch, -largest, largest)).view(-1, 1, 1, 1)

    blurred = F.avg_pool2d(F.pad(x, (1, 1, 1, 1), mode="replicate"), 3, stride=1)
    x = x + amount(config.sharpness) * (x - blurred)
    grey = x.mean(dim=1, keepdim=True)
    x = x + amount(config.saturation) * (x - grey)
    x = x + amount(config.contrast) * (x - grey.mean(dim=(2, 3), keepdim=True))
    return x * (1 + amount(config.brightness))


def _erase(x: Tensor, config: AugmentConfig, generator: torch.Generator) -> Tensor:
    """A square of some images becomes the batch's mean colour."""
    batch, _, height, width = x.shape
    on = torch.rand(batch, 1, generator=generator) < config.erase_probability
    centre = torch.rand(2, batch, 1, generator=generator)
    rows = ((torch.arange(height) + 0.5) / height - centre[0]).abs() < config.erase / 2
    columns = ((torch.arange(width) + 0.5) / width - centre[1]).abs() < config.erase / 2
    inside = (rows & on).unsqueeze(2) & columns.unsqueeze(1)  # (B, H, W)
    return torch.where(inside.unsqueeze(1), x.mean(dim=(0, 2, 3), keepdim=True), x)
