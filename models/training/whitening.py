"""Start the first convolution as what whitens the images' patches, so that nothing of it has to be learned.

Page, How to Train Your ResNet 8, 2019; Jordan, 94 % on CIFAR-10 in 3.29 seconds, arXiv 2404.00498, section 3.1.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

SMALLEST = 5e-4  # added to the variances: the last directions are mostly noise


@torch.no_grad()
def whiten(convolution: nn.Conv2d, images: Tensor) -> None:
    """Set its kernels to the patches' principal directions, each by its deviation, and each with both signs (for ReLU).

    Args:
        convolution: with at most twice as many output channels as a patch has values.
        images: normalised, float32 (N, C, H, W); some thousand are enough.
    """
    side = convolution.kernel_size[0]
    patches = F.unfold(images, side).transpose(1, 2).flatten(0, 1)  # (N * positions, C * side * side)
    variances, directions = torch.linalg.eigh(torch.cov(patches.T))  # rising
    half = convolution.out_channels // 2
    scaled = (directions / (variances + SMALLEST).sqrt()).T.flip(0)[:half]
    kernels = torch.cat([scaled, -scaled]).view(-1, *convolution.weight.shape[1:])
    convolution.weight[: len(kernels)] = kernels
