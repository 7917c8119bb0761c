"""From a network and a budget to a served ladder: graphs with fewer tokens, timed on this machine, and the routes worth having.

Candidates (`exporters.candidates`) are tried family by family, in each from the dearest to the cheapest, until one loses far
more than may be lost. What is there already is not made again, so an interrupted search goes on. All candidates are timed in
turns. Of the routes over them (`exporters.ladder`) that keep the budget the fastest that loses at most what may be lost becomes
`balanced`, and the fastest within a larger loss `fast`; the network as it came is `full`. The version that is published has the
graphs that these need for stages.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np

from app.exits import ExitPolicy
from app.repository.store import ModelStore
from app.runtime.backend import Backend
from app.runtime.cpu import num_cpus
from app.runtime.ort_backend import OrtBackend
from app.types import Array, FloatArray
from exporters import recipe
from exporters.candidates import CANDIDATE, TRAINING, Trial, Workshop, default_patch_sizes
from exporters.certificate import LIMITS
from exporters.config import Chosen, ExportConfig, Tried
from exporters.evaluation import logits_per_exit
from exporters.exit_fitting import fit_temperature
from exporters.fitting import FAST
from exporters.images import ImageSet
from exporters.ladder import Answers, Found, Route, choose, pareto_row
from exporters.progress import SILENT, Progress
from exporters.published import one_thread
from exporters.recovery import photos_to_learn_from
from exporters.reduction_schedule import ScheduleError
from exporters.reporting import Images
from exporters.risk_control import Risk
from exporters.serving import parallel_speedup
from exporters.sources.base import Network, SourceError
from exporters.sources.cascade import CascadeSource, Part
from exporters.timing import cost_per_image, in_batches
from models.manifest import BALANCED, PIXELS, Certificate, ExitSpec, OperatingPoint

COMPARED_WITH = "the network as it came, in fp32"
METHOD = (
    "routes over graphs chosen on one half of the images; on the other half their row tested from the most faithful on, by an "
    "exact test, until one fails (Pareto testing in Learn then Test)"
)
HOPELESS = 4.0  # a candidate that loses so many times what may be lost at most ends its family: fewer tokens lose more
ONE_EXIT = (ExitSpec(score="max_softmax", temperature=1.0, threshold=None),)


@dataclass(frozen=True, slots=True)
class Search:
    """What is tried.

    shares: of the multiply-adds that are left, most first, by a method of token reduction; None: the one that changes answers
    least among those that suit the network. patch_sizes: in pixels, smallest first; None: such as suit the network.
    """

    method: str | None = None
    shares: tuple[float, ...] = (0.85, 0.75, 0.65)
    patch_sizes: tuple[int, ...] | None = None

    def families(self, network: Network, *, resizable: bool) -> list[list[Trial]]:
        """Each from the dearest to the cheapest: merging, larger patches, and both."""
        config, sizes = network.model.config, self.patch_sizes
        method = self.method or ("mctf" if config.num_prefix_tokens else "tome")
        if sizes is None:
            sizes = default_patch_sizes(config.image_size, config.patch_size) if resizable else ()
        merged = [f"{method}:{100 * share:g}%" for share in self.shares]
        both = [Trial(size, merged[0]) for size in sizes[:2] if merged]
        return [[Trial(reduction=each) for each in merged], [Trial(size) for size in sizes], both]


@dataclass(frozen=True, slots=True)
class Budget:
    """What `balanced` and `fast` must keep besides the loss; None: nothing.

    max_latency_ms: of an image alone, on one thread, through every graph that it may pass. target_throughput: images a second
    on all CPUs; then `balanced` is not the fastest but the most faithful that reaches it.
    """

    max_latency_ms: float | None = None
    target_throughput: float | None = None

    def __str__(self) -> str:
        said = [f"at most {self.max_latency_ms:g} ms for an image"] if self.max_latency_ms is not None else []
        said += [f"at least {self.target_throughput:g} images a second"] if self.target_throughput is not None else []
        return " and ".join(said)


@dataclass(frozen=True, slots=True)
class _Graph:
    """One graph, and its logits (N, C) for both images of the images."""

    part: Part
    trial: Trial
    full: bool  # the network as it came, in fp32
    backend: OrtBackend
    fitting: FloatArray
    apart: FloatArray | None

    def __str__(self) -> str:
        return f"{self.trial} ({self.part.variant})"


@dataclass(frozen=True, slots=True)
class _Timed:
    """A graph, and milliseconds of an image: in batches on one thread, and alone, where that was asked for."""

    graph: _Graph
    ms: float
    alone_ms: float


def optimize(
    config: ExportConfig, search: Search, work: Path, progress: Progress = SILENT, *, budget: Budget | None = None
) -> Path:
    """Search, and publish the ladder; the directory of the new version.

    Args:
        config: the network, the images, what may be lost, and where the version goes; without a reduction, in one stage.
        search: what is tried.
        work: where candidates are kept; the same folder again goes on with an interrupted search, or begins one with
            another budget.
        progress: told what is tried and what comes of it.
        budget: what must be kept besides.

    Raises:
        SourceError: the folder holds candidates made of something else, or nothing faster keeps what is to be kept.
        AlreadyPublished, ScheduleError, ImageSetError, WeightsError, ValidationError: as `exporters.recipe.run`.
    """
    recipe.check(replace(config, recovery=None))
    network = recipe.vit_of(config.source.load())
    if network.num_stages > 1:
        raise SourceError("a ladder is made of whole graphs: no --boundaries, and no network with exits of its own")
    progress.step("reading images")
    images = recipe.read_sets(config, network, progress, of_a_search=True)
    photos = photos_to_learn_from(config, network, progress, of_a_search=True)
    workshop = Workshop(config, work, images.fitting, progress, photos)
    graphs = _tried(config, search.families(network, resizable=workshop.resizable), workshop, images)
    return _publish(config, graphs, images, work, budget or Budget(), progress)


def _tried(config: ExportConfig, families: Sequence[Sequence[Trial]], workshop: Workshop, images: Images) -> list[_Graph]:
    """The graphs of the network as it came, then those of every candidate that is worth them."""
    progress = workshop.progress
    stored = workshop.make(Trial(), 1, lambda _: True)
    assert stored is not None  # noqa: S101 - it is worth it
    graphs = _graphs_of(workshop, Trial(), 1, images)
    reference = graphs[0].fitting.argmax(axis=1)
    labels = reference if config.unlabelled else images.fitting.labels
    most = HOPELESS * max(config.exits.max_accuracy_drop, config.fast_drop)

    def lost(logits: FloatArray) -> float:
        return float((reference == labels).mean() - (logits.argmax(axis=1) == labels).mean())

    number = 1
    for family in families:
        for place, trial in enumerate(family):
            try:
                made = workshop.make(trial, number + 1 + place, lambda logits: lost(logits) <= most)
            except ScheduleError as error:
                progress.step(f"this family ends here: {error}")
                break
            if made is None:
                progress.step(f"{trial} loses more than {100 * most:.3g} points in fp32: fewer tokens would lose more")
                break
            found = _graphs_of(workshop, trial, number + 1 + place, images)
            losses = ", ".join(f"{graph.part.variant} {100 * lost(graph.fitting):.2f}" for graph in found)
            progress.step(f"{trial}: points lost on {len(images.fitting)} images: {losses}")
            graphs += found
        number += len(family)
    return graphs


def _graphs_of(workshop: Workshop, trial: Trial, number: int, images: Images) -> list[_Graph]:
    """Every variant of a candidate; of the network as it came fp32 first."""
    stored, found = workshop.open(number), list[_Graph]()
    for variant in stored.manifest.variants:
        backend = OrtBackend(stored.directory, stored.manifest, variant.name, one_thread())
        fitting, apart = (
            None if each is None else logits_per_exit(backend, 1, each.pixels, workshop.progress)[0]
            for each in (images.fitting, images.apart)
        )
        assert fitting is not None  # noqa: S101 - there always are images to fit on
        full = trial.as_it_came and not found
        found.append(_Graph(Part(CANDIDATE, number, variant.name), trial, full, backend, fitting, apart))
    return found


def _publish(
    config: ExportConfig, graphs: Sequence[_Graph], images: Images, work: Path, budget: Budget, progress: Progress
) -> Path:
    timed = _times(graphs, images.fitting.pixels, budget, progress)
    ms, graphs = [each.ms for each in timed], [each.graph for each in timed]
    temperatures = [1.0 if config.unlabelled else fit_temperature(each.fitting, images.fitting.labels) for each in graphs]
    fitting = _answers([graph.fitting for graph in graphs], images.fitting, config)
    apart = None
    if images.apart is not None:
        apart = _answers([graph.apart for graph in graphs if graph.apart is not None], images.apart, config)
    risk: Risk = "disagreement" if config.unlabelled else "accuracy"
    score, last = config.exits.score, len(graphs) - 1
    delta = 1.0 if config.bound is None else config.bound.delta
    everything = pareto_row(fitting, ms, temperatures, risk, score)
    row = pareto_row(fitting, ms, temperatures, risk, score, allowed=_keeps(budget, timed, images.fitting.pixels))
    found: dict[str, Found] = {}
    for point, epsilon in _drops(config).items():
        # With a throughput to reach, `balanced` is the most faithful that does.
        tried = row[:1] if budget.target_throughput is not None and point == BALANCED else row
        chosen = choose(tried, apart, temperatures, epsilon=epsilon, delta=delta, risk=risk, score=score)
        if chosen is not None:
            found[point] = chosen
            progress.step(f"{point}: {_as_text(chosen, graphs)}, {ms[-1] / chosen.route.ms:.2f} times the network as it came")
    if BALANCED not in found or found[BALANCED].route.first == last:
        raise SourceError(_nothing(config, budget, everything, row, last))
    used = sorted({last, *(number for each in found.values() for number in _numbers(each.route))})
    measured = tuple(Tried(_ways(route, graphs), route.ms, route.loss) for route in everything)
    exits = replace(_chosen(config, found, used, temperatures, images, risk), tried=measured)
    source = CascadeSource(work, tuple(graphs[index].part for index in used))
    learned = _learned(work, [graphs[index] for index in used])
    config = config.having_learned(learned)
    return recipe.run(replace(config, source=source, int8=False, chosen=exits, receipt=True), progress, images=images)


def _times(graphs: Sequence[_Graph], pixels: Array, budget: Budget, progress: Progress) -> list[_Timed]:
    """All in turns; the cheapest first, the network as it came last, whatever it takes: it is what `full` means."""
    progress.step("timing all candidates in turns")
    policy = ExitPolicy(ONE_EXIT)
    costs = cost_per_image({number: in_batches(each.backend, 1, policy) for number, each in enumerate(graphs)}, pixels)
    alone = dict.fromkeys(costs, 0.0)
    if budget.max_latency_ms is not None:
        ways = {number: partial(_one_by_one, each.backend) for number, each in enumerate(graphs)}
        alone = {number: cost.ms for number, cost in cost_per_image(ways, pixels).items()}
    timed = [_Timed(graph, costs[number].ms, alone[number]) for number, graph in enumerate(graphs)]
    return sorted(timed, key=lambda each: (each.graph.full, each.ms))


def _one_by_one(backend: Backend, pixels: Array) -> None:
    for start in range(len(pixels)):
        backend.run(0, {PIXELS: pixels[start : start + 1]})


def _keeps(budget: Budget, timed: Sequence[_Timed], pixels: Array) -> Callable[[Route], bool]:
    """Whether a route is within the budget."""
    least_ms = np.inf
    if budget.target_throughput is not None:
        speedup = parallel_speedup(in_batches(timed[0].graph.backend, 1, ExitPolicy(ONE_EXIT)), pixels, num_cpus())
        least_ms = 1000 * speedup / budget.target_throughput

    def keeps(route: Route) -> bool:
        alone = sum(timed[number].alone_ms for number in _numbers(route))
        return route.ms <= least_ms and (budget.max_latency_ms is None or alone <= budget.max_latency_ms)

    return keeps


def _answers(logits: Sequence[FloatArray], images: ImageSet, config: ExportConfig) -> Answers:
    reference = logits[-1].argmax(axis=1)
    return Answers(logits, reference, reference if config.unlabelled else images.labels)


def _drops(config: ExportConfig) -> dict[str, float]:
    """What each operating point may lose."""
    drops = {BALANCED: config.exits.max_accuracy_drop}
    return drops if config.fast_drop <= drops[BALANCED] else drops | {FAST: config.fast_drop}


def _numbers(route: Route) -> tuple[int, ...]:
    return (route.first,) if route.then is None else (route.first, route.then)


def _ways(route: Route, graphs: Sequence[_Graph]) -> str:
    return " then ".join(str(graphs[number]) for number in _numbers(route))


def _learned(work: Path, graphs: Sequence[_Graph]) -> list[str]:
    """What the stages learned since the network came, for the card."""
    manifests = [ModelStore(work).open(each.part.name, each.part.version).manifest for each in graphs]
    told = [manifest.provenance.get(TRAINING) for manifest in manifests]
    return [f"stage {number}: {said}" for number, said in enumerate(told) if said is not None]


def _as_text(found: Found, graphs: Sequence[_Graph]) -> str:
    counts = found.counts
    proved = "proved" if found.proved else "measured"
    return (
        f"{_ways(found.route, graphs)}, {found.route.ms:.2f} ms an image, {100 * counts.loss:.2f} points lost on "
        f"{counts.images} images ({proved}), {100 * found.route.loss:.2f} expected on others"
    )


def _chosen(
    config: ExportConfig,
    found: dict[str, Found],
    used: Sequence[int],
    temperatures: Sequence[float],
    images: Images,
    risk: Risk,
) -> Chosen:
    """Exits, points and certificates of a version whose stages are the graphs that are used."""
    place = {index: number for number, index in enumerate(used)}
    drops = _drops(config)
    thresholds, certificates, bounds = {}, {}, {}
    for point, each in found.items():
        then = None if each.route.then is None else place[each.route.then]
        thresholds[point] = replace(each.route, first=place[each.route.first], then=then).thresholds(len(used))
        certificates[point] = _certificate(config, each, drops[point], images, risk)
        bounds[point] = str(certificates[point] or images.unproved)
    exits = [
        ExitSpec(score=config.exits.score, temperature=temperatures[index], threshold=threshold)
        for index, threshold in zip(used, (*thresholds[BALANCED], None), strict=True)
    ]
    points = [OperatingPoint(name=p, thresholds=thresholds[p], certificate=certificates[p]) for p in found if p != BALANCED]
    return Chosen(tuple(exits), certificates[BALANCED], tuple(points), bounds)


def _certificate(config: ExportConfig, found: Found, epsilon: float, images: Images, risk: Risk) -> Certificate | None:
    if not found.proved or images.apart is None or config.bound is None:
        return None
    return Certificate(
        risk=risk,
        compared_with=COMPARED_WITH,
        epsilon=epsilon,
        delta=config.bound.delta,
        images=len(images.apart),
        images_sha256=images.apart.sha256,
        method=METHOD,
        limits=LIMITS,
    )


def _nothing(config: ExportConfig, budget: Budget, everything: Sequence[Route], row: Sequence[Route], last: int) -> str:
    """Why no version is published, and what would be nearest."""
    faster, allowed = [route for route in everything if route.first != last], 100 * config.exits.max_accuracy_drop
    if str(budget) and not row:
        fastest = min(everything, key=lambda route: route.ms)
        return f"nothing keeps {budget}: the fastest takes {_in_words(fastest)}: ask for less, or try fewer tokens (--shares)"
    if budget.target_throughput is not None and row[0].first == last:
        return f"the network as it came keeps {budget} already: there is nothing to do"
    what = f"nothing faster than the network as it came keeps a loss of at most {allowed:.3g} points"
    kept = [route for route in row if route.first != last] if str(budget) else faster
    nearest = min(kept, key=lambda route: route.loss, default=None)
    if str(budget):
        what += f" and {budget}"
    if nearest is None:
        return f"{what}: no candidate is faster at all"
    return f"{what}; nearest is {_in_words(nearest)}: allow more (--max-drop), or bring more images"


def _in_words(route: Route) -> str:
    return f"{route.ms:.2f} ms an image at {100 * route.loss:.2f} points, as estimated from {route.counts.images} images"
