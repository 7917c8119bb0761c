"""What each stage of a network takes, gives and costs."""

from __future__ import annotations

from exporters.vit_graph import tokens_name
from models.manifest import BATCH, LOGITS, PreprocessSpec, StageSpec, TensorSpec
from models.multi_exit import MultiExitViT
from models.vit import ViTConfig


def stage_specs(model: MultiExitViT, preprocess: PreprocessSpec) -> tuple[StageSpec, ...]:
    """The manifest's stages of a network."""
    config = model.config
    last = len(model.boundaries) - 1
    specs = []
    for index, (start, end) in enumerate(zip((0, *model.boundaries[:-1]), model.boundaries, strict=True)):
        inputs = preprocess.pixels() if index == 0 else _tokens(index - 1, config)
        logits = TensorSpec(name=LOGITS, dtype="float32", shape=(BATCH, config.num_classes))
        outputs = (logits,) if index == last else (logits, _tokens(index, config))
        gmacs = stage_macs(config, end - start, first=index == 0, last=index == last) / 1e9
        specs.append(StageSpec(inputs=(inputs,), outputs=outputs, gmacs=gmacs))
    return tuple(specs)


def stage_macs(config: ViTConfig, num_blocks: int, *, first: bool, last: bool) -> int:
    """Multiply-adds of one image through one stage: convolutions, linear layers and both products of attention.

    Behind the last block only the tokens in front of the patches are needed, where there are any.
    """
    block = _block_macs(config, config.num_tokens)
    head = config.width * max(1, config.num_prefix_tokens) * config.num_classes
    saved = block - _block_macs(config, config.num_prefix_tokens) if last and config.num_prefix_tokens else 0
    return num_blocks * block - saved + head + (_stem_macs(config) if first else 0)


def _block_macs(config: ViTConfig, num_asking: int) -> int:
    """Of one block in which so many tokens ask and are given; all are looked at."""
    tokens, width = config.num_tokens, config.width
    looked_at = 2 * tokens * width * width  # keys and values
    return looked_at + num_asking * (2 * width * width + 2 * tokens * width + 2 * width * config.hidden)


def _stem_macs(config: ViTConfig) -> int:
    if not config.stem:
        return config.num_patches * 3 * config.patch_size**2 * config.width
    macs, in_channels, side = 0, 3, config.image_size
    for out_channels, stride in config.stem:
        side //= stride
        macs += side * side * 9 * in_channels * out_channels
        in_channels = out_channels
    return macs


def _tokens(stage: int, config: ViTConfig) -> TensorSpec:
    return TensorSpec(name=tokens_name(stage), dtype="float32", shape=(BATCH, config.num_tokens, config.width))
