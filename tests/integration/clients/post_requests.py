"""Post a photo in each of the three forms, with a session of requests as it is: python post_requests.py URL PHOTO."""

from __future__ import annotations

import base64
import json
import sys
from pathlib import Path
from typing import Any

import requests

url, photo = sys.argv[1], Path(sys.argv[2])


def post(session: requests.Session, form: str, **body: Any) -> None:
    """Post one body and print the answer."""
    answer = session.post(url, **body)
    print(json.dumps({"form": form, "status": answer.status_code, "body": answer.json()}))


with requests.Session() as session, photo.open("rb") as raw, photo.open("rb") as part:
    post(session, "raw", data=raw)
    post(session, "multipart", files={"images": part})
    post(session, "json", json={"images": [base64.b64encode(photo.read_bytes()).decode()]})
