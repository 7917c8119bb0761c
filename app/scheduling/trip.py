"""A batch on one instance: its images are decoded, run through a stage, and those who are not sure go straight on.

All of it happens on the instance's thread, which then has what it needs in its cache, and the event loop hears only of those
who leave (docs/adr/0021). Survivors are batched anew where that is worth the way through a queue: where others wait, and the
batch has become so small that the fixed cost of a run weighs more.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from app.errors import DeadlineExceeded, InferenceFailed, ServiceError
from app.exits import ExitPolicy, with_answers
from app.log import get_logger
from app.scheduling.work import TOO_LATE, Undecoded, WorkItem
from app.types import Array, ExitInfo, PipelineResult, RunEnded, StageOutput, StageRun

log = get_logger(__name__)

MAX_JOINED_BYTES = 2**16  # of an image


@dataclass(eq=False, slots=True)
class Report:
    """What came of one step, for the event loop: of what is done before the first run (no stage), or of one run."""

    stage: int | None
    images: int = 0  # decoded, or run
    seconds: float = 0.0  # that took
    going_on: int = 0  # to another stage, on the trip or not
    answered: list[tuple[WorkItem, PipelineResult]] = field(default_factory=list)
    failed: list[tuple[WorkItem, Exception]] = field(default_factory=list)
    deferred: list[WorkItem] = field(default_factory=list)  # to be decoded elsewhere
    handed_on: list[tuple[WorkItem, int]] = field(default_factory=list)  # to the queue of a stage
    skipped: list[tuple[int, WorkItem]] = field(default_factory=list)  # not computed at a stage, since their callers had gone
    wasted: list[WorkItem] = field(default_factory=list)  # computed, all or in part, and their callers left meanwhile
    cut_short: bool = False  # the run, because all of them had left
    expired: list[tuple[int, WorkItem]] = field(default_factory=list)  # not computed at a stage, since it would end too late
    error: BaseException | None = None  # the run failed, and with it all who are in `failed`

    @property
    def departures(self) -> bool:
        """Somebody has left the batch, and waits for being told."""
        return bool(self.answered or self.failed or self.deferred or self.handed_on or self.expired)


@dataclass(frozen=True, slots=True)
class Rules:
    """By which the trips of a pipeline go; called on the instances' threads.

    Args:
        batch_sizes: most images in a run, by stage.
        next_stage: where an item goes that is to go on to this stage.
        compute_s: seconds that an image needs at least from a stage on, at its operating point and in a batch of so many.
        decode_s: seconds that decoding an image takes.
        goes_on: whether survivors, of whom this is one, go straight on to a stage, so many of them, or are batched anew.
        join: those who wait for a stage that so many go on to, and come along.
        report: tells the event loop, and returns at once.
    """

    policy: ExitPolicy
    input_name: str
    batch_sizes: Sequence[int]
    next_stage: Callable[[WorkItem, int], int]
    compute_s: Callable[[int, int, int], float]
    decode_s: Callable[[], float]
    goes_on: Callable[[int, WorkItem, int], bool]
    join: Callable[[int, int], list[WorkItem]]
    report: Callable[[Trip, list[Report]], None]


class Trip:
    """Of one batch, from the queue of one stage.

    Args:
        stage: the first.
        batch: its images; whoever is not `aboard` any more is none of ours.
    """

    def __init__(self, rules: Rules, stage: int, batch: Sequence[WorkItem]) -> None:
        self._rules = rules
        self._reports: list[Report] = []
        self.stage = stage
        self.aboard = list(batch)
        self.ended = False

    @property
    def abandoned(self) -> bool:
        """Nobody waits any more for the run it is in."""
        return all(item.abandoned for item in self.aboard)

    def go(self) -> Generator[StageRun, StageOutput, None]:
        """The runs it needs, one after the other; a run's error, thrown in, fails those aboard."""
        inputs: Mapping[str, Array] | None = None
        self._board()
        while self.aboard:
            batch = self.aboard
            report = Report(self.stage, len(batch))
            self._reports.append(report)
            try:
                started = time.perf_counter()
                for item in self.aboard:
                    item.queue_s.append(max(0.0, started - item.queued_at))
                output = yield self.stage, _stack(self.aboard) if inputs is None else inputs
                ended = time.perf_counter()
                report.seconds = ended - started
                for item in self.aboard:
                    item.compute_s.append(report.seconds)
                    item.queued_at = ended
                inputs = self._route(report, output)
            except RunEnded:
                report.seconds, report.cut_short, report.wasted = time.perf_counter() - started, True, batch
                self.aboard = []
            except Exception as error:
                log.exception("stage run failed", stage=self.stage, batch=len(self.aboard))
                self._break(report, error, batch)
            if self.aboard and report.departures:
                self._rules.report(self, self._reports)
                self._reports = []
        self.ended = True
        self._rules.report(self, self._reports)

    def stop(self, error: BaseException) -> None:
        """Fail those aboard, where the trip does not go on by itself."""
        log.error("stage run failed", stage=self.stage, batch=len(self.aboard), exc_info=error)
        report = Report(self.stage, len(self.aboard))
        self._reports.append(report)
        self._break(report, error, self.aboard)
        self.ended = True
        self._rules.report(self, self._reports)

    def _break(self, report: Report, error: BaseException, batch: Sequence[WorkItem]) -> None:
        failure = InferenceFailed(f"the model failed at stage {self.stage}; the image may be sent again")
        failure.__cause__ = error
        # Nobody can say whose rows they were: none of this batch is answered (docs/adr/0007: no second try), nor are those
        # who were about to come aboard.
        lost = dict.fromkeys([*batch, *self.aboard])
        self._reports[-1] = Report(report.stage, report.images, error=error, failed=[(item, failure) for item in lost])
        self.aboard = []

    def _board(self) -> None:
        """Whoever has gone, cannot be done in time, is no image, or takes too long to decode stays behind."""
        report, stage = Report(None), self.stage
        self._reports.append(report)
        if any(item.undecoded is not None for item in self.aboard):
            boarded = self._decoded(report)
        else:
            boarded = [item for item in self.aboard if not self._left(report, stage, item)]
        self.aboard = self._in_time(report, stage, boarded)  # decoding may have taken longer than it does as a rule
        if self.aboard and report.departures:
            self._rules.report(self, self._reports)
            self._reports = []

    def _decoded(self, report: Report) -> list[WorkItem]:
        """Of those aboard, one after the other: some may leave while others are decoded."""
        stage, decode_s = self.stage, self._rules.decode_s()
        needed = self._needed(stage, len(self.aboard))
        to_decode = sum(item.undecoded is not None for item in self.aboard)
        decoded = []
        for item in self.aboard:
            undecoded, ahead_s = item.undecoded, to_decode * decode_s
            to_decode -= undecoded is not None
            if self._left(report, stage, item):
                continue
            if time.perf_counter() + ahead_s + needed(item.point) > item.deadline:
                report.expired.append((stage, item))
            elif undecoded is None or self._decode(item, undecoded, report):
                decoded.append(item)
        return decoded

    def _decode(self, item: WorkItem, undecoded: Undecoded, report: Report) -> bool:
        started = time.perf_counter()
        try:
            pixels = undecoded.decode()
        except Exception as error:
            if not isinstance(error, ServiceError):
                log.exception("an image could not be decoded")
            report.failed.append((item, error))
            return False
        if pixels is None:
            report.deferred.append(item)
            return False
        item.decode_s = time.perf_counter() - started
        item.queued_at += item.decode_s  # so that its wait is for others
        item.inputs = {self._rules.input_name: pixels}
        item.undecoded = None
        report.images += 1
        report.seconds += item.decode_s
        return True

    def _route(self, report: Report, output: StageOutput) -> Mapping[str, Array] | None:
        """Answer who leaves. Of the others at most one group stays aboard: what its stage takes."""
        stage, rules, aboard = self.stage, self._rules, self.aboard
        policy = rules.policy
        if len(output.logits) != len(aboard):
            raise ValueError(f"a batch of {len(aboard)} came back as {len(output.logits)}")
        history = None
        if policy.patient:
            history = with_answers(np.array([item.history for item in aboard]), output.logits)
        with np.errstate(invalid="ignore"):  # rows that are not finite fail below, without a warning for the batch
            probabilities = policy.probabilities(stage, output.logits)
            leave, scores = policy.decide(stage, output.logits, [item.point for item in aboard], history, probabilities)
        finite: list[bool] = np.asarray(np.isfinite(output.logits).all(axis=-1)).tolist()
        leaving, confidence = leave.tolist(), scores.tolist()
        groups: dict[int, list[int]] = {}  # rows, by the stage they go on to
        for row, item in enumerate(aboard):
            if item.abandoned:
                report.wasted.append(item)
            elif not finite[row]:
                report.failed.append((item, InferenceFailed(f"the model gave no finite answer at stage {stage}")))
            elif leaving[row]:
                exit_ = ExitInfo(stage=stage, num_stages=policy.num_stages, confidence=confidence[row])
                result = PipelineResult(probabilities[row], exit_, tuple(item.queue_s), tuple(item.compute_s), item.decode_s)
                report.answered.append((item, result))
            else:
                if history is not None:
                    item.history = int(history[row, 0]), int(history[row, 1])
                groups.setdefault(rules.next_stage(item, stage + 1), []).append(row)
        if not groups:
            self.aboard = []
            return None
        report.going_on = sum(map(len, groups.values()))
        if any(len(value) != len(aboard) for value in output.state.values()):
            raise ValueError("the state has not as many rows as the batch")
        return self._go_on(report, output.state, groups)

    def _go_on(
        self, report: Report, state: Mapping[str, Array], groups: Mapping[int, Sequence[int]]
    ) -> Mapping[str, Array] | None:
        aboard, rules = self.aboard, self._rules
        stage, survivors = max(groups.items(), key=lambda group: len(group[1]))
        staying = survivors[: rules.batch_sizes[stage]]
        if not rules.goes_on(stage, aboard[staying[0]], len(staying)):
            staying = []
        for other, rows in groups.items():
            for row in rows[len(staying) if other == stage else 0 :]:
                aboard[row].inputs = {name: value[row] for name, value in state.items()}
                report.handed_on.append((aboard[row], other))
        if not staying:
            self.aboard = []
            return None
        on_board = self._in_time(report, stage, [aboard[row] for row in staying])
        waiting = rules.join(stage, len(on_board))
        self.aboard = [*aboard, *waiting]  # none is forgotten, should anything fail from here on
        joined = [item for item in waiting if not self._left(report, stage, item)]
        if joined:
            joined = self._in_time(report, stage, joined, len(staying))
        if len(on_board) == len(aboard) and not joined:
            self.stage, self.aboard = stage, aboard
            return state
        kept = staying if len(on_board) == len(staying) else [row for row in staying if aboard[row] in on_board]
        inputs = {name: value[kept] for name, value in state.items()}
        if joined:
            company = _stack(joined)
            inputs = {name: np.concatenate([value, company[name]]) for name, value in inputs.items()}
        self.stage, self.aboard = stage, on_board + joined
        return inputs

    def _left(self, report: Report, stage: int, item: WorkItem) -> bool:
        gone = item.abandoned  # asked once: it may change
        if gone:
            report.skipped.append((stage, item))
        return gone

    def _in_time(self, report: Report, stage: int, items: Sequence[WorkItem], images: int = 0) -> list[WorkItem]:
        """Those who can be done with a stage before their deadlines, in a batch of so many; unset: of themselves."""
        now, needed = time.perf_counter(), self._needed(stage, images or len(items))
        in_time = []
        for item in items:
            if now + needed(item.point) <= item.deadline:
                in_time.append(item)
            else:
                report.expired.append((stage, item))
        return in_time

    def _needed(self, stage: int, images: int) -> Callable[[int], float]:
        """What an image needs at least from a stage on, by its operating point: looked up once for a batch."""
        known: dict[int, float] = {}

        def needed(point: int) -> float:
            if point not in known:
                known[point] = self._rules.compute_s(stage, point, images)
            return known[point]

        return needed


def too_late() -> DeadlineExceeded:
    """What an image is told that was not begun."""
    return DeadlineExceeded(TOO_LATE)


def _stack(batch: Sequence[WorkItem]) -> dict[str, Array]:
    if len(batch) == 1:  # no copy: NumPy would give up the interpreter lock for it
        return {name: value[np.newaxis] for name, value in batch[0].inputs.items()}
    return {name: _joined([item.inputs[name] for item in batch]) for name in batch[0].inputs}


def _joined(rows: Sequence[Array]) -> Array:
    first = rows[0]
    if first.nbytes > MAX_JOINED_BYTES or not all(row.flags.c_contiguous for row in rows):
        return np.stack(rows)
    # As bytes: NumPy would give up the interpreter lock for each row, and to have it back takes longer than the copy.
    return np.frombuffer(b"".join([row.data for row in rows]), first.dtype).reshape(len(rows), *first.shape)
