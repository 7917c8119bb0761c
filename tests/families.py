"""Tiny classifiers of the transformers package with random weights, saved as their owners have them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers as t

CLASSES = 5
FOUR = {"depths": [1, 1, 1, 1], "hidden_sizes": [8, 16, 16, 32]}
SWIN = {"image_size": 64, "patch_size": 4, "embed_dim": 16, "depths": [1, 1], "num_heads": [2, 2], "window_size": 4}
# Family -> configuration and image processor. Sizes are such that every kind of block is there once.
FAMILIES: dict[str, tuple[Any, Any]] = {
    "swin": (lambda **k: t.SwinConfig(**SWIN, **k), lambda: t.ViTImageProcessorPil(size={"height": 64, "width": 64})),
    "swinv2": (lambda **k: t.Swinv2Config(**SWIN, **k), lambda: t.ViTImageProcessorPil(size={"height": 64, "width": 64})),
    "pvt": (
        lambda **k: t.PvtConfig(image_size=64, num_attention_heads=[1, 2, 2, 2], **FOUR, **k),
        lambda: t.PvtImageProcessorPil(size={"height": 64, "width": 64}),
    ),
    "pvt_v2": (
        lambda **k: t.PvtV2Config(image_size=64, num_attention_heads=[1, 2, 2, 2], **FOUR, **k),
        lambda: t.PvtImageProcessorPil(size={"height": 64, "width": 64}),
    ),
    "hiera": (
        lambda **k: t.HieraConfig(
            image_size=[64, 64], embed_dim=8, depths=[1, 1, 1, 1], num_heads=[1, 1, 2, 2], num_hidden_layers=4, **k
        ),
        lambda: t.BitImageProcessorPil(size={"shortest_edge": 72}, crop_size={"height": 64, "width": 64}),
    ),
    "convnext": (
        lambda **k: t.ConvNextConfig(image_size=64, **FOUR, **k),
        lambda: t.ConvNextImageProcessorPil(size={"shortest_edge": 64}, crop_pct=0.875),
    ),
    "convnextv2": (
        lambda **k: t.ConvNextV2Config(image_size=64, **FOUR, **k),
        lambda: t.ConvNextImageProcessorPil(size={"shortest_edge": 384}),
    ),
    "efficientnet": (
        lambda **k: t.EfficientNetConfig(image_size=64, width_coefficient=0.25, depth_coefficient=0.2, hidden_dim=320, **k),
        lambda: t.EfficientNetImageProcessorPil(
            size={"height": 64, "width": 64}, resample=0, rescale_offset=False, include_top=True
        ),
    ),
    "levit": (
        lambda **k: t.LevitConfig(
            image_size=64, hidden_sizes=[16, 24, 32], num_attention_heads=[1, 2, 2], depths=[1, 1, 1], key_dim=[8, 8, 8], **k
        ),
        lambda: t.LevitImageProcessorPil(size={"shortest_edge": 64}, crop_size={"height": 64, "width": 64}),
    ),
    "cvt": (
        lambda **k: t.CvtConfig(embed_dim=[16, 16, 32], num_heads=[1, 2, 2], depth=[1, 2, 3], **k),
        lambda: t.ConvNextImageProcessorPil(size={"shortest_edge": 64}, crop_pct=0.875),
    ),
    "mobilevit": (
        lambda **k: t.MobileViTConfig(
            image_size=64, hidden_sizes=[16, 24, 32], neck_hidden_sizes=[8, 8, 16, 16, 24, 32, 64], num_attention_heads=2, **k
        ),
        lambda: t.MobileViTImageProcessorPil(size={"shortest_edge": 72}, crop_size={"height": 64, "width": 64}),
    ),
    "resnet": (
        lambda **k: t.ResNetConfig(embedding_size=8, **FOUR, **k),
        lambda: t.ConvNextImageProcessorPil(size={"shortest_edge": 64}, crop_pct=0.875),
    ),
}


def write_family(folder: Path, name: str, *, seed: int = 0) -> Path:
    """Model, configuration and image processor of a family in a folder of that name."""
    configuration, processor = FAMILIES[name]
    labels = {number: f"class {number}" for number in range(CLASSES)}
    torch.manual_seed(seed)
    told = configuration(num_labels=CLASSES)
    told.id2label, told.label2id = labels, {label: number for number, label in labels.items()}
    told.architectures = [type(told).__name__.replace("Config", "ForImageClassification")]
    model = getattr(t, told.architectures[0])(told)
    t.logging.disable_progress_bar()
    size = processor()(torch.zeros(3, 300, 300).numpy(), return_tensors="pt")["pixel_values"].shape[-2:]
    as_if_trained(model, lambda: model(pixel_values=torch.randn(8, 3, *size)))
    model.save_pretrained(folder / name)
    processor().save_pretrained(folder / name)
    return folder / name


@torch.no_grad()
def as_if_trained(model: torch.nn.Module, run: Callable[[], object]) -> None:
    """Weights of the spread, and batch norms with the statistics, that give answers which differ from picture to picture.

    Args:
        run: some pictures through the network.
    """
    for module in model.modules():
        if isinstance(module, torch.nn.Linear | torch.nn.Conv2d):
            module.weight.normal_(std=module.weight[0].numel() ** -0.5)
        if isinstance(module, torch.nn.BatchNorm2d | torch.nn.BatchNorm1d):
            module.weight.fill_(1)
            module.reset_running_stats()
            module.momentum = None  # the mean of all batches
    model.train()
    for _ in range(4):
        run()
    model.eval()
