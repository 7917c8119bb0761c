"""GET /metrics."""

from __future__ import annotations

from fastapi import APIRouter, Request, Response
from prometheus_client.exposition import choose_encoder

from app.http.dependencies import MetricsDep

router = APIRouter(tags=["metrics"])


@router.get("/metrics", summary="Metrics for Prometheus", response_class=Response)
async def metrics(request: Request, metrics: MetricsDep) -> Response:
    """Prometheus' text format, or OpenMetrics where the Accept header asks for it."""
    encode, content_type = choose_encoder(request.headers.get("accept", ""))
    return Response(encode(metrics.registry), headers={"Content-Type": content_type})
