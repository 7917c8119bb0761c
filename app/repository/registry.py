"""What is loaded and ready, by model and version."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Generic, Protocol, TypeVar

from app.errors import ModelNotFound, ModelNotReady


class Closable(Protocol):
    """What the registry needs of a loaded model."""

    @property
    def failed(self) -> bool:
        """It cannot serve any more."""
        ...

    async def close(self) -> None:
        """Finish what is in flight and free everything."""
        ...


M = TypeVar("M", bound=Closable)


class ModelRegistry(Generic[M]):
    """Keeps loaded models.

    Args:
        loader: makes a model ready to serve, or raises; called with the name and the version (None: the highest), and
            gives the version with it.
        default_model: of a request that names none; None: the only one there is.
    """

    def __init__(self, loader: Callable[[str, int | None], Awaitable[tuple[int, M]]], default_model: str | None = None) -> None:
        self._loader = loader
        self._default_model = default_model
        self._models: dict[str, dict[int, M]] = {}
        self._loading: set[str] = set()

    @property
    def default_model(self) -> str | None:
        """The model of a request that names none; None when such a request cannot be answered."""
        if self._default_model is not None:
            return self._default_model
        return next(iter(self._models)) if len(self._models) == 1 else None

    @property
    def ready(self) -> bool:
        """There is something to serve, nothing is still being loaded, and nothing has failed."""
        loaded = list(self.loaded())
        return bool(loaded) and not self._loading and not any(model.failed for _, _, model in loaded)

    async def load(self, name: str, version: int | None = None) -> None:
        """Load a version beside those there are."""
        self._loading.add(name)
        try:
            number, model = await self._loader(name, version)
            self._models.setdefault(name, {})[number] = model
        finally:
            self._loading.discard(name)

    def get(self, name: str | None = None, version: int | None = None) -> M:
        """The model to answer with; the highest version when none is given.

        Raises:
            ModelNotFound: no such model or version is loaded, or none was named and there are several.
            ModelNotReady: it is being loaded.
        """
        wanted = name if name is not None else self.default_model
        if wanted is None:
            raise ModelNotFound(f"name a model; loaded: {', '.join(sorted(self._models)) or 'none'}")
        versions = self._models.get(wanted)
        if not versions:
            if wanted in self._loading:
                raise ModelNotReady(f"model {wanted!r} is being loaded; try again in a moment")
            raise ModelNotFound(f"there is no model {wanted!r} here; loaded: {', '.join(sorted(self._models)) or 'none'}")
        number = max(versions) if version is None else version
        if number not in versions:
            raise ModelNotFound(
                f"model {wanted!r} has no version {number} here; loaded: {', '.join(str(v) for v in sorted(versions))}"
            )
        return versions[number]

    def loaded(self) -> list[tuple[str, int, M]]:
        """Everything loaded, by name and version."""
        return [
            (name, version, self._models[name][version])
            for name in sorted(self._models)
            for version in sorted(self._models[name])
        ]

    async def close(self) -> None:
        """Close every model; each finishes what it has in flight."""
        models = [model for _, _, model in self.loaded()]
        self._models.clear()
        await asyncio.gather(*(model.close() for model in models))
