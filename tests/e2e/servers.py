"""`python -m app serve` as a process of its own, on a free port of this machine; and repositories to serve."""

from __future__ import annotations

import http.client
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from io import BytesIO
from pathlib import Path
from types import TracebackType
from typing import Self
from urllib.parse import urlsplit

import numpy as np
import orjson
from PIL import Image
from prometheus_client.parser import text_string_to_metric_families

from app.exits import max_softmax
from app.imaging.preprocess import load_pixels
from app.postprocess import softmax
from app.runtime.ort_backend import OrtBackend
from app.runtime.targets import resolve_profile
from app.types import Array
from models.manifest import MANIFEST_FILE, PIXELS, ModelManifest
from tests.fakes import PATIENCE_S

ROOT = Path(__file__).resolve().parents[2]
MODEL = "test_vit"
READY = re.compile(r"^Fovea is ready: http://127\.0\.0\.1:(\d+)$", re.MULTILINE)


class Server:
    """A context manager; leaving it ends the process if nobody has.

    Args:
        repository: with the models.
        log: where the process writes.
        max_files: its limit of open files; None: ours.
        settings: more environment variables, without `FOVEA_`.
    """

    def __init__(self, repository: Path, log: Path, *, max_files: int | None = None, **settings: object) -> None:
        ours = {
            "REPOSITORY__ROOT": repository,
            "RUNTIME__VARIANT": "fp32",
            "HTTP__HOST": "127.0.0.1",
            "HTTP__PORT": 0,
            **settings,
        }
        environment = {name: value for name, value in os.environ.items() if not name.startswith("FOVEA_")}
        environment |= {f"FOVEA_{name}": str(value) for name, value in ours.items()}
        limit = () if max_files is None else ("sh", "-c", f'ulimit -n {max_files} && exec "$@"', "sh")
        self._log = log
        with log.open("wb") as file:
            self.process = subprocess.Popen(
                [*limit, sys.executable, "-m", "app", "serve"],
                cwd=ROOT,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=subprocess.STDOUT,
            )
        self.port = 0

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def classify_url(self) -> str:
        return f"{self.url}/v1/classify"

    def written(self) -> str:
        """Everything it has written so far."""
        return self._log.read_text()

    def get(self, path: str) -> tuple[int, bytes]:
        """GET over a connection of its own: status and body."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=PATIENCE_S)
        try:
            connection.request("GET", path)
            response = connection.getresponse()
            return response.status, response.read()
        finally:
            connection.close()

    def samples(self, name: str) -> dict[tuple[tuple[str, str], ...], float]:
        """A metric's values now, by its labels."""
        families = text_string_to_metric_families(self.get("/metrics")[1].decode())
        return {
            tuple(sorted(sample.labels.items())): sample.value
            for family in families
            for sample in family.samples
            if sample.name == name
        }

    def wait_idle(self) -> None:
        """Until nothing is in flight any more; fails where something stays."""
        ends_at = time.monotonic() + PATIENCE_S
        while any({**self.samples("fovea_in_flight"), **self.samples("fovea_in_flight_bytes")}.values()):
            assert time.monotonic() < ends_at, "permits did not come back"
            time.sleep(0.01)

    def terminate(self) -> None:
        """SIGTERM, without waiting."""
        self.process.send_signal(signal.SIGTERM)

    def wait(self) -> int:
        """The exit code."""
        return self.process.wait(PATIENCE_S)

    def stop(self) -> None:
        """SIGTERM, and exit code 0 without a word of trouble."""
        self.terminate()
        assert self.wait() == 0, self.written()

    def __enter__(self) -> Self:
        ends_at = time.monotonic() + 3 * PATIENCE_S
        while (found := READY.search(self.written())) is None:
            if self.process.poll() is not None or time.monotonic() > ends_at:
                self.__exit__(None, None, None)
                raise AssertionError(f"the server did not start:\n{self.written()}")
            time.sleep(0.01)
        self.port = int(found[1])
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait()


def port_of(url: str) -> int:
    port = urlsplit(url).port
    assert port is not None
    return port


def distinct_images(count: int) -> list[bytes]:
    """PNG files of unlike content, from coarse noise: a network with random weights tells them apart."""
    generator = np.random.default_rng(7)
    files = []
    for _ in range(count):
        coarse = generator.integers(0, 256, (6, 6, 3), dtype=np.uint8)
        buffer = BytesIO()
        Image.fromarray(coarse).resize((40, 32)).save(buffer, "PNG")
        files.append(buffer.getvalue())
    return files


TEMPERATURE = 1.0


def with_thresholds(repository: Path, target: Path, variant: str, images: Sequence[bytes]) -> Path:
    """A copy of the repository where a third of these images leaves at each exit of the variant.

    Each threshold stands in the middle of the widest gap between two confidences near its quantile, so that no image
    stands on it. Temperatures become 1: those fitted on random answers press all confidences together.
    Exits are data; the manifest has no checksum of itself.
    """
    shutil.copytree(repository, target)
    directory = target / MODEL / "1"
    manifest = ModelManifest.load(directory)
    backend = OrtBackend(directory, manifest, variant, resolve_profile(instances=1))
    state: dict[str, Array] = {
        PIXELS: np.stack([load_pixels(image, manifest.preprocess, max_pixels=10**6) for image in images])
    }
    staying = np.ones(len(images), dtype=bool)
    thresholds: list[float | None] = []
    exits = manifest.variant(variant).exits
    for stage in range(len(exits) - 1):
        output = backend.run(stage, state)
        confidence = np.sort(max_softmax(softmax(output.logits, TEMPERATURE))[staying])
        near = round(len(confidence) * (1 - 1 / (len(exits) - stage)))
        window = slice(max(0, near - len(confidence) // 10), near + len(confidence) // 10 + 1)
        gaps = np.diff(confidence[window])
        widest = int(gaps.argmax())
        threshold = float(confidence[window][widest : widest + 2].mean())
        assert gaps[widest] > 1e-4, "the confidences stand too close together"
        thresholds.append(threshold)
        staying &= max_softmax(softmax(output.logits, TEMPERATURE)) < threshold
        state = dict(output.state)
    backend.close()
    body = orjson.loads((directory / MANIFEST_FILE).read_bytes())
    for entry in body["variants"]:
        if entry["name"] == variant:
            for exit_body, threshold in zip(entry["exits"], [*thresholds, None], strict=True):
                exit_body.update(score="max_softmax", temperature=TEMPERATURE, threshold=threshold)
    (directory / MANIFEST_FILE).write_bytes(orjson.dumps(body))
    return target
