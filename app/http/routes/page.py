"""GET / -> the web page, GET /docs -> the API page, and their files under /static; nothing comes from elsewhere."""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path
from typing import Any

from fastapi import APIRouter, FastAPI, Request
from fastapi.responses import FileResponse, RedirectResponse, Response
from starlette.staticfiles import StaticFiles

router = APIRouter(include_in_schema=False)

STATIC = Path(__file__).resolve().parent.parent / "static"
# Everything the page needs comes from here; previews of photos are blobs.
HEADERS = {
    "Content-Security-Policy": "default-src 'self'; img-src 'self' blob: data:; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-cache",  # ask whether it has changed (ETag), so that an update never mixes old modules with new
}


@router.get("/")
async def page() -> FileResponse:
    """The page."""
    return FileResponse(STATIC / "index.html", headers=HEADERS)


@router.get("/docs")
async def docs(request: Request) -> Response:
    """The API, to read and to try; FastAPI's own page loads its scripts from a content delivery network."""
    if request.scope["raw_path"].endswith(b"/"):  # the page's links are relative, so that it works below any prefix
        return RedirectResponse("../docs")
    return FileResponse(STATIC / "docs.html", headers=HEADERS)


class _Files(StaticFiles):
    """With the headers of the pages."""

    def file_response(self, *args: Any, **kwargs: Any) -> Response:
        response = super().file_response(*args, **kwargs)
        response.headers.update(HEADERS)
        return response


def mount_static(app: FastAPI) -> None:
    """The files of the pages. Swagger UI's come out of the package that carries them."""
    app.mount("/static/swagger", _Files(directory=str(files("fastapi_offline") / "static")))  # first match wins
    app.mount("/static", _Files(directory=STATIC))
