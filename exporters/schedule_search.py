"""A schedule of token reduction found for one network: where a token less costs least.

Greedy: of all blocks the one where some tokens fewer change the network's own answer least, for the multiply-adds it saves;
again and again until few enough are left. What a candidate costs is computed anew only when its turn comes (lazy greedy,
Minoux, 1978): the costs of other blocks rise little by what one block gave up.
"""

from __future__ import annotations

import heapq
import math

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

from app.types import Array
from exporters.calibration import spread
from exporters.config import SearchConfig
from exporters.progress import SILENT, Progress
from exporters.reduction_schedule import ReductionSchedule, ScheduleError, Wish, apply_schedule, check_method, clear_schedule
from exporters.schedule_threshold import schedule_by_threshold
from exporters.staging import stage_specs
from exporters.validation import normalised
from models.manifest import PreprocessSpec
from models.multi_exit import MultiExitViT


def find_schedule(
    model: MultiExitViT, pixels: Array, spec: PreprocessSpec, wish: Wish, config: SearchConfig, progress: Progress = SILENT
) -> ReductionSchedule:
    """By whichever way the wish asks for; see `search_schedule` and `exporters.schedule_threshold`."""
    find = search_schedule if wish.kind == "share" else schedule_by_threshold
    return find(model, pixels, spec, wish.method, wish.amount, config, progress)


def search_schedule(
    model: MultiExitViT,
    pixels: Array,
    spec: PreprocessSpec,
    method: str,
    share: float,
    config: SearchConfig,
    progress: Progress = SILENT,
) -> ReductionSchedule:
    """The schedule, which is not applied; the network is left as it came, without any.

    Args:
        pixels: (N, ...), what stage 0 takes; labels are not needed.
        share: of the multiply-adds that are to be left, in 0 .. 1.

    Raises:
        ScheduleError: the method cannot work in this network, or not go so far.
    """
    chosen = normalised(pixels[spread(len(pixels), config.num_images)], spec)
    step = max(1, model.config.num_patches // config.steps_of_all_tokens)
    check_method(model, method)
    full, reference = _gmacs(model, spec), _log_probabilities(model, chosen)

    def tried(removed: list[int]) -> tuple[float, float] | None:
        """Change of the answer, and multiply-adds; None where the network cannot follow."""
        try:
            # What a block no longer can give, since blocks before it gave more, it keeps.
            apply_schedule(model, ReductionSchedule(method, tuple(removed), up_to=True))
            return _change(reference, _log_probabilities(model, chosen)), _gmacs(model, spec)
        except ScheduleError:
            return None
        finally:
            clear_schedule(model)

    removed, change, gmacs = [0] * model.config.depth, 0.0, full
    waiting = [(-math.inf, number) for number in range(model.config.depth)]  # price when last computed, block
    heapq.heapify(waiting)
    bar = iter(progress.track(range(model.config.depth * config.steps_of_all_tokens), "searching a schedule"))
    while gmacs > share * full:
        next(bar, None)
        while True:
            if not waiting:
                reached, asked = (f"{100 * value:.0f} %" for value in (gmacs / full, share))
                raise ScheduleError(f"{method} leaves {reached} of the multiply-adds at least, not {asked}")
            _, block = heapq.heappop(waiting)
            found = tried([amount + step * (number == block) for number, amount in enumerate(removed)])
            if found is None or found[1] >= gmacs:
                continue  # never again: what is possible only shrinks
            price = (found[0] - change) / (gmacs - found[1])
            if not waiting or price <= waiting[0][0]:
                break
            heapq.heappush(waiting, (price, block))
        removed[block] += step
        change, gmacs = found
        heapq.heappush(waiting, (price, block))
    return ReductionSchedule(method, tuple(removed), up_to=True).settled(model.config.num_patches)


@torch.no_grad()
def _log_probabilities(model: MultiExitViT, pixels: Tensor) -> Tensor:
    return torch.cat([F.log_softmax(model(part)[-1], dim=1) for part in torch.split(pixels, 32)])


def _change(reference: Tensor, now: Tensor) -> float:
    """Kullback-Leibler divergence from the answer without reduction, nats an image."""
    return float(F.kl_div(now, reference, reduction="batchmean", log_target=True))


def _gmacs(model: MultiExitViT, spec: PreprocessSpec) -> float:
    return sum(stage.gmacs for stage in stage_specs(model, spec))
