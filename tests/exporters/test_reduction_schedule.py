"""Schedules of token reduction: what a text says, and what a network can follow."""

from __future__ import annotations

import pytest

from exporters.reduction_schedule import ReductionSchedule, ScheduleError, Wish, apply_schedule, clear_schedule, wish_of
from models.zoo import create_model


@pytest.mark.parametrize(
    ("text", "removed"),
    [
        ("tome:3", (3,) * 6),
        ("tome:4x2", (0, 0, 0, 0, 4, 4)),
        ("evit:0,0,1,2,3,0", (0, 0, 1, 2, 3, 0)),
        ("evit:0.5@2,4", (0, 7, 0, 3, 0, 0)),  # 16 -> 8 and one of the rest -> 5 and one
        ("top_k_attention:0.5@4,2", (0, 8, 0, 4, 0, 0)),
        ("evo_vit:0.6@3,4", (0, 0, 6, 6, 0, 0)),  # of all patches each time
    ],
    ids=["constant", "late", "block by block", "shares, the rest fused", "shares", "shares of slow tokens"],
)
def test_a_text_becomes_an_amount_for_every_block(text: str, removed: tuple[int, ...]) -> None:
    """And back into a text that says the same."""
    schedule = ReductionSchedule.parse(text, 6, 16)

    assert schedule.removed == removed
    assert ReductionSchedule.parse(str(schedule), 6, 16).removed == removed


@pytest.mark.parametrize(
    "text",
    [
        "magic:3",
        "tome",
        "tome:",
        "tome:a",
        "tome:1,2",
        "tome:3x9",
        "tome:-1",
        "tome:1x2x3",
        "evit:0.5@7",
        "evit:2@1",
        "evit:@1",
        "evit:0.7@4,4",
    ],
)
def test_anything_else_is_refused(text: str) -> None:
    """With what could be said instead."""
    with pytest.raises(ScheduleError, match=r"magic|METHOD:13|no schedule for 6 blocks"):
        ReductionSchedule.parse(text, 6, 16)


def test_every_block_knows_how_many_tokens_are_left() -> None:
    """16 patches, 3 fewer in the last two blocks."""
    model = create_model("test_vit")
    apply_schedule(model, ReductionSchedule.parse("tome:3x2", 6, 16))

    reductions = [block.reduction for stage in model.stages for block in stage.blocks]
    assert reductions[:4] == [None] * 4
    assert [(r.method, r.keep, r.num_prefix) for r in reductions[4:]] == [("tome", 13, 1), ("tome", 10, 1)]


@pytest.mark.parametrize(
    ("name", "text", "words"),
    [
        ("test_vit", "tome:9,0,0,0,0,0", "block 0 has 16 patch tokens, of which at most 8 can be merged, not 9"),
        ("test_vit", "evit:4", "block 3: 0 patch tokens"),
        ("test_vit", "tome:0.4@4", "block 3 has 16 patch tokens, of which at most 8 can be merged, not 9"),
        ("vit_cifar10", "evit:4", "has no class token"),
    ],
)
def test_what_a_network_cannot_follow_is_refused(name: str, text: str, words: str) -> None:
    """Before anything is exported."""
    with pytest.raises(ScheduleError, match=words):
        apply_schedule(create_model(name), ReductionSchedule.parse(text, 6, 16))


def test_merging_gives_what_it_can_where_no_block_was_named() -> None:
    """At most half of the tokens at once: 16, 8, 4, 2, 1, 1."""
    model = create_model("test_vit")
    apply_schedule(model, ReductionSchedule.parse("tome:8", 6, 16))

    kept = [block.reduction.keep for stage in model.stages for block in stage.blocks if block.reduction is not None]
    assert kept == [8, 4, 2, 1]


def test_a_schedule_can_be_wished_for() -> None:
    """By a share of the multiply-adds or by a threshold; everything else is said outright, or is neither."""
    assert wish_of("tome:55%") == Wish("tome", "share", 0.55)
    assert wish_of("top_k_norm:>0.3") == Wish("top_k_norm", "threshold", 0.3)
    assert wish_of("tome:13") is None
    for text, message in (
        ("tome:a%", "is no number"),
        ("tome:>b", "is no number"),
        ("tome:0%", "shares are between"),
        ("tome:100%", "shares are between"),
        ("tome:>0", "above 0"),
        ("tome:>inf", "above 0"),
        ("magic:50%", "no token reduction called"),
    ):
        with pytest.raises(ScheduleError, match=message):
            wish_of(text)


def test_a_cleared_network_has_all_its_tokens() -> None:
    """As it came."""
    model = create_model("test_vit")
    apply_schedule(model, ReductionSchedule.parse("tome:3", 6, 16))
    clear_schedule(model)
    assert {block.reduction for stage in model.stages for block in stage.blocks} == {None}


def test_slow_and_fast_tokens_need_a_block_that_watches() -> None:
    """The one before the first that leaves patches out; every block behind goes on noting."""
    model = create_model("test_vit")
    apply_schedule(model, ReductionSchedule.parse("evo_vit:0,0,9,0,7,0", 6, 16))

    found = [block.slow_fast for stage in model.stages for block in stage.blocks]
    assert found[0] is None
    assert [each.computed for each in found[1:]] == [None, 7, None, 9, None]
    clear_schedule(model)
    assert all(block.slow_fast is None for stage in model.stages for block in stage.blocks)
    for text, reason in (("evo_vit:4", "needs a block before"), ("evo_vit:0,16,0,0,0,0", "0 patch tokens cannot")):
        with pytest.raises(ScheduleError, match=reason):
            apply_schedule(model, ReductionSchedule.parse(text, 6, 16))
    with pytest.raises(ScheduleError, match="no class token"):
        apply_schedule(create_model("vit_cifar10"), ReductionSchedule.parse("evo_vit:20x3", 6, 64))
    with pytest.raises(ScheduleError, match="not searched for"):
        wish_of("evo_vit:70%")
