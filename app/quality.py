"""The operating points of a variant: what a request may ask for as `quality`, from the most faithful to the fastest."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from app.errors import InvalidRequest
from models.manifest import BALANCED, FULL, Certificate, VariantSpec


@dataclass(frozen=True, slots=True)
class Rung:
    """One operating point."""

    name: str
    thresholds: tuple[float | None, ...]  # one per exit; None: every image that is still there leaves
    certificate: Certificate | None
    is_full: bool  # nobody leaves early

    @property
    def bound(self) -> str:
        """What it costs at most against the full depth, in words; empty where that is not proved."""
        if self.is_full:
            return "every image has the answer of the last exit"
        return "" if self.certificate is None else str(self.certificate)


class Ladder:
    """All operating points of a variant: `full`, `balanced` and those that the manifest adds, in this order."""

    def __init__(self, variant: VariantSpec) -> None:
        early = len(variant.exits) - 1
        balanced = tuple(exit_.threshold for exit_ in variant.exits)
        self._rungs = [
            Rung(FULL, (float("inf"),) * early + (None,), None, is_full=True),
            Rung(BALANCED, balanced, variant.certificate, is_full=early == 0),
            *(Rung(point.name, (*point.thresholds, None), point.certificate, is_full=early == 0) for point in variant.points),
        ]
        self._index = {rung.name: index for index, rung in enumerate(self._rungs)}

    def __iter__(self) -> Iterator[Rung]:
        return iter(self._rungs)

    def __getitem__(self, index: int) -> Rung:
        return self._rungs[index]

    @property
    def thresholds(self) -> Sequence[Sequence[float | None]]:
        """Of each point, one per exit."""
        return [rung.thresholds for rung in self._rungs]

    def index(self, name: str) -> int:
        """Which it is.

        Raises:
            InvalidRequest: there is none of that name.
        """
        if name not in self._index:
            raise InvalidRequest(f"quality is {name!r}; this model has {', '.join(self._index)}")
        return self._index[name]
