"""From a network and a budget to a served ladder: graphs with fewer tokens, timed on this machine, and the routes worth having.

Each share of the work is a candidate: the network with its tokens reduced to it, in INT8, exported beside the others. What is
there already is not made again, so an interrupted search goes on. All candidates are timed in turns. Of the routes over them
(`exporters.ladder`) the fastest that loses at most what may be lost becomes `balanced`, and the fastest within a larger loss
`fast`; the network as it came is `full`. The version that is published has the graphs that these need for stages.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from app.repository.store import ModelStore
from app.runtime.ort_backend import OrtBackend
from app.types import FloatArray
from exporters import recipe
from exporters.certificate import LIMITS
from exporters.config import Chosen, ExportConfig, Tried
from exporters.evaluation import logits_per_exit
from exporters.exit_fitting import fit_temperature
from exporters.fitting import FAST
from exporters.images import ImageSet
from exporters.ladder import Answers, Found, Route, choose, pareto_row
from exporters.progress import SILENT, Progress
from exporters.published import one_thread
from exporters.reduction_schedule import ScheduleError
from exporters.reporting import Images
from exporters.risk_control import Risk
from exporters.sources.base import SourceError
from exporters.sources.cascade import CascadeSource, Part
from exporters.timing import milliseconds_per_image
from models.manifest import BALANCED, Certificate, ExitSpec, OperatingPoint

CANDIDATE = "candidate"
COMPARED_WITH = "the network as it came, in fp32"
METHOD = (
    "routes over graphs chosen on one half of the images; on the other half their row tested from the most faithful on, by an "
    "exact test, until one fails (Pareto testing in Learn then Test)"
)
HOPELESS = 2.0  # a candidate that loses so many times what may be lost at most ends the search: fewer tokens lose more


@dataclass(frozen=True, slots=True)
class Search:
    """What is tried: shares of the multiply-adds that are left, most first, by a method of token reduction."""

    method: str = "tome"
    shares: tuple[float, ...] = (0.9, 0.8, 0.7, 0.6, 0.5)


@dataclass(frozen=True, slots=True)
class _Graph:
    """One graph, and its logits (N, C) for both images of the images."""

    part: Part
    as_it_came: bool  # all tokens, fp32
    backend: OrtBackend
    fitting: FloatArray
    apart: FloatArray | None


def optimize(config: ExportConfig, search: Search, work: Path, progress: Progress = SILENT) -> Path:
    """Search, and publish the ladder; the directory of the new version.

    Args:
        config: the network, the images, what may be lost, and where the version goes; without a reduction, in one stage.
        search: what is tried.
        work: where candidates are kept; the same folder again goes on with an interrupted search.
        progress: told what is tried and what comes of it.

    Raises:
        SourceError: the folder holds candidates of another search, or nothing faster keeps what is to be kept.
        AlreadyPublished, ScheduleError, ImageSetError, WeightsError, ValidationError: as `exporters.recipe.run`.
    """
    recipe.check(config)
    images = _read(config, progress)
    wishes = [None, *(f"{search.method}:{100 * share:g}%" for share in search.shares)]
    graphs: list[_Graph] = []
    for number, wish in enumerate(wishes, start=1):
        try:
            directory = _candidate(config, wish, number, work, progress)
        except ScheduleError as error:
            if number <= 2:  # not even the first
                raise
            progress.step(f"the search ends here: {error}")
            break
        graphs += _graphs_of(work, number, directory, images, progress)
        full = next(graph for graph in graphs if graph.as_it_came)
        lost = _loss(config, images, full, graphs[-1])
        progress.step(f"{wish or 'all tokens'}: loses {100 * lost:.2f} points on {len(images.fitting)} images")
        if number > 1 and lost > HOPELESS * max(config.exits.max_accuracy_drop, config.fast_drop):
            progress.step("fewer tokens would lose more: the search ends here")
            break
    return _publish(config, graphs, images, work, progress)


def _read(config: ExportConfig, progress: Progress) -> Images:
    """As the candidates' own exports divide the images."""
    network = config.source.load()
    if network.num_stages > 1:
        raise SourceError("a ladder is made of whole graphs: no --boundaries, and no network with exits of its own")
    return recipe.read_sets(replace(config, candidate=True), network, progress)


def _candidate(config: ExportConfig, wish: str | None, number: int, work: Path, progress: Progress) -> Path:
    """Exported now, or found as an earlier search left it."""
    wanted = replace(
        config,
        name=CANDIDATE,
        version=number,
        repository=work,
        reduction=wish,
        candidate=True,
        quantization=replace(config.quantization, min_agreement=0.0, max_accuracy_drop=1.0),  # the search sees what it costs
        command=f"{config.command} ({wish or 'all tokens'})",
    )
    directory = work / CANDIDATE / str(number)
    if not directory.exists():
        progress.step(f"candidate {number}: {wish or 'all tokens'}")
        return recipe.run(wanted, progress)
    told = ModelStore(work).open(CANDIDATE, number).manifest.provenance
    if (told["command"], told["weights_sha256"]) != (wanted.command, config.source.load().weights_sha256):
        raise SourceError(f"{work} holds candidates of another search; name another folder")
    return directory


def _graphs_of(work: Path, number: int, directory: Path, images: Images, progress: Progress) -> list[_Graph]:
    """INT8 where there is one; of the network as it came, the first candidate, fp32 before it."""
    manifest = ModelStore(work).open(CANDIDATE, number).manifest
    first, last = manifest.variants[0].name, manifest.variants[-1].name
    found = []
    for name in dict.fromkeys([first, last] if number == 1 else [last]):
        backend = OrtBackend(directory, manifest, name, one_thread())
        logits = [
            None if each is None else logits_per_exit(backend, 1, each.pixels, progress)[0]
            for each in (images.fitting, images.apart)
        ]
        assert logits[0] is not None  # noqa: S101 - there always are images to fit on
        found.append(_Graph(Part(CANDIDATE, number, name), number == 1 and name == first, backend, logits[0], logits[1]))
    return found


def _loss(config: ExportConfig, images: Images, full: _Graph, graph: _Graph) -> float:
    """Against the network as it came, on the images that are fitted on, a share."""
    reference = full.fitting.argmax(axis=1)
    labels = reference if config.unlabelled else images.fitting.labels
    return float((reference == labels).mean() - (graph.fitting.argmax(axis=1) == labels).mean())


def _publish(config: ExportConfig, graphs: Sequence[_Graph], images: Images, work: Path, progress: Progress) -> Path:
    progress.step("timing all candidates in turns")
    one_exit = (ExitSpec(score="max_softmax", temperature=1.0, threshold=None),)
    backends = {str(index): graph.backend for index, graph in enumerate(graphs)}
    times = milliseconds_per_image(backends, dict.fromkeys(backends, one_exit), images.fitting.pixels)
    # Cheapest first; the network as it came last, whatever it takes: it is what `full` means.
    timed = sorted(
        ((times[str(index)]["without_exits"], graph) for index, graph in enumerate(graphs)),
        key=lambda each: (each[1].as_it_came, each[0]),
    )
    ms, graphs = [each[0] for each in timed], [each[1] for each in timed]
    temperatures = [1.0 if config.unlabelled else fit_temperature(each.fitting, images.fitting.labels) for each in graphs]
    fitting = _answers([graph.fitting for graph in graphs], images.fitting, config)
    apart = None
    if images.apart is not None:
        apart = _answers([graph.apart for graph in graphs if graph.apart is not None], images.apart, config)
    risk: Risk = "disagreement" if config.unlabelled else "accuracy"
    score = config.exits.score
    row = pareto_row(fitting, ms, temperatures, risk, score)
    delta = 1.0 if config.bound is None else config.bound.delta
    found: dict[str, Found] = {}
    for point, epsilon in _drops(config).items():
        chosen = choose(row, apart, temperatures, epsilon=epsilon, delta=delta, risk=risk, score=score)
        if chosen is not None:
            found[point] = chosen
            progress.step(f"{point}: {_as_text(chosen, graphs)}, {ms[-1] / chosen.route.ms:.2f} times the network as it came")
    last = len(graphs) - 1
    if BALANCED not in found or found[BALANCED].route.first == last:
        raise SourceError(_nothing(config, row, last))
    used = sorted({last, *(number for each in found.values() for number in _numbers(each.route))})
    tried = tuple(Tried(_ways(route, graphs), route.ms, route.counts.loss) for route in row)
    exits = replace(_chosen(config, found, used, temperatures, images, risk), tried=tried)
    source = CascadeSource(work, tuple(graphs[index].part for index in used))
    return recipe.run(replace(config, source=source, int8=False, chosen=exits, receipt=True), progress)


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
    return " then ".join(
        f"candidate {graphs[number].part.version} ({graphs[number].part.variant})" for number in _numbers(route)
    )


def _as_text(found: Found, graphs: Sequence[_Graph]) -> str:
    names = _ways(found.route, graphs)
    counts = found.counts
    proved = "proved" if found.proved else "measured"
    return (
        f"{names}, {found.route.ms:.2f} ms an image, {100 * counts.loss:.2f} points lost on {counts.images} images ({proved})"
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


def _nothing(config: ExportConfig, row: Sequence[Route], last: int) -> str:
    allowed = config.exits.max_accuracy_drop
    faster = [route for route in row if route.first != last]
    nearest = min(faster, key=lambda route: route.counts.loss, default=None)
    what = f"nothing faster than the network as it came keeps a loss of at most {100 * allowed:.3g} points"
    if nearest is None:
        return f"{what}: no candidate is faster at all"
    return (
        f"{what}; nearest is {nearest.ms:.2f} ms an image at {100 * nearest.counts.loss:.2f} points on "
        f"{nearest.counts.images} images: allow more (--max-drop), or bring more images"
    )
