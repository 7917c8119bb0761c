"""The graphs of a variant as files, weights that several of them have stored once."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import onnx
from onnx import TensorProto
from onnx.external_data_helper import set_external_data

SHARED_FILE = "shared.bin"
SMALLEST = 1024  # bytes of a tensor that is worth it
ALIGNMENT = 64  # of each tensor in the file, in bytes: a line of the cache


def write_stages(directory: Path, stages: Sequence[onnx.ModelProto]) -> None:
    """One file per stage, `stage_<k>.onnx`; large tensors that several stages have go into `SHARED_FILE`."""
    directory.mkdir()
    digests = [{name: _digest(tensor) for name, tensor in _large(stage).items()} for stage in stages]
    often = {digest for digest, count in Counter(d for each in digests for d in set(each.values())).items() if count > 1}
    places: dict[str, int] = {}
    with (directory / SHARED_FILE).open("wb") as shared:
        for index, (stage, digest_of) in enumerate(zip(stages, digests, strict=True)):
            copy = onnx.ModelProto()
            copy.CopyFrom(stage)
            for tensor in copy.graph.initializer:
                digest = digest_of.get(tensor.name)
                if digest not in often or digest is None:
                    continue
                if digest not in places:
                    shared.write(bytes(-shared.tell() % ALIGNMENT))
                    places[digest] = shared.tell()
                    shared.write(tensor.raw_data)
                set_external_data(tensor, SHARED_FILE, offset=places[digest], length=len(tensor.raw_data))
                tensor.ClearField("raw_data")
                tensor.data_location = TensorProto.EXTERNAL
            onnx.save(copy, directory / f"stage_{index}.onnx")
    if not places:
        (directory / SHARED_FILE).unlink()


def _large(stage: onnx.ModelProto) -> dict[str, TensorProto]:
    return {tensor.name: tensor for tensor in stage.graph.initializer if len(tensor.raw_data) >= SMALLEST}


def _digest(tensor: TensorProto) -> str:
    return hashlib.sha256(tensor.raw_data).hexdigest()
