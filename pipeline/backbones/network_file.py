"""A fine-tuned network as one file: safetensors, with its description as JSON in the header.

Nothing in the file is executed, and no download is needed to use it: it holds every weight, the frozen ones too. The
network is ``NAME@FILE`` wherever a backbone is named; its class scores are its layer `HEAD`. Nothing here needs torch.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import safetensors
import safetensors.numpy
from numpy.typing import NDArray
from scipy.special import softmax

from features_cache.whole import replacing
from pipeline.errors import ModelFileError
from pipeline.provenance import installed_version
from pipeline.spec import LayerSpec, canonical_json

FORMAT = "thawline-network"
VERSION = 2
HEAD = "new_head"
"""Name of the layer that stands where the old classifier was."""
_KEY = "thawline"
_FIELDS: dict[str, Any] = {
    "scores": dict,
    "top": str,
    "classes": list,
    "temperature": float | None,
    "metrics": dict,
    "versions": dict,
}
_LIBRARIES = ("thawline", "torch", "torchvision", "timm")

Tensors = Mapping[str, NDArray[Any]]


@dataclass(frozen=True)
class TunedModel:
    """What a file says about its network.

    Parameters
    ----------
    scores : LayerSpec
        Of the class scores: backbone, digest of all weights, preprocessing, and the precision to compute in.
    top : str
        What replaced the classifier, see `pipeline.backbones.top.make_top`.
    classes : tuple of str
        Class names by number, K of them.
    temperature : float or None
        What calibrates its probabilities, see `pipeline.evaluation.calibration`; ``None`` leaves them as they are.
    metrics : dict
        The `FinetuneResult` of the network, as JSON.
    versions : dict of str to str
        Libraries it was made with; filled in where it is saved.
    """

    scores: LayerSpec
    top: str
    classes: tuple[str, ...]
    temperature: float | None
    metrics: dict[str, Any]
    versions: dict[str, str]

    def predict(self, scores: NDArray[np.floating[Any]]) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
        """Return labels (n,), numbers of `classes`, and their calibrated probabilities (n,) for class scores (n, K)."""
        probabilities = np.asarray(softmax(scores.astype(np.float64) / (self.temperature or 1.0), axis=1))
        return scores.argmax(axis=1), probabilities.max(axis=1)


def is_network_file(path: str | Path) -> bool:
    """Tell by its header whether a file holds a fine-tuned network of ours, whole or not."""
    try:
        return _KEY in _header(Path(path))
    except (OSError, safetensors.SafetensorError):
        return False


def describe(path: str | Path) -> TunedModel:
    """Read the description of a fine-tuned network, and not its weights.

    Raises
    ------
    ModelFileError
        If the file is missing, damaged, not of thawline, or of another version.
    """
    path = Path(path)
    return _model(path, _described(path))


def save_network(path: Path, model: TunedModel, tensors: Tensors) -> None:
    """Write a network, in place of what stands at `path`, as a whole or not at all.

    Parameters
    ----------
    path : Path
    model : TunedModel
    tensors : mapping of str to array
        All weights up to what the old classifier read, by their names in the backbone, and those in `HEAD`.

    Raises
    ------
    ModelFileError
        If the file cannot be written.
    """
    description: dict[str, Any] = {
        "format": FORMAT,
        "version": VERSION,
        **{name: getattr(model, name) for name in _FIELDS},
        "scores": model.scores.to_json(),
        "classes": list(model.classes),
        "versions": {name: installed_version(name) for name in _LIBRARIES},
    }
    description["digest"] = _digest(description, tensors)
    try:
        with replacing(path) as draft:
            safetensors.numpy.save_file(dict(tensors), draft, {_KEY: json.dumps(description, allow_nan=False)})
    except (OSError, safetensors.SafetensorError) as error:
        raise ModelFileError(f"cannot write the model {path}: {getattr(error, 'strerror', None) or error}") from error


def read_network(path: Path) -> tuple[TunedModel, dict[str, NDArray[Any]]]:
    """Read a fine-tuned network and check its digest.

    Raises
    ------
    ModelFileError
        As `describe`, and if description or weights were changed.
    """
    described = _described(path)
    try:
        tensors = safetensors.numpy.load_file(path)
    except (OSError, safetensors.SafetensorError) as error:
        raise ModelFileError(f"{path} is damaged: {' '.join(str(error).split())}") from error
    if described.get("digest") != _digest(described, tensors):
        raise ModelFileError(f"{path} was changed after it was saved (digests differ); fine-tune and save it again")
    return _model(path, described), tensors


def _header(path: Path) -> dict[str, str]:
    with safetensors.safe_open(path, "np") as file:
        return file.metadata() or {}


def _described(path: Path) -> dict[str, Any]:
    """Return the description of a file of this version."""
    try:
        described = json.loads(_header(path).get(_KEY, "{}"))
    except OSError as error:
        raise ModelFileError(f"cannot read the model {path}: {error.strerror or error}") from error
    except (safetensors.SafetensorError, ValueError) as error:
        raise ModelFileError(f"{path} is damaged or no model file: {' '.join(str(error).split())}") from error
    if not isinstance(described, dict) or described.get("format") != FORMAT:
        raise ModelFileError(f"{path} is no model of thawline; expected a file written by: thawline finetune --save")
    if described.get("version") != VERSION:
        raise ModelFileError(
            f"{path} has network format {described.get('version')}, expected {VERSION}; fine-tune and save it again"
        )
    return described


def _model(path: Path, described: Mapping[str, Any]) -> TunedModel:
    wrong = [name for name, kind in _FIELDS.items() if not isinstance(described.get(name, ...), kind)]
    try:
        scores = LayerSpec.from_json(described["scores"])
    except (KeyError, TypeError, AttributeError):  # not what `to_json` gives
        wrong = ["scores"]
    if wrong:
        raise ModelFileError(f"{path} does not say its {', '.join(wrong)}; fine-tune and save it again")
    fields = {name: described[name] for name in _FIELDS}
    return TunedModel(**fields | {"scores": scores, "classes": tuple(fields["classes"])})


def _digest(described: Mapping[str, Any], tensors: Tensors) -> str:
    """Return a digest over the description but for its own digest, and over names, shapes and bytes of all tensors."""
    rest = {key: value for key, value in described.items() if key != "digest"}
    digest = hashlib.blake2b(canonical_json(rest).encode(), digest_size=16)
    for name, item in sorted(tensors.items()):
        digest.update(f"{name}|{item.dtype}|{item.shape}|".encode())
        digest.update(np.ascontiguousarray(item).reshape(-1).view(np.uint8).data)
    return digest.hexdigest()
