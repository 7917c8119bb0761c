"""The same work without the service: a plain loop on N threads that decodes and runs the stages, as fast as it can.

No HTTP, no queue, no batching across stages: what is left is what the machine can do, so served images/s are read as a
share of it. It lives in a process of its own that waits idle for commands: one line of JSON in, one line out.
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
import threading
import time
from collections.abc import Sequence
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from app.exits import ExitPolicy, no_history, with_answers
from app.imaging.preprocess import Pixels, load_pixels, preprocess
from app.runtime.backend import Backend
from app.runtime.ort_backend import OrtBackend
from app.runtime.targets import resolve_profile
from app.types import Array
from models.manifest import PIXELS, ModelManifest, PreprocessSpec
from tests.bench.images import read_folder


def decode_by_hand(data: bytes, spec: PreprocessSpec) -> Pixels:
    """As most people write it: the whole picture decoded by Pillow, resized, then cropped; no limits, no reduced scale."""
    image = Image.open(BytesIO(data)).convert("RGB")
    short = min(image.size)
    size = (spec.resize * image.width // short, spec.resize * image.height // short)
    return preprocess(np.asarray(image.resize(size, Image.Resampling[spec.interpolation.upper()])), spec)


class PlainLoop:
    """One variant's stages on images in turn.

    Args:
        backends: one per thread; the same one may stand several times, where the service's instances share it too.
        images: encoded; image i of the loop is image i modulo their number.
        chunk_size: images that go through the stages together.
        max_pixels: as the service limits them.
    """

    def __init__(
        self,
        backends: Sequence[Backend],
        manifest: ModelManifest,
        variant: str,
        images: Sequence[bytes],
        *,
        chunk_size: int,
        max_pixels: int,
    ) -> None:
        self._backends = tuple(backends)
        self._spec = manifest.preprocess
        self._policy = ExitPolicy(manifest.variant(variant).exits)
        self._images = images
        self._chunk_size = chunk_size
        self._max_pixels = max_pixels

    @property
    def num_threads(self) -> int:
        return len(self._backends)

    def classify(self, images: Sequence[bytes], thread: int = 0, *, by_hand: bool = False) -> npt.NDArray[np.int64]:
        """Decode the images and run the stages each of them needs: the stage after which it left, int64 (B,).

        Args:
            by_hand: decode as `decode_by_hand`, not as the service does.
        """
        inputs: dict[str, Array] = {PIXELS: np.stack([self._decode(data, by_hand) for data in images])}
        exits = np.zeros(len(images), dtype=np.int64)
        rows, history = np.arange(len(images)), no_history(len(images))  # of those that are still on their way
        for stage in range(self._policy.num_stages):
            output = self._backends[thread].run(stage, inputs)
            history = with_answers(history, output.logits)
            leave, _ = self._policy.decide(stage, output.logits, 0, history)
            exits[rows[leave]] = stage
            rows = rows[~leave]
            if not len(rows):
                break
            history = history[~leave]
            inputs = {name: value[~leave] for name, value in output.state.items()}
        return exits

    def throughput(self, *, seconds: float, ramp_s: float = 0.0, by_hand: bool = False) -> dict[str, Any]:
        """Images per second of all threads, each taking the next chunk, in a window after `ramp_s`.

        Returns:
            images_per_s; cpu_s_per_image, of the whole process; exit_rates, the share of images by stage.
        """
        chunks = itertools.count()  # next() on it is atomic
        done: list[tuple[float, npt.NDArray[np.int64]]] = []  # when a chunk ended, and its exits
        failures: list[BaseException] = []
        cpu_before_s, started = time.process_time(), time.monotonic()
        begin, end = started + ramp_s, started + ramp_s + seconds

        def work(thread: int) -> None:
            try:
                finished_at = started
                while finished_at < end and not failures:
                    exits = self.classify(self._chunk(next(chunks)), thread, by_hand=by_hand)
                    finished_at = time.monotonic()
                    done.append((finished_at, exits))
            except BaseException as error:
                failures.append(error)

        threads = [threading.Thread(target=work, args=(index,), name=f"plain-{index}") for index in range(self.num_threads)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        if failures:
            raise failures[0]
        exits = np.concatenate([exits for _, exits in done])
        inside = sum(len(exits) for finished_at, exits in done if begin <= finished_at < end)
        return {
            "images_per_s": inside / seconds,
            "cpu_s_per_image": (time.process_time() - cpu_before_s) / len(exits),
            "exit_rates": (np.bincount(exits, minlength=self._policy.num_stages) / len(exits)).tolist(),
        }

    def latency(self, num_images: int) -> dict[str, Any]:
        """One image after the other on this thread, decode and all the stages it needs: latencies_s."""
        latencies_s = []
        for index in range(num_images):
            data = self._images[index % len(self._images)]
            started = time.perf_counter()
            self.classify([data])
            latencies_s.append(time.perf_counter() - started)
        return {"latencies_s": latencies_s}

    def _decode(self, data: bytes, by_hand: bool) -> Pixels:
        return decode_by_hand(data, self._spec) if by_hand else load_pixels(data, self._spec, max_pixels=self._max_pixels)

    def _chunk(self, number: int) -> list[bytes]:
        first = number * self._chunk_size
        return [self._images[index % len(self._images)] for index in range(first, first + self._chunk_size)]


def main() -> None:
    """Load, warm up, say `{"ready": true}`, then obey lines like `{"do": "throughput", "seconds": 5}` until input ends."""
    parser = argparse.ArgumentParser(
        prog="python -m tests.bench.inprocess", description=__doc__.splitlines()[0] if __doc__ else ""
    )
    parser.add_argument("--model-dir", type=Path, required=True, help="directory of the version, with manifest.json")
    parser.add_argument("--variant", required=True)
    parser.add_argument("--target", default="auto")
    parser.add_argument("--instances", type=int, default=0, help="threads; 0: as the service would take")
    parser.add_argument("--intra-op-threads", type=int, default=1)
    parser.add_argument("--chunk-size", type=int, default=8)
    parser.add_argument("--max-pixels", type=int, default=50_000_000)
    parser.add_argument("--images", type=Path, required=True, help="folder of images, taken in turn")
    args = parser.parse_args()

    manifest = ModelManifest.load(args.model_dir)
    profile = resolve_profile(args.target, instances=args.instances, intra_op_threads=args.intra_op_threads)
    opened = [OrtBackend(args.model_dir, manifest, args.variant, profile)]
    if profile.intra_op_threads > 1:  # as in the service: a thread pool of its own for each instance
        opened += [OrtBackend(args.model_dir, manifest, args.variant, profile) for _ in range(profile.instances - 1)]
    loop = PlainLoop(
        list(itertools.islice(itertools.cycle(opened), profile.instances)),
        manifest,
        args.variant,
        read_folder(args.images),
        chunk_size=args.chunk_size,
        max_pixels=args.max_pixels,
    )
    loop.throughput(seconds=0.5)
    loop.latency(8)
    _say({"ready": True, "threads": loop.num_threads})
    for line in sys.stdin:
        command = json.loads(line)
        if command["do"] == "throughput":
            _say(loop.throughput(seconds=command["seconds"], ramp_s=command["ramp_s"], by_hand=command["by_hand"]))
        else:
            _say(loop.latency(command["num_images"]))


def _say(answer: dict[str, Any]) -> None:
    print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
