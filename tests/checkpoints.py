"""Checkpoints as others keep them, made of random numbers: what a user would have on disk."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

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


def checkpoint(
    *, distilled: bool = False, layer_scale: bool = False, class_position: bool = True, patch: int = PATCH
) -> dict[str, Tensor]:
    """Random tensors under timm's names; `patch` is the side of a patch in pixels."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator) * 0.2

    tokens = (SIDE // patch) ** 2 + (1 + distilled if class_position else 0)
    state = {
        "cls_token": draw(1, 1, WIDTH),
        "pos_embed": draw(1, tokens, WIDTH),
        "patch_embed.proj.weight": draw(WIDTH, 3, patch, patch),
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


def answer(state: dict[str, Tensor], image: Tensor, eps: float = 1e-6) -> Tensor:
    """What the papers say, written out from timm's names: logits (B, C)."""
    x = (
        F.conv2d(image, state["patch_embed.proj.weight"], state["patch_embed.proj.bias"], stride=PATCH)
        .flatten(2)
        .transpose(1, 2)
    )
    prefix = [state[name].expand(len(x), -1, -1) for name in ("cls_token", "dist_token") if name in state]
    if state["pos_embed"].shape[1] == x.shape[1]:  # DeiT III: positions of the patches only
        x = torch.cat([*prefix, x + state["pos_embed"]], dim=1)
    else:
        x = torch.cat([*prefix, x], dim=1) + state["pos_embed"]
    for number in range(DEPTH):
        w = {name.removeprefix(f"blocks.{number}."): value for name, value in state.items()}
        y = F.layer_norm(x, (WIDTH,), w["norm1.weight"], w["norm1.bias"], eps)
        q, k, v = F.linear(y, w["attn.qkv.weight"], w["attn.qkv.bias"]).unflatten(-1, (3, HEADS, -1)).permute(2, 0, 3, 1, 4)
        y = ((q @ k.transpose(-2, -1)) * (WIDTH // HEADS) ** -0.5).softmax(-1) @ v
        y = F.linear(y.transpose(1, 2).flatten(2), w["attn.proj.weight"], w["attn.proj.bias"])
        x = x + y * w.get("ls1.gamma", torch.ones(WIDTH))
        y = F.layer_norm(x, (WIDTH,), w["norm2.weight"], w["norm2.bias"], eps)
        y = F.linear(F.gelu(F.linear(y, w["mlp.fc1.weight"], w["mlp.fc1.bias"])), w["mlp.fc2.weight"], w["mlp.fc2.bias"])
        x = x + y * w.get("ls2.gamma", torch.ones(WIDTH))
    x = F.layer_norm(x, (WIDTH,), state["norm.weight"], state["norm.bias"], eps)
    logits = F.linear(x[:, 0], state["head.weight"], state["head.bias"])
    if "head_dist.weight" in state:
        logits = (logits + F.linear(x[:, 1], state["head_dist.weight"], state["head_dist.bias"])) / 2
    return logits


def write_checkpoint(folder: Path, state: dict[str, Tensor], told: dict[str, Any] | None = None) -> tuple[Path, Path]:
    """Weights and configuration, as a user has them."""
    save_file(state, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(TOLD if told is None else told))
    return folder / "model.safetensors", folder / "config.json"


def write_transformers_folder(folder: Path, state: dict[str, Tensor], model_type: str = "vit") -> None:
    """The same network as transformers' `save_pretrained` writes it."""
    folder.mkdir(exist_ok=True)
    names = {
        "cls_token": "embeddings.cls_token",
        "dist_token": "embeddings.distillation_token",
        "pos_embed": "embeddings.position_embeddings",
        "patch_embed.proj.": "embeddings.patch_embeddings.projection.",
        "norm.": "layernorm.",
    }
    found = {}
    for name, value in state.items():
        if name.startswith("head_dist."):
            found[name.replace("head_dist.", "distillation_classifier.")] = value
        elif name.startswith("head."):
            whole = "cls_classifier." if "head_dist.weight" in state else "classifier."
            found[name.replace("head.", whole)] = value
        elif name.startswith("blocks."):
            _, number, rest = name.split(".", 2)
            layer = f"{model_type}.encoder.layer.{number}"
            if rest.startswith("attn.qkv."):
                for part, piece in zip(("query", "key", "value"), value.chunk(3), strict=True):
                    found[f"{layer}.attention.attention.{part}.{rest.rpartition('.')[2]}"] = piece.clone()
                continue
            theirs = {
                "norm1.": "layernorm_before.",
                "norm2.": "layernorm_after.",
                "attn.proj.": "attention.output.dense.",
                "mlp.fc1.": "intermediate.dense.",
                "mlp.fc2.": "output.dense.",
            }
            (ours, their) = next((a, b) for a, b in theirs.items() if rest.startswith(a))
            found[f"{layer}.{rest.replace(ours, their)}"] = value
        else:
            (ours, their) = next((a, b) for a, b in names.items() if name.startswith(a))
            found[f"{model_type}.{name.replace(ours, their)}"] = value
    save_file(found, folder / "model.safetensors")
    config = {
        "model_type": model_type,
        "image_size": SIDE,
        "num_attention_heads": HEADS,
        "hidden_act": "gelu",
        "layer_norm_eps": 1e-12,
        "id2label": {str(number): label for number, label in enumerate(LABELS)},
    }
    preprocessor = {
        "do_resize": True,
        "size": {"height": SIDE, "width": SIDE},
        "resample": 2,
        "do_normalize": True,
        "image_mean": [0.5, 0.5, 0.5],
        "image_std": [0.5, 0.5, 0.5],
    }
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "preprocessor_config.json").write_text(json.dumps(preprocessor))


def cait_checkpoint(*, class_depth: int = 2) -> dict[str, Tensor]:
    """Random tensors under timm's names of CaiT: talking heads, LayerScale, blocks of class attention."""
    state = checkpoint(class_position=False)
    generator = torch.Generator().manual_seed(1)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator) * 0.2

    for number in range(DEPTH):
        block = f"blocks.{number}"
        for name in ("proj_l", "proj_w"):
            state |= {
                f"{block}.attn.{name}.weight": torch.eye(HEADS) + draw(HEADS, HEADS),
                f"{block}.attn.{name}.bias": draw(HEADS),
            }
        state |= {f"{block}.gamma_1": draw(WIDTH), f"{block}.gamma_2": draw(WIDTH)}
    for number in range(class_depth):
        block = f"blocks_token_only.{number}"
        shapes = {
            **{f"attn.{part}": (WIDTH, WIDTH) for part in ("q", "k", "v", "proj")},
            "mlp.fc1": (64, WIDTH),
            "mlp.fc2": (WIDTH, 64),
        }
        for name, shape in shapes.items():
            state |= {f"{block}.{name}.weight": draw(*shape), f"{block}.{name}.bias": draw(shape[0])}
        for name in ("norm1", "norm2"):
            state |= {f"{block}.{name}.weight": 1 + draw(WIDTH), f"{block}.{name}.bias": draw(WIDTH)}
        state |= {f"{block}.gamma_1": draw(WIDTH), f"{block}.gamma_2": draw(WIDTH)}
    return state


def cait_answer(state: dict[str, Tensor], image: Tensor, eps: float = 1e-6) -> Tensor:
    """What the paper says, written out from timm's names: logits (B, C)."""

    def norm(x: Tensor, name: str) -> Tensor:
        return F.layer_norm(x, (WIDTH,), state[f"{name}.weight"], state[f"{name}.bias"], eps)

    def linear(x: Tensor, name: str) -> Tensor:
        return F.linear(x, state[f"{name}.weight"], state[f"{name}.bias"])

    def heads(x: Tensor) -> Tensor:
        return x.unflatten(-1, (HEADS, -1)).transpose(1, 2)

    def mixed(x: Tensor, name: str) -> Tensor:
        return torch.einsum("bhij,gh->bgij", x, state[f"{name}.weight"]) + state[f"{name}.bias"].view(1, -1, 1, 1)

    x = F.conv2d(image, state["patch_embed.proj.weight"], state["patch_embed.proj.bias"], stride=PATCH)
    x = x.flatten(2).transpose(1, 2) + state["pos_embed"]
    for number in range(DEPTH):
        block = f"blocks.{number}"
        q, k, v = (heads(part) for part in linear(norm(x, f"{block}.norm1"), f"{block}.attn.qkv").chunk(3, dim=-1))
        weights = mixed(q @ k.transpose(-2, -1) * (WIDTH // HEADS) ** -0.5, f"{block}.attn.proj_l")
        weights = mixed(weights.softmax(-1), f"{block}.attn.proj_w")
        y = linear((weights @ v).transpose(1, 2).flatten(2), f"{block}.attn.proj")
        x = x + state[f"{block}.gamma_1"] * y
        y = linear(F.gelu(linear(norm(x, f"{block}.norm2"), f"{block}.mlp.fc1")), f"{block}.mlp.fc2")
        x = x + state[f"{block}.gamma_2"] * y
    token = state["cls_token"].expand(len(x), -1, -1)
    for number in range(len({name.split(".")[1] for name in state if name.startswith("blocks_token_only.")})):
        block = f"blocks_token_only.{number}"
        seen = norm(torch.cat([token, x], dim=1), f"{block}.norm1")
        q, k, v = (heads(linear(of, f"{block}.attn.{part}")) for part, of in (("q", seen[:, :1]), ("k", seen), ("v", seen)))
        weights = (q @ k.transpose(-2, -1) * (WIDTH // HEADS) ** -0.5).softmax(-1)
        token = token + state[f"{block}.gamma_1"] * linear((weights @ v).transpose(1, 2).flatten(2), f"{block}.attn.proj")
        y = linear(F.gelu(linear(norm(token, f"{block}.norm2"), f"{block}.mlp.fc1")), f"{block}.mlp.fc2")
        token = token + state[f"{block}.gamma_2"] * y
    return F.linear(norm(token, "norm")[:, 0], state["head.weight"], state["head.bias"])
