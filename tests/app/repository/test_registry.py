"""What is loaded, which of it answers, and when the service may call itself ready."""

from __future__ import annotations

import asyncio

import pytest

from app.errors import ModelInvalid, ModelNotFound, ModelNotReady
from app.repository.registry import ModelRegistry
from tests.fakes import VIRTUAL_TIME, settle

pytestmark = pytest.mark.anyio


@pytest.fixture
def anyio_backend() -> object:
    return VIRTUAL_TIME


class FakeModel:
    def __init__(self, name: str, version: int) -> None:
        self.name = (name, version)
        self.failed = False
        self.num_closed = 0

    async def close(self) -> None:
        self.num_closed += 1


class FakeLoader:
    """Loads version 1 unless another is asked for; held by the test, and fails when told."""

    def __init__(self) -> None:
        self.open = asyncio.Event()
        self.open.set()
        self.failure: Exception | None = None

    async def __call__(self, name: str, version: int | None) -> tuple[int, FakeModel]:
        await self.open.wait()
        if self.failure is not None:
            raise self.failure
        number = 1 if version is None else version
        return number, FakeModel(name, number)


@pytest.fixture
async def loader() -> FakeLoader:
    return FakeLoader()


@pytest.fixture
async def registry(loader: FakeLoader) -> ModelRegistry[FakeModel]:
    return ModelRegistry(loader)


async def test_the_highest_version_answers(registry: ModelRegistry[FakeModel]) -> None:
    """In whatever order they were loaded; another is to be had by its number."""
    for version in (2, 10, 9):
        await registry.load("a", version)

    assert registry.get("a").name == ("a", 10)
    assert registry.get("a", 9).name == ("a", 9)
    assert [(name, version) for name, version, _ in registry.loaded()] == [("a", 2), ("a", 9), ("a", 10)]


async def test_the_only_model_needs_no_name(registry: ModelRegistry[FakeModel]) -> None:
    """With a second one the request has to say which it means."""
    await registry.load("a")
    assert registry.default_model == "a"
    assert registry.get().name == ("a", 1)

    await registry.load("b")
    assert registry.default_model is None
    with pytest.raises(ModelNotFound, match="name a model; loaded: a, b"):
        registry.get()


async def test_the_default_model_is_the_one_set(loader: FakeLoader) -> None:
    """Among several, whatever the order."""
    registry = ModelRegistry(loader, default_model="b")
    await registry.load("a")
    await registry.load("b")

    assert registry.get().name == ("b", 1)


async def test_what_is_not_loaded_is_not_found(registry: ModelRegistry[FakeModel]) -> None:
    """The message says what there is."""
    await registry.load("a", 3)

    with pytest.raises(ModelNotFound, match="no model 'b' here; loaded: a"):
        registry.get("b")
    with pytest.raises(ModelNotFound, match="no version 1 here; loaded: 3"):
        registry.get("a", 1)


async def test_a_model_being_loaded_is_not_ready(registry: ModelRegistry[FakeModel], loader: FakeLoader) -> None:
    """It exists, so the caller may try again; and the registry is not ready until it is there."""
    assert not registry.ready
    loader.open.clear()
    loading = asyncio.create_task(registry.load("a"))
    await settle()

    with pytest.raises(ModelNotReady, match="'a' is being loaded"):
        registry.get("a")
    assert not registry.ready
    loader.open.set()
    await loading

    assert registry.get("a").name == ("a", 1)
    assert registry.ready


async def test_the_registry_is_not_ready_before_every_model_is_there(
    registry: ModelRegistry[FakeModel], loader: FakeLoader
) -> None:
    """One of two loaded is not enough."""
    await registry.load("a")
    assert registry.ready
    loader.open.clear()
    loading = asyncio.create_task(registry.load("b"))
    await settle()

    assert not registry.ready
    loader.open.set()
    await loading
    assert registry.ready


async def test_a_version_answers_while_another_is_loaded(registry: ModelRegistry[FakeModel], loader: FakeLoader) -> None:
    """The old one goes on until the new one is there."""
    await registry.load("a", 1)
    loader.open.clear()
    loading = asyncio.create_task(registry.load("a", 2))
    await settle()

    assert registry.get("a").name == ("a", 1)
    loader.open.set()
    await loading
    assert registry.get("a").name == ("a", 2)


async def test_a_failed_load_leaves_what_there_was(registry: ModelRegistry[FakeModel], loader: FakeLoader) -> None:
    """The error goes to who loads; the model is unknown rather than for ever being loaded."""
    await registry.load("a")
    loader.failure = ModelInvalid("damaged")
    with pytest.raises(ModelInvalid):
        await registry.load("b")

    assert registry.ready
    with pytest.raises(ModelNotFound):
        registry.get("b")


async def test_a_failed_model_makes_the_registry_unready(registry: ModelRegistry[FakeModel]) -> None:
    """One that cannot serve any more is enough."""
    await registry.load("a")
    await registry.load("b")
    assert registry.ready

    registry.get("b").failed = True

    assert not registry.ready


async def test_close_closes_every_version_once(registry: ModelRegistry[FakeModel]) -> None:
    """And nothing answers or is ready afterwards."""
    for name, version in (("a", 1), ("a", 2), ("b", 1)):
        await registry.load(name, version)
    models = [model for _, _, model in registry.loaded()]

    await registry.close()
    await registry.close()

    assert [model.num_closed for model in models] == [1, 1, 1]
    assert not registry.ready
    with pytest.raises(ModelNotFound):
        registry.get("a")
