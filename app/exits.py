"""The exit decision on logits: may an image leave after this stage? Pure NumPy, no asyncio, no ONNX Runtime."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import numpy.typing as npt

from app.postprocess import softmax
from app.types import FloatArray
from models.manifest import ExitSpec


def max_softmax(probabilities: FloatArray) -> FloatArray:
    """The largest probability, (B, C) -> (B,), in 1/C .. 1 (Hendrycks and Gimpel, ICLR 2017)."""
    score: FloatArray = probabilities.max(axis=-1)
    return score


def margin(probabilities: FloatArray) -> FloatArray:
    """The largest probability minus the second, (B, C) -> (B,), in 0 .. 1."""
    if probabilities.shape[-1] < 2:
        return np.ones(probabilities.shape[:-1], dtype=np.float32)
    two: FloatArray = np.partition(probabilities, -2, axis=-1)[..., -2:]
    score: FloatArray = two[..., 1] - two[..., 0]
    return score


def entropy(probabilities: FloatArray) -> FloatArray:
    """1 minus the normalised entropy, (B, C) -> (B,), in 0 .. 1: high is sure, as with the other scores.

    Source: Teerapittayanon et al., BranchyNet, ICPR 2016, where the entropy itself is compared.
    """
    classes = max(2, probabilities.shape[-1])
    terms = probabilities * np.log(np.maximum(probabilities, np.finfo(np.float32).tiny))
    score: FloatArray = (1 + terms.sum(axis=-1) / np.log(classes)).astype(np.float32)
    return score


PATIENCE = "patience"  # a score that needs to know what the exits before said: a `History`
History = npt.NDArray[np.int64]  # (B, 2): the class that the last exit gave, and how many exits in a row gave it


def no_history(count: int) -> History:
    """Of images that no exit has seen."""
    return np.tile(np.array([-1, 0]), (count, 1))


def with_answers(history: History, logits: FloatArray) -> History:
    """With what one more exit says, (B, C)."""
    answers = logits.argmax(axis=-1)
    return np.stack([answers, np.where(history[:, 0] == answers, history[:, 1] + 1, 1)], axis=1)


SCORES: dict[str, Callable[[FloatArray], FloatArray]] = {"max_softmax": max_softmax, "margin": margin, "entropy": entropy}


class ExitPolicy:
    """Decides by the scores, temperatures and thresholds fitted for one variant.

    Args:
        exits: one per stage.
        points: thresholds of each operating point, one per stage, None for "all leave"; unset: those of the exits, as the
            only point.
    """

    def __init__(self, exits: Sequence[ExitSpec], points: Sequence[Sequence[float | None]] | None = None) -> None:
        self._exits = tuple(exits)
        self.patient = any(exit_.score == PATIENCE for exit_ in exits)  # needs a history
        chosen = [[exit_.threshold for exit_ in exits]] if points is None else points
        # (stages, points); the comparison is in float32, as scores are
        self._thresholds = np.array(
            [[-np.inf if threshold is None else threshold for threshold in point] for point in chosen], dtype=np.float32
        ).T

    @property
    def num_stages(self) -> int:
        return len(self._exits)

    @property
    def num_points(self) -> int:
        return int(self._thresholds.shape[1])

    def jump(self, stage: int, entries: Sequence[int], point: int = 0) -> int:
        """Where an image that is to go to a stage really goes: past networks in which its operating point lets nobody leave.

        Args:
            stage: the next one.
            entries: stages that begin a network; one of them the first.
            point: the operating point.
        """
        passed = self._thresholds[:, point] > 1
        if stage not in entries or (self.patient and not passed[:-1].all()):  # who is passed over could not agree
            return stage
        return max(to for to in entries if to >= stage and passed[stage:to].all())

    def nobody_leaves(self, stage: int, point: int = 0) -> bool:
        """Whether no image is ever sure enough after this stage."""
        return bool(self._thresholds[stage, point] > 1)

    def way(self, entries: Sequence[int], point: int = 0) -> list[int]:
        """The stages that an image goes through that never is sure enough."""
        stages = [self.jump(0, entries, point)]
        while stages[-1] < self.num_stages - 1:
            stages.append(self.jump(stages[-1] + 1, entries, point))
        return stages

    def probabilities(self, stage: int, logits: FloatArray) -> FloatArray:
        """Calibrated probabilities of this exit, (..., C) -> (..., C)."""
        return softmax(logits, self._exits[stage].temperature)

    def decide(
        self,
        stage: int,
        logits: FloatArray,
        point: int | Sequence[int] = 0,
        history: History | None = None,
        probabilities: FloatArray | None = None,
    ) -> tuple[npt.NDArray[np.bool_], FloatArray]:
        """Which images leave after this stage.

        Args:
            stage: index from 0; from the last stage every image leaves.
            logits: float32 (B, C).
            point: the operating point of all images, or of each.
            history: with this exit's answers, where the policy is `patient`.
            probabilities: of these logits by this exit, where they are known already.

        Returns:
            leave: bool (B,); confidence: the exit's score, float32 (B,).

        Source of patience: Zhou et al., BERT Loses Patience, NeurIPS 2020; with the probability for those who agree alike.
        """
        spec = self._exits[stage]
        if probabilities is None:
            probabilities = self.probabilities(stage, logits)
        if spec.score != PATIENCE:
            confidence = SCORES[spec.score](probabilities)
        elif history is None:
            raise ValueError("patience is a matter of the exits before: a history is needed")
        else:
            confidence = ((history[:, 1] - 1 + max_softmax(probabilities)) / self.num_stages).astype(np.float32)
        leave: npt.NDArray[np.bool_] = np.asarray(confidence >= self._thresholds[stage, point])
        return leave, confidence
