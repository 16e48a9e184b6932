"""A graph as an ONNX file, written as a whole or not at all."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import torch

from features_cache.whole import replacing
from pipeline.errors import ModelFileError, first_line
from pipeline.exporting.graph import Classifier

INPUT = "pixels"
_LARGEST = 2**31 - 1
"""Bytes of one ONNX file: its length is a signed 32-bit number."""


def write_program(path: Path, graph: Classifier, metadata: Mapping[str, Any]) -> None:
    """Write a classifier for any number of images, with metadata as a JSON text for each key.

    Raises
    ------
    ModelFileError
        If the graph cannot be written as ONNX, or the file cannot be written.
    """
    program = _program(graph)
    program.model.metadata_props.update({name: json.dumps(part, ensure_ascii=False) for name, part in metadata.items()})
    try:
        with replacing(path) as draft:
            program.save(draft, external_data=False)
    except OSError as error:
        raise ModelFileError(f"cannot write the graph {path}: {error.strerror or error}") from error


def _program(graph: Classifier) -> torch.onnx.ONNXProgram:
    weight = sum(item.nbytes for item in graph.state_dict().values())
    if weight > _LARGEST:
        raise ModelFileError(
            f"an ONNX file holds at most 2 GiB, and this model has {weight / 2**30:.1f} GiB of weights"
        )
    try:
        program = torch.onnx.export(
            graph,
            (torch.zeros(2, *graph.network.size, 3, dtype=torch.uint8),),
            input_names=[INPUT],
            output_names=graph.outputs,
            dynamic_shapes={INPUT: {0: torch.export.Dim("n")}},
            dynamo=True,
            verbose=False,
        )
    except Exception as error:  # the exporter runs foreign code on symbols: it fails in as many ways as there are nets
        raise ModelFileError(f"this backbone cannot be written as ONNX: {first_line(error)}") from error
    return cast("torch.onnx.ONNXProgram", program)
