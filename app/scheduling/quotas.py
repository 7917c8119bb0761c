"""How many images each client may send: a token bucket for each (as in RFC 2697, with one rate), bounded in number."""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Callable

from app.errors import InvalidRequest, QuotaExceeded

MAX_CLIENTS = 10_000  # that are remembered; who comes back after being forgotten begins with a full bucket


class Quotas:
    """For one event loop.

    Args:
        images_per_s: that a client may send on average.
        burst: that it may send at once.
    """

    def __init__(self, *, images_per_s: float, burst: int, clock: Callable[[], float] = time.monotonic) -> None:
        self._rate = images_per_s
        self._burst = burst
        self._clock = clock
        self._buckets: OrderedDict[str, tuple[float, float]] = OrderedDict()  # tokens, and when they were counted

    def take(self, client: str, images: int) -> None:
        """Count images of a client, all or none.

        Raises:
            InvalidRequest: more than it may ever send at once.
            QuotaExceeded: more than it may send now.
        """
        if images > self._burst:
            raise InvalidRequest(f"the request has {images} images and a client may send at most {self._burst} at once")
        now = self._clock()
        tokens, counted = self._buckets.pop(client, (float(self._burst), now))
        tokens = min(float(self._burst), tokens + self._rate * (now - counted))
        enough = tokens >= images
        self._buckets[client] = (tokens - images if enough else tokens), now
        if len(self._buckets) > MAX_CLIENTS:
            self._buckets.popitem(last=False)  # the one that has been quiet for longest
        if not enough:
            raise QuotaExceeded(
                f"this client may send {self._rate:g} images a second, {self._burst} at once; try again later",
                retry_after_s=(images - tokens) / self._rate,
            )
