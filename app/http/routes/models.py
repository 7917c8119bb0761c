"""GET /v1/models…"""

from __future__ import annotations

from fastapi import APIRouter

from app.http.dependencies import ServiceDep
from app.http.errors import problem_responses
from app.http.schemas import ModelBody, ModelsResponse, QualityBody, StageCostBody
from app.loaded_model import LoadedModel
from app.quality import Rung
from app.service import InferenceService

router = APIRouter(prefix="/v1/models", tags=["models"])
ERRORS = problem_responses({404: "No such model or version.", 422: "The version is not a number."})


@router.get("", summary="Everything loaded")
async def list_models(service: ServiceDep) -> ModelsResponse:
    """Every loaded version, by name and version."""
    return ModelsResponse(models=[_body(service, model) for _, _, model in service.registry.loaded()])


@router.get("/{name}", summary="The highest loaded version of a model", responses=ERRORS)
async def get_model(name: str, service: ServiceDep) -> ModelBody:
    """What it is, what it runs on, and where it comes from."""
    return _body(service, service.registry.get(name))


@router.get("/{name}/versions/{version}", summary="One loaded version of a model", responses=ERRORS)
async def get_version(name: str, version: int, service: ServiceDep) -> ModelBody:
    """What it is, what it runs on, and where it comes from."""
    return _body(service, service.registry.get(name, version))


def _body(service: InferenceService, model: LoadedModel) -> ModelBody:
    manifest, registry, costs = model.manifest, service.registry, model.pipeline.costs
    is_default = registry.default_model is not None and registry.get() is model
    variant = manifest.variant(model.variant)
    return ModelBody(
        name=manifest.name,
        version=manifest.version,
        default=is_default,
        ready=not model.failed,
        target=model.profile.target.value,
        instances=model.profile.instances,
        intra_op_threads=model.profile.intra_op_threads,
        variant=model.variant,
        variant_reason=model.variant_reason,
        stages=len(manifest.stages),
        classes=manifest.num_classes,
        labels=list(model.labels),
        gmacs_by_stage=[round(stage.gmacs, 6) for stage in manifest.stages],
        stage_costs=[
            StageCostBody(
                batch_size=size,
                fixed_ms=round(1000 * curve.fixed_s, 4),
                per_image_ms=round(1000 * curve.per_image_s, 4),
            )
            for size, curve in zip(costs.batch_sizes, costs.curves, strict=True)
        ],
        exits=[exit_.model_dump() for exit_ in variant.exits],
        qualities=[_quality(rung, default=index == model.default_point) for index, rung in enumerate(model.ladder)],
        provenance=manifest.provenance,
    )


def _quality(rung: Rung, *, default: bool) -> QualityBody:
    return QualityBody(
        name=rung.name,
        default=default,
        thresholds=[None if threshold is None or threshold > 1 else threshold for threshold in rung.thresholds[:-1]],
        bound=rung.bound,
        certificate=None if rung.certificate is None else rung.certificate.model_dump(),
    )
