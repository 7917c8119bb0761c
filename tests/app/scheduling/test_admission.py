"""One limit on images and bytes: all or nothing, given back whatever happens, and an honest Retry-After."""

from __future__ import annotations

import asyncio
import math
from contextlib import suppress

import pytest

from app.errors import Overloaded
from app.metrics import Metrics
from app.scheduling.admission import MAX_RETRY_AFTER_S, MIN_RETRY_AFTER_S, RATE_HALF_LIFE_S, Admission
from tests.fakes import Clock


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def admission(metrics: Metrics, clock: Clock) -> Admission:
    """Four images and a hundred bytes at once."""
    return Admission(max_images=4, max_bytes=100, metrics=metrics, clock=clock)


def gauges(metrics: Metrics) -> tuple[float | None, float | None]:
    return tuple(metrics.registry.get_sample_value(name) for name in ("fovea_in_flight", "fovea_in_flight_bytes"))  # type: ignore[return-value]


def request(admission: Admission, *, images: int, num_bytes: int = 0, error: Exception | None = None) -> None:
    """One request from its arrival to its answer, or to its error."""
    with admission.admit() as permit:
        permit.take_bytes(num_bytes)
        permit.take_images(images)
        assert admission.images_in_flight >= images
        if error is not None:
            raise error


def test_the_limit_itself_is_admitted(admission: Admission, metrics: Metrics) -> None:
    """As many images and bytes as the limits say, by several requests together."""
    with admission.admit() as first, admission.admit() as second:
        first.take_images(3)
        second.take_images(1)
        first.take_bytes(60)
        second.take_bytes(40)
        assert admission.images_in_flight == 4
        assert gauges(metrics) == (4, 100)


def test_images_are_admitted_all_or_none(admission: Admission, metrics: Metrics) -> None:
    """A request that does not fit whole takes nothing; what is left is for another."""
    with admission.admit() as first, admission.admit() as second:
        first.take_images(3)
        with pytest.raises(Overloaded, match="3 images are being worked on and at most 4"):
            second.take_images(2)
        assert gauges(metrics) == (3, 0)
        second.take_images(1)

    assert admission.images_in_flight == 0


def test_bytes_are_admitted_all_or_none(admission: Admission, metrics: Metrics) -> None:
    """The chunk of a body that does not fit is refused, and the chunks before are still held."""
    with admission.admit() as first, admission.admit() as second:
        first.take_bytes(50)
        second.take_bytes(40)
        with pytest.raises(Overloaded, match="90 bytes are being worked on and at most 100 bytes"):
            second.take_bytes(11)
        assert gauges(metrics) == (0, 90)
        second.take_bytes(10)


@pytest.mark.parametrize("error", [None, RuntimeError("a fault of ours"), Overloaded("another limit", retry_after_s=1)])
def test_everything_is_given_back(admission: Admission, metrics: Metrics, error: Exception | None) -> None:
    """However the request ends; and the whole room is there again."""
    with suppress(RuntimeError, Overloaded):
        request(admission, num_bytes=10, images=4, error=error)

    assert gauges(metrics) == (0, 0)
    with admission.admit() as permit:
        permit.take_images(4)
        permit.take_bytes(100)


def test_a_refused_request_gives_back_what_it_held(admission: Admission, metrics: Metrics) -> None:
    """Its body was admitted, its images were not: the bytes are free again."""
    with pytest.raises(Overloaded):
        request(admission, num_bytes=80, images=5)

    assert gauges(metrics) == (0, 0)


def test_nothing_is_admitted_after_close(admission: Admission) -> None:
    """Requests that hold a permit go on and may take more; new ones are sent elsewhere."""
    with admission.admit() as permit:
        admission.close()
        permit.take_images(4)
        with pytest.raises(Overloaded, match="stopping") as refused:
            admission.admit()

    assert refused.value.retry_after_s >= MIN_RETRY_AFTER_S


def answer_images(admission: Admission, clock: Clock, *, per_second: float, seconds: float) -> None:
    """One image after the other, each answered, with quiet minutes between that must not count."""
    for _ in range(round(per_second * seconds)):
        with admission.admit() as permit:
            permit.take_images(1)
            clock.advance(1 / per_second)
        clock.advance(60)


@pytest.mark.parametrize("per_second", [5, 20])
def test_retry_after_follows_the_measured_rate(metrics: Metrics, clock: Clock, per_second: float) -> None:
    """It is the time that the images in flight will take at the rate of busy times; 40 images at 5/s: 8 s, at 20/s: 2 s."""
    admission = Admission(max_images=40, max_bytes=1, metrics=metrics, clock=clock)
    answer_images(admission, clock, per_second=per_second, seconds=20 * RATE_HALF_LIFE_S)

    with admission.admit() as permit:
        permit.take_images(40)
        with admission.admit() as second, pytest.raises(Overloaded) as refused:
            second.take_images(1)

    # Single answers are added at once and decay until the next: half of one step too much at most.
    assert refused.value.retry_after_s == pytest.approx(40 / per_second, rel=0.02)


def test_retry_after_follows_a_change_of_rate(metrics: Metrics, clock: Clock) -> None:
    """After some half lives at the new rate nothing is left of the old."""
    admission = Admission(max_images=40, max_bytes=1, metrics=metrics, clock=clock)
    answer_images(admission, clock, per_second=100, seconds=100)
    answer_images(admission, clock, per_second=4, seconds=10 * RATE_HALF_LIFE_S)

    with admission.admit() as permit:
        permit.take_images(40)
        assert admission.retry_after_s() == pytest.approx(10, rel=0.04)


def test_retry_after_stays_within_its_bounds(admission: Admission, clock: Clock) -> None:
    """Never below a second, even when nothing was measured or is in flight; never above a minute, however slow."""
    assert admission.retry_after_s() == MIN_RETRY_AFTER_S
    with admission.admit() as permit:
        permit.take_images(4)
        assert admission.retry_after_s() == MIN_RETRY_AFTER_S
    answer_images(admission, clock, per_second=1000, seconds=1)
    assert admission.retry_after_s() == MIN_RETRY_AFTER_S
    with admission.admit() as permit:
        permit.take_images(1)
        clock.advance(1000)
        assert admission.retry_after_s() == MAX_RETRY_AFTER_S


def test_failed_requests_do_not_count_as_answered(admission: Admission, clock: Clock) -> None:
    """A service that fails quickly is not a fast one."""

    def fail() -> None:
        with admission.admit() as permit:
            permit.take_images(1)
            clock.advance(0.002)
            raise RuntimeError("a fault of ours")

    for _ in range(1000):
        with pytest.raises(RuntimeError):
            fail()
    with admission.admit() as permit:
        permit.take_images(1)
        clock.advance(1)
    with admission.admit() as permit:
        permit.take_images(1)
        # One answer in 3 busy seconds, the older 2 of them faded; with the failures it would be the minimum.
        faded = (1 - 0.5 ** (2 / RATE_HALF_LIFE_S)) * RATE_HALF_LIFE_S / math.log(2) * 0.5 ** (1 / RATE_HALF_LIFE_S)
        assert admission.retry_after_s() == pytest.approx(faded + 1, rel=1e-2)


@pytest.mark.anyio
async def test_idle_is_when_the_last_permit_is_given_back(admission: Admission) -> None:
    """A request that is still uploading holds no image yet, and is waited for all the same."""
    with admission.admit():
        waiting = asyncio.create_task(admission.wait_idle())
        await asyncio.sleep(0)
        assert not waiting.done()
    await waiting
