"""Candidates of a search: what they are compared with, and which patches are tried."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from exporters.candidates import Workshop, default_patch_sizes
from exporters.images import ImageSet
from exporters.progress import SILENT
from exporters.sensitivity import every_exit
from exporters.sources.timm_vit import TimmSource
from exporters.validation import ValueMismatch
from exporters.vit_export import ViTExport
from tests.checkpoints import LABELS, checkpoint, write_checkpoint
from tests.exporters.exporting import make_config


class Changed:
    """A network that answers otherwise for some images."""

    def __init__(self, exported: ViTExport, changed: slice) -> None:
        self.exported, self.changed, self.preprocess = exported, changed, exported.preprocess

    def answers(self, pixels: np.ndarray) -> list[np.ndarray]:
        (logits,) = self.exported.answers(pixels)
        logits[self.changed] += 0.2
        return [logits]


@pytest.mark.parametrize(
    ("changed", "reduced", "refused"),
    [(slice(0), False, False), (slice(1), True, False), (slice(1), False, True), (slice(None), True, True)],
)
def test_a_graph_must_be_the_network(tmp_path: Path, changed: slice, reduced: bool, refused: bool) -> None:
    """For every image; where tokens are reduced an image may have been torn between two patches, but not most."""
    network = TimmSource(*write_checkpoint(tmp_path, checkpoint()), LABELS).load()
    exported = ViTExport(network.model, network.preprocess)
    pixels = np.random.default_rng(0).integers(0, 256, (20, *network.preprocess.crop, 3), dtype=np.uint8)
    images = ImageSet(pixels, np.zeros(20, dtype=np.int64), "0" * 64)
    workshop = Workshop(make_config(tmp_path, tmp_path), tmp_path, images, SILENT)
    graphs = exported.graphs()
    assert len(every_exit(graphs, pixels)) == 1

    if refused:
        with pytest.raises(ValueMismatch, match=r"differ from the network's own by 0\.2"):
            workshop._compare(Changed(exported, changed), graphs, reduced=reduced)  # type: ignore[arg-type]
    else:
        workshop._compare(Changed(exported, changed), graphs, reduced=reduced)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("image", "patch", "sizes"), [(224, 16, (18, 20, 22)), (384, 16, (18, 20, 22)), (16, 4, (5,)), (32, 32, ())]
)
def test_larger_patches_leave_fewer_tokens(image: int, patch: int, sizes: tuple[int, ...]) -> None:
    """About three quarters, six tenths and half of them; of one patch nothing can be left."""
    assert default_patch_sizes(image, patch) == sizes
    assert all((image // size) ** 2 < (image // patch) ** 2 for size in sizes)
