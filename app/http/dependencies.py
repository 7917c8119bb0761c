"""What routes are given: the service, the settings, the metrics."""

from __future__ import annotations

from typing import Annotated

from fastapi import Depends, Request

from app.metrics import Metrics
from app.service import InferenceService
from app.settings import Settings


async def get_service(request: Request) -> InferenceService:
    """The open service of this application."""
    service: InferenceService = request.app.state.service
    return service


async def get_settings(request: Request) -> Settings:
    """The settings this application was built with."""
    settings: Settings = request.app.state.settings
    return settings


async def get_metrics(request: Request) -> Metrics:
    """The metrics of this application."""
    metrics: Metrics = request.app.state.metrics
    return metrics


ServiceDep = Annotated[InferenceService, Depends(get_service)]
SettingsDep = Annotated[Settings, Depends(get_settings)]
MetricsDep = Annotated[Metrics, Depends(get_metrics)]
