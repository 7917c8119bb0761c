"""The multi-exit network and the zoo: cut where it says, the same for the same seed."""

from __future__ import annotations

import pytest
import torch

from models.multi_exit import MultiExitViT, first_stages
from models.zoo import ZOO, create_model


@pytest.mark.parametrize("name", sorted(ZOO))
def test_every_zoo_entry_builds_and_gives_logits_at_every_exit(name: str) -> None:
    """Sizes, labels and preprocessing of an entry agree."""
    entry = ZOO[name]
    model = create_model(name).eval()

    logits = model(torch.zeros(2, 3, entry.config.image_size, entry.config.image_size))

    assert [(2, len(entry.labels))] * len(entry.boundaries) == [tuple(exit_.shape) for exit_ in logits]
    assert entry.preprocess.crop == (entry.config.image_size, entry.config.image_size)
    assert entry.boundaries[-1] == entry.config.depth


def test_stages_chained_by_hand_give_the_same_logits() -> None:
    """A stage needs nothing but the tokens of the one before."""
    model = create_model("test_vit").eval()
    x = torch.randn(3, 3, 32, 32)

    whole = model(x)
    for stage, expected in zip(model.stages, whole, strict=True):
        logits, x, _ = stage(x)
        torch.testing.assert_close(logits, expected)


def test_the_seed_decides_the_weights_and_leaves_the_global_generator_alone() -> None:
    """A session that exports a seeded network gets the same one every time."""
    torch.manual_seed(1)
    before = torch.random.get_rng_state()
    first, again, other = create_model("test_vit"), create_model("test_vit"), create_model("test_vit", seed=1)

    assert torch.equal(before, torch.random.get_rng_state())
    pairs = zip(first.parameters(), again.parameters(), other.parameters(), strict=True)
    same, different = zip(*((torch.equal(a, b), torch.equal(a, c)) for a, b, c in pairs), strict=True)
    assert all(same)
    assert not all(different)


@pytest.mark.parametrize("boundaries", [(2, 4), (0, 6), (4, 2, 6), (2, 2, 6), (2, 4, 7)])
def test_boundaries_that_do_not_end_at_the_depth_are_refused(boundaries: tuple[int, ...]) -> None:
    """Blocks behind the last exit would never be used."""
    with pytest.raises(ValueError, match="must rise and end at the depth"):
        MultiExitViT(ZOO["test_vit"].config, boundaries)


def test_unknown_name_is_refused_with_the_names_there_are() -> None:
    """The message helps to the right one."""
    with pytest.raises(ValueError, match="test_vit"):
        create_model("vit_enormous")


def test_the_first_stages_alone_say_what_they_said() -> None:
    """With the same weights, as a network of their own depth; as many as there are at most."""
    model = create_model("test_vit").eval()
    x = torch.randn(2, 3, 32, 32)
    for count in (1, 2, 3):
        part = first_stages(model, count)
        assert (len(part.stages), part.config.depth) == (count, model.boundaries[count - 1])
        with torch.no_grad():
            assert all(torch.equal(mine, theirs) for mine, theirs in zip(part(x), model(x), strict=False))
    with pytest.raises(ValueError, match="has 3 stages, not 4"):
        first_stages(model, 4)
