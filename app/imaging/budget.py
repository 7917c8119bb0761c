"""A shared allowance of memory: decode threads wait here until there is room for the next picture (docs/adr/0011)."""

from __future__ import annotations

import ctypes
import sys
import threading
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager

from app.errors import ImageTooLarge

_MMAP_THRESHOLD_BYTES, _TRIM_THRESHOLD_BYTES = 4 * 2**20, 8 * 2**20
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # glibc's malloc.h


class NeedsTime(Exception):
    """Decoding the image takes longer, or waits longer, than its caller can spare."""


class DecodeBudget:
    """Bytes that all decodes together may hold. First come, first served, so a large picture is not starved by small ones.

    A thread holds one share at a time: asking for a second one inside the first could wait for itself.
    """

    def __init__(self, max_bytes: int) -> None:
        _return_freed_memory()  # else a share that was given back would not be free
        self.max_bytes = max_bytes
        self._free = max_bytes
        self._lock = threading.Lock()
        self._waiting: deque[tuple[int, threading.Event]] = deque()

    @contextmanager
    def hold(self, num_bytes: int, *, wait: bool = True) -> Iterator[None]:
        """Wait until so many bytes are free, and have them until the block ends.

        Raises:
            ImageTooLarge: more than the whole budget; at once.
            NeedsTime: they are not free, and it is not to wait.
        """
        if num_bytes > self.max_bytes:
            raise ImageTooLarge(
                f"Decoding the image takes up to {num_bytes} bytes of memory, more than the {self.max_bytes} allowed: "
                "scale it down, or save it as a baseline JPEG, and send it again."
            )
        self._take(num_bytes, wait)
        try:
            yield
        finally:
            self._give_back(num_bytes)

    def _take(self, num_bytes: int, wait: bool) -> None:
        with self._lock:
            if not self._waiting and num_bytes <= self._free:
                self._free -= num_bytes
                return
            if not wait:
                raise NeedsTime
            turn = threading.Event()
            self._waiting.append((num_bytes, turn))
        turn.wait()  # whoever sets it has taken the bytes for us

    def _give_back(self, num_bytes: int) -> None:
        with self._lock:
            self._free += num_bytes
            while self._waiting and self._waiting[0][0] <= self._free:
                taken, turn = self._waiting.popleft()
                self._free -= taken
                turn.set()


def _return_freed_memory() -> None:
    """Have glibc give large blocks back as soon as they are freed, in the whole process.

    By itself it learns from the first large picture to keep such blocks, for every thread its own: 8 threads then peaked at
    851 MiB with a budget of 512, else at 369 (docs/adr/0011). Another C library is left as it is.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is not None:
        mallopt(_M_MMAP_THRESHOLD, _MMAP_THRESHOLD_BYTES)
        mallopt(_M_TRIM_THRESHOLD, _TRIM_THRESHOLD_BYTES)
