"""GET /health/live and /health/ready, and their other names /healthz, /livez and /readyz."""

from __future__ import annotations

from fastapi import APIRouter, Response
from pydantic import BaseModel

from app.http.dependencies import ServiceDep

router = APIRouter(prefix="/health", tags=["health"])
aliases = APIRouter(include_in_schema=False)  # as Kubernetes' own servers have them


class Live(BaseModel):
    live: bool = True


class Ready(BaseModel):
    ready: bool


@aliases.get("/healthz")
@aliases.get("/livez")
@router.get("/live", summary="Is the process alive?")
async def live() -> Live:
    """200 as long as the event loop turns, also while the service stops."""
    return Live()


@aliases.get("/readyz", responses={503: {"model": Ready}})
@router.get("/ready", summary="Are requests welcome?", responses={503: {"model": Ready}})
async def ready(service: ServiceDep, response: Response) -> Ready:
    """200 when every model is loaded and verified; 503 while the service stops, or while a model fails (docs/overload.md)."""
    if not service.ready:
        response.status_code = 503
    return Ready(ready=service.ready)
