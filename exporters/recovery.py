"""Recovering what token reduction lost, as a step of an export: photographs read, learned from, and told."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from app.runtime.cpu import has_bf16
from exporters.config import ExportConfig
from exporters.images import ImageSet, ImageSetError, read_unlabelled
from exporters.progress import SILENT, Progress
from exporters.sources.base import Network
from models.manifest import PreprocessSpec
from models.multi_exit import MultiExitViT
from models.training.recovery import Recovered, RecoveryConfig, recover

LARGER = 1.25  # than what the network sees: views are cut out
MAX_PHOTOS = 4000  # 235 kB each at 224 pixels


def photos_to_learn_from(
    config: ExportConfig, network: Network, progress: Progress = SILENT, *, of_a_search: bool = False
) -> ImageSet | None:
    """Images of anything, larger than the network sees them; None where none are named.

    Args:
        config: where they are.
        network: for its pixels.
        progress: told how far it is.
        of_a_search: what is served is chosen by the images to fit on, even if the network has no exit but its end.

    Raises:
        ImageSetError: there are too few, one is no image, or they are those that are to say how good the network is.
    """
    if config.recovery is None:
        return None
    check_photos(config, network, of_a_search=of_a_search)
    path, size = config.recovery, round(LARGER * network.model.config.image_size)
    larger = network.preprocess.model_copy(update={"resize": size, "crop": (size, size), "layout": "uint8_nhwc"})
    found = read_unlabelled(path, larger, progress, most=MAX_PHOTOS)
    if len(found) < (least := RecoveryConfig().min_photos):
        raise ImageSetError(f"{path.name}: {len(found)} photographs are too few to learn from; {least} or more are needed")
    return found


def check_photos(config: ExportConfig, network: Network, *, of_a_search: bool = False) -> None:
    """What can be known of the photographs before they are read; as `photos_to_learn_from`.

    Raises:
        ImageSetError: images that are to say how good the network is are among them.
    """
    if config.recovery is None:
        return
    kept = [config.test_images, *config.other_images.values()]
    if of_a_search or network.num_stages > 1:
        kept.append(config.calibration_images)
    photos = config.recovery.resolve()
    for path in (each.resolve() for each in kept):
        if path.is_relative_to(photos) or photos.is_relative_to(path):
            raise ImageSetError(
                f"{photos.name}: the network would know images of {path.name}, and they are to say how good it is"
            )


def recover_answers(
    model: MultiExitViT,
    former: MultiExitViT,
    photos: ImageSet,
    spec: PreprocessSpec,
    *,
    has_exits: bool = False,
    progress: Progress = SILENT,
) -> str:
    """Have a network with fewer tokens learn its former answers, in place; what came of it, in words.

    Args:
        model: with reduced tokens, or fewer from the start.
        former: the same before.
        photos: as `photos_to_learn_from` reads them.
        spec: of the network's pixels.
        has_exits: it came with heads, which learn too.
        progress: told how far it is.
    """
    settings = RecoveryConfig(bf16=has_bf16())
    mean, std = (torch.tensor(values).view(1, 3, 1, 1) for values in (spec.mean, spec.std))

    def normalise(x: Tensor) -> Tensor:
        return (x * spec.scale - mean) / std

    progress.step(f"learning the former answers from {len(photos)} photographs, {settings.epochs} times each")
    recovered = recover(
        model,
        former,
        np.asarray(photos.pixels),
        model.config.image_size,
        normalise,
        settings,
        progress.track,
        first_exit=0 if has_exits else len(model.stages) - 1,
    )
    said = in_words(recovered)
    progress.step(said)
    return (
        f"with fewer tokens it learned its former answers from {len(photos)} photographs (sha256 {photos.sha256[:16]}): {said}"
    )


def in_words(recovered: Recovered) -> str:
    """For the console and the card."""
    if not recovered.helped:
        return f"it did not help ({recovered.before:.4f} nats from its former answer on photographs held out): left as it was"
    return f"{recovered.after:.4f} nats from its former answer instead of {recovered.before:.4f}, on photographs held out"
