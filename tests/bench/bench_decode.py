"""What decoding JPEGs at a reduced scale costs in grey levels and saves in time; the tables of docs/adr/0008.

    python tests/bench/bench_decode.py --images FOLDER
    python tests/bench/bench_decode.py --images FOLDER --photos 30 --enlarge-to 4000

Every photo goes through all variants in turn, so that a busy machine slows them alike: trust ratios, not milliseconds.
"""

from __future__ import annotations

import argparse
import math
import random
import statistics
import sys
import time
from dataclasses import dataclass, field
from io import BytesIO
from pathlib import Path

import numpy as np
import PIL
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from app.imaging import decode, preprocess
from models.manifest import PreprocessSpec

MAX_PIXELS = 100_000_000
TARGETS = ((32, 32), (64, 64), (256, 224))  # shorter side after the resize, side of the crop


@dataclass
class Variant:
    """How far the decoder may reduce, and whether the resize may average first; with what was measured."""

    draft_factor: float  # inf: never
    reducing_gap: float | None
    num_reduced: int = 0
    differences: list[float] = field(default_factory=list)  # mean absolute difference of a photo, grey levels
    durations_ms: list[float] = field(default_factory=list)  # one per photo
    speedups: list[float] = field(default_factory=list)  # against the first variant on the same photo

    def load(self, data: bytes, spec: PreprocessSpec) -> np.ndarray:
        decode.DRAFT_FACTOR = self.draft_factor  # type: ignore[assignment]  # inf is fine where it is compared
        preprocess.REDUCING_GAP = self.reducing_gap
        return preprocess.load_pixels(data, spec, max_pixels=MAX_PIXELS)


def main() -> None:
    args = _arguments()
    photos = _read(args.images, args.photos, args.enlarge_to)
    sides = [min(Image.open(BytesIO(photo)).size) for photo in photos]
    print(f"{len(photos)} photos, shorter side {min(sides)} to {max(sides)}, median {statistics.median(sides):.0f} px")
    print(f"Pillow {PIL.__version__}, {args.interpolation}, {args.rounds} rounds\n")
    print("| resize, crop | draft factor | reducing gap | photos reduced | mean | largest photo | ms/photo | speed-up |")
    print("| --- | --- | --- | --- | --- | --- | --- | --- |")
    for resize, crop in TARGETS:
        spec = PreprocessSpec(
            resize=resize,
            crop=(crop, crop),
            interpolation=args.interpolation,
            mean=(0, 0, 0),
            std=(1, 1, 1),
            layout="uint8_nhwc",
        )
        for variant in _measure(photos, spec, args.rounds):
            factor = "full" if variant.draft_factor == math.inf else f"{variant.draft_factor:g}"
            print(
                f"| {resize}, {crop} | {factor} | {variant.reducing_gap or 'none'} | {variant.num_reduced / len(photos):.0%} "
                f"| {statistics.mean(variant.differences):.2f} | {max(variant.differences):.2f} "
                f"| {statistics.median(variant.durations_ms):.2f} | {statistics.median(variant.speedups):.2f} |"
            )


def _measure(photos: list[bytes], spec: PreprocessSpec, rounds: int) -> list[Variant]:
    variants = [Variant(math.inf, None), Variant(math.inf, 3.0)]
    variants += [Variant(factor, None) for factor in (1, 1.5, 2, 3, 4)]
    variants += [Variant(2, 3.0)]
    for photo in photos:
        durations_s: list[list[float]] = [[] for _ in variants]
        results = [variant.load(photo, spec) for variant in variants]  # also warms up
        for _ in range(rounds):
            for variant, durations in zip(variants, durations_s, strict=True):
                start = time.perf_counter()
                variant.load(photo, spec)
                durations.append(time.perf_counter() - start)
        fastest_s = [min(durations) for durations in durations_s]
        for variant, result, duration_s in zip(variants, results, fastest_s, strict=True):
            variant.differences.append(float(np.abs(result.astype(int) - results[0]).mean()))
            variant.durations_ms.append(1000 * duration_s)
            variant.speedups.append(fastest_s[0] / duration_s)
            side = int(min(variant.draft_factor, 2**30) * spec.resize)
            variant.num_reduced += min(Image.open(BytesIO(photo)).size) >= 2 * side
    return variants


def _read(folder: Path, num_photos: int, enlarge_to: int | None) -> list[bytes]:
    paths = sorted(path for path in folder.rglob("*") if path.suffix.lower() in {".jpg", ".jpeg"})
    photos = [path.read_bytes() for path in random.Random(0).sample(paths, min(num_photos, len(paths)))]
    return photos if enlarge_to is None else [_enlarged(photo, enlarge_to) for photo in photos]


def _enlarged(photo: bytes, side: int) -> bytes:
    """A stand-in for a phone's photo: less fine detail than a real one, so differences come out small, the time is right."""
    image = Image.open(BytesIO(photo)).convert("RGB")
    scale = side / max(image.size)
    buffer = BytesIO()
    image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.LANCZOS).save(
        buffer, "JPEG", quality=90
    )
    return buffer.getvalue()


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=Path, required=True, help="folder with JPEG photos, searched with its subfolders")
    parser.add_argument("--photos", type=int, default=200, help="how many to take (seeded choice)")
    parser.add_argument("--rounds", type=int, default=3, help="times each variant runs on a photo; the fastest counts")
    parser.add_argument("--interpolation", default="bicubic", choices=("bilinear", "bicubic", "lanczos"))
    parser.add_argument("--enlarge-to", type=int, help="first enlarge each photo to this longer side, in pixels")
    return parser.parse_args()


if __name__ == "__main__":
    main()
