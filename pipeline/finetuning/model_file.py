"""A fine-tuned network as one file: safetensors, with its description as JSON in the header.

Nothing in the file is executed, and no download is needed to use it: it holds every weight, the frozen ones too.
"""

from __future__ import annotations

import hashlib
import json
import tempfile
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from pipeline.backbones.registry import load
from pipeline.errors import BackboneError, ModelFileError
from pipeline.finetuning.network import Network
from pipeline.spec import DECODE_POLICY, Preprocessing, canonical_json

FORMAT = "thawline-network"
VERSION = 1
_KEY = "thawline"
_FIELDS = {
    "backbone": str,
    "size": int,
    "freeze": str,
    "top": str,
    "trunk_precision": str,
    "precision": str,
    "preprocessing": dict,
    "decode": int,
    "classes": list,
    "metrics": dict,
    "versions": dict,
}
_LIBRARIES = ("thawline", "torch", "torchvision", "timm")


@dataclass(frozen=True, eq=False)
class TunedModel:
    """A fine-tuned network and all it takes to feed it.

    Parameters
    ----------
    network : Network
        In eval mode, float32 weights; maps uint8 pixels (n, h, w, 3) to logits (n, k).
    backbone : str
        Canonical name, such as ``"torchvision/resnet18"``.
    size : int
        Side of the network input, pixels.
    freeze, top : str
        As in training.
    preprocessing : Preprocessing
        How an image becomes the pixels.
    classes : tuple of str
        Class names by number, k of them.
    metrics : dict
        The `FinetuneResult` of the model, as JSON.
    """

    network: Network
    backbone: str
    size: int
    freeze: str
    top: str
    preprocessing: Preprocessing
    classes: tuple[str, ...]
    metrics: dict[str, Any]


def save_tuned(path: Path, model: TunedModel) -> None:
    """Write `model` under a temporary name beside `path`, then rename it.

    Raises
    ------
    ModelFileError
        If the file cannot be written.
    """
    tensors = {name: item.detach().cpu().contiguous() for name, item in model.network.state_dict().items()}
    network = model.network
    description: dict[str, Any] = {
        "format": FORMAT,
        "version": VERSION,
        **{name: getattr(model, name) for name in ("backbone", "size", "freeze", "top", "metrics")},
        "trunk_precision": network.trunk_precision,
        "precision": network.precision,
        "preprocessing": asdict(model.preprocessing),
        "decode": DECODE_POLICY,
        "classes": list(model.classes),
        "versions": {name: version(name) for name in _LIBRARIES},
    }
    description["digest"] = _digest(description, tensors)
    try:
        with tempfile.TemporaryDirectory(dir=path.parent, prefix=".thawline-") as folder:
            draft = Path(folder) / path.name
            safetensors.torch.save_file(tensors, draft, {_KEY: json.dumps(description, allow_nan=False)})
            draft.replace(path)
    except (OSError, safetensors.SafetensorError) as error:
        raise ModelFileError(f"cannot write the model {path}: {getattr(error, 'strerror', None) or error}") from error


def load_tuned(path: str | Path) -> TunedModel:
    """Read a fine-tuned network and rebuild it; nothing in the file is executed.

    The network of the result is a plain `torch.nn.Module` from uint8 pixels to logits.

    Raises
    ------
    ModelFileError
        If the file is missing, damaged, not of thawline, of another version, or does not fit this machine's libraries.
    """
    path = Path(path)
    try:
        with safetensors.safe_open(path, "pt") as file:
            text = (file.metadata() or {}).get(_KEY, "{}")
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - it is no mapping
        described = json.loads(text)
    except OSError as error:
        raise ModelFileError(f"cannot read the model {path}: {error.strerror or error}") from error
    except Exception as error:  # damaged bytes make the readers raise nearly anything
        raise ModelFileError(f"{path} is damaged or no model file: {' '.join(str(error).split())}") from error
    _check(path, described, tensors)
    return _rebuilt(path, described, tensors)


def _check(path: Path, described: Any, tensors: Mapping[str, Tensor]) -> None:
    if not isinstance(described, dict) or described.get("format") != FORMAT:
        raise ModelFileError(f"{path} is no model of thawline; expected a file written by: thawline finetune --save")
    if described.get("version") != VERSION:
        raise ModelFileError(
            f"{path} has network format {described.get('version')}, expected {VERSION}; fine-tune and save it again"
        )
    if described.get("digest") != _digest(described, tensors):
        raise ModelFileError(f"{path} was changed after it was saved (digests differ); fine-tune and save it again")
    wrong = [name for name, kind in _FIELDS.items() if not isinstance(described.get(name), kind)]
    if wrong:
        raise ModelFileError(f"{path} does not say its {', '.join(wrong)}; fine-tune and save it again")
    if described["decode"] != DECODE_POLICY:
        raise ModelFileError(f"{path} was trained on images decoded by other rules; fine-tune and save it again")


def _rebuilt(path: Path, described: dict[str, Any], tensors: dict[str, Tensor]) -> TunedModel:
    given: dict[str, Any] = {name: described[name] for name in ("backbone", "size", "freeze", "top", "metrics")}
    classes = tuple(described["classes"])
    try:
        backbone = load(f"{given['backbone']}@random:0", given["size"])
        network = Network(backbone, given["freeze"], given["top"], len(classes))
        network.load_state_dict(tensors)
    except (BackboneError, RuntimeError) as error:
        made = ", ".join(f"{name} {number}" for name, number in described["versions"].items())
        raise ModelFileError(
            f"{path} does not fit {given['backbone']} of the libraries here ({' '.join(str(error).split())[:200]}); "
            f"use those it was made with: {made}"
        ) from error
    network.trunk_precision, network.precision = described["trunk_precision"], described["precision"]
    preprocessing = Preprocessing.from_json(described["preprocessing"])
    return TunedModel(network.eval(), preprocessing=preprocessing, classes=classes, **given)


def _digest(described: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> str:
    """Return a digest over the description but for its own digest, and over names, shapes and bytes of all tensors."""
    rest = {key: value for key, value in described.items() if key != "digest"}
    digest = hashlib.blake2b(canonical_json(rest).encode(), digest_size=16)
    for name, item in sorted(tensors.items()):
        digest.update(f"{name}|{item.dtype}|{tuple(item.shape)}|".encode())
        digest.update(item.contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
