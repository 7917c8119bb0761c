"""The model card: what was measured, in words and tables, made from the same report the machine reads.

Mitchell et al., Model Cards for Model Reporting, FAT* 2019.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from exporters.config import ExportConfig
from models.manifest import ModelManifest


def model_card(config: ExportConfig, manifest: ModelManifest, report: Mapping[str, Any], provenance: Mapping[str, str]) -> str:
    """Markdown; every figure comes from the report."""
    stages = len(manifest.stages)
    accuracy = _table(
        ["variant", *(f"exit {index}" for index in range(stages)), "with exits on", "agrees with fp32"],
        [
            [
                name,
                *(_percent(value) for value in variant["top1_by_exit"]),
                _percent(variant["operating_point"]["top1"]),
                _percent(variant["agreement_with_fp32"]),
            ]
            for name, variant in report["variants"].items()
        ],
    )
    routing = _table(
        ["variant", *(f"leave at {index}" for index in range(stages)), "mean GMACs", "compute saved", "ms/image, no exits"],
        [
            [
                name,
                *(_percent(value) for value in variant["operating_point"]["exit_rates"]),
                f"{variant['operating_point']['mean_gmacs']:.4f}",
                _percent(variant["operating_point"]["compute_saved"]),
                f"{report['ms_per_image_without_exits'][name]:.2f}",
            ]
            for name, variant in report["variants"].items()
        ],
    )
    calibration = _table(
        ["variant", *(f"exit {index}" for index in range(stages))],
        [[name, *(_percent(value) for value in variant["ece_by_exit"])] for name, variant in report["variants"].items()],
    )
    return f"""# {manifest.name}, version {manifest.version}

{stages} stages with an exit after each, {manifest.num_classes} classes: {", ".join(_labels_of(config))}.

- **Data:** {config.data}
- **Training:** {config.training}
- **Licence of the weights:** {config.licence}
- **Made by:** `{config.command}` at commit {provenance["commit"]}

Fitted on {report["fitted_on"]["images"]} images that were not trained on; every figure below is from
{report["tested_on"]["images"]} test images that took no part in training or fitting.

## Accuracy (top-1)

{accuracy}

"exit k" takes every image to exit k. "With exits on" is what the service does: an image leaves at the first exit that
is sure enough. The thresholds were fitted to lose at most {100 * config.exits.max_accuracy_drop:.1f} points on the
fitting images.

## Where images leave, and what it saves

{routing}

Stage costs: {", ".join(f"{value:.4f}" for value in report["gmacs_by_stage"])} GMACs per image. Milliseconds are medians
of one thread at batch 8 on the machine that exported ({report["machine"]}); measure on yours.

## Calibration (expected calibration error, 15 bins)

{calibration}

## Limits

It knows its classes and nothing else: a picture of anything else is still put into one of them, sometimes with
confidence. It looks at the central square of a picture only, scaled to {manifest.preprocess.crop[0]} x
{manifest.preprocess.crop[1]} pixels. INT8 ranges and exits were fitted on the same images, so the loss allowed there is a
little optimistic; the tables above are not: their images took no part in it.
"""


def _labels_of(config: ExportConfig) -> tuple[str, ...]:
    from models.zoo import ZOO

    return ZOO[config.model].labels


def _table(head: list[str], rows: list[list[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _percent(value: float) -> str:
    return f"{100 * value:.2f} %"
