"""Patches followed through reductions: by hand for each method, and against the sizes that Token Merging itself tracks."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
import torch

from exporters.golden import golden_images
from exporters.graph_writer import ReductionNote
from exporters.receipt.token_maps import DROPPED, destinations, owners, reductions_of
from exporters.reduction_schedule import ReductionSchedule, apply_schedule
from exporters.vit_export import stage_graphs
from models.manifest import PIXELS
from models.token_reduction import METHODS
from models.zoo import ZOO, create_model
from tests.exporters.receipt.graphs import with_outputs

SPEC = ZOO["test_vit"].preprocess


def note(method: str, patches: int, keep: int) -> ReductionNote:
    return ReductionNote(method, patches, keep, order="order", nearest="nearest")


def goes_to(method: str, patches: int, keep: int, order: list[int], nearest: list[int]) -> list[int]:
    tensors = {"order": np.array([order]), "nearest": np.array([nearest])}
    found: list[int] = destinations(note(method, patches, keep), tensors)[0].tolist()
    return found


def test_each_method_by_hand() -> None:
    """What the papers' figures show, with six patches of which few are left."""
    # Odd patches 1, 3, 5 look; the second and the first of them are merged into the even patches 4 and 0. The third stays and
    # comes first.
    assert goes_to("tome", 6, 4, order=[1, 0, 2], nearest=[0, 2, 1]) == [1, 1, 2, 3, 3, 0]
    # Two are kept, in the order of their scores; one token stands for the others.
    assert goes_to("evit", 6, 3, order=[4, 1, 0, 2, 3, 5], nearest=[]) == [2, 1, 2, 2, 0, 2]
    # Of those that are not kept each goes into the kept one that is most like it.
    assert goes_to("tps", 5, 2, order=[4, 1, 0, 2, 3], nearest=[1, 0, 1]) == [1, 1, 0, 1, 0]
    assert goes_to("top_k_norm", 4, 2, order=[3, 0], nearest=[]) == [1, DROPPED, DROPPED, 0]
    assert goes_to("token_pooling", 4, 2, order=[], nearest=[1, 1, 0, 1]) == [1, 1, 0, 1]
    with pytest.raises(ValueError, match="followed through 'magic'"):
        goes_to("magic", 4, 2, order=[3, 0], nearest=[])


def reduced(schedule: str) -> list[onnx.ModelProto]:
    torch.manual_seed(0)
    model = create_model("test_vit").eval()
    apply_schedule(model, ReductionSchedule.parse(schedule, model.config.depth, model.config.num_patches))
    return stage_graphs(model, SPEC)


def test_patches_are_where_token_merging_counts_them() -> None:
    """The sizes that the graph itself hands on from stage to stage are the numbers of patches in each token."""
    graphs = reduced("tome:2")
    pixels = golden_images(SPEC)
    for through in range(1, len(graphs)):
        found = owners(graphs[:through], pixels)
        assert found is not None
        (sizes,) = with_outputs(graphs[:through], {PIXELS: pixels}, [f"sizes_{through - 1}"])
        for image, counted in zip(found, sizes[:, 1:, 0], strict=True):  # behind the class token
            assert np.bincount(image, minlength=len(counted)).tolist() == counted.astype(int).tolist()


@pytest.mark.parametrize("method", sorted(METHODS))
def test_every_method_can_be_followed(method: str) -> None:
    """Through blocks and stages every patch ends in a token, or nowhere where patches are dropped; no token is left out."""
    graphs = reduced(f"{method}:4x2")
    keep = [note for graph in graphs for note in reductions_of(graph)][-1].keep

    found = owners(graphs, golden_images(SPEC))

    assert found is not None
    for image in found:
        tokens = np.unique(image[image != DROPPED])
        assert tokens.tolist() == list(range(keep))
        assert (DROPPED in image) == method.startswith("top_k")


def test_nothing_is_told_where_nothing_is_reduced() -> None:
    """No map is drawn then."""
    graphs = stage_graphs(create_model("test_vit").eval(), SPEC)
    assert [reductions_of(graph) for graph in graphs] == [[], [], []]
    assert owners(graphs, golden_images(SPEC)) is None
