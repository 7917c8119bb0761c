"""Post a photo in each of the three forms, with an async client of httpx as it is: python post_httpx_async.py URL PHOTO."""

from __future__ import annotations

import asyncio
import base64
import json
import sys
from pathlib import Path
from typing import Any

import httpx


async def main(url: str, photo: bytes) -> None:
    """Post all three, over one client."""
    async with httpx.AsyncClient() as client:
        await post(client, url, "raw", content=photo)
        await post(client, url, "multipart", files={"images": ("photo.jpg", photo)})
        await post(client, url, "json", json={"images": [base64.b64encode(photo).decode()]})


async def post(client: httpx.AsyncClient, url: str, form: str, **body: Any) -> None:
    """Post one body and print the answer."""
    answer = await client.post(url, **body)
    print(json.dumps({"form": form, "status": answer.status_code, "body": answer.json()}))


asyncio.run(main(sys.argv[1], Path(sys.argv[2]).read_bytes()))
