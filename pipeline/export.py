"""A saved model as one ONNX graph: from pixels to labels, with nothing of thawline needed to run it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from torch import nn

from pipeline.backbones.backbone import Backbone
from pipeline.backbones.network_file import describe, is_network_file
from pipeline.backbones.registry import load
from pipeline.backbones.taps import tap
from pipeline.errors import ModelFileError
from pipeline.exporting.graph import Classifier, HeadScores
from pipeline.exporting.program import INPUT, write_program
from pipeline.heads.registry import find_head
from pipeline.heads.saved import SavedModel, check_destination, load_model
from pipeline.provenance import installed_version
from pipeline.results import ExportResult
from pipeline.spec import LayerSpec, json_fields


@dataclass(frozen=True, eq=False)
class _Parts:
    """What one file becomes: the graph, the backbone in it, and what its metadata and the result say."""

    graph: Classifier
    backbone: Backbone
    specs: Sequence[LayerSpec]
    head: str
    params: dict[str, Any]
    classes: Sequence[str]
    metrics: dict[str, Any]
    versions: dict[str, str]


def export(model: str | Path, path: str | Path) -> ExportResult:
    """Write a model and its backbone as one ONNX file.

    The graph takes ``pixels``, uint8 (n, height, width, 3): RGB images resized and cropped as the file's metadata says;
    normalisation is part of the graph. It gives ``label``, int64 (n,), ``scores``, float32 (n, K), whose largest is the
    label, and, where the model has them, ``probabilities``, float32 (n, K), calibrated as `predict` does. Numbers are
    float32 whatever the model was trained in. The metadata holds JSON: ``classes`` (K names, in the order of the
    scores), ``preprocessing`` (`pipeline.spec.Preprocessing`) and ``model`` (head, parameters, layers, temperature,
    test metrics, versions).

    Parameters
    ----------
    model : str or Path
        A file that ``fit --save`` or ``finetune --save`` wrote.
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
    parts = _network_parts(model) if is_network_file(model) else _head_parts(load_model(model))
    size = parts.backbone.preprocessing.size
    write_program(path, parts.graph, _metadata(parts))
    return ExportResult(
        path=str(path),
        backbone=parts.backbone.handle,
        layer="+".join(spec.layer for spec in parts.specs),
        head=parts.head,
        classes=len(parts.classes),
        inputs={INPUT: [None, *size, 3]},
        outputs=parts.graph.outputs,
        bytes=path.stat().st_size,
    )


def _head_parts(saved: SavedModel) -> _Parts:
    specs = [LayerSpec.from_json(layer["spec"]) for layer in saved.layers]
    scores = HeadScores(saved, half=specs[0].store == "float16")
    if len({(spec.backbone, spec.weights_digest, spec.pool, spec.preprocessing, spec.store) for spec in specs}) > 1:
        named = ", ".join(f"{spec.backbone} {spec.layer} ({spec.pool})" for spec in specs)
        raise ModelFileError(f"a graph takes layers of one backbone and pooling, got {named}; fit one of them")
    asked = saved.layers[0]["request"]
    backbone = _backbone(asked["backbone"], asked["size"], specs[0])
    network = tap(backbone, [spec.layer for spec in specs], specs[0].pool)
    graph = Classifier(network, scores, saved.temperature, probable=find_head(saved.head).family.probabilities)
    classes = [saved.classes[number] for number in saved.pipeline.classes_]
    return _Parts(graph, backbone, specs, saved.head, saved.params, classes, saved.metrics, saved.versions)


def _network_parts(path: str | Path) -> _Parts:
    model = describe(path)
    backbone = _backbone(f"{model.scores.backbone}@{path}", None, model.scores)
    network = tap(backbone, [model.scores.layer], model.scores.pool)
    graph = Classifier(network, nn.Identity(), model.temperature, probable=True)
    params = model.metrics["params"]
    return _Parts(graph, backbone, [model.scores], model.top, params, model.classes, model.metrics, model.versions)


def _backbone(name: str, size: int | None, spec: LayerSpec) -> Backbone:
    """Load a backbone; refuse another one than the model was trained on."""
    backbone = load(name, size)
    if (backbone.weights_digest, backbone.preprocessing) != (spec.weights_digest, spec.preprocessing):
        raise ModelFileError(
            f"{backbone.handle} has other weights or another preprocessing here than when the model was trained; "
            "use the weights and versions it was trained with, or train it again"
        )
    return backbone


def _metadata(parts: _Parts) -> dict[str, Any]:
    description = {
        "head": parts.head,
        "params": parts.params,
        "layers": [spec.to_json() for spec in parts.specs],
        "temperature": parts.graph.temperature,
        "metrics": parts.metrics,
        "versions": parts.versions | {"torch": installed_version("torch")},
    }
    preprocessing = json_fields(parts.backbone.preprocessing)
    return {"classes": parts.classes, "preprocessing": preprocessing, "model": description}
