"""Post a photo in each of the three forms, with a client of httpx as it is: python post_httpx.py URL PHOTO."""

from __future__ import annotations

import base64
import json
import sys
from pathlib import Path
from typing import Any

import httpx

url, photo = sys.argv[1], Path(sys.argv[2])


def post(client: httpx.Client, form: str, **body: Any) -> None:
    """Post one body and print the answer."""
    answer = client.post(url, **body)
    print(json.dumps({"form": form, "status": answer.status_code, "body": answer.json()}))


with httpx.Client() as client, photo.open("rb") as raw, photo.open("rb") as part:
    post(client, "raw", content=raw)
    post(client, "multipart", files={"images": part})
    post(client, "json", json={"images": [base64.b64encode(photo.read_bytes()).decode()]})
