"""Every family that `fovea export` knows at one real size: what it weighs, costs and takes here; the table of docs/models.md.

    python -m tests.bench.families --images DIR
    python -m tests.bench.families --images DIR --only swin,levit

Weights are random, with the spread of trained ones, so accuracy says nothing; agreement says what INT8 does to such a network.
timm's are measured where timm is installed.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers as t
from PIL import Image
from rich.console import Console
from safetensors.torch import save_file

from exporters.config import CalibrationConfig, QuantizationConfig
from exporters.exportable import Exportable
from exporters.graphs_export import export_of
from exporters.images import read_unlabelled
from exporters.progress import SILENT
from exporters.sensitivity import last_logits
from exporters.sources.base import SourceError, WholeModel
from exporters.sources.timm_whole import TimmWholeSource
from exporters.sources.transformers_whole import TransformersWholeSource
from exporters.vit_export import ViTExport
from models.manifest import PreprocessSpec
from models.multi_exit import MultiExitViT
from models.vit import ViTConfig
from tests.bench.graphs import milliseconds_per_image
from tests.bench.machine import facts
from tests.bench.processes import ROOT
from tests.bench.report import write_section
from tests.families import as_if_trained

CLASSES = 1000
NUM_PHOTOS, PHOTO_STEP = 16, 31  # for the statistics of batch norms
BIT = {"size": {"shortest_edge": 256}, "crop_size": {"height": 224, "width": 224}}
SPEC = PreprocessSpec(
    resize=256, crop=(224, 224), interpolation="bicubic", mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5), layout="uint8_nhwc"
)
TIMMS = {"MViTv2-T": "mvitv2_tiny", "TinyViT-5M": "tiny_vit_5m_224", "EfficientFormer-L1": "efficientformer_l1"}


def convnext_processor() -> Any:
    return t.ConvNextImageProcessorPil(size={"shortest_edge": 224}, crop_pct=0.875)


# Name -> configuration and image processor of transformers; sizes are those of the papers' smaller networks.
THEIRS: dict[str, tuple[Callable[[], Any], Callable[[], Any]]] = {
    "Swin-T": (t.SwinConfig, t.ViTImageProcessorPil),
    "PVT-T": (t.PvtConfig, t.PvtImageProcessorPil),
    "PVTv2-B0": (t.PvtV2Config, t.PvtImageProcessorPil),
    "Hiera-T": (
        lambda: t.HieraConfig(depths=[1, 2, 7, 2], num_hidden_layers=4),
        lambda: t.BitImageProcessorPil(**BIT),
    ),
    "ConvNeXt-T": (t.ConvNextConfig, convnext_processor),
    "ConvNeXt-V2-T": (t.ConvNextV2Config, convnext_processor),
    "EfficientNet-B0": (
        lambda: t.EfficientNetConfig(image_size=224, width_coefficient=1.0, depth_coefficient=1.0, hidden_dim=1280),
        lambda: t.EfficientNetImageProcessorPil(size={"height": 224, "width": 224}),
    ),
    "LeViT-128": (t.LevitConfig, t.LevitImageProcessorPil),
    "CvT-13": (t.CvtConfig, convnext_processor),
    "MobileViT-S": (t.MobileViTConfig, lambda: t.MobileViTImageProcessorPil(size={"shortest_edge": 288})),
    "ResNet-50": (t.ResNetConfig, convnext_processor),
}


@dataclass(frozen=True, slots=True)
class Row:
    """One network measured."""

    name: str
    parameters: int
    gmacs: float
    fp32_ms: float
    int8_ms: float
    batches: tuple[int, int]
    agreement: float
    kept_fp32: str
    seconds: float  # of the export, without timing

    def markdown(self) -> str:
        cells = (
            self.name,
            f"{self.parameters / 1e6:.1f} M",
            f"{self.gmacs:.2f}",
            f"{1000 / self.fp32_ms:.0f} ({self.batches[0]})",
            f"{1000 / self.int8_ms:.0f} ({self.batches[1]})",
            f"{self.fp32_ms / self.int8_ms:.2f}",
            f"{100 * self.agreement:.1f} %",
            f"{self.seconds:.0f} s",
        )
        return f"| {' | '.join(cells)} |"


HEADER = (
    "| network | parameters | GMACs | fp32 images/s (batch) | INT8 images/s (batch) | ratio | INT8 agrees | exported in |\n"
    "| --- | --- | --- | --- | --- | --- | --- | --- |"
)


def main() -> int:
    """0, or 1 when a network could not be exported."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--images", type=Path, required=True, help="folder of photographs, with its sub-folders")
    parser.add_argument("--only", help="names, separated by commas")
    parser.add_argument("--output", type=Path, default=ROOT / "docs" / "models.md")
    args = parser.parse_args()
    torch.set_num_threads(1)
    console = Console(width=160)
    wanted = {name.lower() for name in args.only.split(",")} if args.only else None
    makers: dict[str, Callable[[Path], tuple[Exportable, PreprocessSpec, int]]] = {
        "ViT-Ti/16": lambda _: _ours(192, 3),
        "DeiT-S/16": lambda _: _ours(384, 6),
        **{name: lambda folder, name=name: _theirs(folder, name, args.images) for name in THEIRS},
        **{name: lambda folder, name=name: _timms(folder, name) for name in TIMMS},
    }
    rows, failed, missing = [], [], []
    for name, make in makers.items():
        if wanted is not None and not any(name.lower().startswith(each) for each in wanted):
            continue
        try:
            with tempfile.TemporaryDirectory() as folder:
                row = _measured(name, *make(Path(folder)), args.images)
        except SourceError as error:
            (missing if "pip install" in str(error) else failed).append(name)
            console.print(f"{name}: {error}", highlight=False)
            continue
        rows.append(row)
        console.print(row.markdown(), highlight=False)
        _write(args.output, rows, missing)  # after each: it takes a quarter of an hour, and one may fail
    return 1 if failed else 0


def _write(output: Path, rows: Sequence[Row], missing: Sequence[str]) -> None:
    told = facts(ROOT) | {"Command": "`python -m tests.bench.families --images DIR`"}
    where = "\n".join(f"- {key}: {value}" for key, value in told.items())
    without = f"\nNot measured, their package was not there: {', '.join(missing)}.\n" if missing else ""
    write_section(output, f"\n{where}\n\n{HEADER}\n" + "\n".join(row.markdown() for row in rows) + f"\n{without}\n")


def _measured(name: str, exported: Exportable, spec: PreprocessSpec, parameters: int, images: Path) -> Row:
    pixels = read_unlabelled(images, spec).pixels
    started = time.perf_counter()
    (stage,), (fp32,) = exported.stages(), exported.graphs()
    nothing_asked = QuantizationConfig(target_agreement=0.0)
    found = exported.quantized(pixels[::2], CalibrationConfig(num_images=64, batch_size=8), nothing_asked, SILENT)
    seconds = time.perf_counter() - started
    (int8,) = found.graphs
    answers = [last_logits([graph], pixels[1::2]).argmax(axis=1) for graph in (fp32, int8)]
    times = milliseconds_per_image({"fp32": [fp32], "int8": [int8]}, pixels)
    return Row(
        name,
        parameters,
        stage.gmacs,
        times["fp32"][0],
        times["int8"][0],
        (times["fp32"][1], times["int8"][1]),
        float((answers[0] == answers[1]).mean()),
        found.kept_fp32,
        seconds,
    )


def _ours(width: int, heads: int) -> tuple[Exportable, PreprocessSpec, int]:
    torch.manual_seed(0)
    model = MultiExitViT(ViTConfig(224, 16, width, 12, heads, CLASSES, mlp_ratio=4.0, pooling="cls"), (12,)).eval()
    as_if_trained(model, lambda: model(torch.randn(4, 3, 224, 224)))
    return ViTExport(model, SPEC), SPEC, _count(model)


def _theirs(folder: Path, name: str, images: Path) -> tuple[Exportable, PreprocessSpec, int]:
    configuration, processor = (make() for make in THEIRS[name])
    configuration.id2label = {number: f"class {number}" for number in range(CLASSES)}
    torch.manual_seed(0)
    model = getattr(t, type(configuration).__name__.replace("Config", "ForImageClassification"))(configuration)
    photos = [np.asarray(Image.open(file).convert("RGB")) for file in sorted(images.rglob("*.*"))[::PHOTO_STEP][:NUM_PHOTOS]]
    seen = processor(photos, return_tensors="pt")["pixel_values"]
    # Batch norms must know photographs: with the statistics of noise such a network is chaotic, in fp32 too.
    as_if_trained(model, lambda: model(pixel_values=seen))
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return _whole(TransformersWholeSource(folder).load(), model)


def _timms(folder: Path, name: str) -> tuple[Exportable, PreprocessSpec, int]:
    try:
        import timm
    except (ImportError, RuntimeError) as error:
        raise SourceError(f"timm is not here: pip install timm ({error})") from error
    torch.manual_seed(0)
    model = timm.create_model(TIMMS[name], pretrained=False, num_classes=CLASSES)
    as_if_trained(model, lambda: model(torch.randn(4, 3, 224, 224)))
    save_file({key: value.contiguous() for key, value in model.state_dict().items()}, folder / "model.safetensors")
    told = {"input_size": (3, 224, 224), "interpolation": "bicubic", "crop_pct": 0.9, "mean": SPEC.mean, "std": SPEC.std}
    config = {"architecture": TIMMS[name], "num_classes": CLASSES, "pretrained_cfg": told}
    (folder / "config.json").write_text(json.dumps(config))
    labels = tuple(map(str, range(CLASSES)))
    return _whole(TimmWholeSource(folder / "model.safetensors", folder / "config.json", labels).load(), model)


def _whole(found: WholeModel, model: torch.nn.Module) -> tuple[Exportable, PreprocessSpec, int]:
    return export_of(found), found.preprocess, _count(model)


def _count(model: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


if __name__ == "__main__":
    sys.exit(main())
