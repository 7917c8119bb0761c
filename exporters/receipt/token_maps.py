"""Which token each patch of an image ends in: the reductions of the very graph that serves, followed from patch to token.

A graph tells which reductions it makes (`exporters.graph_writer.ReductionNote`). The tensors that these name become outputs of
a copy of it, so what is shown is what the served graph does, INT8 included.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence

import numpy as np
import onnx
import onnxruntime as ort

from app.runtime.ort_backend import session_options
from app.types import Array
from exporters.graph_writer import REDUCTIONS_KEY, ReductionNote
from models.manifest import PIXELS

DROPPED = -1


def reductions_of(graph: onnx.ModelProto) -> list[ReductionNote]:
    """What a graph tells of its reductions, in their order; none where it was written before graphs told."""
    told = {prop.key: prop.value for prop in graph.metadata_props}
    return [ReductionNote(**each) for each in json.loads(told.get(REDUCTIONS_KEY, "[]"))]


def owners(graphs: Sequence[onnx.ModelProto], pixels: Array) -> Array | None:
    """The token that each patch is in behind the last of these stages, int64 (N, patches); `DROPPED` where it is in none.

    Args:
        graphs: the first stages of one network.
        pixels: what the first takes, (N, ...).

    Returns:
        Tokens are numbered as behind the last stage, those in front of the patches left out; None where nothing is reduced.
    """
    notes = [reductions_of(graph) for graph in graphs]
    first = next((note for told in notes for note in told), None)
    if first is None:
        return None
    found = np.tile(np.arange(first.patches), (len(pixels), 1))
    values: dict[str, Array] = {PIXELS: pixels}
    for graph, told in zip(graphs, notes, strict=True):
        values = _run(graph, values, [name for note in told for name in (note.order, note.nearest) if name])
        for note in told:
            goes_to = destinations(note, values)
            found = np.where(found == DROPPED, DROPPED, np.take_along_axis(goes_to, np.maximum(found, 0), axis=1))
    return found


def destinations(note: ReductionNote, tensors: Mapping[str, Array]) -> Array:
    """Where each patch goes in one reduction, int64 (N, patches): a number below `note.keep`, or `DROPPED`.

    Args:
        note: the reduction; tensors: those that it names.

    Raises:
        ValueError: the method is not known.
    """
    if note.method == "token_pooling":
        return tensors[note.nearest]
    order = tensors[note.order]
    rank = np.full((len(order), note.patches), note.patches)  # beyond all, where the order does not have them
    np.put_along_axis(rank, order, np.arange(order.shape[1])[None], axis=1)
    goes_to: Array
    match note.method:
        case "top_k_attention" | "top_k_norm" | "dynamicvit":  # what they do not keep is gone
            goes_to = np.where(rank < note.keep, rank, DROPPED)
        case "evit":  # one token stands for all that are not kept
            goes_to = np.minimum(rank, note.keep - 1)
        case "tps":
            behind = np.clip(rank - note.keep, 0, note.patches - note.keep - 1)
            goes_to = np.where(rank < note.keep, rank, np.take_along_axis(tensors[note.nearest], behind, axis=1))
        case "tome" | "mctf":  # odd patches look, even ones are found; those that look and go nowhere come first
            num_looking, num_merged = note.patches // 2, note.patches - note.keep
            stay, rank = num_looking - num_merged, rank[:, :num_looking]
            goes_to = np.empty((len(order), note.patches), dtype=np.int64)
            goes_to[:, ::2] = stay + np.arange(note.patches - num_looking)
            goes_to[:, 1::2] = np.where(rank < num_merged, stay + tensors[note.nearest], rank - num_merged)
        case _:
            raise ValueError(f"no patch can be followed through {note.method!r}")
    return goes_to


def _run(graph: onnx.ModelProto, values: Mapping[str, Array], wanted: Sequence[str]) -> dict[str, Array]:
    """Its outputs, and these of its tensors."""
    copy = onnx.ModelProto()
    copy.CopyFrom(graph)
    there = {output.name for output in copy.graph.output}
    copy.graph.output.extend(onnx.ValueInfoProto(name=name) for name in dict.fromkeys(wanted) if name not in there)
    session = ort.InferenceSession(copy.SerializeToString(), session_options(1), providers=["CPUExecutionProvider"])
    names = [node.name for node in session.get_outputs()]
    taken = {node.name: values[node.name] for node in session.get_inputs()}
    return dict(zip(names, session.run(names, taken), strict=True))
