"""Peak memory of decoding files, each in a process of its own: `python tests/peak_memory.py FILE...`, a JSON line for each.

VmHWM, the most memory a process ever had resident, starts anew at a fork; so a forked child's, less what it began with.
"""

from __future__ import annotations

import ctypes
import json
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any
from unittest.mock import patch

from app.errors import RequestError
from app.imaging import decode
from app.imaging.preprocess import load_pixels
from models.manifest import PreprocessSpec
from tests.images import make_jpeg

SPEC = PreprocessSpec.model_validate(
    {
        "resize": 256,
        "crop": (224, 224),
        "interpolation": "bicubic",
        "mean": (0.485, 0.456, 0.406),
        "std": (0.229, 0.224, 0.225),
        "layout": "uint8_nhwc",
    }
)


def main(paths: Sequence[str]) -> None:
    load(make_jpeg())  # what is loaded once is no part of a picture's cost
    for path in paths:
        data = Path(path).read_bytes()
        ctypes.CDLL(None).malloc_trim(0)  # memory freed but kept would be used again without being seen
        child = os.fork()
        if child == 0:
            before = _status_bytes("VmRSS")
            cost, error = load(data)
            result = {"peak": _status_bytes("VmHWM") - before, "cost": cost, "error": error, "file": Path(path).name}
            sys.stdout.write(json.dumps(result) + "\n")
            sys.stdout.flush()
            os._exit(0)
        os.waitpid(child, 0)


def load(data: bytes) -> tuple[int, str | None]:
    """The cost estimated from the header (0: refused before), and how it failed."""
    costs: list[int] = []

    def remember(estimate: Callable[..., int]) -> Callable[..., int]:
        def estimated(*args: Any) -> int:
            costs.append(estimate(*args))
            return costs[-1]

        return estimated

    with (
        patch.object(decode, "decode_cost", remember(decode.decode_cost)),
        patch.object(decode, "plain_jpeg_cost", remember(decode.plain_jpeg_cost)),
    ):
        try:
            load_pixels(data, SPEC, max_pixels=50_000_000)
        except RequestError as error:
            return max(costs, default=0), error.code
    return max(costs), None


def _status_bytes(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{name}:"))


if __name__ == "__main__":
    main(sys.argv[1:])
