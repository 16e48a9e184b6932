"""Saved fine-tuned networks: a safetensors file with its description as JSON in the header.

Nothing in the file is executed, and using it needs no download: it holds all weights, the frozen ones too. The network
is ``NAME@FILE`` wherever a backbone is named; its class scores are its layer `TOP_LAYER`. Nothing here imports torch.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import safetensors
import safetensors.numpy
from numpy.typing import NDArray
from scipy.special import expit, softmax

from features_cache import parse_json
from pipeline.errors import ModelFileError
from pipeline.model_file import TASK_DEFAULTS, ModelFormat, fits_task, reading, writing
from pipeline.options import CLASSIFICATION, REGRESSION
from pipeline.spec import LayerSpec

FORMAT = ModelFormat(
    name="thawline-network",
    version=2,
    fields={
        "scores": dict,
        "top": str,
        "classes": list,
        "temperature": float | None,
        "metrics": dict,
        "versions": dict,
        "task": str,
        "thresholds": list | None,
    },
    libraries=("thawline", "torch", "torchvision", "timm"),
    remedy="fine-tune and save it again",
    defaults=TASK_DEFAULTS,
)
TOP_LAYER = "new_head"
"""Name of the layer that takes the place of the old classifier."""
_KEY = "thawline"

Tensors = Mapping[str, NDArray[Any]]


@dataclass(frozen=True)
class TunedModel:
    """The description of a fine-tuned network.

    `scores` is the layer of its class scores, with the digest of all weights and the precision to compute in; `top` is
    the kind of the new classifier. `temperature` calibrates the probabilities (see `pipeline.evaluation.calibration`),
    `metrics` is the network's result as JSON, and `versions` has the libraries it was made with. `task` and
    `thresholds` are as in `pipeline.heads.saved.SavedModel`.
    """

    scores: LayerSpec
    top: str
    classes: tuple[str, ...]
    temperature: float | None
    metrics: dict[str, Any]
    task: str = CLASSIFICATION
    thresholds: list[float] | None = None
    versions: dict[str, str] = field(default_factory=dict)

    @property
    def outputs(self) -> int:
        """How many numbers the network gives: one for each class or label, or a single one."""
        return 1 if self.task == REGRESSION else len(self.classes)

    def predict_values(self, scores: NDArray[np.floating[Any]]) -> NDArray[np.float64]:
        """Return the probabilities (n, K) of several labels, or numbers (n,), for scores (n, K or 1)."""
        found = scores.astype(np.float64)
        return found[:, 0] if self.task == REGRESSION else np.asarray(expit(found))

    def predict(self, scores: NDArray[np.floating[Any]]) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
        """Return labels (n,), indices into `classes`, and their calibrated probabilities (n,) for scores (n, K)."""
        if self.task != CLASSIFICATION:
            raise ModelFileError(f"the model is for task '{self.task}' and predicts no class; use predict_values")
        probabilities = np.asarray(softmax(scores.astype(np.float64) / (self.temperature or 1.0), axis=1))
        return scores.argmax(axis=1), probabilities.max(axis=1)


def is_network_file(path: str | Path) -> bool:
    """Tell whether the header of a file says that it is a fine-tuned network of thawline, even a damaged one."""
    try:
        return _KEY in _header(Path(path))
    except (OSError, safetensors.SafetensorError):
        return False


def describe_network(path: str | Path) -> TunedModel:
    """Read the description of a fine-tuned network, but not its weights.

    Raises `ModelFileError` if the file is missing, damaged, not a model of thawline, or of another version.
    """
    return _model(Path(path), _read_description(Path(path)))


def save_network(path: Path, model: TunedModel, tensors: Tensors) -> None:
    """Write a network to `path`; an existing file is replaced, and stays as it was after a `ModelFileError`.

    `tensors` are all weights up to what the old classifier read, by their names in the backbone, and those in
    `TOP_LAYER`.
    """
    fields = {name: getattr(model, name) for name in FORMAT.fields}
    fields |= {"scores": model.scores.to_json(), "classes": list(model.classes)}
    description = FORMAT.describe(fields, _content(tensors))
    with writing(path) as draft:
        safetensors.numpy.save_file(dict(tensors), draft, {_KEY: json.dumps(description, allow_nan=False)})


def load_network(path: Path) -> tuple[TunedModel, dict[str, NDArray[Any]]]:
    """Read description and weights; raises `ModelFileError` also if they were changed after they were saved."""
    description = _read_description(path)
    with reading(path):
        tensors = safetensors.numpy.load_file(path)
        FORMAT.check_digest(path, description, _content(tensors))
    return _model(path, description), tensors


def _header(path: Path) -> dict[str, str]:
    with safetensors.safe_open(path, "np") as file:
        return file.metadata() or {}


def _read_description(path: Path) -> dict[str, Any]:
    """Return the description, once format and version are checked."""
    with reading(path):
        description = parse_json(_header(path).get(_KEY, "null"))
    return FORMAT.check(path, description)


def _model(path: Path, description: Mapping[str, Any]) -> TunedModel:
    fields = FORMAT.read_fields(path, description)
    try:
        scores = LayerSpec.from_json(fields["scores"])
        if scores.layer != TOP_LAYER:
            raise ValueError(f"expected the layer {TOP_LAYER}, got {scores.layer:.40}")
    except ValueError as error:
        raise FORMAT.lacks(path, "scores") from error
    if not fits_task(fields):
        raise FORMAT.lacks(path, "task", "thresholds")
    return TunedModel(**fields | {"scores": scores, "classes": tuple(fields["classes"])})


def _content(tensors: Tensors) -> Iterator[bytes | memoryview]:
    """Yield what the digest covers besides the description: name, dtype, shape and bytes of every tensor."""
    for name, item in sorted(tensors.items()):
        yield f"{name}|{item.dtype}|{item.shape}|".encode()
        yield np.ascontiguousarray(item).reshape(-1).view(np.uint8).data
