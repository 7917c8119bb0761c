"""The ladder of operating points: what a variant has, and what a request may ask for."""

from __future__ import annotations

import numpy as np
import pytest
from pydantic import ValidationError

from app.errors import InvalidRequest
from app.exits import ExitPolicy
from app.quality import DOWN_AFTER_S, TIGHT_AFTER_S, UP_AFTER_S, Ladder, QualityController
from models.manifest import Certificate, ExitSpec, HardwareTarget, OperatingPoint, VariantSpec
from tests.fakes import Clock

CERTIFICATE = Certificate(
    risk="accuracy",
    compared_with="the last exit of the same variant",
    epsilon=0.02,
    delta=0.1,
    images=400,
    images_sha256="0" * 64,
    method="a test",
    limits="everything else",
)


def variant(*points: OperatingPoint, stages: int = 3) -> VariantSpec:
    exits = [ExitSpec(score="max_softmax", temperature=1.0, threshold=0.9) for _ in range(stages - 1)]
    return VariantSpec(
        name="fp32",
        targets=(HardwareTarget.CPU,),
        files=tuple(f"{stage}.onnx" for stage in range(stages)),
        exits=(*exits, ExitSpec(score="max_softmax", temperature=1.0, threshold=None)),
        golden_atol=1e-3,
        points=points,
    )


FAST = OperatingPoint(name="fast", thresholds=(0.5, 0.6), certificate=CERTIFICATE)


def test_every_variant_is_full_and_balanced_and_what_it_adds() -> None:
    """Most faithful first; the bound is the certificate's, and at the full depth nothing is lost."""
    ladder = Ladder(variant(FAST))

    assert [rung.name for rung in ladder] == ["full", "balanced", "fast"]
    assert [rung.thresholds[-1] for rung in ladder] == [None] * 3
    assert ladder[1].thresholds == (0.9, 0.9, None)
    assert ladder[2].thresholds == (0.5, 0.6, None)
    assert [rung.bound for rung in ladder][:2] == ["every image has the answer of the last exit", ""]
    assert ladder[2].bound == str(CERTIFICATE)
    assert "at most 2 points of accuracy against the last exit of the same variant, with 90 % confidence" in ladder[2].bound
    assert [ladder.index(name) for name in ("full", "balanced", "fast")] == [0, 1, 2]
    with pytest.raises(InvalidRequest, match="quality is 'best'; this model has full, balanced, fast"):
        ladder.index("best")


def test_one_stage_is_always_the_full_depth() -> None:
    """There is nothing to leave early."""
    assert [rung.is_full for rung in Ladder(variant(stages=1))] == [True, True]


def test_images_of_a_batch_leave_by_their_own_operating_point() -> None:
    """The same confidence is enough for one and not for another; behind the last stage all leave."""
    fitted = variant(FAST)
    policy = ExitPolicy(fitted.exits, Ladder(fitted).thresholds)
    logits = np.log(np.array([[0.7, 0.3]] * 3 + [[0.95, 0.05]] * 3 + [[1.0, 1e-30]], dtype=np.float32))

    leave, _ = policy.decide(0, logits, [0, 1, 2, 0, 1, 2, 0])

    assert leave.tolist() == [False, False, True, False, True, True, False]  # not even the surest at the full depth
    assert policy.decide(2, logits, [0, 1, 2, 0, 1, 2, 0])[0].all()
    assert ExitPolicy(fitted.exits).decide(0, logits)[0].tolist() == [False] * 3 + [True] * 4


@pytest.mark.parametrize(
    ("points", "word"),
    [
        ((FAST, FAST), "the same name"),
        ((FAST.model_copy(update={"name": "full"}),), "the same name"),
        ((OperatingPoint(name="fast", thresholds=(0.5,)),), r"\['fast'\] need a threshold for each of 2 early exits"),
    ],
)
def test_a_ladder_that_makes_no_sense_is_no_manifest(points: tuple[OperatingPoint, ...], word: str) -> None:
    """Two points of a name, or thresholds that do not fit the exits."""
    with pytest.raises(ValidationError, match=word):
        variant(*points)


@pytest.fixture
def clock() -> Clock:
    return Clock()


def controller(clock: Clock, *, default: int = 0, floor: int = 2) -> QualityController:
    return QualityController(Ladder(variant(FAST)), default=default, floor=floor, clock=clock)


def press(quality: QualityController, clock: Clock, steps: int) -> None:
    """A long wait for long enough."""
    quality.observe(2.0)
    for _ in range(steps):
        clock.advance(2 * DOWN_AFTER_S)
        quality.observe(2.0)


def test_the_ladder_is_only_gone_down_as_far_as_it_is_proved() -> None:
    """`balanced` has no certificate here, so `fast` behind it is not reached by itself."""
    ladder = Ladder(variant(FAST))
    assert [ladder.lowest_certified(start) for start in range(3)] == [0, 2, 2]


def test_quality_goes_down_step_by_step_and_not_below_the_floor(clock: Clock) -> None:
    """A step at a time, because what it changes is only seen after a while."""
    quality = controller(clock, floor=2)
    seen = []
    for _ in range(5):
        quality.observe(2.0)
        quality.observe(2.0)  # too early for another step
        seen.append(quality.current)
        clock.advance(2 * DOWN_AFTER_S)
    assert seen == [0, 1, 2, 2, 2]
    assert quality.steps_down == 2
    never = controller(clock, default=1, floor=1)
    press(never, clock, 2)
    assert (never.current, never.steps_down) == (1, 0)


def test_quality_comes_back_when_it_has_been_calm_for_a_while(clock: Clock) -> None:
    """A wait in between holds it where it is; after a quiet hour it is all back at the first request."""
    quality = controller(clock)
    press(quality, clock, 2)
    assert quality.current == 2
    for _ in range(10):
        clock.advance(UP_AFTER_S / 2)
        quality.observe(0.5)  # neither long nor short
    assert quality.current == 2
    found = []
    for _ in range(5):
        clock.advance(UP_AFTER_S / 2)
        quality.observe(0.1)
        found.append(quality.current)
    assert found == [2, 1, 1, 0, 0]
    press(quality, clock, 2)
    clock.advance(3600)
    quality.observe(0.0)
    assert quality.current == 0


@pytest.mark.parametrize(
    ("wanted", "floor", "calm", "pressed"),
    [
        (None, None, 0, 2),
        (0, None, 0, 0),  # who names a point keeps it
        (2, None, 2, 2),
        (None, 1, 0, 1),
        (0, 2, 0, 2),
        (1, 1, 1, 1),
    ],
)
def test_each_request_has_its_own_floor(clock: Clock, wanted: int | None, floor: int | None, calm: int, pressed: int) -> None:
    """And nobody gets less than the model's own."""
    quality = controller(clock)
    assert quality.range(wanted, floor)[0] == calm
    press(quality, clock, 2)
    assert quality.range(wanted, floor)[0] == pressed
    above = controller(clock, floor=1)
    press(above, clock, 2)
    assert above.range(None, 2) == (1, 1)


def test_a_step_up_that_had_to_be_taken_back_makes_the_next_one_wait(clock: Clock) -> None:
    """Twice as long, so that a load between two points does not swing between them; a calm while later it is as before."""
    quality = controller(clock, floor=1)

    def calm_for(seconds: float) -> int:
        for _ in range(round(seconds / 0.1)):
            clock.advance(0.1)
            quality.observe(0.0)
        return quality.current

    press(quality, clock, 1)
    assert [calm_for(1.9), calm_for(0.2)] == [1, 0]
    press(quality, clock, 1)
    assert [calm_for(3.9), calm_for(0.2)] == [1, 0]
    press(quality, clock, 1)
    assert [calm_for(7.9), calm_for(0.2)] == [1, 0]
    assert calm_for(9) == 0
    press(quality, clock, 1)
    assert [calm_for(1.9), calm_for(0.2)] == [1, 0]


def test_one_long_wait_among_short_ones_changes_nothing(clock: Clock) -> None:
    """Only one that lasts."""
    quality = controller(clock)
    for _ in range(20):
        clock.advance(DOWN_AFTER_S)
        quality.observe(2.0)
        clock.advance(DOWN_AFTER_S)
        quality.observe(0.9)
    assert quality.current == 0


def test_where_refusals_are_near_it_goes_down_sooner(clock: Clock) -> None:
    """Those in front keep their points, so a step that waits for a long wait comes too late for some; one spike is none."""
    quality = controller(clock)
    seen = []
    for _ in range(4):
        quality.observe(0.9, needed=0.8)
        seen.append(quality.current)
        clock.advance(1.5 * TIGHT_AFTER_S)
    assert seen == [0, 1, 2, 2]
    spiky = controller(clock)
    for _ in range(20):
        clock.advance(TIGHT_AFTER_S)
        spiky.observe(0.9, needed=0.8)
        clock.advance(TIGHT_AFTER_S)
        spiky.observe(0.9, needed=0.5)
    assert spiky.current == 0


def test_nothing_is_taken_back_while_refusals_are_near(clock: Clock) -> None:
    """Where answers come late now and then, a short wait alone does not say that there is time to spare."""
    quality = controller(clock)
    press(quality, clock, 2)
    for _ in range(10):
        clock.advance(UP_AFTER_S / 2)
        quality.observe(0.1, needed=0.8)
    assert quality.current == 2
    for _ in range(3):
        clock.advance(UP_AFTER_S / 2)
        quality.observe(0.1, needed=0.5)
    assert quality.current == 1
