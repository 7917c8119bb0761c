"""Photos that left at each exit, with what was answered, and with the tokens that their patches ended in."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import onnx
from PIL import Image

from app.postprocess import softmax
from app.types import Array
from exporters.images import ImageSet
from exporters.receipt.measuring import Subject, leaves_at
from exporters.receipt.token_maps import DROPPED, owners
from models.manifest import PreprocessSpec

PER_EXIT = 4
SIDE = 224  # pixels of the shorter side that a picture has at least
BORDER = (255, 255, 255)  # between patches of different tokens
GONE = 0.25  # how bright a patch is that is in no token
JPEG_QUALITY = 85


@dataclass(frozen=True, slots=True)
class Example:
    """One photo; pictures are files in memory: JPEG, and PNG for the map, None where no tokens are reduced."""

    stage: int
    answer: str
    label: str  # "" where it has none
    confidence: float
    photo: bytes
    token_map: bytes | None
    num_tokens: int  # of the patches; 0 without a map

    @property
    def right(self) -> bool | None:
        return None if not self.label else self.answer == self.label


def find_examples(subject: Subject, images: ImageSet, labels: Sequence[str], *, labelled: bool) -> list[Example]:
    """Some that leave at each stage of the variant that is shown, evenly spread over the images.

    Args:
        subject: the version.
        images: as it was measured on.
        labels: the names of the classes.
        labelled: whether those images have labels.
    """
    variant, spec = subject.shown, subject.manifest.preprocess
    stages, answers = leaves_at(subject)
    entries = subject.manifest.entries
    found = []
    for stage, exit_ in enumerate(variant.exits):
        leaving = np.flatnonzero(stages == stage)
        if not len(leaving):
            continue
        chosen = leaving[np.linspace(0, len(leaving) - 1, min(PER_EXIT, len(leaving))).round().astype(np.int64)]
        first = max(entry for entry in entries if entry <= stage)
        graphs = [onnx.load(subject.directory / file) for file in variant.files[first : stage + 1]]
        into = owners(graphs, images.pixels[chosen])
        confidences = softmax(subject.logits[variant.name][stage][chosen], exit_.temperature).max(axis=1)
        for number, index in enumerate(chosen):
            photo = as_photo(images.pixels[index], spec)
            tokens = None if into is None else into[number]
            found.append(
                Example(
                    stage=stage,
                    answer=labels[int(answers[index])],
                    label=labels[int(images.labels[index])] if labelled else "",
                    confidence=float(confidences[number]),
                    photo=_file(_enlarged(photo), "JPEG"),
                    token_map=None if tokens is None else _file(draw_tokens(photo, tokens), "PNG"),
                    num_tokens=0 if tokens is None else len(np.unique(tokens[tokens != DROPPED])),
                )
            )
    return found


def as_photo(pixels: Array, spec: PreprocessSpec) -> Array:
    """What stage 0 takes of one image, as uint8 RGB (H, W, 3)."""
    if spec.layout == "uint8_nhwc":
        return pixels
    mean, std = (np.array(each, dtype=np.float32)[:, None, None] for each in (spec.mean, spec.std))
    scaled = (pixels * std + mean) / np.float32(spec.scale)
    photo: Array = np.clip(np.rint(scaled), 0, 255).astype(np.uint8).transpose(1, 2, 0)
    return photo


def draw_tokens(photo: Array, into: Array) -> Array:
    """Patches of one token in their mean colour, a line where the token changes; dropped patches are dark.

    Args:
        photo: uint8 (H, W, 3).
        into: the token of each patch, row by row, int64 (patches,); `DROPPED`: in none.

    Returns:
        uint8 (h, w, 3), at least `SIDE` pixels high and wide.
    """
    rows, columns = grid(photo.shape[0], photo.shape[1], len(into))
    cell = -(-SIDE // min(rows, columns))
    patches = np.asarray(Image.fromarray(photo).resize((columns, rows), Image.Resampling.BOX), dtype=np.float64)
    colours, tokens = patches.reshape(-1, 3).copy(), into.reshape(rows, columns)
    for token in np.unique(into):
        inside = into == token
        colours[inside] = colours[inside] * GONE if token == DROPPED else colours[inside].mean(axis=0)
    drawn = np.rint(colours).astype(np.uint8).reshape(rows, columns, 3).repeat(cell, axis=0).repeat(cell, axis=1)
    for row, column in np.argwhere(tokens[1:] != tokens[:-1]):
        drawn[(row + 1) * cell - 1 : (row + 1) * cell + 1, column * cell : (column + 1) * cell] = BORDER
    for row, column in np.argwhere(tokens[:, 1:] != tokens[:, :-1]):
        drawn[row * cell : (row + 1) * cell, (column + 1) * cell - 1 : (column + 1) * cell + 1] = BORDER
    return drawn


def grid(height: int, width: int, patches: int) -> tuple[int, int]:
    """Rows and columns of so many equal patches, as square as can be, of a picture.

    Raises:
        ValueError: there are none.
    """
    choices = [(rows, patches // rows) for rows in range(1, patches + 1) if patches % rows == 0]
    if not choices:
        raise ValueError(f"{patches} patches are no picture")
    return min(choices, key=lambda each: abs(np.log(each[0] * width / (each[1] * height))))


def _enlarged(photo: Array) -> Array:
    """Small pictures in whole multiples, each pixel a square; larger ones as they are."""
    times = max(1, -(-SIDE // min(photo.shape[:2])))
    return photo.repeat(times, axis=0).repeat(times, axis=1)


def _file(picture: Array, form: str) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(picture).save(buffer, form, **({"quality": JPEG_QUALITY} if form == "JPEG" else {"optimize": True}))
    return buffer.getvalue()
