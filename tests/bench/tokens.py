"""Time and peak memory of a ViT-Tiny against the number of tokens, with and without merging: docs/high-resolution.md.

    python -m tests.bench.tokens

Random weights: this is about speed. Each measurement is a process of its own, so that its memory is its own.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import onnx
import torch
from rich.console import Console

from exporters.config import CalibrationConfig, QuantizationConfig
from exporters.golden import golden_images
from exporters.progress import SILENT
from exporters.reduction_schedule import ReductionSchedule, apply_schedule
from exporters.vit_export import ViTExport
from models.manifest import PreprocessSpec
from models.multi_exit import MultiExitViT
from models.vit import ViTConfig
from tests.bench.machine import facts
from tests.bench.processes import ROOT
from tests.bench.report import write_section
from tests.families import as_if_trained

SIDES = (224, 320, 448, 640, 768, 896, 1024)  # 196 to 4,096 patches of 16 x 16
PATCH, DEPTH = 16, 12
# Of the tokens that enter the network, the share that every block merges: as 13 of 196.
SHARE = 13 / 196
WAYS = ("fp32", "fp32, merged", "int8", "int8, merged")
COLOURS = {"fp32": "tab:red", "fp32, merged": "tab:orange", "int8": "tab:blue", "int8, merged": "tab:green"}


@dataclass(frozen=True, slots=True)
class Point:
    """One graph at one size."""

    ms: float
    peak_mib: float  # of a process that runs it, beyond what it has with no model


def main() -> int:
    """0."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--sides", help="pixels, separated by commas")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--output", type=Path, default=ROOT / "docs" / "high-resolution.md")
    args = parser.parse_args()
    torch.set_num_threads(1)
    console = Console(width=160)
    sides = [int(side) for side in args.sides.split(",")] if args.sides else SIDES
    found: dict[int, dict[str, Point]] = {}
    with tempfile.TemporaryDirectory() as folder:
        for side in sides:
            files = _export(side, Path(folder))
            runs = [{way: _measure(file) for way, file in files.items()} for _ in range(args.rounds)]
            found[side] = {
                way: Point(statistics.median(r[way].ms for r in runs), statistics.median(r[way].peak_mib for r in runs))
                for way in files
            }
            console.print(side, found[side], highlight=False)
    write_section(args.output, _markdown(found))
    _draw(found, args.output.with_suffix(".png"))
    return 0


def _export(side: int, folder: Path) -> dict[str, Path]:
    """A graph file of each way."""
    spec = PreprocessSpec(
        resize=side, crop=(side, side), interpolation="bicubic", mean=(0.5,) * 3, std=(0.5,) * 3, layout="uint8_nhwc"
    )
    pixels, files = golden_images(spec)[:2], {}
    for merged in (False, True):
        torch.manual_seed(0)
        model = MultiExitViT(ViTConfig(side, PATCH, 192, DEPTH, 3, 1000, mlp_ratio=4.0, pooling="cls"), (DEPTH,)).eval()
        as_if_trained(model, lambda: None)
        if merged:
            removed = round(SHARE * (side // PATCH) ** 2)
            apply_schedule(model, ReductionSchedule.parse(f"tome:{removed}", DEPTH, (side // PATCH) ** 2))
        exported = ViTExport(model, spec)
        int8 = exported.quantized(
            pixels, CalibrationConfig(num_images=2, batch_size=1), QuantizationConfig(target_agreement=0.0), SILENT
        )
        for name, (graph,) in (("fp32", exported.graphs()), ("int8", int8.graphs)):
            way = f"{name}, merged" if merged else name
            files[way] = folder / f"{side} {way}.onnx"
            onnx.save(graph, files[way])
    return files


def _measure(file: Path) -> Point:
    command = [sys.executable, "-m", "tests.bench.run_graph", str(file)]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT)
    return Point(**json.loads(done.stdout))


def _markdown(found: dict[int, dict[str, Point]]) -> str:
    told = facts(ROOT) | {"Command": "`python -m tests.bench.tokens`"}
    lines = ["", *(f"- {key}: {value}" for key, value in told.items()), ""]
    lines += [f"| pixels | tokens | {' | '.join(f'{way}: ms, MiB' for way in WAYS)} | growth taken away |"]
    lines += ["| --- " * (3 + len(WAYS)) + "|"]
    first = min(found)
    for side, points in found.items():
        tokens = (side // PATCH) ** 2
        cells = [f"{points[way].ms:.0f}, {points[way].peak_mib:.0f}" for way in WAYS]
        lines.append(f"| {side} | {tokens} | {' | '.join(cells)} | {_taken_away(found[first], points, tokens, first)} |")
    return "\n".join(lines) + "\n\n"


def _taken_away(first: dict[str, Point], points: dict[str, Point], tokens: int, side: int) -> str:
    """How much of the time beyond linear growth from the smallest size merging takes away, in fp32."""
    times = tokens / (side // PATCH) ** 2
    beyond = {way: points[way].ms - times * first[way].ms for way in ("fp32", "fp32, merged")}
    return f"{100 * (1 - beyond['fp32, merged'] / beyond['fp32']):.0f} %" if times > 1 and beyond["fp32"] > 0 else ""


def _draw(found: dict[int, dict[str, Point]], path: Path) -> None:
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(10, 4))
    tokens = [(side // PATCH) ** 2 for side in found]
    for way in WAYS:
        axes[0].plot(tokens, [points[way].ms for points in found.values()], "o-", label=way, color=COLOURS[way])
        axes[1].plot(tokens, [points[way].peak_mib for points in found.values()], "o-", label=way, color=COLOURS[way])
    for axis, what in zip(axes, ("milliseconds an image", "peak memory, MiB"), strict=True):
        axis.set_xlabel("tokens")
        axis.set_ylabel(what)
        axis.set_ylim(bottom=0)
        axis.grid(alpha=0.3)
        axis.legend()
    figure.suptitle("ViT-Ti/16, one image, one thread")
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)


if __name__ == "__main__":
    sys.exit(main())
