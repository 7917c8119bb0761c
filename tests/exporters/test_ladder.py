"""Routes over several graphs: what they cost, which are worth having, and that what is promised of them holds."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from exporters.exit_fitting import NEVER
from exporters.ladder import ALWAYS, Answers, Route, answer, choose, pareto_row
from exporters.risk_control import PairedCounts

MS, TEMPERATURES, SCORE = [1.0, 2.0, 4.0], [1.0, 1.0, 1.0], "max_softmax"


def answers(count: int, seed: int) -> Answers:
    """Three graphs over four classes, each more often right than the one before; the reference is a little better still."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, 4, count)
    hardness = rng.exponential(1.0, count)
    shared = rng.normal(0, 1, (count, 4)) * hardness[:, None]
    logits = []
    for noise in (1.2, 0.6, 0.2, 0.0):
        own = rng.normal(0, 1, (count, 4)) * hardness[:, None] * noise
        logits.append((3.0 * np.eye(4)[labels] + shared + own).astype(np.float32))
    return Answers(logits[:3], logits[3].argmax(axis=1), labels)


def part(of: Answers, chosen: np.ndarray) -> Answers:
    return Answers([each[chosen] for each in of.logits], of.reference[chosen], of.labels[chosen])


def loss(route: Route, of: Answers) -> float:
    predicted = answer(route, of, TEMPERATURES, SCORE)
    return float((of.reference == of.labels).mean() - (predicted == of.labels).mean())


def test_a_row_begins_with_the_dearest_and_grows_faster_and_looser() -> None:
    """No route in it is beaten; what each is said to cost and lose is what it costs and loses."""
    found = answers(3000, seed=1)
    row = pareto_row(found, MS, TEMPERATURES, "accuracy", SCORE)

    assert (row[0].first, row[0].then) == (2, None)
    times, losses = [route.ms for route in row[1:]], [route.loss for route in row[1:]]
    assert times == sorted(times, reverse=True)
    assert losses == sorted(losses)
    assert {route.then for route in row} >= {None, 2}
    for route in row:
        assert route.counts.loss == pytest.approx(loss(route, found))
        if route.then is not None:
            gone_on = (found.logits[route.first].argmax(axis=1) != answer(route, found, TEMPERATURES, SCORE)).mean()
            assert MS[route.first] + gone_on * MS[route.then] <= route.ms + 1e-9


def test_a_route_is_an_operating_point_of_a_cascade() -> None:
    """Thresholds of every graph but the last: where nobody may leave, where all do, and where the sure ones do."""
    counts = PairedCounts(0, 0, 10)
    assert Route(2, None, ALWAYS, 4.0, counts, 0.0).thresholds(3) == (NEVER, NEVER)
    assert Route(1, None, ALWAYS, 2.0, counts, 0.0).thresholds(3) == (NEVER, ALWAYS)
    assert Route(0, 1, 0.7, 2.0, counts, 0.0).thresholds(3) == (0.7, ALWAYS)
    assert Route(0, 2, 0.7, 2.0, counts, 0.0).thresholds(3) == (0.7, NEVER)
    assert Route(1, 2, 0.7, 3.0, counts, 0.0).thresholds(3) == (NEVER, 0.7)


def test_what_is_proved_holds_as_often_as_it_says() -> None:
    """Against the reference, over 60 draws; more may be lost, faster routes are taken."""
    everything, delta = answers(60_000, seed=2), 0.1
    broken, times = dict.fromkeys((0.02, 0.05), 0), {0.02: [], 0.05: []}
    for seed in range(60):
        drawn = np.random.default_rng(200 + seed).choice(len(everything.labels), 2000, replace=False)
        fitting, apart = part(everything, drawn[:1000]), part(everything, drawn[1000:])
        row = pareto_row(fitting, MS, TEMPERATURES, "accuracy", SCORE)
        for epsilon in broken:
            found = choose(row, apart, TEMPERATURES, epsilon=epsilon, delta=delta)
            if found is not None:
                assert found.proved
                broken[epsilon] += loss(found.route, everything) > epsilon
                times[epsilon].append(found.route.ms)
    assert len(times[0.05]) > 50
    assert np.mean(times[0.05]) < np.mean(times[0.02])
    assert np.mean(times[0.05]) < MS[2]
    for count in broken.values():
        assert count <= stats.binom.ppf(0.999, 60, delta)


def test_without_images_set_apart_the_row_decides_and_nothing_is_proved() -> None:
    """The fastest that is expected to lose no more than allowed; none where all are expected to lose more."""
    fitting = answers(1000, seed=3)
    row = pareto_row(fitting, MS, TEMPERATURES, "accuracy", SCORE)

    found = choose(row, None, TEMPERATURES, epsilon=0.03, delta=0.1)

    assert found is not None
    assert not found.proved
    assert found.route.loss <= 0.03
    assert all(route.ms >= found.route.ms for route in row if route.loss <= 0.03)
    assert choose(row, None, TEMPERATURES, epsilon=-1.0, delta=0.1) is None


def test_the_best_of_many_routes_is_not_the_luckiest() -> None:
    """Few images: chosen by labels alone more is lost on others than was allowed; by the estimate hardly any more."""
    everything, epsilon = answers(60_000, seed=4), 0.02
    by_labels, by_estimate = [], []
    for seed in range(40):
        drawn = np.random.default_rng(seed).choice(len(everything.labels), 300, replace=False)
        row = pareto_row(part(everything, drawn), MS, TEMPERATURES, "accuracy", SCORE)
        lucky = min((route for route in row if route.counts.loss <= epsilon), key=lambda route: route.ms)
        found = choose(row, None, TEMPERATURES, epsilon=epsilon, delta=1.0)
        assert found is not None
        by_labels.append(loss(lucky, everything))
        by_estimate.append(loss(found.route, everything))
    beyond_by_labels, beyond_by_estimate = np.mean(by_labels) - epsilon, np.mean(by_estimate) - epsilon
    assert beyond_by_labels > 0.002
    assert beyond_by_estimate < beyond_by_labels / 4


def test_disagreement_has_no_noise() -> None:
    """It is what it is on the images."""
    found = answers(500, seed=5)
    for route in pareto_row(found, MS, TEMPERATURES, "disagreement", SCORE):
        assert route.loss == route.counts.loss
