"""A token of a network with fewer of them is compared with what its patches are in the network that keeps them all."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch

from models.learned_pruning import LearnedPruning, TokenPredictor
from models.multi_exit import MultiExitViT
from models.slow_fast import SlowFast
from models.token_reduction import METHODS, TokenReduction
from models.training.followed import Followed, FollowedReduction, Trail
from models.vit import Block
from models.zoo import ZOO

CONFIG, BOUNDARIES = ZOO["test_vit"].config, ZOO["test_vit"].boundaries
PREFIX, PATCHES = CONFIG.num_prefix_tokens, CONFIG.num_patches
IMAGES = torch.randn(3, 3, CONFIG.image_size, CONFIG.image_size, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def student(teacher: MultiExitViT) -> MultiExitViT:
    """The same, which merges behind its first block and again behind its second."""
    model = copy.deepcopy(teacher)
    for block, keep in zip(blocks_of(model), (PATCHES - 5, PATCHES - 8), strict=False):
        block.reduction = TokenReduction("tome", keep, PREFIX)
    return model


def blocks_of(model: MultiExitViT) -> list[Block]:
    return [module for module in model.modules() if isinstance(module, Block)]


@torch.no_grad()
def distance(student: MultiExitViT, teacher: MultiExitViT) -> float:
    with Followed(student, teacher) as followed:
        teacher(IMAGES)
        student(IMAGES)
        return float(followed.distance())


@pytest.mark.parametrize("method", sorted(METHODS))
def test_a_token_is_what_its_shares_say(method: str) -> None:
    """Shares of two reductions, one behind the other, times the patches that there were at first."""
    generator, trail = torch.Generator().manual_seed(0), Trail()
    x, sizes = torch.randn(2, 1 + 12, 6, generator=generator), torch.ones(2, 1 + 12, 1)
    patches = x[:, 1:]
    trail.start(len(x), patches.shape[1])
    for keep in (8, 5):
        tokens = x.shape[1]
        weights = torch.randn(2, 3, tokens, tokens, generator=generator).softmax(dim=-1)
        keys = torch.randn(2, tokens, 4, generator=generator)
        x, sizes = FollowedReduction(method, keep, 1, trail)(x, sizes, weights, keys)

    assert trail.shares.shape == (2, 5, 12)
    torch.testing.assert_close(trail.shares @ patches, x[:, 1:])
    torch.testing.assert_close(trail.shares.sum(dim=-1), torch.ones(2, 5))


def test_a_network_is_no_distance_from_itself(teacher: MultiExitViT) -> None:
    """And is, once a weight changes."""
    student = copy.deepcopy(teacher)
    assert distance(student, teacher) == 0.0
    blocks_of(student)[-1].mlp.fc2.bias.data.add_(0.5)
    assert distance(student, teacher) > 0.01


def test_tokens_are_compared_with_the_mean_of_their_patches(teacher: MultiExitViT, student: MultiExitViT) -> None:
    """Against a plain loop over blocks, images and tokens, patches told apart by what is merged with what."""
    found = distance(student, teacher)

    total, blocks, trail = 0.0, blocks_of(teacher), Trail()
    with torch.no_grad():
        stage = student.stages[0]
        tokens = stage.embedding(IMAGES)
        wanted, sizes = tokens, None
        trail.start(len(IMAGES), PATCHES)
        for number, (ours, theirs) in enumerate(zip(blocks_of(student), blocks, strict=True)):
            if ours.reduction is not None:
                ours.reduction = FollowedReduction(ours.reduction.method, ours.reduction.keep, PREFIX, trail)
            tokens, sizes = ours(tokens, sizes)
            wanted, _ = theirs(wanted)
            front = [float((a - b).square().mean()) for a, b in zip(tokens[:, :PREFIX], wanted[:, :PREFIX], strict=True)]
            total += sum(front) / len(front) / float(wanted[:, :PREFIX].square().mean())
            if number == len(blocks) - 1:
                continue
            errors = []
            for image in range(len(IMAGES)):
                for token, shares in zip(tokens[image, PREFIX:], trail.shares[image], strict=True):
                    members = [patch for patch in range(PATCHES) if shares[patch] > 0]
                    mean = sum(float(shares[patch]) * wanted[image, PREFIX + patch] for patch in members)
                    errors += [float((token - mean).square().mean())] * len(members)
            assert len(errors) == len(IMAGES) * PATCHES
            total += sum(errors) / len(errors) / float(wanted[:, PREFIX:].square().mean())
    assert found == pytest.approx(total / len(blocks), rel=1e-5)


def test_where_patches_cannot_be_followed_the_class_token_is(teacher: MultiExitViT) -> None:
    """Behind learned pruning, slow and fast tokens, and with patches of another size."""
    for number, part in enumerate((LearnedPruning(TokenPredictor(CONFIG.width), 4, PREFIX), SlowFast(4, PREFIX), None)):
        student = copy.deepcopy(teacher)
        if isinstance(part, LearnedPruning):
            blocks_of(student)[1].pruning = part
        elif isinstance(part, SlowFast):
            for block in blocks_of(student):
                block.slow_fast = part
        else:
            larger = replace(CONFIG, patch_size=2 * CONFIG.patch_size, stem=())
            student = MultiExitViT(larger, BOUNDARIES).eval()
        before = distance(student, teacher)
        assert before > 0, number
        with torch.no_grad():
            blocks_of(student)[-1].mlp.fc2.weight.mul_(2)
        assert distance(student, teacher) != before, number


def test_a_network_is_left_as_it_was(teacher: MultiExitViT, student: MultiExitViT) -> None:
    """Also behind an error."""
    reductions = [block.reduction for block in blocks_of(student)]

    def fail_while_followed() -> None:
        with Followed(student, teacher):
            assert any(isinstance(block.reduction, FollowedReduction) for block in blocks_of(student))
            raise RuntimeError("on purpose")

    with pytest.raises(RuntimeError, match="on purpose"):
        fail_while_followed()

    assert reductions == [block.reduction for block in blocks_of(student)]
    assert not any(isinstance(reduction, FollowedReduction) for reduction in reductions)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in [*student.modules(), *teacher.modules()])


def test_networks_of_other_depths_are_refused(teacher: MultiExitViT) -> None:
    deeper = MultiExitViT(replace(CONFIG, depth=CONFIG.depth + 1), (*BOUNDARIES, CONFIG.depth + 1))
    with pytest.raises(ValueError, match=f"{CONFIG.depth + 1} blocks cannot be compared with {CONFIG.depth}"):
        Followed(deeper, teacher)
