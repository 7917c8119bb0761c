"""ViT and DeiT as transformers keeps them: a folder with `config.json`, `preprocessor_config.json` and `model.safetensors`.

Labels and preprocessing come from those files. Their tensors are brought under timm's names and go the same way from there.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, TypeVar

import torch
from pydantic import BaseModel, ValidationError
from torch import Tensor

from exporters.sources.base import AS_IT_IS, Asked, Network, SourceError, at_size, faults_of, own_network
from models.manifest import PreprocessSpec
from models.vit_state import Told
from models.weights import load_state_dict, sha256_of

CONFIG, PREPROCESSOR = "config.json", "preprocessor_config.json"
WEIGHTS = ("model.safetensors", "pytorch_model.bin")
RESAMPLE: dict[int, Literal["nearest", "bilinear", "bicubic", "lanczos"]] = {  # Pillow's numbers
    0: "nearest",
    1: "lanczos",
    2: "bilinear",
    3: "bicubic",
}
# transformers' name behind `vit.` or `deit.` -> timm's. Queries, keys and values are joined before.
RENAMED = (
    (r"embeddings\.cls_token", "cls_token"),
    (r"embeddings\.distillation_token", "dist_token"),
    (r"embeddings\.position_embeddings", "pos_embed"),
    (r"embeddings\.patch_embeddings\.projection\.(.+)", r"patch_embed.proj.\1"),
    (r"encoder\.layer\.(\d+)\.layernorm_before\.(.+)", r"blocks.\1.norm1.\2"),
    (r"encoder\.layer\.(\d+)\.layernorm_after\.(.+)", r"blocks.\1.norm2.\2"),
    (r"encoder\.layer\.(\d+)\.attention\.qkv\.(.+)", r"blocks.\1.attn.qkv.\2"),
    (r"encoder\.layer\.(\d+)\.attention\.output\.dense\.(.+)", r"blocks.\1.attn.proj.\2"),
    (r"encoder\.layer\.(\d+)\.intermediate\.dense\.(.+)", r"blocks.\1.mlp.fc1.\2"),
    (r"encoder\.layer\.(\d+)\.output\.dense\.(.+)", r"blocks.\1.mlp.fc2.\2"),
    (r"layernorm\.(.+)", r"norm.\1"),
    (r"(?:cls_)?classifier\.(.+)", r"head.\1"),
    (r"distillation_classifier\.(.+)", r"head_dist.\1"),
)
T = TypeVar("T", bound=BaseModel)
QUERY = re.compile(r"encoder\.layer\.(\d+)\.attention\.attention\.query\.(weight|bias)")


class _Config(BaseModel):
    model_type: Literal["vit", "deit"]
    image_size: int
    num_attention_heads: int
    hidden_act: Literal["gelu"]
    layer_norm_eps: float
    id2label: dict[int, str]


class _Side(BaseModel):
    height: int
    width: int


class _Preprocessor(BaseModel):
    """Old files give sizes as one number."""

    do_resize: Literal[True]
    size: _Side | int
    resample: int
    do_center_crop: bool = False
    crop_size: _Side | int | None = None
    do_rescale: Literal[True] = True
    rescale_factor: float = 1 / 255  # transformers' own; old files do not say it
    do_normalize: Literal[True]
    image_mean: tuple[float, float, float]
    image_std: tuple[float, float, float]


@dataclass(frozen=True, slots=True)
class TransformersSource:
    """A folder as `save_pretrained` writes it.

    Args:
        folder: with model and preprocessor.
        asked: stages and sizes, where other than as it comes.
    """

    folder: Path
    asked: Asked = AS_IT_IS

    def load(self) -> Network:
        """Read it into our own network; it has no exits but its end.

        Raises:
            SourceError: a file is missing, or says what is not supported.
            WeightsError: the checkpoint lacks a tensor, has one too many, or one of another shape.
        """
        config = _read(self.folder / CONFIG, _Config)
        spec = preprocessing(_read(self.folder / PREPROCESSOR, _Preprocessor))
        if spec.crop != (config.image_size, config.image_size):
            side = config.image_size
            raise SourceError(f"the preprocessor gives {spec.crop} pixels and the network takes {side} x {side}")
        labels = tuple(config.id2label[number] for number in sorted(config.id2label))
        weights = next((self.folder / name for name in WEIGHTS if (self.folder / name).exists()), None)
        if weights is None:
            raise SourceError(f"{self.folder.name} holds neither {' nor '.join(WEIGHTS)}")
        told = Told(config.image_size, config.num_attention_heads, len(labels), config.layer_norm_eps)
        model = own_network(under_timms_names(load_state_dict(weights)), told, self.asked)
        spec = at_size(spec, model.config.image_size)
        return Network(model, spec, labels, sha256_of(weights), self.folder.name, has_exits=len(model.stages) == 1)

    def labels(self) -> tuple[str, ...]:
        """Of the classes, in their order."""
        config = _read(self.folder / CONFIG, _Config)
        return tuple(config.id2label[number] for number in sorted(config.id2label))


def preprocessing(told: _Preprocessor) -> PreprocessSpec:
    """Either squashed to a square, or, where a crop is asked for, the centre of a picture that was squashed to a larger one.

    Raises:
        SourceError: the filter is not known.
    """
    if told.resample not in RESAMPLE:
        raise SourceError(f"{PREPROCESSOR}: resample {told.resample} is none of Pillow's filters that are known")
    size = _side(told.size)
    if told.do_center_crop and told.crop_size is None:
        raise SourceError(f"{PREPROCESSOR}: it crops and does not say to what size")
    crop = _side(told.crop_size) if told.do_center_crop and told.crop_size is not None else size
    if size[0] != size[1]:
        raise SourceError(f"{PREPROCESSOR}: only squares are supported, not {size[0]} x {size[1]}")
    return PreprocessSpec(
        resize=size[0],
        squash=True,
        crop=crop,
        crop_rounding="down",
        interpolation=RESAMPLE[told.resample],
        mean=told.image_mean,
        std=told.image_std,
        scale=told.rescale_factor,
        layout="uint8_nhwc",
    )


def under_timms_names(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The same tensors, queries, keys and values joined; what has no counterpart keeps its name, and is refused later."""
    plain = {re.sub(r"^(?:vit|deit)\.", "", name): value for name, value in state.items()}
    for name in [name for name in plain if QUERY.fullmatch(name)]:
        names = [name.replace("query", part) for part in ("query", "key", "value")]
        parts = [plain.pop(part) for part in names if part in plain]
        plain[name.replace("attention.attention.query", "attention.qkv")] = torch.cat(parts)
    renamed = {}
    for name, value in plain.items():
        new = next((re.sub(old, timm, name) for old, timm in RENAMED if re.fullmatch(old, name)), name)
        renamed[new] = value
    return renamed


def _read(path: Path, kind: type[T]) -> T:
    if not path.exists():
        raise SourceError(f"{path.parent.name} holds no {path.name}")
    try:
        return kind.model_validate_json(path.read_bytes())
    except ValidationError as error:
        raise SourceError(f"{path.name} is not supported: {faults_of(error)}") from error


def _side(size: _Side | int) -> tuple[int, int]:
    return (size, size) if isinstance(size, int) else (size.height, size.width)
