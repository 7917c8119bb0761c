"""Curves of cost: what was seen, what was not, and what changes."""

from __future__ import annotations

import pytest

from app.scheduling.costs import HALF_LIFE, CostCurve, StageCosts, Way
from app.types import RunTime


def test_a_line_is_found_again() -> None:
    """2 ms and 0.5 ms for each image, at sizes that were seen and at others."""
    curve = CostCurve()
    for images in (1, 2, 4, 8) * 10:
        curve.observe(images, 0.002 + 0.0005 * images)
    assert (curve.fixed_s, curve.per_image_s) == pytest.approx((0.002, 0.0005))
    assert curve.seconds(16) == pytest.approx(0.01)


def test_what_was_measured_at_load_stays_known_while_all_batches_are_full() -> None:
    """The machine became twice as slow; of full batches that is seen, and one image is not thought to cost nothing."""
    curve = CostCurve([RunTime(1, 0.003), RunTime(8, 0.010)])
    assert [curve.seconds(images) for images in (1, 8)] == pytest.approx([0.003, 0.010])
    for _ in range(20 * HALF_LIFE):
        curve.observe(8, 0.020)
    assert curve.seconds(8) == pytest.approx(0.020, rel=0.02)
    assert 0.003 <= curve.seconds(1) < 0.008


def test_old_runs_are_forgotten() -> None:
    """After twenty half-lives nothing is left of them."""
    curve = CostCurve()
    for seconds in (0.1, 0.01):
        for step in range(20 * HALF_LIFE):
            curve.observe(1 + step % 8, seconds)
    assert curve.seconds(4) == pytest.approx(0.01, rel=1e-3)


@pytest.mark.parametrize(
    ("runs", "one", "eight"),
    [
        ([], 0.0, 0.0),
        ([(4, 0.008)], 0.002, 0.016),  # one size: by the image
        ([(1, 0.010), (8, 0.004)], 0.007, 0.007),  # a larger batch is never cheaper
        ([(1, 0.001), (8, 0.016)], 0.001 * 129 / 65, 0.008 * 129 / 65),  # no time is fixed below 0
    ],
)
def test_no_part_is_below_zero(runs: list[tuple[int, float]], one: float, eight: float) -> None:
    """Whatever was measured."""
    curve = CostCurve(RunTime(*run) for run in runs)
    assert (curve.seconds(1), curve.seconds(8)) == pytest.approx((one, eight))


THROUGH = Way(first=0, after=(1, None), nobody_leaves=(False, False))


def test_an_image_costs_its_share_of_a_full_batch_and_of_what_follows() -> None:
    """Of a hundred images thirty go on: of the second stage an image costs three tenths."""
    costs = StageCosts([[RunTime(1, 0.002), RunTime(8, 0.008)], [RunTime(1, 0.010), RunTime(8, 0.080)]], max_batch_size=8)
    assert costs.remaining_s(THROUGH) == pytest.approx([0.001 + 0.010, 0.010])  # nothing seen: all go on
    for _ in range(1000):
        costs.observe(0, 10, 0.002 + 6 / 7 * 0.001 * 9, 3)
    assert costs.remaining_s(THROUGH) == pytest.approx([0.001 + 0.003, 0.010], rel=0.01)
    assert costs.path_s(THROUGH, 1) == pytest.approx(0.002 + 0.3 * 0.010, rel=0.01)


def test_an_operating_point_has_its_own_way() -> None:
    """Who passes a network over does not pay for it, and where nobody leaves all go on, whatever others did."""
    costs = StageCosts([[RunTime(1, 0.001)], [RunTime(1, 0.010)], [RunTime(1, 0.100)]], max_batch_size=1)
    for _ in range(1000):
        costs.observe(0, 10, 0.010, 1)
    past = Way(first=2, after=(1, 2, None), nobody_leaves=(True, True, True))
    assert costs.path_s(past, 1) == pytest.approx(0.100)
    all_of_it = Way(first=0, after=(1, 2, None), nobody_leaves=(True, True, True))
    assert costs.path_s(all_of_it, 1) == pytest.approx(0.111)
    assert costs.remaining_s(all_of_it) == pytest.approx([0.111, 0.110, 0.100])
    beside = Way(first=0, after=(2, 2, None), nobody_leaves=(False, False, False))
    assert costs.path_s(beside, 1) == pytest.approx(0.001 + 0.1 * 0.100, rel=0.01)


def test_the_fixed_part_is_that_measured_at_load() -> None:
    """What comes under load does not change it; where nothing was measured, that is all there is."""
    costs = StageCosts([[RunTime(1, 1.5), RunTime(8, 5.0)], []], max_batch_size=8)
    for stage in (0, 1):
        for images in (2, 4):
            costs.observe(stage, images, 3.0, images)
    assert costs.fixed_s(0) == pytest.approx(1.0)
    assert costs.fixed_s(1) == pytest.approx(3.0)
    assert costs.curves[0].fixed_s != pytest.approx(1.0, rel=0.01)


def test_a_run_has_no_more_images_than_a_full_batch() -> None:
    """Who comes with seven others to a stage of two at a time takes one run of two, on the way and for the deadline."""
    costs = StageCosts([[RunTime(1, 0.001), RunTime(8, 0.008)], [RunTime(1, 0.030), RunTime(8, 0.240)]], max_batch_size=8)
    assert costs.batch_sizes == [8, 2]
    assert [costs.run_s(stage, 8) for stage in (0, 1)] == pytest.approx([0.008, 0.060])
    assert costs.path_s(THROUGH, 8) == pytest.approx(0.008 + 0.060)
    assert costs.remaining_s(THROUGH) == pytest.approx([0.001 + 0.030, 0.030])


@pytest.mark.parametrize(
    ("fixed_s", "per_image_s", "most", "size"),
    [
        (0.0002, 0.001, 8, 8),  # eight are done in 8 ms: nobody waits for long
        (0.0, 0.0001, 64, 64),
        (0.0002, 0.001, 64, 36),
        (0.0, 0.03, 8, 2),  # a long run, that costs by the image
        (0.0, 0.03, 1, 1),
        (0.002, 0.01, 8, 5),
        (0.2, 0.03, 8, 8),  # a fixed cost to be shared
        (0.2, 0.0, 8, 8),
    ],
)
def test_a_full_batch_is_no_larger_than_is_worth_the_time(fixed_s: float, per_image_s: float, most: int, size: int) -> None:
    """An image costs at most a twentieth more than in the largest batch, with what lies around a run; or the run is quick."""
    runs = [RunTime(images, fixed_s + images * per_image_s) for images in sorted({1, most})]
    assert StageCosts([runs, []], max_batch_size=most).batch_sizes == [size, most]
