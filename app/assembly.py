"""The one place that wires: settings -> store, backends, pipelines, service."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

from app.errors import InvalidRequest, ModelNotFound, StartupError
from app.exits import ExitPolicy
from app.loaded_model import LoadedModel
from app.log import get_logger
from app.metrics import Metrics
from app.quality import Ladder, QualityController
from app.repository.registry import ModelRegistry
from app.repository.store import ModelStore, StoredModel
from app.runtime.backend import Backend
from app.runtime.cpu import num_cpus
from app.runtime.golden import verify_golden
from app.runtime.ort_backend import OrtBackend
from app.runtime.pool import BackendPool
from app.runtime.selection import VariantChoice, choose_variant, lone_gain, time_stages
from app.runtime.targets import ON_THE_CPU, TargetProfile, resolve_profile
from app.scheduling.admission import Admission
from app.scheduling.forecast import Forecast
from app.scheduling.pipeline import StagedPipeline
from app.scheduling.quotas import Quotas
from app.service import InferenceService
from app.settings import Settings
from app.threads import Workers
from app.types import RunTime
from models.manifest import PIXELS

log = get_logger(__name__)

MIN_AUTO_IN_FLIGHT = 256  # images


@dataclass(frozen=True, slots=True)
class _Opened:
    """What loading gives before anything needs an event loop."""

    stored: StoredModel
    choice: VariantChoice
    per_core: bool  # each instance is one core of the CPU
    run_times: list[list[RunTime]]  # of each stage
    backends: tuple[OrtBackend, ...]  # one per instance
    wide: Backend | None


async def open_service(settings: Settings, metrics: Metrics) -> InferenceService:
    """Load, verify and warm up every model of the settings; the service is ready when this returns.

    Raises:
        StartupError, ModelInvalid, ModelNotFound: what cannot work, in words for the operator.
    """
    profile = resolve_profile(
        settings.runtime.target,
        instances=settings.runtime.instances,
        intra_op_threads=settings.runtime.intra_op_threads,
    )
    store = ModelStore(settings.repository.root)

    async def load(name: str, version: int | None) -> tuple[int, LoadedModel]:
        opened = await asyncio.to_thread(_open_model, store, name, version, settings, profile)
        model = _start_model(opened, settings, profile, metrics, service.decoders, lambda: service.lag.seconds)
        return model.manifest.version, model

    registry = ModelRegistry(load, settings.repository.default_model)
    admission = Admission(
        max_images=_max_in_flight(settings, profile), max_bytes=settings.limits.max_in_flight_bytes, metrics=metrics
    )
    quotas = settings.quotas
    service = InferenceService(
        registry,
        admission,
        metrics,
        max_pixels=settings.limits.max_pixels,
        decode_threads=settings.limits.decode_threads or num_cpus(),
        max_decode_bytes=settings.limits.max_decode_bytes,
        deadlines=settings.deadlines,
        quotas=Quotas(images_per_s=quotas.images_per_s, burst=quotas.burst) if quotas.images_per_s else None,
    )
    names = settings.repository.models or store.names()
    if not names:
        raise StartupError(f"there is no model in {settings.repository.root}; set FOVEA_REPOSITORY__ROOT to where yours are")
    default = settings.repository.default_model
    if default is not None and default not in names:
        raise ModelNotFound(f"the default model {default!r} is not among those to load: {', '.join(names)}")
    if unknown := sorted(settings.deadlines.models.keys() - set(names)):
        raise StartupError(f"FOVEA_DEADLINES__MODELS names {', '.join(unknown)}; there are {', '.join(names)}")
    try:
        for name in names:
            await registry.load(name)
    except BaseException:
        await service.close()
        raise
    return service


def _max_in_flight(settings: Settings, profile: TargetProfile) -> int:
    """The setting, or enough for every instance to work on full batches while others are decoded and wait."""
    in_batches = settings.batching.max_batch_size * profile.instances
    chosen = settings.limits.max_in_flight
    if not chosen:
        return max(MIN_AUTO_IN_FLIGHT, 4 * in_batches, settings.http.max_images_per_request)
    if chosen < in_batches:
        raise StartupError(
            f"limits.max_in_flight ({chosen}) is below batching.max_batch_size x instances ({in_batches}), "
            "so batches could never be full: raise the one or lower the other"
        )
    return chosen


def _open_model(store: ModelStore, name: str, version: int | None, settings: Settings, profile: TargetProfile) -> _Opened:
    """Everything that takes time: checksums, sessions, warm-up, golden pair, timing."""
    started = time.perf_counter()
    stored = store.open(name, version)
    manifest = stored.manifest
    batch_size = settings.batching.max_batch_size
    candidates: dict[str, OrtBackend] = {}
    for variant in _allowed_variants(stored, settings.runtime.variant, profile):
        candidates[variant] = _open_backend(stored, variant, profile, batch_size)
    choice = choose_variant(candidates, manifest.stages, batch_size=batch_size, instances=profile.instances)
    if settings.runtime.variant != "auto":
        choice = VariantChoice(choice.name, f"{choice.name} was asked for by FOVEA_RUNTIME__VARIANT", {})
    chosen = candidates.pop(choice.name)
    for backend in candidates.values():
        backend.close()
    run_times = time_stages(chosen, manifest.stages, batch_sizes=_batch_sizes(batch_size), instances=profile.instances)
    # With one ONNX Runtime thread the calling thread does all the work, so instances can share sessions, and weights
    # lie in memory once. With more, each needs a thread pool of its own.
    shared = profile.intra_op_threads == 1
    others = [
        chosen if shared else _open_backend(stored, choice.name, profile, batch_size) for _ in range(profile.instances - 1)
    ]
    wide, lone_threads = None, 1
    per_core = shared and profile.target in ON_THE_CPU
    if per_core and profile.instances > 1 and settings.runtime.lone_threads != 1:
        lone_threads = settings.runtime.lone_threads or num_cpus()
        wide_profile = replace(profile, intra_op_threads=lone_threads, spinning=True)
        _, wide = lone_gain(chosen, lambda: _open_backend(stored, choice.name, wide_profile, batch_size), manifest.stages)
    log.info(
        "model loaded",
        model=name,
        version=manifest.version,
        target=profile.target.value,
        variant=choice.name,
        why=choice.reason,
        instances=profile.instances,
        threads_each=profile.intra_op_threads,
        threads_alone=profile.intra_op_threads if wide is None else lone_threads,
        seconds=round(time.perf_counter() - started, 2),
    )
    return _Opened(stored, choice, per_core, run_times, (chosen, *others), wide)


def _open_backend(stored: StoredModel, variant: str, profile: TargetProfile, batch_size: int) -> OrtBackend:
    backend = OrtBackend(stored.directory, stored.manifest, variant, profile)
    verify_golden(backend, stored.directory, stored.manifest, variant)
    backend.warm_up(_batch_sizes(batch_size))
    return backend


def _batch_sizes(most: int) -> list[int]:
    """What is timed: one image, twice as many each time, and a full batch."""
    return [*(2**power for power in range((most - 1).bit_length())), most]


def _allowed_variants(stored: StoredModel, wanted: str, profile: TargetProfile) -> list[str]:
    allowed = [variant.name for variant in stored.manifest.variants if profile.target in variant.targets]
    if wanted == "auto":
        if not allowed:
            raise StartupError(f"{stored.manifest.name} has no variant for target {profile.target}")
        return allowed
    if wanted not in allowed:
        raise StartupError(
            f"variant {wanted!r} of {stored.manifest.name} cannot be served on target {profile.target}; "
            f"allowed: {', '.join(allowed) or 'none'}"
        )
    return [wanted]


def _start_model(
    opened: _Opened,
    settings: Settings,
    profile: TargetProfile,
    metrics: Metrics,
    decoders: Workers,
    lag: Callable[[], float],
) -> LoadedModel:
    manifest, choice = opened.stored.manifest, opened.choice
    variant = manifest.variant(choice.name)
    ladder = Ladder(variant)
    runtime = settings.runtime
    default_point = _point(ladder, "QUALITY", runtime.quality, manifest.name)
    floor = ladder.lowest_certified(default_point)
    if runtime.min_quality is not None:
        floor = _point(ladder, "MIN_QUALITY", runtime.min_quality, manifest.name)
        if floor < default_point:
            raise StartupError(f"FOVEA_RUNTIME__MIN_QUALITY ({runtime.min_quality}) is above the quality {runtime.quality}")
    pool = BackendPool(
        opened.backends,
        opened.wide,
        run_timeout_s=runtime.run_timeout_s,
        replaced=metrics.runs_given_up.labels(manifest.name),
    )
    pipeline = StagedPipeline(
        pool,
        ExitPolicy(variant.exits, ladder.thresholds),
        input_name=PIXELS,
        entries=manifest.entries,
        model=manifest.name,
        metrics=metrics,
        max_batch_size=settings.batching.max_batch_size,
        max_queue_delay_s=settings.batching.max_queue_delay_s,
        run_times=opened.run_times,
        spread=opened.per_core,
    )
    decodes = opened.per_core and not settings.limits.decode_threads
    quality = QualityController(ladder, default=default_point, floor=floor)
    forecast = Forecast(decoders, pipeline, lag, decodes=decodes)
    metrics.steps_down.labels(manifest.name).set_function(lambda: quality.steps_down)
    metrics.expected.labels(manifest.name).set_function(lambda: forecast.needed_s(forecast.predict_s(1, quality.current)))
    pipeline.start()
    labels: Mapping[str, str] = {
        "model": manifest.name,
        "version": str(manifest.version),
        "target": profile.target.value,
        "variant": choice.name,
    }
    metrics.model.labels(**labels).info({})
    return LoadedModel(
        manifest=manifest,
        labels=opened.stored.labels,
        profile=profile,
        variant=choice.name,
        variant_reason=choice.reason,
        ladder=ladder,
        default_point=default_point,
        quality=quality,
        bend_above_s=runtime.bend_above_ms / 1000,
        pipeline=pipeline,
        decodes=decodes,
        forecast=forecast,
        pool=pool,
        metrics=metrics,
    )


def _point(ladder: Ladder, setting: str, quality: str, model: str) -> int:
    try:
        return ladder.index(quality)
    except InvalidRequest as error:
        names = ", ".join(rung.name for rung in ladder)
        raise StartupError(f"FOVEA_RUNTIME__{setting} is {quality!r}; {model} has {names}") from error
