"""What INT8 and token reduction cost and save on trained ViTs, and where the time goes: docs/token-reduction.md.

    python -m tests.bench.reductions --network deit_tiny=WEIGHTS,CONFIG --labels FILE --folders FILE \\
        --calibration DIR --test DIR --test DIR --reduce mctf:60% --reduce mctf:50% --recover DIR

With `--recover`, each schedule is measured a second time, with what was learned back from these photographs; with `--keep DIR`
that is learned once, and found there by later runs.
The baseline of every ratio is the same network in fp32, with all its tokens, at its own best batch, in the same rounds. A
DeiT-S with random weights is timed besides.
"""

from __future__ import annotations

import argparse
import copy
import hashlib
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import onnx
import torch
from rich.console import Console

from app.types import Array
from exporters.config import CalibrationConfig, ExportConfig, QuantizationConfig, SearchConfig
from exporters.evaluation import paired_loss
from exporters.images import ImageSet, read_images
from exporters.progress import SILENT
from exporters.recovery import photos_to_learn_from, recover_answers
from exporters.reduction_schedule import ReductionSchedule, apply_schedule, wish_of
from exporters.schedule_search import find_schedule
from exporters.sensitivity import last_logits
from exporters.sources.base import Asked
from exporters.sources.timm_vit import TimmSource
from exporters.vit_export import ViTExport
from models.manifest import PreprocessSpec
from models.multi_exit import MultiExitViT
from models.training.recovery import RecoveryConfig
from models.vit import ViTConfig
from tests.bench.graphs import milliseconds_per_image
from tests.bench.machine import facts
from tests.bench.operators import profile_table
from tests.bench.processes import ROOT
from tests.bench.report import write_section
from tests.families import as_if_trained

ALL = "all tokens"
RECOVERED = ", recovered"
HEADER = (
    "| variant | tokens removed, block by block | ms an image (batch) | times fp32 | top-1 | lost, 95 % interval "
    "| agrees with fp32 |\n"
    "| --- | --- | --- | --- | --- | --- | --- |"
)


@dataclass(frozen=True, slots=True)
class Images:
    """Prepared for one network."""

    calibration: Array
    test: Array
    labels: Array


@dataclass(frozen=True, slots=True)
class Graph:
    """One variant of a network."""

    model: onnx.ModelProto
    schedule: str
    kept_fp32: str
    gmacs: float


@dataclass(frozen=True, slots=True)
class Lessons:
    """What reduced networks learn, and where that is kept."""

    network: str
    photos: ImageSet | None = None
    folder: Path | None = None

    def learn(self, student: MultiExitViT, teacher: MultiExitViT, spec: PreprocessSpec, schedule: ReductionSchedule) -> str:
        """In place; as `recover_answers`."""
        if self.photos is None:
            raise ValueError("there is nothing to learn from")
        made_from = hashlib.sha256(repr((self.network, str(schedule), self.photos.sha256, RecoveryConfig())).encode())
        for value in teacher.state_dict().values():
            made_from.update(value.numpy().tobytes())
        kept = None if self.folder is None else self.folder / f"{made_from.hexdigest()[:16]}.pt"
        if kept is not None and kept.exists():
            found = torch.load(kept, weights_only=True)
            student.load_state_dict(found["weights"])
            return f"{found['told']} (kept)"
        told = recover_answers(student, teacher, self.photos, spec)
        if kept is not None:
            kept.parent.mkdir(parents=True, exist_ok=True)
            torch.save({"told": told, "weights": student.state_dict()}, kept)
        return told


def main() -> int:
    """0."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--network", action="append", default=[], help="NAME=WEIGHTS,CONFIG as timm keeps them")
    parser.add_argument("--labels", type=Path, required=True, help="a label a line")
    parser.add_argument("--folders", type=Path, required=True, help="the folder of each class's images, one a line")
    parser.add_argument("--calibration", type=Path, required=True)
    parser.add_argument("--test", type=Path, action="append", required=True)
    parser.add_argument("--reduce", action="append", default=[])
    parser.add_argument("--reduce-small", action="append", default=[], help="the DeiT-S, block by block")
    parser.add_argument("--recover", type=Path, help="photographs to learn from, none of them a test image")
    parser.add_argument("--keep", type=Path, help="what was learned, by weights, schedule and photographs")
    parser.add_argument("--target-agreement", type=float, default=QuantizationConfig().target_agreement)
    parser.add_argument("--max-fp32-share", type=float, default=QuantizationConfig().max_fp32_share)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--output", type=Path, default=ROOT / "docs" / "token-reduction.md")
    args = parser.parse_args()
    console = Console(width=180)
    labels = tuple(args.labels.read_text().rstrip("\n").split("\n"))
    folders = {name: number for number, name in enumerate(args.folders.read_text().split())}
    quantization = QuantizationConfig(target_agreement=args.target_agreement, max_fp32_share=args.max_fp32_share)
    asked = [
        f"--target-agreement {args.target_agreement:g}",
        f"--max-fp32-share {args.max_fp32_share:g}",
        *(f"--reduce {each}" for each in args.reduce),
        *(f"--reduce-small {each}" for each in args.reduce_small),
        *(["--recover …"] if args.recover else []),
    ]
    told = facts(ROOT) | {"Command": f"`python -m tests.bench.reductions … {' '.join(asked)}`"}
    parts = ["", *(f"- {key}: {value}" for key, value in told.items()), ""]
    for text in args.network:
        name, _, files = text.partition("=")
        weights, config = (Path(part) for part in files.split(","))
        source = TimmSource(weights, config, labels)
        network = source.load()
        sets = [read_images(path, labels, network.preprocess, folders=folders) for path in (args.calibration, *args.test)]
        images = Images(
            sets[0].pixels, np.concatenate([s.pixels for s in sets[1:]]), np.concatenate([s.labels for s in sets[1:]])
        )
        photos = None
        if args.recover is not None:
            told_by = ExportConfig(name, source, args.calibration, args.test[0], ROOT, 1, recovery=args.recover)
            photos = photos_to_learn_from(told_by, network)
        lessons = Lessons(name, photos, args.keep)
        parts.append(_section(name, source, images, args.reduce, lessons, quantization, args.rounds, console))
    parts.append(_deit_small(args.reduce_small, args.rounds, console))
    write_section(args.output, "\n".join(parts) + "\n")
    return 0


def _section(
    name: str,
    source: TimmSource,
    images: Images,
    schedules: Sequence[str],
    lessons: Lessons,
    quantization: QuantizationConfig,
    rounds: int,
    console: Console,
) -> str:
    """A trained network: accuracy, time, operators, stages."""
    network = source.load()
    model, spec = network.model, network.preprocess
    graphs = _graphs(model, spec, images.calibration, schedules, lessons, quantization, console)
    times = milliseconds_per_image({key: [graph.model] for key, graph in graphs.items()}, images.test, rounds=rounds)
    reference = last_logits([graphs["fp32"].model], images.test).argmax(axis=1)
    rows = [HEADER]
    for key, graph in graphs.items():
        answers = last_logits([graph.model], images.test).argmax(axis=1)
        right = answers == images.labels
        lost, half_width = paired_loss(reference == images.labels, right)
        ms, batch = times[key]
        cells = [
            key,
            graph.schedule,
            f"{ms:.2f} ({batch})",
            f"{times['fp32'][0] / ms:.2f}",
            f"{100 * right.mean():.2f} %",
            f"{100 * lost:.2f} ± {100 * half_width:.2f}",
            f"{100 * (answers == reference).mean():.1f} %",
        ]
        rows.append(f"| {' | '.join(cells)} |")
        console.print(rows[-1], highlight=False)
    kept = "; ".join(f"{key}: {graph.kept_fp32}" for key, graph in graphs.items() if graph.kept_fp32)
    chosen = {key: graph for key, graph in graphs.items() if not key.endswith(RECOVERED)}  # the same operators
    profile = profile_table(
        {key: graph.model for key, graph in chosen.items()},
        {key: graph.gmacs for key, graph in chosen.items()},
        images.test[:8],
    )
    console.print(profile, highlight=False)
    title = f"## {name}, {len(images.labels)} photographs"
    split = _split(source, spec, images, rounds)
    console.print(split, highlight=False)
    return f"{title}\n\n" + "\n".join(rows) + f"\n\nIn fp32 besides the heads: {kept}.\n\n{profile}\n\n{split}\n"


def _split(source: TimmSource, spec: PreprocessSpec, images: Images, rounds: int) -> str:
    """What it costs to cut a network into three stages, when every image goes through all of them."""
    depth = source.load().model.config.depth
    networks = {}
    for name, boundaries in (("whole", ()), ("three stages", (depth // 3, 2 * depth // 3, depth))):
        exported = ViTExport(replace(source, asked=Asked(boundaries)).load().model, spec)
        nothing_asked = QuantizationConfig(target_agreement=0.0)
        int8 = exported.quantized(images.calibration[:64], CalibrationConfig(), nothing_asked, SILENT)
        networks |= {f"fp32, {name}": exported.graphs(), f"int8, {name}": int8.graphs}
    times = milliseconds_per_image(networks, images.test, rounds=rounds)
    told = (
        f"{kind} {times[f'{kind}, three stages'][0]:.2f} ms an image instead of {times[f'{kind}, whole'][0]:.2f} "
        f"({times[f'{kind}, three stages'][0] / times[f'{kind}, whole'][0]:.3f})"
        for kind in ("fp32", "int8")
    )
    return f"Cut into three stages, with all images going through all of them and a head after each: {', '.join(told)}."


def _graphs(
    model: MultiExitViT,
    spec: PreprocessSpec,
    pixels: Array,
    schedules: Sequence[str],
    lessons: Lessons,
    quantization: QuantizationConfig,
    console: Console,
) -> dict[str, Graph]:
    """fp32 with all tokens, then INT8 with all of them and with each schedule, and with what is learned back."""
    exported = ViTExport(model, spec)
    (fp32,), (stage,) = exported.graphs(), exported.stages()
    found = {"fp32": Graph(fp32, "", "", stage.gmacs)}
    calibration = CalibrationConfig(num_images=256)
    int8 = exported.quantized(pixels, calibration, quantization, SILENT)
    found[f"int8, {ALL}"] = Graph(int8.graphs[0], "", int8.kept_fp32, stage.gmacs)
    console.print(f"{ALL}; in fp32: {int8.kept_fp32}", highlight=False)
    for text in schedules:
        network, config = copy.deepcopy(model), model.config
        schedule = (
            ReductionSchedule.parse(text, config.depth, config.num_patches)
            if (wish := wish_of(text)) is None
            else find_schedule(network, pixels, spec, wish, SearchConfig())
        )
        apply_schedule(network, schedule)
        removed = ", ".join(map(str, schedule.removed))
        for learned in [""] if lessons.photos is None else ["", RECOVERED]:
            if learned:
                console.print(lessons.learn(network, model, spec, schedule), highlight=False)
            reduced = ViTExport(network, spec)
            (stage,) = reduced.stages()
            int8 = reduced.quantized(pixels, calibration, replace(quantization, target_agreement=0.0), SILENT)
            found[f"int8, {text}{learned}"] = Graph(int8.graphs[0], removed, int8.kept_fp32, stage.gmacs)
            console.print(f"{text}{learned}: {removed}; in fp32: {int8.kept_fp32}", highlight=False)
    return found


def _deit_small(schedules: Sequence[str], rounds: int, console: Console) -> str:
    """Speed alone: random weights, so that nothing is searched and no layer left out."""
    spec = PreprocessSpec(
        resize=256, crop=(224, 224), interpolation="bicubic", mean=(0.5,) * 3, std=(0.5,) * 3, layout="uint8_nhwc"
    )
    torch.manual_seed(0)
    model = MultiExitViT(ViTConfig(224, 16, 384, 12, 6, 1000, mlp_ratio=4.0, pooling="cls"), (12,)).eval()
    as_if_trained(model, lambda: None)
    pixels = np.random.default_rng(0).integers(0, 256, (16, 224, 224, 3), dtype=np.uint8)
    graphs = _graphs(model, spec, pixels, schedules, Lessons("DeiT-S"), QuantizationConfig(target_agreement=0.0), console)
    times = milliseconds_per_image({key: [graph.model] for key, graph in graphs.items()}, pixels, rounds=rounds)
    rows = [
        "## DeiT-S, random weights: time alone",
        "",
        "| variant | ms an image (batch) | times fp32 |",
        "| --- | --- | --- |",
    ]
    for key, (ms, batch) in times.items():
        rows.append(f"| {key} | {ms:.2f} ({batch}) | {times['fp32'][0] / ms:.2f} |")
        console.print(rows[-1], highlight=False)
    return "\n".join(rows)


if __name__ == "__main__":
    sys.exit(main())
