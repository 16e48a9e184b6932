"""A saved model as one ONNX graph, from pixels to labels, that runs without thawline."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from pipeline.backbones.backbone import Backbone
from pipeline.backbones.network_file import TunedModel, describe_network, is_network_file
from pipeline.backbones.registry import load_backbone
from pipeline.backbones.taps import TappedNetwork, tap
from pipeline.errors import ModelFileError, first_cause, first_line
from pipeline.heads.registry import find_head
from pipeline.heads.saved import SavedModel, load_model
from pipeline.model_file import check_destination, writing
from pipeline.options import CLASSIFICATION, DEFAULT_HEADS, REGRESSION
from pipeline.provenance import installed_version
from pipeline.results import ExportResult
from pipeline.spec import LayerSpec, Size, json_fields

INPUT = "pixels"
_LARGEST = 2**31 - 1
"""Bytes of one ONNX file, because its length is a signed 32-bit number."""


def export(model: str | Path, path: str | Path) -> ExportResult:
    """Write a model and its backbone as one ONNX file.

    The graph takes ``pixels``, uint8 (n, height, width, 3): RGB images, resized and cropped as the metadata says; it
    normalises them itself. It gives ``label``, int64 (n,); ``scores``, float32 (n, K), whose largest is the label; and,
    if the model has them, ``probabilities``, float32 (n, K), calibrated as in `pipeline.predict.predict`. A model for
    several labels gives ``labels``, bool (n, K), instead of ``label``, and one for numbers only ``value``, float32
    (n,). The graph computes in float32, whatever the precision that the model was trained in.

    The metadata has three entries in JSON: ``classes`` (K names, in the order of the scores), ``preprocessing`` (a
    `pipeline.spec.Preprocessing`) and ``model`` (head, parameters, layers, temperature, test metrics, versions).

    Parameters
    ----------
    model : str or Path
        A saved head or fine-tuned network.
    path : str or Path
        The ``.onnx`` file to write; an existing file is replaced, and stays as it was after an error.

    Raises
    ------
    ModelFileError
        If the file is no model, its head is not linear or reads columns of a table, its layers are of several backbones
        or poolings, the backbone has other weights now or cannot be written as ONNX, or the file cannot be written.
    BackboneError
        If the backbone or its weights do not exist here.

    Examples
    --------
    >>> from pipeline.extract import extract
    >>> from pipeline.fit import fit
    >>> caches = extract("photos", layers=["blocks.1"], size=32)
    >>> report = fit("thawline-cache", save="model.skops")
    >>> result = export("model.skops", "model.onnx")
    >>> result.inputs, result.outputs
    ({'pixels': [None, 32, 32, 3]}, ['label', 'scores', 'probabilities'])
    """
    if find_spec("onnxscript") is None:
        raise ModelFileError("ONNX files need two more packages: pip install 'thawline[onnx]'")
    path = check_destination(path, ".onnx")
    parts = _network_parts(model) if is_network_file(model) else _head_parts(load_model(model))
    network = tap(parts.backbone, [spec.layer for spec in parts.specs], parts.specs[0].pool)
    graph = Predictor(network, parts.scores, parts.model, has_probabilities=parts.has_probabilities)
    program = onnx_program(graph, network.size, graph.outputs)
    metadata = {name: json.dumps(part, ensure_ascii=False) for name, part in _metadata(parts).items()}
    program.model.metadata_props.update(metadata)
    with writing(path) as draft:
        program.save(draft, external_data=False)
    return ExportResult(
        path=str(path),
        backbone=parts.backbone.handle,
        layer="+".join(spec.layer for spec in parts.specs),
        head=parts.head,
        classes=len(parts.classes),
        inputs={INPUT: [None, *network.size, 3]},
        outputs=graph.outputs,
        bytes=path.stat().st_size,
    )


@dataclass(frozen=True, eq=False)
class _Parts:
    """What a saved model consists of; `scores` maps the features of the layers of `specs`, joined, to class scores."""

    model: SavedModel | TunedModel
    backbone: Backbone
    specs: Sequence[LayerSpec]
    scores: nn.Module
    has_probabilities: bool
    head: str
    params: dict[str, Any]
    classes: Sequence[str]


def _head_parts(saved: SavedModel) -> _Parts:
    if saved.columns:
        named = ", ".join(column.name for column in saved.joined)
        raise ModelFileError(
            f"the model reads columns of a table ({named}) and cannot be exported: the graph takes images alone; "
            "fit a head without them"
        )
    specs = saved.specs
    scores = HeadScores(saved, half=specs[0].store == "float16")
    if len({(spec.backbone, spec.weights_digest, spec.pool, spec.preprocessing, spec.store) for spec in specs}) > 1:
        layers = ", ".join(f"{spec.backbone} {spec.layer} ({spec.pool})" for spec in specs)
        raise ModelFileError(
            f"ONNX export needs all layers to be of one backbone and pooling, got {layers}; fit a head on fewer layers"
        )
    request = saved.layers[0]["request"]
    backbone = _backbone(request["backbone"], request["size"], specs[0])
    classes = list(saved.classes)
    if saved.task == CLASSIFICATION:
        classes = [classes[number] for number in saved.pipeline.classes_]
    has_probabilities = find_head(saved.head, saved.task).family.probabilities
    return _Parts(saved, backbone, specs, scores, has_probabilities, saved.head, saved.params, classes)


def _network_parts(path: str | Path) -> _Parts:
    tuned = describe_network(path)
    backbone = _backbone(f"{tuned.scores.backbone}@{path}", None, tuned.scores)
    params = tuned.metrics["params"]
    return _Parts(tuned, backbone, [tuned.scores], nn.Identity(), True, tuned.top, params, tuned.classes)


def _backbone(name: str, size: Size | None, spec: LayerSpec) -> Backbone:
    """Load the backbone that a model was trained on; raise `ModelFileError` if it is another one here."""
    backbone = load_backbone(name, size)
    wanted = replace(
        spec.preprocessing, white=backbone.preprocessing.white
    )  # the graph takes pixels after this scaling
    here = backbone.weights_digest, backbone.preprocessing, backbone.heads(spec.layer)
    if here != (spec.weights_digest, wanted, spec.heads):
        raise ModelFileError(
            f"{backbone.handle} has other weights or another preprocessing here than when the model was trained; "
            "use the weights and versions it was trained with, or train it again"
        )
    return backbone


class Predictor(nn.Module):
    """A saved model as one module, in float32; `scores` maps the joined features (n, d) to scores (n, K)."""

    thresholds: Tensor

    def __init__(
        self, network: TappedNetwork, scores: nn.Module, model: SavedModel | TunedModel, *, has_probabilities: bool
    ) -> None:
        super().__init__()
        self.network, self.scores, self.task = network, scores, model.task
        self.temperature, self.has_probabilities = model.temperature or 1.0, has_probabilities
        answer = "label" if model.task == CLASSIFICATION else "labels"
        self.outputs = [answer, "scores", *(["probabilities"] if has_probabilities else [])]
        if model.task == REGRESSION:
            self.outputs = ["value"]
        self.register_buffer("thresholds", torch.tensor(model.thresholds or [], dtype=torch.float32))
        self.eval()

    def forward(self, pixels: Tensor) -> tuple[Tensor, ...]:
        """Map uint8 (n, h, w, 3) to `outputs`, see `export`."""
        scores = self.scores(torch.cat(self.network(pixels), 1))
        if self.task == REGRESSION:
            return (scores[:, 0],)
        if self.task == CLASSIFICATION:
            results = scores.argmax(1), scores, (scores / self.temperature).softmax(1)
        else:
            probabilities = scores.sigmoid()
            results = (probabilities if self.has_probabilities else scores) >= self.thresholds, scores, probabilities
        return results[: len(self.outputs)]


class HeadScores(nn.Module):
    """Scaling and hyperplanes of a linear scikit-learn head; `half` says that it was fitted on features in float16."""

    weights: Tensor
    bias: Tensor
    mean: Tensor
    deviation: Tensor

    def __init__(self, saved: SavedModel, *, half: bool) -> None:
        from sklearn.compose import ColumnTransformer
        from sklearn.preprocessing import Normalizer, StandardScaler

        super().__init__()
        family = find_head(saved.head, saved.task).family
        hyperplanes = family.hyperplanes(saved.pipeline.named_steps["classifier"])
        if hyperplanes is None:
            raise ModelFileError(
                f"only heads with one hyperplane per class can be exported, and {saved.head} has none; "
                f"fit another, such as {DEFAULT_HEADS[saved.task]}"
            )
        buffers = hyperplanes._asdict()
        scaler = saved.pipeline.named_steps.get("scaler")
        if isinstance(scaler, StandardScaler):
            buffers |= {"mean": scaler.mean_, "deviation": scaler.scale_}
        for name, values in buffers.items():
            self.register_buffer(name, torch.tensor(values, dtype=torch.float32))
        self.standardises = isinstance(scaler, StandardScaler)
        dims = [layer["dim"] for layer in saved.layers]
        self.normalised: list[int] = []  # how many features each part has that is brought to length 1 by itself
        if isinstance(scaler, ColumnTransformer):
            self.normalised = dims
        elif isinstance(scaler, Normalizer):
            self.normalised = [sum(dims)]
        self.half_features = half

    def forward(self, features: Tensor) -> Tensor:
        """Map features (n, d) to scores (n, K)."""
        if self.half_features:
            features = features.half().float()
        if self.standardises:
            features = (features - self.mean) / self.deviation
        elif self.normalised:
            parts = [part / _length(part) for part in torch.split(features, self.normalised, 1)]
            features = torch.cat(parts, 1) / len(parts) ** 0.5
        return features @ self.weights.T + self.bias


def _length(rows: Tensor) -> Tensor:
    """Return the length (n, 1) of each row, 1 for rows of zeros."""
    length = rows.norm(dim=1, keepdim=True)
    return torch.where(length == 0, 1.0, length)


def onnx_program(graph: nn.Module, size: tuple[int, int], outputs: list[str]) -> torch.onnx.ONNXProgram:
    """Return a module that maps images (n, height, width, 3) to `outputs` as ONNX, for any number of images.

    Raises `ModelFileError` if it has too many weights, operations that ONNX lacks, or comes out as no sound graph.
    """
    weight = sum(item.nbytes for item in graph.state_dict().values())
    if weight > _LARGEST:
        raise ModelFileError(
            f"an ONNX file holds at most 2 GiB, and this model has {weight / 2**30:.1f} GiB of weights; "
            "use a smaller backbone"
        )
    from onnx.checker import ValidationError, check_model

    try:
        program = torch.onnx.export(
            graph,
            (torch.zeros(2, *size, 3, dtype=torch.uint8),),
            input_names=[INPUT],
            output_names=outputs,
            dynamic_shapes=({0: torch.export.Dim("n")},),
            dynamo=True,
            verbose=False,
        )
    except Exception as error:  # the exporter runs the network's code on symbols, which can raise anything
        raise ModelFileError(f"this backbone cannot be written as ONNX: {first_line(first_cause(error))}") from error
    found = cast("torch.onnx.ONNXProgram", program)
    try:
        check_model(found.model_proto)
    except ValidationError as error:
        raise ModelFileError(
            f"this backbone cannot be written as ONNX: torch's exporter makes a damaged graph ({first_line(error)})"
        ) from error
    return found


def _metadata(parts: _Parts) -> dict[str, Any]:
    model = {
        "head": parts.head,
        "params": parts.params,
        "layers": [spec.to_json() for spec in parts.specs],
        "temperature": parts.model.temperature,
        "metrics": parts.model.metrics,
        "versions": parts.model.versions | {"torch": installed_version("torch")},
    }
    return {"classes": parts.classes, "preprocessing": json_fields(parts.specs[0].preprocessing), "model": model}
