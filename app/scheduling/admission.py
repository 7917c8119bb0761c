"""The one limit on everything in flight (docs/adr/0002): images and bytes. Nothing behind it refuses work."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from types import TracebackType
from typing import Self

from app.errors import Overloaded
from app.metrics import Metrics

MIN_RETRY_AFTER_S, MAX_RETRY_AFTER_S = 1.0, 60.0
RATE_HALF_LIFE_S = 5.0  # of busy time: how fast the measured throughput forgets


class Permit:
    """What one request holds: some bytes while it is read, some images while they are computed.

    A context manager; leaving it gives everything back.
    """

    def __init__(self, admission: Admission) -> None:
        self._admission = admission
        self.images = 0
        self.num_bytes = 0

    def take_bytes(self, count: int) -> None:
        """Hold `count` more bytes; Overloaded when they are not to be had."""
        self._admission.take(0, count)
        self.num_bytes += count

    def take_images(self, count: int) -> None:
        """Hold `count` more images, all or none; Overloaded when they are not to be had."""
        self._admission.take(count, 0)
        self.images += count

    def __enter__(self) -> Self:
        self._admission.open_permit()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._admission.give_back(self.images, self.num_bytes, answered=error is None)
        self.images = self.num_bytes = 0


class Admission:
    """Counts what is in flight; refuses at once what would go beyond. For one event loop, so it needs no lock."""

    def __init__(
        self,
        *,
        max_images: int,
        max_bytes: int,
        metrics: Metrics,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.max_images = max_images
        self._max_bytes = max_bytes
        metrics.in_flight.set_function(lambda: self._images)  # looked up when somebody asks, not set for every request
        metrics.in_flight_bytes.set_function(lambda: self._bytes)
        self._clock = clock
        self._images = 0
        self._bytes = 0
        self._answered = 0.0  # images, decaying with RATE_HALF_LIFE_S of busy time
        self._busy_s = 0.0  # time with images in flight, decaying likewise
        self._counted_until = clock()
        self._permits = 0
        self._idle = asyncio.Event()
        self._idle.set()
        self._closed = False

    @property
    def images_in_flight(self) -> int:
        return self._images

    def admit(self) -> Permit:
        """An empty permit for a request that has just arrived; Overloaded while the service stops."""
        if self._closed:
            raise Overloaded("the service is stopping; send the request to another instance", retry_after_s=MIN_RETRY_AFTER_S)
        return Permit(self)

    def close(self) -> None:
        """Admit nothing more; what holds a permit goes on."""
        self._closed = True

    def retry_after_s(self) -> float:
        """How long the images in flight will take at the rate of the last busy seconds, within 1 .. 60 s.

        Only time with images in flight counts, so a quiet hour does not make the service look slow.
        """
        self._count()
        wait = self._images * self._busy_s / self._answered if self._answered > 0 else MIN_RETRY_AFTER_S
        return min(max(wait, MIN_RETRY_AFTER_S), MAX_RETRY_AFTER_S)

    async def wait_idle(self) -> None:
        """Until no permit is open."""
        await self._idle.wait()

    def open_permit(self) -> None:
        """For `Permit`: one more request is being worked on."""
        self._permits += 1
        self._idle.clear()

    def take(self, images: int, num_bytes: int) -> None:
        """For `Permit`: count more as in flight, or raise Overloaded and count nothing."""
        if self._images + images > self.max_images:
            raise Overloaded(
                f"{self._images} images are being worked on and at most {self.max_images} are accepted at once; "
                "try again later",
                retry_after_s=self.retry_after_s(),
            )
        if self._bytes + num_bytes > self._max_bytes:
            raise Overloaded(
                f"requests of {self._bytes} bytes are being worked on and at most {self._max_bytes} bytes are accepted "
                "at once; try again later",
                retry_after_s=self.retry_after_s(),
            )
        self._add(images, num_bytes)

    def give_back(self, images: int, num_bytes: int, *, answered: bool) -> None:
        """For `Permit`: no longer in flight; `answered` images count for the measured rate."""
        self._add(-images, -num_bytes)
        if answered:
            self._answered += images
        self._permits -= 1
        if not self._permits:
            self._idle.set()

    def _add(self, images: int, num_bytes: int) -> None:
        self._count()
        self._images += images
        self._bytes += num_bytes

    def _count(self) -> None:
        now = self._clock()
        elapsed, self._counted_until = now - self._counted_until, now
        if self._images:
            decay = 0.5 ** (elapsed / RATE_HALF_LIFE_S)
            self._answered *= decay
            self._busy_s = self._busy_s * decay + elapsed
