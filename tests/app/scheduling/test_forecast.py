"""When an answer would come, and how careful the next promise is after one that failed."""

from __future__ import annotations

from dataclasses import dataclass

import pytest

from app.scheduling.forecast import MAX_AGE_S, MAX_FACTOR, MIN_ANSWERS, REFRESH_S, WINDOW, Correction, Forecast
from tests.fakes import Clock


@dataclass
class Decoding:
    num_threads: int = 2
    unfinished: int = 0
    mean_job_s: float = 0.002


@dataclass
class Computing:
    """Four instance-milliseconds an image, two instances, batches of 4 ms and 1 ms for each image."""

    num_images: int = 0

    def outlook(self, more: int, point: int) -> tuple[float, float]:
        waiting = self.num_images + more
        batch = min(waiting, 8)
        return 0.004 * (1 + point) / 2 * (waiting - batch), 0.004 + 0.001 * batch


def no_lag() -> float:
    return 0.0


def test_what_takes_longer_decides() -> None:
    """Decoding and computing go on at once; behind both the image's own way."""
    assert Forecast(Decoding(), Computing(), no_lag).predict_s(1, 0) == pytest.approx(0.001 + 0.005)
    assert Forecast(Decoding(), Computing(20), no_lag).predict_s(1, 0) == pytest.approx(0.026 + 0.012)
    assert Forecast(Decoding(), Computing(20), no_lag).predict_s(1, 1) == pytest.approx(0.052 + 0.012)
    decoding = Decoding(unfinished=30, mean_job_s=0.008)
    assert Forecast(decoding, Computing(2), no_lag).predict_s(2, 0) == pytest.approx(0.128 + 0.012)


def test_it_knows_how_many_are_in_front() -> None:
    """On threads, and in stages."""
    assert Forecast(Decoding(unfinished=2), Computing(3), no_lag).in_front == 5


def test_answers_teach_a_factor_and_a_margin() -> None:
    """Half as long again as a rule, and one in two hundred more than that; few answers teach no factor."""
    clock = Clock()
    correction = Correction(clock)
    assert (correction.factor, correction.margin_s) == (1, 0)
    for number in range(200):
        correction.add(0.1, 0.15 + (0.05 if number % 100 == 0 else 0.0))
    clock.advance(REFRESH_S)
    correction.add(0.1, 0.15)
    assert correction.factor == pytest.approx(1.505, rel=1e-4)
    assert correction.margin_s == pytest.approx(0.2 - 0.1505, rel=1e-3)
    for _ in range(WINDOW):
        correction.add(0.1, 0.1)
    clock.advance(REFRESH_S)
    correction.add(0.1, 0.1)
    assert (correction.factor, correction.margin_s) == pytest.approx((1, 0))
    correction.add(0.1, 9.0)
    assert correction.factor == pytest.approx(1)  # not looked up yet


def test_no_factor_runs_away() -> None:
    """Whatever happened once."""
    for predicted, took, factor in ((0.001, 10.0, MAX_FACTOR), (10.0, 0.001, 1 / MAX_FACTOR), (0.0, 1.0, 1.0)):
        correction = Correction(Clock())
        for _ in range(MIN_ANSWERS):
            correction.add(predicted, took)
        assert correction.factor == factor


def test_care_ends_by_itself() -> None:
    """Whoever is refused teaches nothing; so answers grow old without new ones."""
    clock = Clock()
    forecast = Forecast(Decoding(), Computing(), no_lag, Correction(clock))
    before_s = forecast.needed_s(0.1)
    assert before_s == pytest.approx(0.1)
    for _ in range(MIN_ANSWERS):
        forecast.learn(0.1, 0.9)
    assert forecast.needed_s(0.1) == pytest.approx(0.9)
    assert forecast.expected_s(0.1) == pytest.approx(0.1 * MAX_FACTOR)
    clock.advance(MAX_AGE_S / 2)
    assert forecast.needed_s(0.1) == pytest.approx(0.9)
    clock.advance(MAX_AGE_S)
    assert forecast.needed_s(0.1) == before_s


def test_the_lag_of_the_loop_is_added() -> None:
    """No answer shows it."""
    assert Forecast(Decoding(), Computing(), lambda: 0.03).needed_s(0.1) == pytest.approx(0.13)
