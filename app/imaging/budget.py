"""A shared allowance of memory: decode threads wait here until there is room for the next picture (docs/adr/0011)."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager

from app.errors import ImageTooLarge


class DecodeBudget:
    """Bytes that all decodes together may hold. First come, first served, so a large picture is not starved by small ones.

    A thread holds one share at a time: asking for a second one inside the first could wait for itself.
    """

    def __init__(self, max_bytes: int) -> None:
        self.max_bytes = max_bytes
        self._free = max_bytes
        self._lock = threading.Lock()
        self._waiting: deque[tuple[int, threading.Event]] = deque()

    @contextmanager
    def hold(self, num_bytes: int) -> Iterator[None]:
        """Wait until so many bytes are free, and have them until the block ends.

        Raises:
            ImageTooLarge: more than the whole budget; at once.
        """
        if num_bytes > self.max_bytes:
            raise ImageTooLarge(
                f"Decoding the image takes up to {num_bytes} bytes of memory, more than the {self.max_bytes} allowed: "
                "scale it down, or save it as a baseline JPEG, and send it again."
            )
        self._take(num_bytes)
        try:
            yield
        finally:
            self._give_back(num_bytes)

    def _take(self, num_bytes: int) -> None:
        with self._lock:
            if not self._waiting and num_bytes <= self._free:
                self._free -= num_bytes
                return
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
