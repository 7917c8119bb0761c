"""Networks to learn from: a convolutional one, or a Vision Transformer that was trained elsewhere and is fitted to the classes.

The convolutional one reaches in some twenty epochs what a transformer of its size does not in hundreds: a small residual
network in the manner of those made to be trained in seconds (Page, How to Train Your ResNet, 2018; Jordan, 94 % on CIFAR-10 in
3.29 seconds, arXiv 2404.00498), three groups of two convolutions, each halving the image; the second of a group is residual.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

import torch
from torch import Tensor, nn

from models.training.config import PretrainedTeacherConfig
from models.vit import ConvLayer, ConvStem
from models.vit_state import Told, network_of, width_of

CHANNELS = (64, 256, 256)  # of the three groups
STEM_CHANNELS = 32
LOGIT_SCALE = 0.125  # of the last layer's output: max-pooled features are large (Page, 2018)


def _convolution(in_channels: int, out_channels: int, *, pool: bool = False) -> nn.Sequential:
    layers: list[nn.Module] = [nn.Conv2d(in_channels, out_channels, 3, padding=1, bias=False)]
    if pool:
        layers.append(nn.MaxPool2d(2))  # before the norm: a quarter of the work
    return nn.Sequential(*layers, nn.BatchNorm2d(out_channels), nn.GELU())


class _Group(nn.Module):
    """(B, C, H, W) -> (B, C', H / 2, W / 2)."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.reduce = _convolution(in_channels, out_channels, pool=True)
        self.residual = _convolution(out_channels, out_channels)

    def forward(self, x: Tensor) -> Tensor:
        x = self.reduce(x)
        return x + self.residual(x)  # type: ignore[no-any-return]


class ConvTeacher(nn.Module):
    """Normalised images (B, 3, H, W) -> logits (B, C)."""

    def __init__(self, num_classes: int, channels: Sequence[int] = CHANNELS) -> None:
        super().__init__()
        widths = (STEM_CHANNELS, *channels)
        self.stem = _convolution(3, STEM_CHANNELS)
        self.groups = nn.Sequential(*(_Group(before, after) for before, after in pairwise(widths)))
        self.fc = nn.Linear(widths[-1], num_classes, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.amax(self.groups(self.stem(x)), dim=(2, 3))
        return self.fc(x) * LOGIT_SCALE  # type: ignore[no-any-return]


@torch.no_grad()
def start_stem(model: nn.Module, checkpoint: Path) -> None:
    """Give a network's convolutional stem the weights of a `ConvTeacher`'s first groups, as many as it has layers for.

    Its activation is another (ReLU, for INT8), so that it has to be trained on; what convolutions see they know already.

    Raises:
        ValueError: the stem has no layer that fits, or none at all.
    """
    stems = [module for module in model.modules() if isinstance(module, ConvStem)]
    if not stems:
        raise ValueError("the network has no convolutional stem to start")
    given: dict[str, Tensor] = torch.load(checkpoint, weights_only=True)["model"]
    convolutions = [name.removesuffix(".weight") for name, value in given.items() if value.ndim == 4]
    norms = [name.removesuffix(".running_mean") for name in given if name.endswith(".running_mean")]
    started = 0
    for layer, conv, norm in zip(stems[0].layers, convolutions, norms, strict=False):  # as far as both go
        if not isinstance(layer, ConvLayer) or layer.conv.weight.shape != given[f"{conv}.weight"].shape:
            break
        layer.conv.weight.copy_(given[f"{conv}.weight"])
        layer.norm.load_state_dict({name: given[f"{norm}.{name}"] for name in layer.norm.state_dict()})
        started += 1
    if not started:
        raise ValueError(f"no layer of the stem is like the first of {checkpoint.name}")


class PretrainedTeacher(nn.Module):
    """Normalised images (B, 3, H, W) -> logits (B, C) by a Vision Transformer that sees them larger, and a new classifier.

    Args:
        state: its state dict under timm's names; its own classifier is not used, nor needed.
        config: how large it sees them, and what it was trained with.
        ours: mean and standard deviation that images come with.
    """

    gain: Tensor
    offset: Tensor

    def __init__(
        self,
        state: dict[str, Tensor],
        num_classes: int,
        config: PretrainedTeacherConfig,
        ours: tuple[Sequence[float], Sequence[float]],
    ) -> None:
        super().__init__()
        self.side = config.side
        width = width_of(state)
        body = {name: value for name, value in state.items() if not name.startswith(("head.", "head_dist."))}
        new = {"head.weight": torch.zeros(num_classes, width), "head.bias": torch.zeros(num_classes)}
        self.network = network_of(body | new, Told(config.side, config.num_heads, num_classes), ())
        (our_mean, our_std), (their_mean, their_std) = (
            tuple(torch.tensor(values).view(1, -1, 1, 1) for values in pair) for pair in (ours, (config.mean, config.std))
        )
        self.register_buffer("gain", our_std / their_std)
        self.register_buffer("offset", (our_mean - their_mean) / their_std)

    def forward(self, x: Tensor) -> Tensor:
        x = nn.functional.interpolate(x * self.gain + self.offset, size=self.side, mode="bicubic", align_corners=False)
        return self.network(x)[-1]  # type: ignore[no-any-return]
