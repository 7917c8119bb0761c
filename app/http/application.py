"""Put the application together: routes, handlers, and a lifespan that opens and closes the service."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import partial

from fastapi import FastAPI
from starlette.types import ASGIApp, Receive, Scope, Send

from app import __version__
from app.assembly import open_service
from app.http.errors import install_error_handlers
from app.http.middleware import RequestContextMiddleware
from app.http.routes import classify, health, metrics, models, page
from app.metrics import Metrics, create_registry
from app.settings import Settings

DESCRIPTION = """Image classification that spends compute where a picture needs it: the model is cut into stages with an
exit after each, sure images leave early, and the others are batched anew."""


class _Application(FastAPI):
    """FastAPI, but requests to classify are spared its layers, which take longer than all that the service does for them."""

    classify: ASGIApp

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and scope["path"] == classify.PATH and scope["method"] == "POST":
            scope["app"] = self
            await self.classify(scope, receive, send)
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
        title="Fovea",
        version=__version__,
        description=DESCRIPTION,
        lifespan=lifespan,
        docs_url=None,
        redoc_url=None,
        redirect_slashes=False,  # a redirect would name http:// where a proxy speaks https; the middleware takes the slash off
    )
    app.state.settings = settings
    app.state.metrics = Metrics(create_registry())
    app.state.draining = False
    install_error_handlers(app)
    context = partial(RequestContextMiddleware, max_head_bytes=settings.http.max_head_bytes, access_log=settings.log.access)
    app.classify = context(classify.endpoint)
    app.add_middleware(context)
    for module in (classify, models, health, metrics, page):
        app.include_router(module.router)
    app.include_router(health.aliases)
    page.mount_static(app)
    return app


def drain(app: FastAPI) -> None:
    """Not ready from now on; requests are still answered, and each answer closes its connection."""
    app.state.draining = True
    app.state.service.drain()
