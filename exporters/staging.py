"""What each stage of a network takes, gives and costs."""

from __future__ import annotations

from exporters.vit_graph import Companion, TokenCount, asks_for_prefix_only, companion_name, tokens_name
from models.efficient_attention import PINV_ROUNDS
from models.manifest import BATCH, LOGITS, PreprocessSpec, StageSpec, TensorSpec
from models.multi_exit import MultiExitViT, Stage
from models.vit import Block, ViTConfig


def stages_of(model: MultiExitViT) -> list[Stage]:
    """In their order; TypeError where one is something else."""
    stages = [stage for stage in model.stages if isinstance(stage, Stage)]
    if len(stages) != len(model.stages):
        raise TypeError("a stage is of another kind than models.multi_exit.Stage")
    return stages


def blocks_of(stage: Stage) -> list[Block]:
    """In their order; TypeError where one is something else."""
    blocks = [block for block in stage.blocks if isinstance(block, Block)]
    if len(blocks) != len(stage.blocks):
        raise TypeError("a block is of another kind than models.vit.Block")
    return blocks


def token_counts(model: MultiExitViT) -> list[TokenCount]:
    """Behind the embedding, then behind each stage."""
    count = model.config.num_tokens
    companion: Companion = ""
    counts = [TokenCount(count)]
    for stage in stages_of(model):
        for block in blocks_of(stage):
            if block.pruning is not None:
                count = model.config.num_prefix_tokens + block.pruning.keep
            if block.reduction is not None:
                count = model.config.num_prefix_tokens + block.reduction.keep
                companion = "sizes" if block.reduction.tracks_sizes else ""
            if block.slow_fast is not None:
                companion = "importance"
        counts.append(TokenCount(count, companion))
    return counts


def stage_specs(model: MultiExitViT, preprocess: PreprocessSpec) -> tuple[StageSpec, ...]:
    """The manifest's stages of a network."""
    config, counts = model.config, token_counts(model)
    logits = TensorSpec(name=LOGITS, dtype="float32", shape=(BATCH, config.num_classes))
    last = len(model.stages) - 1
    specs = []
    for index, stage in enumerate(stages_of(model)):
        inputs = (preprocess.pixels(),) if index == 0 else _tokens(index - 1, counts[index], config)
        outputs = (logits,) if index == last else (logits, *_tokens(index, counts[index + 1], config))
        macs = stage_macs(stage, config, counts[index].count, last=index == last)
        specs.append(StageSpec(inputs=inputs, outputs=outputs, gmacs=macs / 1e9))
    return tuple(specs)


def stage_macs(stage: Stage, config: ViTConfig, count: int, *, last: bool) -> int:
    """Multiply-adds of one image through one stage: convolutions, linear layers and both products of attention.

    Behind the last block only the tokens in front of the patches are needed, where there are any. What choosing the tokens of
    a reduction costs is not counted; it is of the order of one product of attention.

    Args:
        count: tokens that come in.
    """
    num_prefix = config.num_prefix_tokens
    macs = config.width * max(1, num_prefix) * config.num_classes
    if stage.embedding is not None:
        macs += _stem_macs(config)
    for number, block in enumerate(blocks_of(stage)):
        prefix_only = last and number == len(stage.blocks) - 1 and asks_for_prefix_only(config)
        if block.pruning is not None:
            macs += (count - num_prefix) * block.pruning.predictor.multiply_adds()
            count = num_prefix + block.pruning.keep
        seen = count
        if block.slow_fast is not None and block.slow_fast.computed is not None:
            seen = num_prefix + block.slow_fast.computed + 1
        asking = num_prefix if prefix_only else seen
        macs += 2 * seen * config.width**2 + asking * 2 * config.width**2 + _gather_macs(config, asking, seen)
        if config.talking_heads:
            macs += 2 * asking * seen * config.num_heads**2
        if block.reduction is not None and not prefix_only:
            asking = count = num_prefix + block.reduction.keep
        macs += asking * 2 * config.width * config.hidden
    # Class attention in the head: keys and values of all tokens, all else of one.
    seen, width = count + 1, config.width
    return macs + config.class_depth * (2 * seen * width**2 + 2 * width**2 + 2 * seen * width + 2 * width * config.hidden)


def _gather_macs(config: ViTConfig, asking: int, count: int) -> int:
    """The products inside attention: of all pairs of tokens, or of the efficient kinds' matrices."""
    rank, width = config.attention_rank, config.width
    match config.attention:
        case "softmax":
            return 2 * asking * count * width
        case "linformer":  # keys and values mixed, then looked at
            return 2 * rank * count * width + 2 * asking * rank * width
        case "performer":  # features of queries and keys, keys with values, queries with that and with the sum
            return 2 * rank * width * (asking + count) + asking * rank * config.num_heads
        case "nystromformer":
            heads = config.num_heads
            landmarks, between = 2 * rank * count * width, 3 * rank * count * width + rank**2 * width
            return landmarks + between + 4 * PINV_ROUNDS * heads * rank**3 + rank**2 * width + asking * rank * width


def _stem_macs(config: ViTConfig) -> int:
    if not config.stem:
        return config.num_patches * 3 * config.patch_size**2 * config.width
    macs, in_channels, side = 0, 3, config.image_size
    for layer in config.stem:
        macs += side**2 * layer.side**2 * in_channels * layer.channels
        side, in_channels = side // layer.pool, layer.channels
    return macs


def _tokens(stage: int, tokens: TokenCount, config: ViTConfig) -> tuple[TensorSpec, ...]:
    x = TensorSpec(name=tokens_name(stage), dtype="float32", shape=(BATCH, tokens.count, config.width))
    if not tokens.companion:
        return (x,)
    name = companion_name(tokens.companion, stage)
    return x, TensorSpec(name=name, dtype="float32", shape=tokens.companion_shape(config))
