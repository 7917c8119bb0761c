"""A request to classify, free of the door that it comes through: what it asks for, and what a door must be able to give."""

from __future__ import annotations

import math
import time
from collections.abc import Coroutine, Sequence
from typing import Any, NamedTuple, Protocol, TypeVar

from app.errors import InvalidRequest
from app.scheduling.admission import Permit
from app.types import EncodedImage

T = TypeVar("T")


class Parameters(NamedTuple):
    """What a request may say beside its images; None: not said."""

    model: str | None = None
    version: int | None = None
    top_k: int | None = None
    quality: str | None = None
    min_quality: str | None = None
    timeout_ms: int | None = None

    def merged(self, other: Parameters, *, where: str, other_where: str) -> Parameters:
        """These, and those that were said elsewhere.

        Args:
            where, other_where: the two places, for the message.

        Raises:
            InvalidRequest: a parameter was said in both, and not the same.
        """
        for name, ours, theirs in zip(self._fields, self, other, strict=True):
            if ours is not None and theirs is not None and ours != theirs:
                raise InvalidRequest(f"{name} is {ours} in the {where} and {theirs} in the {other_where}; say it once")
        return self._replace(**{name: value for name, value in other._asdict().items() if value is not None})


class Upload(NamedTuple):
    """The body of one request."""

    images: list[EncodedImage]  # in order
    parameters: Parameters  # that came in the body
    several: bool  # the request has the form of a list, so the answer gives errors beside the images


class Incoming(Protocol):
    """A request at a door. `InferenceService.answer` calls these in a fixed order, each at most once."""

    started: float  # when its head was there, by `time.perf_counter`
    longest_s: float  # what it may take at most, upload included; infinite: it has no time budget
    client: str | None  # whose quota it counts for; None: nobody's
    num_images: int | None  # as its head tells; None: that, and more parameters, come with its body

    def parameters(self) -> Parameters:
        """Those of its head.

        Raises:
            InvalidRequest: they cannot be read.
        """
        ...

    async def read(self, permit: Permit) -> Upload:
        """Its body.

        Args:
            permit: to hold the bytes with.

        Raises:
            PayloadTooLarge, InvalidRequest, Overloaded: it is refused.
        """
        ...

    async def while_connected(self, work: Coroutine[Any, Any, T]) -> T:
        """The result of the work, which is cancelled when the client leaves.

        Raises:
            InvalidRequest: the client has left.
        """
        ...


class LocalRequest:
    """A request made in this process: images that are there, no quota and no time budget. Each image has its own error."""

    def __init__(self, images: Sequence[EncodedImage], parameters: Parameters | None = None) -> None:
        self.started = time.perf_counter()
        self.longest_s = math.inf
        self.client: str | None = None
        self.num_images: int | None = len(images)
        self._images = list(images)
        self._parameters = Parameters() if parameters is None else parameters

    def parameters(self) -> Parameters:
        return self._parameters

    async def read(self, _permit: Permit) -> Upload:
        return Upload(self._images, Parameters(), several=True)

    async def while_connected(self, work: Coroutine[Any, Any, T]) -> T:
        return await work
