"""What routes are given: the service, the metrics."""

from __future__ import annotations

from typing import Annotated

from fastapi import Depends, Request

from app.metrics import Metrics
from app.service import InferenceService


async def get_service(request: Request) -> InferenceService:
    """The open service of this application."""
    service: InferenceService = request.app.state.service
    return service


async def get_metrics(request: Request) -> Metrics:
    """The metrics of this application."""
    metrics: Metrics = request.app.state.metrics
    return metrics


ServiceDep = Annotated[InferenceService, Depends(get_service)]
MetricsDep = Annotated[Metrics, Depends(get_metrics)]
