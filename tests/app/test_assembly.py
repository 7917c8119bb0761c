"""From settings to a service that answers: the tiny exported model on real ONNX Runtime, and what is refused at start."""

from __future__ import annotations

import asyncio
import shutil
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from app import assembly
from app.assembly import open_service
from app.errors import InferenceFailed, ModelInvalid, ModelNotFound, Overloaded, ServiceError, StartupError
from app.exits import ExitPolicy, max_softmax
from app.metrics import Metrics
from app.postprocess import softmax
from app.request import LocalRequest, Parameters
from app.runtime.cpu import has_exact_int8
from app.runtime.ort_backend import OrtBackend
from app.runtime.selection import VariantChoice
from app.runtime.targets import resolve_profile
from app.service import InferenceService
from app.settings import BatchingSettings, LimitSettings, RepositorySettings, RuntimeSettings, Settings
from app.types import Prediction
from models.manifest import PIXELS, ExitSpec, ModelManifest
from tests.app.http.served import make_settings

pytestmark = pytest.mark.anyio
NAME = "test_vit"


def settings_for(
    root: Path,
    *,
    models: tuple[str, ...] = (),
    default_model: str | None = None,
    target: str = "cpu",
    variant: str = "auto",
    instances: int = 2,
    intra_op_threads: int = 1,
    max_batch_size: int = 4,
) -> Settings:
    """Two instances on the CPU."""
    return Settings(
        repository=RepositorySettings(root=root, models=models, default_model=default_model),
        runtime=RuntimeSettings.model_validate(
            {"target": target, "variant": variant, "instances": instances, "intra_op_threads": intra_op_threads}
        ),
        batching=BatchingSettings(max_batch_size=max_batch_size),
        limits=LimitSettings(decode_threads=2),
    )


@asynccontextmanager
async def service_for(settings: Settings, metrics: Metrics) -> AsyncIterator[InferenceService]:
    service = await open_service(settings, metrics)
    try:
        yield service
    finally:
        await service.close()


@pytest.fixture
def root(tiny_repository: Path, tmp_path: Path) -> Path:
    """A repository of our own, to be damaged."""
    shutil.copytree(tiny_repository, tmp_path / "repository")
    return tmp_path / "repository"


@pytest.fixture
def images() -> list[np.ndarray]:
    """Twelve of the model's size, so that preprocessing changes nothing."""
    generator = np.random.default_rng(3)
    coarse = generator.integers(0, 256, (12, 8, 8, 3), dtype=np.uint8)
    return [np.asarray(Image.fromarray(image).resize((32, 32))) for image in coarse]


def png(image: np.ndarray) -> bytes:
    buffer = BytesIO()
    Image.fromarray(image).save(buffer, "PNG")
    return buffer.getvalue()


def use_spread_exits(root: Path, variant: str, images: np.ndarray) -> None:
    """Give the variant exits at which a third of these images leaves after each stage.

    Those fitted on the noise of the tiny repository are taken by nearly all or none.
    """
    directory = root / NAME / "1"
    manifest = ModelManifest.load(directory)
    backend = OrtBackend(directory, manifest, variant, resolve_profile("cpu", instances=1))
    thresholds: list[float | None] = []
    inputs = {PIXELS: images}
    for stage in range(2):
        output = backend.run(stage, inputs)
        confidence = max_softmax(softmax(output.logits))
        surest = np.argsort(-confidence)
        third = len(images) // 3
        thresholds.append(float(confidence[surest[third - 1 : third + 1]].mean()))  # between two images, so that none is near
        inputs = {name: state[surest[third:]] for name, state in output.state.items()}
    exits = tuple(ExitSpec(score="max_softmax", temperature=1.0, threshold=each) for each in (*thresholds, None))
    variants = tuple(each.model_copy(update={"exits": exits}) if each.name == variant else each for each in manifest.variants)
    # The checksums are those of the other files, so the version is intact.
    (directory / "manifest.json").write_text(manifest.model_copy(update={"variants": variants}).model_dump_json())


async def classify(service: InferenceService, images: list[bytes]) -> list[Prediction | ServiceError]:
    return (await service.answer(LocalRequest(images, Parameters(top_k=10)))).results


@pytest.mark.parametrize("variant", ["fp32", "int8"])
async def test_every_exit_path_agrees_with_running_all_stages_on_one_image(
    root: Path, metrics: Metrics, images: list[np.ndarray], variant: str
) -> None:
    """Batched, re-batched and on two instances, each image gets what it gets alone, and leaves where it would alone."""
    if variant == "int8" and not has_exact_int8():
        pytest.skip("this CPU's u8 x s8 products saturate, so the recipe made no INT8 variant")
    target = "cpu_vnni" if variant == "int8" else "cpu"
    use_spread_exits(root, variant, np.stack(images))
    manifest = ModelManifest.load(root / NAME / "1")

    async with service_for(settings_for(root, target=target, variant=variant), metrics) as service:
        answers = await classify(service, [png(image) for image in images])

    backend = OrtBackend(root / NAME / "1", manifest, variant, resolve_profile("cpu", instances=1))
    policy = ExitPolicy(manifest.variant(variant).exits)
    exit_stages = []
    for image, answer in zip(images, answers, strict=True):
        assert isinstance(answer, Prediction)
        inputs = {PIXELS: image[None]}
        for stage in range(policy.num_stages):
            output = backend.run(stage, inputs)
            leave, confidence = policy.decide(stage, output.logits)
            if leave[0]:
                break
            inputs = dict(output.state)
        exit_stages.append(stage)
        assert (answer.exit.stage, answer.exit.num_stages) == (stage, 3)
        assert answer.exit.confidence == pytest.approx(float(confidence[0]), abs=1e-5)
        expected = policy.probabilities(stage, output.logits)[0]
        found = {score.index: score.probability for score in answer.predictions}
        np.testing.assert_allclose([found[index] for index in range(10)], expected, atol=1e-5)
        assert answer.predictions[0].index == int(expected.argmax())
        assert len(answer.timings.compute_s) == stage + 1
    assert [exit_stages.count(stage) for stage in range(3)] == [4, 4, 4]


async def test_the_service_is_ready_when_it_is_open(tiny_repository: Path, metrics: Metrics) -> None:
    """And not any more once it closes; the metrics say the same, and what is running."""
    service = await open_service(settings_for(tiny_repository, variant="fp32"), metrics)
    assert service.ready
    assert metrics.registry.get_sample_value("fovea_ready") == 1
    running = {"model": NAME, "version": "1", "target": "cpu", "variant": "fp32"}
    assert metrics.registry.get_sample_value("fovea_model_info", running) == 1

    await service.close()

    assert not service.ready
    assert metrics.registry.get_sample_value("fovea_ready") == 0
    with pytest.raises(Overloaded):
        service.admission.admit()


async def test_a_broken_image_costs_the_others_nothing(
    tiny_repository: Path, metrics: Metrics, images: list[np.ndarray]
) -> None:
    """It has its error in its place."""
    async with service_for(settings_for(tiny_repository), metrics) as service:
        good, broken, other = await classify(service, [png(images[0]), b"no image", png(images[1])])

    assert isinstance(good, Prediction)
    assert isinstance(broken, ServiceError)
    assert isinstance(other, Prediction)
    assert service.admission.images_in_flight == 0


async def test_a_request_in_flight_is_answered_when_the_service_closes(
    tiny_repository: Path, metrics: Metrics, images: list[np.ndarray]
) -> None:
    """Closing waits for it."""
    service = await open_service(settings_for(tiny_repository), metrics)
    model = service.registry.get()
    submitted = [asyncio.create_task(model.pipeline.submit(image)) for image in images]
    await asyncio.sleep(0)  # each has joined the queue

    await service.close()

    assert [10] * len(images) == [len((await task).probabilities) for task in submitted]
    with pytest.raises(InferenceFailed):
        await model.pipeline.submit(images[0])


@pytest.mark.parametrize(("intra_op_threads", "distinct"), [(1, 1), (2, 2)])
async def test_instances_share_sessions_only_with_one_thread_each(
    tiny_repository: Path, metrics: Metrics, monkeypatch: pytest.MonkeyPatch, intra_op_threads: int, distinct: int
) -> None:
    """With one the weights lie in memory once; with more, each instance needs a thread pool of its own."""
    pools: list[list[OrtBackend]] = []

    class WatchedPool(assembly.BackendPool):
        def __init__(self, backends: tuple[OrtBackend, ...], wide: OrtBackend | None, **options: Any) -> None:
            pools.append(list(backends))
            super().__init__(backends, wide, **options)
            assert wide is None  # so small a network is fast enough alone

    monkeypatch.setattr(assembly, "BackendPool", WatchedPool)

    async with service_for(settings_for(tiny_repository, intra_op_threads=intra_op_threads), metrics):
        (backends,) = pools

    assert (len(backends), len({id(backend) for backend in backends})) == (2, distinct)


async def test_the_chosen_variant_serves_and_the_other_is_closed(
    tiny_repository: Path, metrics: Metrics, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the timing says is what runs, with the exits that were fitted on it."""
    if not has_exact_int8():
        pytest.skip("this CPU's u8 x s8 products saturate, so there is only one variant to choose")
    offered: list[dict[str, OrtBackend]] = []

    def choose(backends: dict[str, OrtBackend], *_: object, **__: object) -> VariantChoice:
        offered.append(dict(backends))
        return VariantChoice("fp32", "fp32 is the fastest here: said the test", {})

    monkeypatch.setattr(assembly, "choose_variant", choose)

    async with service_for(settings_for(tiny_repository, target="cpu_vnni"), metrics) as service:
        model = service.registry.get()
        assert (model.variant, model.variant_reason) == ("fp32", "fp32 is the fastest here: said the test")
        assert sorted(offered[0]) == ["fp32", "int8"]
        with pytest.raises(IndexError):  # its sessions are gone
            offered[0]["int8"].run(0, {PIXELS: np.zeros((1, 32, 32, 3), dtype=np.uint8)})


async def test_the_variant_is_timed_on_this_machine(tiny_repository: Path, metrics: Metrics) -> None:
    """Whichever wins, the reason names every variant that the target allows."""
    if not has_exact_int8():
        pytest.skip("this CPU's u8 x s8 products saturate, so there is only one variant to choose")
    async with service_for(settings_for(tiny_repository, target="cpu_vnni"), metrics) as service:
        model = service.registry.get()

    assert model.variant in ("fp32", "int8")
    assert "fp32" in model.variant_reason
    assert "int8" in model.variant_reason


async def test_a_forced_variant_serves(tiny_repository: Path, metrics: Metrics) -> None:
    """And the reason says that it was asked for."""
    async with service_for(settings_for(tiny_repository, variant="fp32"), metrics) as service:
        model = service.registry.get()

    assert (model.variant, model.variant_reason) == ("fp32", "fp32 was asked for by FOVEA_RUNTIME__VARIANT")


@pytest.mark.parametrize("variant", ["int8", "fp16"])
async def test_a_variant_that_the_target_does_not_allow_is_refused(
    tiny_repository: Path, metrics: Metrics, variant: str
) -> None:
    """INT8 on a CPU whose products saturate would answer wrongly; the message says what is allowed."""
    with pytest.raises(StartupError, match=f"variant '{variant}' of test_vit cannot be served on target cpu; allowed: fp32"):
        await open_service(settings_for(tiny_repository, variant=variant), metrics)


async def test_too_few_in_flight_for_the_instances_of_this_machine_is_refused(
    tiny_repository: Path, metrics: Metrics, monkeypatch: pytest.MonkeyPatch
) -> None:
    """How many instances `0` means is known only here, after the settings were checked by themselves."""
    monkeypatch.setattr("app.runtime.targets.num_cpus", lambda: 1000)

    settings = settings_for(tiny_repository, instances=0)
    batches = 1000 * settings.batching.max_batch_size
    limited = settings.model_copy(update={"limits": settings.limits.model_copy(update={"max_in_flight": 256})})
    with pytest.raises(
        StartupError, match=rf"max_in_flight \(256\) is below batching.max_batch_size x instances \({batches}\)"
    ):
        await open_service(limited, metrics)


async def test_an_empty_repository_is_refused(tmp_path: Path, metrics: Metrics) -> None:
    """The message says which setting to change."""
    with pytest.raises(StartupError, match=r"there is no model in .*FOVEA_REPOSITORY__ROOT"):
        await open_service(settings_for(tmp_path), metrics)


async def test_an_unknown_model_is_refused(tiny_repository: Path, metrics: Metrics) -> None:
    """Named to be loaded, or named as the default."""
    with pytest.raises(ModelNotFound, match="no model other"):
        await open_service(settings_for(tiny_repository, models=("other",)), metrics)
    with pytest.raises(ModelNotFound, match="default model 'other' is not among those to load: test_vit"):
        await open_service(settings_for(tiny_repository, default_model="other"), metrics)


async def test_a_model_that_computes_otherwise_is_refused(root: Path, metrics: Metrics) -> None:
    """Every file is the one that was published, and yet this machine gives other logits than the golden pair says."""
    directory = root / NAME / "1"
    manifest = ModelManifest.load(directory)
    with np.load(directory / "golden.npz") as golden:
        arrays = dict(golden)
    arrays["fp32/stage_1/logits"] = arrays["fp32/stage_1/logits"] + np.float32(0.01)
    np.savez(directory / "golden.npz", **arrays)
    files = {**manifest.files, "golden.npz": _sha256(directory / "golden.npz")}
    (directory / "manifest.json").write_text(manifest.model_copy(update={"files": files}).model_dump_json())

    with pytest.raises(ModelInvalid, match="variant fp32, stage 1: logits differ"):
        await open_service(settings_for(root, variant="fp32"), metrics)


async def test_one_damaged_model_stops_the_start_and_frees_the_others(
    root: Path, metrics: Metrics, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A service that cannot serve all it was told to does not start, and leaves no batch loop behind."""
    shutil.copytree(root / NAME, root / "zzz")  # calls itself test_vit, and is loaded after it
    before = asyncio.all_tasks()

    with pytest.raises(ModelInvalid, match="zzz/1 holds test_vit"):
        await open_service(settings_for(root), metrics)

    assert asyncio.all_tasks() == before
    assert metrics.registry.get_sample_value("fovea_ready") == 0


def _sha256(path: Path) -> str:
    from exporters.publishing import checksums

    return checksums(path.parent)[path.name]


@pytest.mark.parametrize(
    ("runtime", "deadlines", "words"),
    [
        ({"quality": "best"}, {}, "FOVEA_RUNTIME__QUALITY is 'best'; test_vit has full, balanced"),
        ({"min_quality": "worst"}, {}, "FOVEA_RUNTIME__MIN_QUALITY is 'worst'; test_vit has full, balanced"),
        ({"quality": "balanced", "min_quality": "full"}, {}, "MIN_QUALITY .full. is above the quality balanced"),
        ({}, {"models": {"other": {"default_ms": 5}}}, "FOVEA_DEADLINES__MODELS names other; there are test_vit"),
    ],
)
async def test_what_no_model_has_is_refused_at_start(
    tiny_repository: Path, metrics: Metrics, runtime: dict[str, Any], deadlines: dict[str, Any], words: str
) -> None:
    """With the names there are."""
    settings = make_settings(tiny_repository, runtime=runtime, deadlines=deadlines)
    with pytest.raises(StartupError, match=words):
        await open_service(settings, metrics)


@pytest.mark.parametrize(("lone_threads", "gain", "wide"), [(0, 1.5, True), (3, 1.5, True), (1, 1.5, False), (0, 1.1, False)])
async def test_a_lone_batch_gets_a_wide_backend_where_it_is_worth_it(
    tiny_repository: Path, metrics: Metrics, monkeypatch: pytest.MonkeyPatch, lone_threads: int, gain: float, wide: bool
) -> None:
    """Unless it is switched off; what is not worth it is not kept."""

    def lone_gain(_: object, open_wide: Callable[[], OrtBackend], __: object) -> tuple[float, OrtBackend | None]:
        return gain, open_wide() if gain > 1.25 else None

    monkeypatch.setattr(assembly, "lone_gain", lone_gain)
    settings = make_settings(tiny_repository, runtime={"instances": 2, "lone_threads": lone_threads})
    service = await open_service(settings, metrics)
    assert (service.registry.get().pool._wide is not None) == wide
    await service.close()
