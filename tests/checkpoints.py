"""Checkpoints as others keep them, made of random numbers: what a user would have on disk."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

WIDTH, DEPTH, HEADS, CLASSES, SIDE, PATCH = 32, 2, 4, 5, 16, 4
TOLD: dict[str, Any] = {
    "architecture": "vit_nano_patch4_16",
    "num_classes": CLASSES,
    "model_args": {"num_heads": HEADS},
    "pretrained_cfg": {
        "input_size": [3, SIDE, SIDE],
        "interpolation": "bicubic",
        "crop_pct": 0.9,
        "mean": [0.5, 0.5, 0.5],
        "std": [0.5, 0.4, 0.3],
        "tag": "mine",
    },
}
LABELS = tuple("abcde")


def checkpoint(*, distilled: bool = False, layer_scale: bool = False, class_position: bool = True) -> dict[str, Tensor]:
    """Random tensors under timm's names."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator) * 0.2

    tokens = (SIDE // PATCH) ** 2 + (1 + distilled if class_position else 0)
    state = {
        "cls_token": draw(1, 1, WIDTH),
        "pos_embed": draw(1, tokens, WIDTH),
        "patch_embed.proj.weight": draw(WIDTH, 3, PATCH, PATCH),
        "patch_embed.proj.bias": draw(WIDTH),
        "norm.weight": 1 + draw(WIDTH),
        "norm.bias": draw(WIDTH),
        "head.weight": draw(CLASSES, WIDTH),
        "head.bias": draw(CLASSES),
    }
    if distilled:
        state |= {"dist_token": draw(1, 1, WIDTH), "head_dist.weight": draw(CLASSES, WIDTH), "head_dist.bias": draw(CLASSES)}
    for number in range(DEPTH):
        block = f"blocks.{number}"
        shapes = {"attn.qkv": (3 * WIDTH, WIDTH), "attn.proj": (WIDTH, WIDTH), "mlp.fc1": (64, WIDTH), "mlp.fc2": (WIDTH, 64)}
        for name, shape in shapes.items():
            state |= {f"{block}.{name}.weight": draw(*shape), f"{block}.{name}.bias": draw(shape[0])}
        for name in ("norm1", "norm2"):
            state |= {f"{block}.{name}.weight": 1 + draw(WIDTH), f"{block}.{name}.bias": draw(WIDTH)}
        if layer_scale:
            state |= {f"{block}.ls1.gamma": draw(WIDTH), f"{block}.ls2.gamma": draw(WIDTH)}
    return state


def write_checkpoint(folder: Path, state: dict[str, Tensor], told: dict[str, Any] | None = None) -> tuple[Path, Path]:
    """Weights and configuration, as a user has them."""
    save_file(state, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(TOLD if told is None else told))
    return folder / "model.safetensors", folder / "config.json"
