"""The environment changes what it should, and what cannot work is refused with a sentence."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
from pydantic import BaseModel, ValidationError
from pydantic_settings import SettingsError

from app.settings import (
    EMBEDDED_REPOSITORY,
    BatchingSettings,
    HttpSettings,
    LimitSettings,
    RuntimeSettings,
    Settings,
    unknown_variables,
)
from models.manifest import HardwareTarget


@pytest.fixture(autouse=True)
def clean_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing of the machine's own settings."""
    for name in list(os.environ):
        if name.upper().startswith("FOVEA_"):
            monkeypatch.delenv(name)


def fields() -> list[tuple[str, str]]:
    return [
        (section, field)
        for section, info in Settings.model_fields.items()
        for field in info.annotation.model_fields  # type: ignore[union-attr]
    ]


def test_the_defaults_are_valid() -> None:
    """The service starts with nothing set, on this machine only, with the embedded model."""
    settings = Settings()

    assert (settings.http.host, settings.http.port) == ("127.0.0.1", 8000)
    assert settings.repository.root == EMBEDDED_REPOSITORY
    assert (settings.runtime.target, settings.runtime.variant) == ("auto", "auto")
    assert settings.batching.max_queue_delay_s == 0


def test_every_field_says_what_it_means() -> None:
    """A sentence each, for people and for the documentation."""
    for section, field in fields():
        model: type[BaseModel] = Settings.model_fields[section].annotation  # type: ignore[assignment]
        description = model.model_fields[field].description
        assert description, f"{section}.{field} has no description"
        assert description.endswith("."), f"{section}.{field}: {description!r} is not a sentence"


@pytest.mark.parametrize(
    ("name", "value", "section", "field", "expected"),
    [
        ("FOVEA_HTTP__PORT", "9000", "http", "port", 9000),
        ("fovea_http__port", "9001", "http", "port", 9001),
        ("FOVEA_BATCHING__MAX_QUEUE_DELAY_S", "0.005", "batching", "max_queue_delay_s", 0.005),
        ("FOVEA_RUNTIME__TARGET", "cpu", "runtime", "target", HardwareTarget.CPU),
        ("FOVEA_REPOSITORY__ROOT", "/models", "repository", "root", Path("/models")),
        ("FOVEA_REPOSITORY__MODELS", '["a", "b"]', "repository", "models", ("a", "b")),
        ("FOVEA_LOG__ACCESS", "true", "log", "access", True),
    ],
)
def test_the_environment_changes_a_field(
    monkeypatch: pytest.MonkeyPatch, name: str, value: str, section: str, field: str, expected: object
) -> None:
    """Section and field are joined by two underscores; the others of the section keep their defaults."""
    monkeypatch.setenv(name, value)
    settings, defaults = Settings(), Settings.model_construct()

    assert getattr(getattr(settings, section), field) == expected
    changed = getattr(settings, section).model_dump(exclude={field})
    assert changed == getattr(defaults, section).model_dump(exclude={field})


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("FOVEA_HTTP__PROT", "9000"),
        ("FOVEA_HTTP__PORT", "many"),
        ("FOVEA_HTTP__PORT", "65536"),
        ("FOVEA_HTTP__PORT", "-1"),
        ("FOVEA_HTTP__REQUEST_TIMEOUT_S", "0"),
        ("FOVEA_BATCHING__MAX_BATCH_SIZE", "0"),
        ("FOVEA_BATCHING__MAX_QUEUE_DELAY_S", "-0.001"),
        ("FOVEA_RUNTIME__TARGET", "abacus"),
        ("FOVEA_RUNTIME__INSTANCES", "-1"),
        ("FOVEA_LOG__FORMAT", "xml"),
    ],
)
def test_an_impossible_value_or_an_unknown_name_is_refused(monkeypatch: pytest.MonkeyPatch, name: str, value: str) -> None:
    """A misspelt setting is an error that names it, not a default in silence."""
    monkeypatch.setenv(name, value)

    with pytest.raises(ValidationError) as refused:
        Settings()
    assert ".".join(str(part) for part in refused.value.errors()[0]["loc"][:2]) == name.removeprefix("FOVEA_").lower().replace(
        "__", "."
    )


def test_models_that_are_no_json_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """The form is said in the field's description."""
    monkeypatch.setenv("FOVEA_REPOSITORY__MODELS", "a, b")

    with pytest.raises((ValidationError, SettingsError)):
        Settings()


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        (
            {"limits": LimitSettings(max_in_flight=64), "http": HttpSettings(max_images_per_request=65)},
            r"max_in_flight \(64\) is below http.max_images_per_request \(65\), so the largest request could never be admitted",
        ),
        (
            {"limits": LimitSettings(max_in_flight_bytes=1000), "http": HttpSettings(max_upload_bytes=1001)},
            r"max_in_flight_bytes \(1000\) is below http.max_upload_bytes \(1001\), so the largest body could never be",
        ),
    ],
)
def test_contradictions_are_refused(changes: dict[str, Any], sentence: str) -> None:
    """The sentence names both fields with their values and what would go wrong."""
    with pytest.raises(ValidationError, match=sentence):
        Settings(**changes)


def test_limits_that_just_fit_are_accepted() -> None:
    """Equal is enough."""
    settings = Settings(
        limits=LimitSettings(max_in_flight=64, max_in_flight_bytes=1000),
        batching=BatchingSettings(max_batch_size=16),
        runtime=RuntimeSettings(instances=4),
        http=HttpSettings(max_images_per_request=64, max_upload_bytes=1000),
    )

    assert settings.limits.max_in_flight == 64


def test_settings_do_not_change() -> None:
    """Made once and passed on."""
    settings = Settings()

    with pytest.raises(ValidationError):
        settings.http.port = 1  # type: ignore[misc]
    with pytest.raises(ValidationError):
        settings.http = HttpSettings()  # type: ignore[misc]


def test_a_mistyped_variable_is_refused_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    """An operator who meant to set a limit must not believe it is set."""
    monkeypatch.setenv("FOVEA_LIMIT__MAX_PIXELS", "5")
    with pytest.raises(ValidationError, match="FOVEA_LIMIT__MAX_PIXELS: there is no such setting"):
        Settings()


@pytest.mark.parametrize("name", ["FOVEA_PORT", "FOVEA_TARGET", "fovea_http__port", "FOVEA_HTTP", "OTHER__NAME"])
def test_other_variables_are_left_alone(name: str) -> None:
    """Compose has variables of its own, and a whole section may be given as JSON."""
    assert unknown_variables([name]) == []
