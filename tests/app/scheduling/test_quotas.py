"""Token buckets: bursts, refilling, one client's haste is not another's, and their number is bounded."""

from __future__ import annotations

import pytest

from app.errors import InvalidRequest, QuotaExceeded
from app.scheduling import quotas as module
from app.scheduling.quotas import Quotas
from tests.fakes import Clock


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def quotas(clock: Clock) -> Quotas:
    """Two images a second, four at once."""
    return Quotas(images_per_s=2.0, burst=4, clock=clock)


def test_a_burst_and_then_the_rate(quotas: Quotas, clock: Clock) -> None:
    """Four at once, then one every half second; who is refused is told when, and has lost nothing."""
    quotas.take("a", 3)
    quotas.take("a", 1)
    for _ in range(3):
        with pytest.raises(QuotaExceeded, match="2 images a second, 4 at once") as refused:
            quotas.take("a", 1)
        assert refused.value.retry_after_s == pytest.approx(0.5)
    clock.advance(0.5)
    quotas.take("a", 1)
    clock.advance(3600)
    quotas.take("a", 4)
    with pytest.raises(QuotaExceeded) as refused:
        quotas.take("a", 3)
    assert refused.value.retry_after_s == pytest.approx(1.5)


def test_clients_do_not_share(quotas: Quotas) -> None:
    """Nor is a request of theirs taken in part."""
    quotas.take("a", 4)
    quotas.take("b", 2)
    with pytest.raises(QuotaExceeded):
        quotas.take("b", 3)
    quotas.take("b", 2)


def test_more_than_a_bucket_holds_is_refused_for_good(quotas: Quotas) -> None:
    """Waiting would not help."""
    with pytest.raises(InvalidRequest, match="5 images and a client may send at most 4 at once"):
        quotas.take("a", 5)


def test_memory_is_bounded(quotas: Quotas, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever has been quiet for longest is forgotten."""
    monkeypatch.setattr(module, "MAX_CLIENTS", 3)
    for client in "abcad":
        quotas.take(client, 1)
    assert list(quotas._buckets) == ["c", "a", "d"]
