"""Named configurations, each with the preprocessing its images need."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from models.manifest import PreprocessSpec
from models.multi_exit import MultiExitViT
from models.vit import StemLayer, ViTConfig

CIFAR10_LABELS = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
# Close to CIFAR-10's own (0.491, 0.482, 0.447 and 0.247, 0.244, 0.262). The mean is a byte's value, so that an INT8 graph takes
# the bytes as they are, with that byte for zero, and pads with it.
CIFAR10_MEAN = (123 / 255,) * 3  # per channel, RGB in [0, 1]
CIFAR10_STD = (0.25,) * 3


@dataclass(frozen=True, slots=True)
class ZooEntry:
    """What `create_model` needs, and what the exporter writes into the manifest."""

    config: ViTConfig
    boundaries: tuple[int, ...]
    preprocess: PreprocessSpec
    labels: tuple[str, ...]


def _cifar10_preprocess(size: int) -> PreprocessSpec:
    return PreprocessSpec(
        resize=size,
        crop=(size, size),
        interpolation="bicubic",
        mean=CIFAR10_MEAN,
        std=CIFAR10_STD,
        layout="uint8_nhwc",
    )


ZOO: dict[str, ZooEntry] = {
    # The embedded default model: six convolutions to 64 tokens, then six blocks. The first exit is behind the first block,
    # since the stem costs as much as six.
    "vit_cifar10": ZooEntry(
        config=ViTConfig(
            image_size=32,
            patch_size=4,
            width=192,
            depth=6,
            num_heads=3,
            num_classes=10,
            mlp_ratio=1.5,
            pooling="mean",
            stem=(
                StemLayer(32),
                StemLayer(64, pool=2),
                StemLayer(64, residual=True),
                StemLayer(256, pool=2),
                StemLayer(256, residual=True),
                StemLayer(192, side=1),
            ),
        ),
        boundaries=(1, 3, 6),
        preprocess=_cifar10_preprocess(32),
        labels=CIFAR10_LABELS,
    ),
    # For tests: plain patches and a class token, so that both forms of the network are exercised.
    "test_vit": ZooEntry(
        config=ViTConfig(image_size=32, patch_size=8, width=64, depth=6, num_heads=4, num_classes=10),
        boundaries=(2, 4, 6),
        preprocess=_cifar10_preprocess(32),
        labels=CIFAR10_LABELS,
    ),
}


def create_model(name: str, *, seed: int = 0) -> MultiExitViT:
    """A network of that name with freshly drawn weights, the same for the same seed; ValueError for an unknown name."""
    if name not in ZOO:
        raise ValueError(f"no model called {name!r} in the zoo; there are {', '.join(sorted(ZOO))}")
    entry = ZOO[name]
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return MultiExitViT(entry.config, entry.boundaries)
