"""A saved model as one ONNX graph: from pixels to labels, with nothing of thawline needed to run it."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Sequence
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import cast

import torch
from torch import Tensor, nn

from pipeline.backbones.backbone import Backbone
from pipeline.backbones.graph import TappedNetwork, tap
from pipeline.backbones.registry import load
from pipeline.errors import ModelFileError
from pipeline.heads.linear_scores import LinearScores, linear_scores
from pipeline.heads.registry import find_head
from pipeline.heads.store import SavedModel, check_destination, load_model
from pipeline.results import ExportResult
from pipeline.spec import LayerSpec

INPUT = "pixels"
_LARGEST = 2**31 - 1
"""Bytes of one ONNX file: its length is a signed 32-bit number."""


def export(model: str | Path, path: str | Path) -> ExportResult:
    """Write a model and its backbone as one ONNX file.

    The graph takes ``pixels``, uint8 (n, height, width, 3): RGB images resized and cropped as the file's metadata says;
    normalisation is part of the graph. It gives ``label``, int64 (n,), ``scores``, float32 (n, K), whose largest is the
    label, and, where the head has them, ``probabilities``, float32 (n, K), calibrated as `predict` does. Numbers are
    float32 whatever the features were trained in. The metadata holds JSON: ``classes`` (K names,
    in the order of the scores), ``preprocessing`` (`pipeline.spec.Preprocessing`) and ``model`` (head, parameters,
    layers, test metrics, versions).

    Parameters
    ----------
    model : str or Path
        A file that ``fit --save`` wrote.
    path : str or Path
        The ``.onnx`` file to write; an existing one is replaced at once or not at all.

    Raises
    ------
    ModelFileError
        If the file is no model, its head is not linear, its layers are not of one backbone and pooling, the backbone
        has other weights by now or cannot be written as ONNX, or the file cannot be written.
    BackboneError
        If the backbone cannot be had.
    """
    if find_spec("onnxscript") is None:
        raise ModelFileError("ONNX files need two more packages: pip install 'thawline[onnx]'")
    path = check_destination(path)
    saved = load_model(model)
    linear = linear_scores(saved.head.partition("/")[0], saved.pipeline.named_steps["classifier"])
    specs = [LayerSpec.from_json(layer["spec"]) for layer in saved.layers]
    backbone = _backbone(saved, specs)
    network = tap(backbone, [spec.layer for spec in specs], specs[0].pool)
    classes = [saved.classes[number] for number in saved.pipeline.classes_]
    graph = _Classifier(network, linear, saved, half=specs[0].store == "float16")
    program = _program(graph, backbone.preprocessing.size)
    program.model.metadata_props.update(_metadata(saved, specs, classes))
    _write(path, program)
    return ExportResult(
        path=str(path),
        backbone=backbone.handle,
        layer="+".join(spec.layer for spec in specs),
        head=saved.head,
        classes=len(classes),
        inputs={INPUT: [None, *backbone.preprocessing.size, 3]},
        outputs=graph.outputs,
        bytes=path.stat().st_size,
    )


class _Classifier(nn.Module):
    """Network, scaling and hyperplanes, one after the other."""

    weights: Tensor
    bias: Tensor
    mean: Tensor
    deviation: Tensor

    def __init__(self, network: TappedNetwork, linear: LinearScores, saved: SavedModel, *, half: bool) -> None:
        super().__init__()
        head = find_head(saved.head)
        buffers = linear._asdict()
        if head.scaling == "standard":
            scaler = saved.pipeline.named_steps["scaler"]
            buffers |= {"mean": scaler.mean_, "deviation": scaler.scale_}
        for name, values in buffers.items():
            self.register_buffer(name, torch.tensor(values, dtype=torch.float32))
        self.network = network
        self.scaling = head.scaling
        self.half_features = half
        self.temperature = saved.temperature or 1.0
        self.outputs = ["label", "scores", *(["probabilities"] if head.family.probabilities else [])]
        self.eval()

    def forward(self, pixels: Tensor) -> tuple[Tensor, ...]:
        """Map uint8 (n, h, w, 3) to labels (n,), scores (n, K) and perhaps probabilities (n, K)."""
        features = torch.cat(self.network(pixels), 1)
        if self.half_features:
            features = features.half().float()  # as the cache rounded what the head was trained on
        scores = self._scaled(features) @ self.weights.T + self.bias
        found = scores.argmax(1), scores, (scores / self.temperature).softmax(1)
        return found[: len(self.outputs)]

    def _scaled(self, features: Tensor) -> Tensor:
        if self.scaling == "standard":
            return (features - self.mean) / self.deviation
        if self.scaling == "l2":
            length = features.norm(dim=1, keepdim=True)
            return features / torch.where(length == 0, 1.0, length)
        return features


def _backbone(saved: SavedModel, specs: Sequence[LayerSpec]) -> Backbone:
    """Load the one backbone of all layers; refuse another one than the head was trained on."""
    if len({(spec.backbone, spec.weights_digest, spec.pool, spec.preprocessing, spec.store) for spec in specs}) > 1:
        named = ", ".join(f"{spec.backbone} {spec.layer} ({spec.pool})" for spec in specs)
        raise ModelFileError(f"a graph takes layers of one backbone and pooling, got {named}; fit one of them")
    asked = saved.layers[0]["request"]
    backbone = load(asked["backbone"], asked["size"])
    if (backbone.weights_digest, backbone.preprocessing) != (specs[0].weights_digest, specs[0].preprocessing):
        raise ModelFileError(
            f"{backbone.handle} has other weights or another preprocessing here than when the model was trained; "
            "use the weights and versions it was trained with, or train it again"
        )
    return backbone


def _metadata(saved: SavedModel, specs: Sequence[LayerSpec], classes: Sequence[str]) -> dict[str, str]:
    description = {
        "head": saved.head,
        "params": saved.params,
        "layers": [spec.to_json() for spec in specs],
        "temperature": saved.temperature,
        "metrics": saved.metrics,
        "versions": saved.versions | {"torch": version("torch")},
    }
    preprocessing = specs[0].to_json()["preprocessing"]
    parts = {"classes": classes, "preprocessing": preprocessing, "model": description}
    return {name: json.dumps(part, ensure_ascii=False) for name, part in parts.items()}


def _program(graph: _Classifier, size: tuple[int, int]) -> torch.onnx.ONNXProgram:
    weight = sum(item.nbytes for item in graph.state_dict().values())
    if weight > _LARGEST:
        raise ModelFileError(
            f"an ONNX file holds at most 2 GiB, and this model has {weight / 2**30:.1f} GiB of weights"
        )
    try:
        program = torch.onnx.export(
            graph,
            (torch.zeros(2, *size, 3, dtype=torch.uint8),),
            input_names=[INPUT],
            output_names=graph.outputs,
            dynamic_shapes={INPUT: {0: torch.export.Dim("n")}},
            dynamo=True,
            verbose=False,
        )
    except Exception as error:  # the exporter runs foreign code on symbols: it fails in as many ways as there are nets
        lines = str(error).strip().splitlines() or [type(error).__name__]
        raise ModelFileError(f"this backbone cannot be written as ONNX: {lines[0][:200]}") from error
    return cast("torch.onnx.ONNXProgram", program)


def _write(path: Path, program: torch.onnx.ONNXProgram) -> None:
    """Write under a temporary name beside `path`, then rename."""
    try:
        with tempfile.TemporaryDirectory(dir=path.parent, prefix=".thawline-") as folder:
            draft = Path(folder) / path.name
            program.save(draft, external_data=False)
            draft.replace(path)
    except OSError as error:
        raise ModelFileError(f"cannot write the graph {path}: {error.strerror or error}") from error
