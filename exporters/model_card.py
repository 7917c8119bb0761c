"""The model card: what was measured, in words and tables, made from the same report the machine reads.

Mitchell et al., Model Cards for Model Reporting, FAT* 2019.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from exporters.config import ExportConfig
from models.manifest import ModelManifest, PreprocessSpec

NO_LABELS = """**The images had no labels.** What is called accuracy here is agreement with the network's own answer, in fp32,
at its last exit and without token reduction.

"""

NAMED_CLASSES = 20
DEVIATIONS, NOTABLE = 4.0, 0.03  # beyond both, two sets of images are not alike: standard deviations, share of right answers


def model_card(
    config: ExportConfig,
    manifest: ModelManifest,
    labels: Sequence[str],
    report: Mapping[str, Any],
    provenance: Mapping[str, str],
) -> str:
    """Markdown; every figure comes from the report."""
    stages = range(len(manifest.stages))
    variants: dict[str, Any] = report["variants"]
    accuracy = _table(
        [
            "variant",
            *(f"exit {index}" for index in stages),
            "with exits on",
            "top-5, last exit",
            "lost to fp32, last exit",
            "agrees with fp32",
        ],
        [
            [
                name,
                *(percent(value) for value in figures["top1_by_exit"]),
                percent(figures["operating_point"]["top1"]),
                percent(figures["top5_by_exit"][-1]),
                points(figures["loss_against_fp32"]),
                percent(figures["agreement_with_fp32"]),
            ]
            for name, figures in variants.items()
        ],
    )
    routing = _table(
        ["variant", *(f"leave at {index}" for index in stages), "lost by exits", "mean GMACs", "compute saved", "ms/image"],
        [
            [
                name,
                *(percent(value) for value in figures["operating_point"]["exit_rates"]),
                points(figures["operating_point"]["loss_against_full_depth"]),
                f"{figures['operating_point']['mean_gmacs']:.4f}",
                percent(figures["operating_point"]["compute_saved"]),
                milliseconds(report["ms_per_image"][name]),
            ]
            for name, figures in variants.items()
        ]
        + _further_points(report),
    )
    calibration = _table(
        ["variant", *(f"exit {index}" for index in stages)],
        [[name, *(percent(value) for value in figures["ece_by_exit"])] for name, figures in variants.items()],
    )
    last, figures = list(variants.items())[-1]
    warnings = [exits_cost_more(variants, config.exits.max_accuracy_drop), unlike_images(report)]
    warned = "".join(f"\n**{warning}**\n" for warning in warnings if warning)
    return f"""# {manifest.name}, version {manifest.version}

{_stages(len(stages))}, {_classes(labels)}.

- **Data:** {config.data}
- **Training:** {config.training}
- **INT8:** in fp32 is {provenance["kept_fp32"]}
- **Token reduction:** {_reduction(provenance["token_reduction"], report)}
- **Licence of the weights:** {config.licence}
- **Made by:** `{config.command}` at commit {provenance["commit"]}

{NO_LABELS if config.unlabelled else ""}Fitted on {report["fitted_on"]["images"]} images; every figure below is from
{report["tested_on"]["images"]} test images that took no part in training or fitting. Losses are paired, with their 95 %
interval. `python -m exporters evaluate --images TEST` measures all of it again.

## Accuracy (top-1)

{accuracy}

"exit k" takes every image to exit k. "With exits on" is what the service does: an image leaves at the first exit that
is sure enough. {_thresholds(config, report)}

## Where images leave, and what it saves

{routing}
{warned}
Stage costs: {", ".join(f"{value:.4f}" for value in report["gmacs_by_stage"])} GMACs per image. Milliseconds are medians
of one thread at batch 8, survivors batched anew, on the machine that exported ({report["machine"]}); measure on yours.

## Calibration (expected calibration error, 15 bins)

{calibration}
{_other_images(report, labels)}
## Limits

By class ({last}, exits on): {by_class(figures, labels)}. The most frequent mistakes: {mistakes(figures, labels)}.

It knows its classes and nothing else: a picture of anything else is still put into one of them, sometimes with
confidence. It looks at {_looks_at(manifest.preprocess)}. {_optimism(report)}
"""


def _further_points(report: Mapping[str, Any]) -> list[list[str]]:
    """A row for each operating point beside the exits."""
    return [
        [
            f"{name}, {point}",
            *(percent(value) for value in figures["exit_rates"]),
            points(figures["loss_against_full_depth"]),
            f"{figures['mean_gmacs']:.4f}",
            percent(figures["compute_saved"]),
            "not timed",
        ]
        for name, further in report["points"].items()
        for point, figures in further.items()
    ]


def _thresholds(config: ExportConfig, report: Mapping[str, Any]) -> str:
    fitted = (
        f"The thresholds were fitted to lose at most {100 * config.exits.max_accuracy_drop:.2g} points on the\nfitting images."
    )
    bounds: dict[str, dict[str, str]] = report["bounds"]
    said = "\n".join(
        f"- {name}, {point}: {bound}." for name, points in bounds.items() for point, bound in points.items() if bound
    )
    if not said:
        return fitted
    if not report["certified_on"]["images"]:
        return f"{fitted}\n\n{said}"
    return f"""The thresholds were chosen among many, fitted on half of the images at hand, by what the
other half, {report["certified_on"]["images"]} images, proves of them (docs/risk-control.md):

{said}

This holds on average over images drawn like those; of other images, of single ones and of single classes it says nothing."""


def _optimism(report: Mapping[str, Any]) -> str:
    if report["certified_on"]["images"]:
        return "Nothing was fitted on the images\nthat the exits were certified on, nor on those of the tables above."
    return (
        "INT8 ranges\nand exits were fitted on the same images, so the loss allowed there is a little optimistic; the tables "
        "above are not: their\nimages took no part in it."
    )


def _stages(count: int) -> str:
    return "One stage" if count == 1 else f"{count} stages with an exit after each"


def _classes(labels: Sequence[str]) -> str:
    more = "" if len(labels) <= NAMED_CLASSES else ", …"
    return f"{len(labels)} classes: {', '.join(labels[:NAMED_CLASSES])}{more}"


def _looks_at(spec: PreprocessSpec) -> str:
    resized = f"made {spec.resize} pixels square" if spec.squash else f"with its shorter side made {spec.resize} pixels"
    return f"a picture {resized}, of which the central {spec.crop[0]} x {spec.crop[1]} count"


def _reduction(schedule: str, report: Mapping[str, Any]) -> str:
    if schedule == "none":
        return schedule
    full = report["without_reduction"]
    if not full:
        return f"`{schedule}`, before this version was made; what it loses is told in the card of the version it was made from"
    return (
        f"`{schedule}`; what is lost is told against fp32 without it, which has {percent(full['top1'])} "
        f"at {full['ms_per_image']:.2f} ms an image"
    )


def percent(value: float) -> str:
    """Of a share."""
    return f"{100 * value:.2f} %"


def points(loss: Mapping[str, float]) -> str:
    """A loss of accuracy with its 95 % interval."""
    return f"{100 * loss['top1'] + 0.0:.2f} ± {100 * loss['within']:.2f} points"


def milliseconds(times: Mapping[str, float]) -> str:
    """With exits, and what it would be without."""
    return f"{times['with_exits']:.2f} instead of {times['without_exits']:.2f}"


def by_class(figures: Mapping[str, Any], labels: Sequence[str]) -> str:
    """The accuracy of each class that had images; of the weakest alone where there are many."""
    classes: list[tuple[str, float]] = list(figures["top1_by_class"].items())
    said = "" if len(classes) <= NAMED_CLASSES else f"the {NAMED_CLASSES} weakest of {len(classes)}: "
    if said:
        classes = sorted(classes, key=lambda each: each[1])[:NAMED_CLASSES]
    return said + ", ".join(f"{labels[int(index)]} {percent(value)}" for index, value in classes)


def exits_cost_more(variants: Mapping[str, Any], allowed: float) -> str:
    """A sentence where leaving early costs surely more on the test images than on those it was fitted on; else nothing.

    Args:
        variants: of a report.
        allowed: share of right answers that exits were allowed to cost.
    """
    losses = {name: figures["operating_point"]["loss_against_full_depth"] for name, figures in variants.items()}
    more = [f"{name} {points(loss)}" for name, loss in losses.items() if loss["top1"] - loss["within"] > allowed]
    if not more:
        return ""
    return (
        f"On the test images exits cost more than the {100 * allowed:.2g} points allowed on the fitting images "
        f"({', '.join(more)}): the two are not alike. Fit on images like those that will be served, on more of them, or allow "
        "less (--max-drop)."
    )


def unlike_images(report: Mapping[str, Any]) -> str:
    """A sentence where the images to fit on and the test images differ by more than chance can make them; else nothing."""
    fitted, tested = report["fitted_on"], report["tested_on"]["images"]
    name, before = next(iter(fitted["top1"].items()))
    after = report["variants"][name]["top1_by_exit"][-1]
    together = (before * fitted["images"] + after * tested) / (fitted["images"] + tested)
    deviation = math.sqrt(together * (1 - together) * (1 / fitted["images"] + 1 / tested))
    if abs(before - after) <= max(DEVIATIONS * deviation, NOTABLE):
        return ""
    return (
        f"The network is right on {percent(before)} of the images to fit on and on {percent(after)} of the test images: "
        "the two are not alike, and what was fitted or proved on the one need not hold on the other. Fit on images like those "
        "that will be served."
    )


def mistakes(figures: Mapping[str, Any], labels: Sequence[str]) -> str:
    """Which class was taken for which, most frequent first."""
    found = [f"{labels[true]} taken for {labels[answered]} ({count} times)" for true, answered, count in figures["confusions"]]
    return ", ".join(found) or "none"


def _other_images(report: Mapping[str, Any], labels: Sequence[str]) -> str:
    if not report["other_images"]:
        return ""
    rows, texts = [], []
    for name, found in report["other_images"].items():
        for variant, figures in found["variants"].items():
            point = figures["operating_point"]
            rows.append([name, str(found["images"]), variant, percent(figures["top1_by_exit"][-1]), percent(point["top1"])])
        texts.append(f"{name}: {by_class(figures, labels)}. Mistakes: {mistakes(figures, labels)}.")
    table = _table(["images", "number", "variant", "last exit", "with exits on"], rows)
    return f"\n## Other images, none of them trained on or fitted on\n\n{table}\n\n" + "\n\n".join(texts) + "\n"


def _table(head: list[str], rows: list[list[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)
