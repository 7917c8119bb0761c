"""Which of several graphs of one network serves which operating point, alone or one behind another, and what is proved of it.

Every route is a choice: all images to one graph, or to a cheap one first and, where it is not sure enough, to a dearer one. The
images that exits are fitted on say what each costs and loses; those choices that are not beaten in both make a row, from the
most faithful to the fastest. That row is fixed before the images set apart are looked at, so it can be tested on them in its
order, and the last that keeps the promise is taken: Laufer-Goldshtein et al., Efficiently Controlling Multiple Risks with
Pareto Testing, ICLR 2023; the tests are those of `exporters.risk_control`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import combinations

import numpy as np

from app.exits import SCORES
from app.postprocess import softmax
from app.types import Array, FloatArray
from exporters.exit_fitting import NEVER
from exporters.risk_control import PairedCounts, Risk, last_safe, paired_counts

SHARES = np.linspace(0.05, 0.95, 19)  # of the images that leave at the first graph of two
BEYOND = 2.0  # the row ends where the images it was made of lose so many times what may be lost
ALWAYS = 0.0  # below every score: all leave here


@dataclass(frozen=True, slots=True)
class Answers:
    """What the graphs, cheapest first, and the reference say of some images.

    logits: of each graph, (N, C); reference: the class that the network as it came gives each, (N,); labels: (N,).
    """

    logits: Sequence[FloatArray]
    reference: Array
    labels: Array


@dataclass(frozen=True, slots=True)
class Route:
    """Graphs by their number, cheapest 0: `first`, and `then` for images whose score there is below the threshold.

    ms: mean time of an image. counts: against the reference, on the images that the route was chosen by. loss: as estimated
    from those for other images, a share.
    """

    first: int
    then: int | None
    threshold: float  # of the first; `ALWAYS` where nobody goes on
    ms: float
    counts: PairedCounts
    loss: float

    def thresholds(self, num_graphs: int) -> tuple[float, ...]:
        """Of every graph but the last, as an operating point of a version whose stages are the graphs."""
        found = [NEVER] * (num_graphs - 1)
        if self.first < num_graphs - 1:
            found[self.first] = self.threshold
        if self.then is not None and self.then < num_graphs - 1:
            found[self.then] = ALWAYS
        return tuple(found)


@dataclass(frozen=True, slots=True)
class Found:
    """The route for one operating point, whether its loss is proved, and on how many images."""

    route: Route
    proved: bool
    counts: PairedCounts  # on the images set apart where there are any, else on those it was chosen by


def pareto_row(
    answers: Answers,
    ms: Sequence[float],
    temperatures: Sequence[float],
    risk: Risk,
    score: str,
    *,
    allowed: Callable[[Route], bool] = lambda _: True,
) -> list[Route]:
    """All images to the dearest graph; then routes that no other beats in both time and loss, the fastest last.

    Args:
        answers: on the images that routes are chosen by.
        ms: time of an image in each graph, cheapest first.
        temperatures: of each graph's logits.
        risk: what counts as a loss.
        score: of `app.exits.SCORES`.
        allowed: of those alone.
    """
    labels = answers.labels if risk == "accuracy" else None
    predicted = [each.argmax(axis=1) for each in answers.logits]
    posterior = softmax(answers.logits[-1], temperatures[-1])

    def route(first: int, then: int | None, threshold: float, cost: float, given: Array) -> Route:
        counts = paired_counts(answers.reference, given, labels)
        return Route(first, then, threshold, cost, counts, _estimated(counts, posterior, answers.reference, given, risk))

    routes = [route(index, None, ALWAYS, float(ms[index]), predicted[index]) for index in range(len(ms))]
    for first, then in combinations(range(len(ms)), 2):
        scores = SCORES[score](softmax(answers.logits[first], temperatures[first]))
        for threshold in np.unique(np.quantile(scores, 1 - SHARES)):
            stays = scores < np.float32(threshold)
            both = np.where(stays, predicted[then], predicted[first])
            cost = float(ms[first]) + float(ms[then]) * float(stays.mean())
            routes.append(route(first, then, float(threshold), cost, both))
    row: list[Route] = []
    kept, dearest = [route for route in routes if allowed(route)], routes[len(ms) - 1]
    for way in sorted(kept, key=lambda each: (each.ms, each.loss)):
        if not row or way.loss < row[-1].loss:
            row.append(way)
    return [*([dearest] if dearest in kept else []), *(way for way in reversed(row) if way is not dearest)]


def _estimated(counts: PairedCounts, posterior: FloatArray, reference: Array, given: Array, risk: Risk) -> float:
    """The loss to be expected on other images: the mean of two estimates where labels are noisy.

    The labels of some hundred images say what is lost without bias, and with much chance: the best of many routes is one that
    was lucky. What the reference network gives its own answer more than the other, calibrated, varies far less, and is too
    severe where the other is right. (DeiT-Tiny and ViT-Tiny on 500 images: routes chosen for 0.5 points by labels alone lose
    0.9 on others, by the mean of both 0.3 and 0.0.)

    Args:
        counts: by labels; posterior: calibrated probabilities of the reference network, (N, C).
        reference, given: its classes, and the route's, (N,).
        risk: disagreement has no noise, and counts as it is.
    """
    if risk == "disagreement":
        return counts.loss
    rows = np.arange(len(reference))
    severe = float((posterior[rows, reference] - posterior[rows, given]).mean())
    return (counts.loss + severe) / 2


def answer(route: Route, answers: Answers, temperatures: Sequence[float], score: str) -> Array:
    """The class that a route gives each image, (N,)."""
    first = answers.logits[route.first]
    found: Array = first.argmax(axis=1)
    if route.then is None:
        return found
    sure = SCORES[score](softmax(first, temperatures[route.first])) >= np.float32(route.threshold)
    both: Array = np.where(sure, found, answers.logits[route.then].argmax(axis=1))
    return both


def choose(
    row: Sequence[Route],
    apart: Answers | None,
    temperatures: Sequence[float],
    *,
    epsilon: float,
    delta: float,
    risk: Risk = "accuracy",
    score: str = "max_softmax",
) -> Found | None:
    """The fastest route of a row that loses at most epsilon; None where there is none.

    Args:
        row: from `pareto_row`.
        apart: images that had no part in the row; None: the row's own figures decide, and nothing is proved.
        temperatures: of each graph's logits.
        epsilon: largest loss, a share of the images.
        delta: largest probability that the route taken loses more.
        risk: what counts as a loss.
        score: as the row was made with.
    """
    if apart is None:
        kept = [route for route in row if route.loss <= epsilon]
        return Found(kept[-1], False, kept[-1].counts) if kept else None
    within = [route for route in row if route.loss <= BEYOND * epsilon]
    labels = apart.labels if risk == "accuracy" else None
    counts = [paired_counts(apart.reference, answer(route, apart, temperatures, score), labels) for route in within]
    last = last_safe(counts, risk, epsilon, delta)
    return None if last is None else Found(within[last], True, counts[last])
