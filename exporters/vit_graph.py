"""A stage of the Vision Transformer written directly as an ONNX graph.

As fast as torch's own export in fp32 and faster in INT8 (docs/adr/0005): linear layers become `QuantizeLinear` and
`MatMulIntegerToFloat` with per-channel weights, the stem's convolutions become `QLinearConv`, instead of QDQ pairs that ONNX
Runtime has to recognise. Add, LayerNormalization, Softmax and Gelu stay plain: their fused forms are slower on the CPU.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal

import numpy as np
import onnx
from onnx import TensorProto
from torch import nn

from app.types import Array
from exporters.attention_graph import INT8_FROM_TOKENS, by_head, gather_tokens, mix, scores
from exporters.graph_writer import IN_FP32, ActivationRange, GraphWriter, ReductionNote, Shape
from exporters.reduction_graph import Patches, reduce_patches, remembered, split_patches, take, top_k
from exporters.stem import conv_stem, patch_projection
from models.learned_pruning import LearnedPruning
from models.manifest import BATCH, LOGITS, PIXELS, PreprocessSpec
from models.multi_exit import Stage
from models.slow_fast import SlowFast
from models.vit import Block, ClassBlock, ConvStem, Embedding, Head, PatchEmbed, ViTConfig


def tokens_name(stage: int) -> str:
    """The tokens that a stage gives to the next."""
    return f"tokens_{stage}"


def companion_name(companion: Companion, stage: int) -> str:
    """What goes along with them, where something does."""
    return f"{companion}_{stage}"


# How many patches each token stands for (B, N, 1), or how much each patch matters (B, M); nothing.
Companion = Literal["sizes", "importance", ""]


@dataclass(frozen=True, slots=True)
class TokenCount:
    """How many tokens there are between two stages, and what goes along with them."""

    count: int
    companion: Companion = ""

    def companion_shape(self, config: ViTConfig) -> Shape:
        """ValueError where nothing goes along."""
        match self.companion:
            case "sizes":
                return (BATCH, self.count, 1)
            case "importance":
                return (BATCH, self.count - config.num_prefix_tokens)
        raise ValueError("nothing goes along with these tokens")


def stage_graph(
    stage: Stage,
    index: int,
    config: ViTConfig,
    preprocess: PreprocessSpec,
    *,
    entering: TokenCount,
    leaving: TokenCount,
    last: bool,
    ranges: Mapping[str, ActivationRange] | None = None,
    expose: bool = False,
) -> onnx.ModelProto:
    """The ONNX model of one stage.

    Args:
        stage: in evaluation mode.
        index: of the stage; it gives `tokens_<index>` and takes `tokens_<index - 1>`.
        config: of the whole network.
        preprocess: its layout decides the input of the first stage.
        entering, leaving: what the stage takes (after the embedding, in the first) and gives.
        last: the last stage gives logits only; the others the tokens too.
        ranges: of each linear layer's input and each convolution's output, by layer name; layers named become INT8 (the
            convolutions of a stem only together). None: all stay fp32.
        expose: give the extremes of those inputs and outputs as graph outputs, for calibration.
    """
    graph = _VitGraph(ranges or {}, expose=expose)
    inputs: list[tuple[str, int, Shape]]
    along = {"sizes": "", "importance": ""}
    if stage.embedding is not None:
        x = graph.embed(stage.embedding, config, preprocess)
        kind = TensorProto.UINT8 if preprocess.layout == "uint8_nhwc" else TensorProto.FLOAT
        inputs = [(PIXELS, kind, preprocess.pixels().shape)]
    else:
        x = tokens_name(index - 1)
        inputs = [(x, TensorProto.FLOAT, (BATCH, entering.count, config.width))]
        if entering.companion:
            along[entering.companion] = companion_name(entering.companion, index - 1)
            inputs.append((along[entering.companion], TensorProto.FLOAT, entering.companion_shape(config)))
    tokens = _Tokens(x, along["sizes"], entering.count, along["importance"])
    for number, block in enumerate(stage.blocks):
        if not isinstance(block, Block):
            raise TypeError(f"no graph is known for a block of the kind {type(block).__name__}")
        # Behind the last block only the heads look, and they see the tokens in front.
        prefix_only = last and number == len(stage.blocks) - 1 and asks_for_prefix_only(config)
        tokens = graph.block(block, f"blocks.{number}", tokens, config, prefix_only=prefix_only)
    graph.node("Identity", graph.head(stage.head, tokens), output=LOGITS)
    outputs: list[tuple[str, Shape]] = [(LOGITS, (BATCH, config.num_classes))]
    if not last:
        graph.node("Identity", tokens.x, output=tokens_name(index))
        outputs.append((tokens_name(index), (BATCH, leaving.count, config.width)))
        if leaving.companion:
            name = companion_name(leaving.companion, index)
            graph.node("Identity", getattr(tokens, leaving.companion), output=name)
            outputs.append((name, leaving.companion_shape(config)))
    return graph.model(inputs, outputs)


def asks_for_prefix_only(config: ViTConfig) -> bool:
    """Whether the last block answers the tokens in front of the patches alone; Nyströmformer's landmarks need all queries."""
    return config.num_prefix_tokens > 0 and config.attention != "nystromformer"


@dataclass(frozen=True, slots=True)
class _Tokens:
    """Names of tokens (B, N, D), of their sizes (B, N, 1), "" where each stands for one patch, and N.

    importance: name of that of each patch (B, M), "" where no block has noted it.
    """

    x: str
    sizes: str
    count: int
    importance: str = ""


class _VitGraph(GraphWriter):
    """A method per part of the network."""

    def norm(self, name: str, module: nn.LayerNorm, x: str) -> str:
        scale, bias = self.weight(f"{name}.weight", module.weight), self.weight(f"{name}.bias", module.bias)
        return self.node("LayerNormalization", x, scale, bias, axis=-1, epsilon=module.eps)

    def embed(self, module: Embedding, config: ViTConfig, preprocess: PreprocessSpec) -> str:
        """Pixels -> tokens (B, N, D) with positions; normalises where the preprocessing leaves it to the graph."""
        stem = module.patch_embed
        if isinstance(stem, ConvStem):
            x = conv_stem(self, stem, config, preprocess)
        elif isinstance(stem, PatchEmbed):
            x = patch_projection(self, stem, config, preprocess)
        else:
            raise TypeError(f"no graph is known for a stem of the kind {type(stem).__name__}")
        positions = module.pos_embed.detach().numpy().copy()
        if module.cls_token is not None:
            # Rows of zeros in front, and the class token inside the positions: no node asks for the batch size.
            x = self.node("Pad", x, self.constant([0, config.num_prefix_tokens, 0, 0, 0, 0]))
            positions[:, : config.num_prefix_tokens] += module.cls_token.detach().numpy()
        return self.node("Add", x, self.weight("positions", positions))

    def block(self, module: Block, name: str, tokens: _Tokens, config: ViTConfig, *, prefix_only: bool = False) -> _Tokens:
        """Tokens -> tokens; `prefix_only` gives those in front of the patches alone, exactly as they would be among all."""
        num_prefix = config.num_prefix_tokens
        if module.slow_fast is not None:
            return self.slow_and_fast(module.slow_fast, module, name, tokens, config, prefix_only=prefix_only)
        if module.pruning is not None:
            tokens = self.prune(module.pruning, f"{name}.predictor", tokens)
        attended, patches = self.attention(module, f"{name}.attn", tokens, config, prefix_only=prefix_only)
        x = self.node("Add", self.slice(tokens.x, 0, num_prefix, axis=1) if prefix_only else tokens.x, attended)
        count, sizes = (num_prefix if prefix_only else tokens.count), tokens.sizes
        if module.reduction is not None and not prefix_only:
            x, sizes = reduce_patches(self, module.reduction, patches(x))
            count = num_prefix + module.reduction.keep
        return _Tokens(self.mlp(module, name, x), sizes, count)

    def mlp(self, module: Block, name: str, x: str) -> str:
        """x + mlp(norm(x))."""
        hidden = self.norm(f"{name}.norm2", module.norm2, x)
        hidden = self.linear(f"{name}.mlp.fc1", hidden, *_matrix(module.mlp.fc1))
        hidden = self.node("Gelu", hidden, approximate="none")
        return self.node("Add", x, self.linear(f"{name}.mlp.fc2", hidden, *_matrix(module.mlp.fc2)))

    def slow_and_fast(
        self, slow_fast: SlowFast, module: Block, name: str, tokens: _Tokens, config: ViTConfig, *, prefix_only: bool
    ) -> _Tokens:
        """Tokens -> as many tokens, of which the most important went through the block; `models.slow_fast`."""
        num_prefix, num_patches = config.num_prefix_tokens, tokens.count - config.num_prefix_tokens
        before, rest, known, unseen = tokens, "", tokens.importance, ""
        if slow_fast.computed is not None and tokens.importance:
            patches = self.slice(tokens.x, num_prefix, tokens.count, axis=1)
            split = split_patches(self, patches, tokens.importance, slow_fast.computed, num_patches)
            rest, known, unseen = split.rest, split.known, split.unseen
            x = self.node("Concat", self.slice(tokens.x, 0, num_prefix, axis=1), split.slow, axis=1)
            before = _Tokens(x, "", num_prefix + slow_fast.computed + 1)
        attended, patches_of = self.attention(module, f"{name}.attn", before, config, prefix_only=prefix_only)
        x = self.slice(before.x, 0, num_prefix, axis=1) if prefix_only else before.x
        after = self.mlp(module, name, self.node("Add", x, attended))
        if prefix_only:
            return _Tokens(after, "", num_prefix)
        seen = patches_of(after).class_attention(self)
        if not rest:
            importance = remembered(self, known, seen) if known else seen
            return _Tokens(after, "", tokens.count, importance)
        last, end = before.count - 1, before.count
        step = self.node("Sub", self.slice(after, last, end, axis=1), self.slice(before.x, last, end, axis=1))
        joined = self.node("Concat", self.slice(after, 0, last, axis=1), self.node("Add", rest, step), axis=1)
        known = remembered(self, known, self.slice(seen, 0, last - num_prefix, axis=1))
        return _Tokens(joined, "", tokens.count, self.node("Concat", known, unseen, axis=1))

    def attention(
        self, module: Block, name: str, tokens: _Tokens, config: ViTConfig, *, prefix_only: bool
    ) -> tuple[str, Callable[[str], Patches]]:
        """What attention gathers, and what a reduction may want to know of the patches, given their tokens."""
        heads, width, num_prefix = config.num_heads, config.width, config.num_prefix_tokens
        head_width = width // heads
        x = self.norm(name.removesuffix("attn") + "norm1", module.norm1, tokens.x)
        weight, bias = _matrix(module.attn.qkv)
        # softmax(q k / sqrt(d)) = softmax((q / sqrt(d)) k): the scale goes into the query's weights.
        weight, bias = weight.copy(), bias.copy()
        weight[:, :width] /= np.sqrt(head_width)
        bias[:width] /= np.sqrt(head_width)
        if prefix_only:
            asking = self.slice(x, 0, num_prefix, axis=1)
            q = self.linear(f"{name}.q", asking, weight[:, :width], bias[:width])
            k, v = self.linears(f"{name}.kv", x, weight[:, width:], bias[width:], [".k", ".v"])
        else:
            q, k, v = self.linears(f"{name}.qkv", x, weight, bias, [".q", ".k", ".v"])
        weights = ""
        if module.attn.gather is not None:
            apart = (by_head(self, x, heads, head_width, across=x == k) for x in (q, k, v))
            mixed = gather_tokens(self, f"{name}.gather", module.attn.gather, *apart)
        else:
            talks = module.attn.proj_l is not None or module.attn.proj_w is not None
            small = prefix_only or talks or tokens.count < INT8_FROM_TOKENS
            weights = scores(self, f"{name}.scores", q, k, heads, head_width, small=small)
            if module.attn.proj_l is not None:
                weights = self.across_heads(f"{name}.proj_l", module.attn.proj_l, weights)
            if tokens.sizes:  # proportional attention: + log(size) of what is looked at
                looked_at = self.node("Reshape", self.node("Log", tokens.sizes), self.constant([0, 1, 1, -1]))
                weights = self.node("Add", weights, looked_at)
            weights = self.node("Softmax", weights, axis=-1)
            talked = weights
            if module.attn.proj_w is not None:
                talked = self.across_heads(f"{name}.proj_w", module.attn.proj_w, weights)
            mixed = mix(self, f"{name}.mix", talked, v, heads, head_width, small=small)
        mixed = self.node("Transpose", mixed, perm=[0, 2, 1, 3])
        mixed = self.node("Reshape", mixed, self.constant([0, 0, width]))
        attended = self.linear(f"{name}.proj", mixed, *_matrix(module.attn.proj))

        def patches(of: str) -> Patches:
            return Patches(of, tokens.sizes, weights, k, heads, num_prefix, tokens.count - num_prefix)

        return attended, patches

    def prune(self, module: LearnedPruning, name: str, tokens: _Tokens) -> _Tokens:
        """The patches that the predictor prefers; `models.learned_pruning`."""
        predictor, num_prefix = module.predictor, module.num_prefix
        patches = self.slice(tokens.x, num_prefix, tokens.count, axis=1)
        x = self.linear(f"{name}.fc", self.norm(f"{name}.norm", predictor.norm, patches), *_matrix(predictor.fc))
        own, shared = self.nodes("Split", [self.node("Gelu", x)], [f"{name}.own", f"{name}.shared"], axis=-1, num_outputs=2)
        shared = self.node("ReduceMean", shared, self.constant([1]), keepdims=1)
        shared = self.node("Expand", shared, self.constant([1, tokens.count - num_prefix, 1]))
        x = self.node("Concat", own, shared, axis=-1)
        for layer, part in (("out1", predictor.out1), ("out2", predictor.out2)):
            x = self.node("Gelu", self.linear(f"{name}.{layer}", x, *_matrix(part)))
        # The difference of the two logits, as one column.
        weight, bias = _matrix(predictor.out3)
        weight, bias = weight[:, :1] - weight[:, 1:], bias[:1] - bias[1:]
        odds = self.node("MatMul", x, self.weight(f"{name}{IN_FP32}.out3.weight", weight))
        odds = self.node("Squeeze", self.node("Add", odds, self.weight(f"{name}.out3.bias", bias)), self.constant([-1]))
        order = top_k(self, odds, module.keep)
        self.note(ReductionNote("dynamicvit", tokens.count - num_prefix, module.keep, order))
        kept = take(self, patches, order)
        x = self.node("Concat", self.slice(tokens.x, 0, num_prefix, axis=1), kept, axis=1) if num_prefix else kept
        return _Tokens(x, "", num_prefix + module.keep)

    def across_heads(self, name: str, module: nn.Linear, weights: str) -> str:
        """Each new head a mixture of all: a convolution of one pixel, heads for channels."""
        kernel = module.weight.detach().numpy()[:, :, None, None]
        names = self.weight(f"{name}{IN_FP32}.weight", kernel), self.weight(f"{name}.bias", module.bias)
        return self.node("Conv", weights, *names, kernel_shape=[1, 1])

    def class_attention(self, name: str, module: ClassBlock, token: str, patches: _Tokens) -> str:
        """Class token (B, 1, D) behind a block of class attention."""
        heads, width = module.attn.num_heads, module.attn.q.in_features
        x = self.norm(f"{name}.norm1", module.norm1, self.node("Concat", token, patches.x, axis=1))
        parts = {part: _matrix(getattr(module.attn, part)) for part in "qkv"}
        scale = np.float32(np.sqrt(width // heads))
        q = self.linear(f"{name}.attn.q", self.slice(x, 0, 1, axis=1), parts["q"][0] / scale, parts["q"][1] / scale)
        weight, bias = (np.concatenate([parts["k"][i], parts["v"][i]], axis=-1) for i in (0, 1))
        k, v = self.linears(f"{name}.attn.kv", x, weight, bias, [".k", ".v"])
        q, k, v = (by_head(self, part, heads, width // heads, across=part == k) for part in (q, k, v))
        weights = self.node("MatMul", q, k)  # (B, heads, 1, 1 + N)
        if patches.sizes:  # the class token stands for itself
            sizes = self.node("Pad", patches.sizes, self.constant([0, 1, 0, 0, 0, 0]), self.scalar("one", 1))
            looked_at = self.node("Transpose", self.node("Log", sizes), perm=[0, 2, 1])
            weights = self.node("Add", weights, self.node("Unsqueeze", looked_at, self.constant([1])))
        weights = self.node("Softmax", weights, axis=-1)
        mixed = self.node("Transpose", self.node("MatMul", weights, v), perm=[0, 2, 1, 3])
        mixed = self.node("Reshape", mixed, self.constant([0, 0, width]))
        token = self.node("Add", token, self.linear(f"{name}.attn.proj", mixed, *_matrix(module.attn.proj)))
        hidden = self.norm(f"{name}.norm2", module.norm2, token)
        hidden = self.node("Gelu", self.linear(f"{name}.mlp.fc1", hidden, *_matrix(module.mlp.fc1)), approximate="none")
        return self.node("Add", token, self.linear(f"{name}.mlp.fc2", hidden, *_matrix(module.mlp.fc2)))

    def head(self, module: Head, tokens: _Tokens) -> str:
        """Tokens -> logits; what classifies is always fp32: it is tiny, and confidences come from it."""
        x = tokens.x
        if module.cls_token is not None:
            # The token for every image: a row of zeros in front of the patches, taken alone, and the token added.
            padded = self.node("Pad", x, self.constant([0, 1, 0, 0, 0, 0]))
            zero = self.slice(padded, 0, 1, axis=1)
            token = self.node("Add", zero, self.weight("head.cls_token", module.cls_token))
            for number, block in enumerate(module.class_blocks):
                if not isinstance(block, ClassBlock):
                    raise TypeError(f"no graph is known for a block of the kind {type(block).__name__}")
                token = self.class_attention(f"head.class_blocks.{number}", block, token, tokens)
            x = self.node("Flatten", self.norm("head.norm", module.norm, token))
        elif module.num_prefix_tokens:  # the norm is per token, so the others need none
            x = self.norm("head.norm", module.norm, self.slice(x, 0, module.num_prefix_tokens, axis=1))
            x = self.node("Flatten", x)  # (B, P * D)
        else:
            x = self.norm("head.norm", module.norm, x)
            x = self.node("ReduceMean", x, self.constant([1]), keepdims=0)
        weight, bias = _matrix(module.fc)
        return self.node("Gemm", x, self.weight("head.weight", weight), self.weight("head.bias", bias))


def _matrix(module: nn.Linear) -> tuple[Array, Array]:
    """Weight as (in, out) and bias of a linear layer."""
    return module.weight.detach().numpy().T, module.bias.detach().numpy()
