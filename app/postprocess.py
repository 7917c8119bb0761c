"""From logits to labelled probabilities; pure NumPy."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from app.types import FloatArray, LabelScore

MAX_SORTED_HERE = 64  # classes


def softmax(logits: FloatArray, temperature: float = 1.0) -> FloatArray:
    """Probabilities over the last axis of logits / temperature, float32 of the same shape (Guo et al., ICML 2017)."""
    scaled = logits / np.float32(temperature)
    exponentials = np.exp(scaled - scaled.max(axis=-1, keepdims=True))
    probabilities: FloatArray = exponentials / exponentials.sum(axis=-1, keepdims=True)
    return probabilities


def top_k(probabilities: FloatArray, labels: Sequence[str], k: int) -> tuple[LabelScore, ...]:
    """The k likeliest classes, likeliest first; equal ones in the order of their index.

    Args:
        probabilities: float32 (C,).
        labels: one per class.
        k: 1 .. C.
    """
    if len(probabilities) > MAX_SORTED_HERE:
        order = np.argsort(-probabilities, kind="stable")[:k]
        pairs = [*zip(order.tolist(), probabilities[order].tolist(), strict=True)]
    else:
        # NumPy's sort gives up the interpreter lock, and to have it back takes longer than sorting a few numbers here.
        values = probabilities.tolist()
        pairs = [(index, values[index]) for index in sorted(range(len(values)), key=values.__getitem__, reverse=True)[:k]]
    return tuple([LabelScore(labels[index], index, probability) for index, probability in pairs])
