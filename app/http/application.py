"""Put the application together: routes, handlers, and a lifespan that opens and closes the service."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import partial
from typing import Any

from fastapi import FastAPI
from starlette.datastructures import State
from starlette.types import ASGIApp, Receive, Scope, Send

from app import __version__
from app.assembly import open_service
from app.http.direct import Direct
from app.http.errors import install_error_handlers, unexpected_problem
from app.http.middleware import RequestContextMiddleware
from app.http.refusals import Refusals
from app.http.routes import classify, health, metrics, models, page
from app.metrics import Metrics, create_registry
from app.scheduling.quotas import Quotas
from app.service import InferenceService
from app.settings import Settings

DESCRIPTION = """Image classification that spends compute where a picture needs it: the model is cut into stages with an
exit after each, sure images leave early, and the others are batched anew."""


class _State(State):
    """Of the application. Starlette's looks every attribute up in Python, many times for each request; this has plain ones."""

    settings: Settings
    metrics: Metrics
    quotas: Quotas | None
    service: InferenceService
    draining: bool
    refusals: Refusals

    def __setattr__(self, key: Any, value: Any) -> None:
        object.__setattr__(self, key, value)


class _Application(FastAPI):
    """FastAPI, with a short way past its layers for requests that come by the thousand (docs/adr/0010)."""

    short: ASGIApp

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and (scope["method"], scope["path"]) in classify.DIRECT:
            scope["app"] = self
            await self.short(scope, receive, send)
        else:
            await super().__call__(scope, receive, send)


def create_app(settings: Settings | None = None) -> FastAPI:
    """The ASGI application; the service opens when it starts and closes when it stops."""
    settings = settings if settings is not None else Settings()

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        app.state.service = await open_service(settings, app.state.metrics)
        try:
            yield
        finally:
            await app.state.service.close()

    app = _Application(
        title="Fovea", version=__version__, description=DESCRIPTION, lifespan=lifespan, docs_url=None, redoc_url=None
    )
    app.state = _State()
    app.state.settings = settings
    app.state.metrics = Metrics(create_registry())
    app.state.draining = False
    app.state.refusals = Refusals(settings.http.max_upload_bytes)
    quotas = settings.quotas
    app.state.quotas = Quotas(images_per_s=quotas.images_per_s, burst=quotas.burst) if quotas.images_per_s else None
    install_error_handlers(app)
    context = partial(RequestContextMiddleware, access_log=settings.log.access, on_unexpected=unexpected_problem)
    app.short = context(Direct(classify.DIRECT))
    app.add_middleware(context)
    for module in (classify, models, health, metrics, page):
        app.include_router(module.router)
    page.mount_static(app)
    return app


def drain(app: FastAPI) -> None:
    """Not ready from now on; requests are still answered, and each answer closes its connection."""
    app.state.draining = True
    app.state.service.drain()
