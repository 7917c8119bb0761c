"""Post a photo in each of the three forms, with a session of aiohttp as it is: python post_aiohttp.py URL PHOTO."""

from __future__ import annotations

import asyncio
import base64
import json
import sys
from pathlib import Path
from typing import Any

import aiohttp


async def main(url: str, photo: bytes) -> None:
    """Post all three, over one session."""
    async with aiohttp.ClientSession() as session:
        await post(session, url, "raw", data=photo)
        multipart = aiohttp.FormData()
        multipart.add_field("images", photo, filename="photo.jpg")
        await post(session, url, "multipart", data=multipart)
        await post(session, url, "json", json={"images": [base64.b64encode(photo).decode()]})


async def post(session: aiohttp.ClientSession, url: str, form: str, **body: Any) -> None:
    """Post one body and print the answer."""
    async with session.post(url, **body) as answer:
        print(json.dumps({"form": form, "status": answer.status, "body": await answer.json()}))


asyncio.run(main(sys.argv[1], Path(sys.argv[2]).read_bytes()))
