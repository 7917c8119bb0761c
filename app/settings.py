"""What the environment may change. Prefix `FOVEA_`, nesting `__`: `FOVEA_HTTP__PORT=9000`.

Built once, in the command line or by `create_app`, and passed on; nothing imports a global.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path
from typing import Literal, Self

from pydantic import BaseModel, ConfigDict, Field, NonNegativeFloat, PositiveFloat, PositiveInt, model_validator
from pydantic_settings import BaseSettings, SettingsConfigDict

from models.manifest import HardwareTarget

EMBEDDED_REPOSITORY = Path(__file__).resolve().parent.parent / "models" / "artifacts"


class _Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class HttpSettings(_Section):
    host: str = Field("127.0.0.1", description="Address to listen on; 0.0.0.0 for every interface.")
    port: int = Field(8000, ge=0, le=65535, description="Port to listen on; 0 takes a free one.")
    max_upload_bytes: PositiveInt = Field(20 * 2**20, description="Largest request body accepted, in bytes.")
    max_images_per_request: PositiveInt = Field(64, description="Most images in one multipart or JSON request.")
    request_timeout_s: PositiveFloat = Field(30.0, description="Time budget of a request, upload included, in seconds.")
    max_head_bytes: int = Field(
        2**16, ge=1024, le=2**20, description="Largest head of a request, in bytes; more is refused with 431, or 400."
    )
    head_timeout_s: PositiveFloat = Field(
        10.0,
        description="Longest time from the opening of a connection, or a request's first byte, to the end of its head, in s.",
    )
    keep_alive_s: PositiveFloat = Field(
        75.0,
        description="How long a connection is kept between two requests, or while its client does not read its answers, "
        "in seconds; set it longer than the proxy's idle timeout.",
    )
    max_connections: PositiveInt = Field(
        2048,
        description="Connections open at once, fewer where the limit of open files leaves no room; beyond it the longest-idle "
        "one is closed; if none is idle, the new one is refused with 503.",
    )
    drain_delay_s: NonNegativeFloat = Field(
        1.0, description="After SIGTERM: how long to go on serving, not ready and closing connections, in seconds."
    )
    shutdown_timeout_s: PositiveInt = Field(30, description="After the drain: longest wait for requests in flight, in seconds.")


class LimitSettings(_Section):
    max_in_flight: int = Field(
        0,
        ge=0,
        description="Images admitted at once; one more is refused with 503. 0: 256, or four full batches per instance if more.",
    )
    max_in_flight_bytes: PositiveInt = Field(256 * 2**20, description="Request bytes held at once; more is refused with 503.")
    max_pixels: PositiveInt = Field(50_000_000, description="Largest image, width times height, told from the header.")
    max_decode_bytes: PositiveInt = Field(
        512 * 2**20,
        description="Memory that decoding images may take at once, in bytes, estimated from their headers; others wait.",
    )
    decode_threads: int = Field(
        0,
        ge=0,
        description="Threads that decode images; 0: where each instance is a core of the CPU, it decodes its own images, and "
        "large ones are left to one thread per CPU of the quota, as all are elsewhere.",
    )


class BatchingSettings(_Section):
    max_batch_size: PositiveInt = Field(
        8,
        description="Most images in one run of a stage; fewer where a run is long and an image costs no less in a larger one "
        "(docs/adr/0025).",
    )
    max_queue_delay_s: NonNegativeFloat = Field(
        0.0, description="Longest wait for a fuller batch while an instance is free, in seconds (docs/adr/0001)."
    )


class RuntimeSettings(_Section):
    target: Literal["auto"] | HardwareTarget = Field("auto", description="Hardware target; auto detects it.")
    variant: str = Field("auto", description="Variant to serve; auto times those the target allows and takes the fastest.")
    quality: str = Field(
        "balanced", description="Operating point of a request that names none: full, balanced, or one that the model adds."
    )
    min_quality: str | None = Field(
        None,
        description="Last operating point that requests are taken down to under load, unless they name one; "
        "unset: the last of which it is proved what it costs. The same as runtime.quality: none is.",
    )
    bend_above_ms: PositiveFloat = Field(
        200.0,
        description="Expected time to an answer above which requests are taken down a point, in milliseconds; "
        "or half their time budget; sooner where refusals are near.",
    )
    instances: int = Field(0, ge=0, description="Backend instances, one thread each; 0: one per CPU of the quota.")
    intra_op_threads: PositiveInt = Field(1, description="ONNX Runtime threads of one instance.")
    run_timeout_s: PositiveFloat = Field(
        60.0, description="A run of a stage that takes longer is given up: its images fail and its instance gets a new thread."
    )
    lone_threads: int = Field(
        0,
        ge=0,
        description="ONNX Runtime threads for a batch that has the machine to itself; they need the weights a second time. "
        "0: all CPUs, where timing at load shows that it is worth it; 1: as other batches.",
    )


class ModelDeadlines(_Section):
    default_ms: PositiveInt | None = None
    max_ms: PositiveInt | None = None


class DeadlineSettings(_Section):
    default_ms: PositiveInt | None = Field(
        None, description="Time budget of a request that names none, in milliseconds; unset: all of http.request_timeout_s."
    )
    models: dict[str, ModelDeadlines] = Field(
        {}, description='Default and largest budget by model, as JSON: {"a": {"default_ms": 200, "max_ms": 1000}}.'
    )


class QuotaSettings(_Section):
    images_per_s: float = Field(0.0, ge=0, description="Images a second that one client may send on average; 0: no quotas.")
    burst: PositiveInt = Field(64, description="Images that a client may send at once.")
    header: str = Field(
        "X-API-Key",
        pattern=r"^[A-Za-z0-9-]+$",
        description="Header that tells clients apart; those without it share one quota. Checking it is a gateway's task.",
    )


class RepositorySettings(_Section):
    root: Path = Field(EMBEDDED_REPOSITORY, description="Directory with <model>/<version>/manifest.json.")
    models: tuple[str, ...] = Field((), description='Models to load, as JSON: ["a", "b"]; empty: all there are.')
    default_model: str | None = Field(None, description="Model of a request that names none; unset: the only one there is.")


class LogSettings(_Section):
    level: Literal["debug", "info", "warning", "error"] = Field("info", description="Least level that is written.")
    format: Literal["auto", "console", "json"] = Field("auto", description="auto: console on a terminal, else JSON lines.")
    access: bool = Field(False, description="Write a line for every request, not only for failed ones (500, 504).")


def unknown_variables(environ: Iterable[str]) -> list[str]:
    """Names that look like a nested setting but are none: a limit that was mistyped would otherwise not be set."""
    known = {
        f"FOVEA_{section}__{name}".upper()
        for section, field in Settings.model_fields.items()
        for name in (field.annotation.model_fields if isinstance(field.annotation, type) else ())
    }
    sections = {f"FOVEA_{section}".upper() for section in Settings.model_fields}
    return sorted(
        name for name in environ if name.upper().startswith("FOVEA_") and "__" in name and name.upper() not in known | sections
    )


class Settings(BaseSettings):
    model_config = SettingsConfigDict(env_prefix="FOVEA_", env_nested_delimiter="__", frozen=True, extra="forbid")

    http: HttpSettings = HttpSettings()
    limits: LimitSettings = LimitSettings()
    batching: BatchingSettings = BatchingSettings()
    runtime: RuntimeSettings = RuntimeSettings()
    deadlines: DeadlineSettings = DeadlineSettings()
    quotas: QuotaSettings = QuotaSettings()
    repository: RepositorySettings = RepositorySettings()
    log: LogSettings = LogSettings()

    @model_validator(mode="after")
    def _knows_every_variable(self) -> Self:
        unknown = unknown_variables(os.environ)
        if unknown:
            raise ValueError(f"{', '.join(unknown)}: there is no such setting; docs/settings.md lists those there are")
        return self

    @model_validator(mode="after")
    def _budgets_are_within_the_longest(self) -> Self:
        longest = 1000 * self.http.request_timeout_s
        budgets = {name: (each.default_ms, each.max_ms) for name, each in self.deadlines.models.items()}
        for name, (default, largest) in {"deadlines": (self.deadlines.default_ms, None), **budgets}.items():
            most = min(longest, largest or longest)
            if default is not None and default > most:
                raise ValueError(f"{name}: a default time budget of {default} ms is above the largest, {most:g} ms")
        return self

    @model_validator(mode="after")
    def _can_admit_what_it_accepts(self) -> Self:
        if 0 < self.limits.max_in_flight < self.http.max_images_per_request:
            raise ValueError(
                f"limits.max_in_flight ({self.limits.max_in_flight}) is below http.max_images_per_request "
                f"({self.http.max_images_per_request}), so the largest request could never be admitted"
            )
        if self.limits.max_in_flight_bytes < self.http.max_upload_bytes:
            raise ValueError(
                f"limits.max_in_flight_bytes ({self.limits.max_in_flight_bytes}) is below http.max_upload_bytes "
                f"({self.http.max_upload_bytes}), so the largest body could never be admitted"
            )
        return self
