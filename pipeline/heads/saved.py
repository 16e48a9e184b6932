"""Saved models: a skops file that is its own description, read without running anything from it.

The archive holds what `skops.io.dump` wrote (so ``skops.io.load`` alone gives the scikit-learn pipeline) and one more
member, ``thawline.json``, with everything else `predict` needs and a digest of all of it.
"""

from __future__ import annotations

import hashlib
import json
import os
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from sklearn.pipeline import Pipeline

from features_cache.errors import nearest_beside
from features_cache.whole import replacing
from pipeline.errors import FitError, ModelFileError
from pipeline.evaluation.calibration import tempered
from pipeline.heads.registry import find_head
from pipeline.provenance import installed_version
from pipeline.spec import canonical_json

FORMAT = "thawline-model"
VERSION = 1
_DESCRIPTION = "thawline.json"
_FIELDS: dict[str, Any] = {
    "head": str,
    "params": dict,
    "layers": list,
    "classes": list,
    "temperature": float | None,
    "metrics": dict,
    "versions": dict,
}
_LIBRARIES = ("thawline", "scikit-learn", "numpy", "skops")


@dataclass(frozen=True)
class SavedModel:
    """A trained head and all it takes to feed it.

    Parameters
    ----------
    pipeline : Pipeline
        Scaler (where there is one) and classifier; takes features (n, d), gives class numbers.
    head : str
        Name of the head, such as ``"logreg"``.
    params : dict
        Its chosen parameters.
    layers : list of dict
        In the order in which their features are joined: ``spec`` (a `LayerSpec` as JSON), ``fingerprint``, ``dim`` and
        ``request`` (what to ask of the extractor: backbone as the user wrote it, layer, pool, size, precision, ...).
    classes : tuple of str
        Class names by number.
    temperature : float or None
        What calibrates its probabilities, see `pipeline.evaluation.calibration`; ``None`` leaves them as they are.
    metrics : dict
        The `FitResult` of the same model, as JSON.
    versions : dict of str to str
        Libraries it was made with.
    """

    pipeline: Pipeline
    head: str
    params: dict[str, Any]
    layers: list[dict[str, Any]]
    classes: tuple[str, ...]
    temperature: float | None
    metrics: dict[str, Any]
    versions: dict[str, str]

    def predict(self, features: NDArray[np.floating[Any]]) -> tuple[NDArray[np.int64], NDArray[np.float64] | None]:
        """Label rows of features.

        Parameters
        ----------
        features : (n, d) float
            The layers' features side by side; d is the sum of their dims.

        Returns
        -------
        labels : (n,) int64
            Indices into `classes`.
        probability : (n,) float64 or None
            That of the label, calibrated; ``None`` for heads without probabilities.

        Raises
        ------
        ModelFileError
            If d is another number than the model was trained on.
        """
        expected = sum(layer["dim"] for layer in self.layers)
        if features.shape[1] != expected:
            raise ModelFileError(
                f"the model takes {expected} features of {'+'.join(layer['spec']['layer'] for layer in self.layers)}, "
                f"got {features.shape[1]}; extract the layers it names"
            )
        features = features.astype(np.float32, copy=False)
        labels = np.asarray(self.pipeline.predict(features), np.int64)
        if not find_head(self.head).family.probabilities:
            return labels, None
        probabilities = np.asarray(self.pipeline.predict_proba(features), np.float64)
        if self.temperature is not None:
            probabilities = tempered(probabilities, self.temperature)
        place = np.searchsorted(self.pipeline.classes_, labels)
        return labels, probabilities[np.arange(len(labels)), place]


def current_versions() -> dict[str, str]:
    """Return the versions of the libraries that a saved model depends on."""
    return {name: installed_version(name) for name in _LIBRARIES}


def check_destination(path: str | Path) -> Path:
    """Return `path` if a file can be written there; called before the work that would be lost.

    Raises
    ------
    ModelFileError
        If it is a folder, or its own folder does not exist or is not writable.
    """
    path = Path(path)
    if path.is_dir():
        raise ModelFileError(f"a file is to be written, but {path} is a folder; name a file in it")
    if not path.parent.is_dir():
        raise ModelFileError(f"no folder {path.parent} to write {path.name} in; create it first")
    if not os.access(path.parent, os.W_OK):
        raise ModelFileError(f"the folder {path.parent} may not be written to; put {path.name} elsewhere")
    return path


def save_model(path: str | Path, model: SavedModel) -> None:
    """Write `model`, in place of what stands at `path`, as a whole or not at all.

    Raises
    ------
    ModelFileError
        If the file cannot be written.
    """
    import skops.io  # late, for it imports torch, which nothing else in a fit needs

    path = check_destination(path)
    description = {key: value for key, value in vars(model).items() if key != "pipeline"}
    try:
        with replacing(path) as draft:
            skops.io.dump(model.pipeline, draft)
            with zipfile.ZipFile(draft, "a") as archive:
                described = {"format": FORMAT, "version": VERSION, **description}
                described["digest"] = _digest(archive, described)
                archive.writestr(_DESCRIPTION, json.dumps(described, indent=1, allow_nan=False))
    except OSError as error:
        raise ModelFileError(f"cannot write the model {path}: {error.strerror or error}") from error


def load_model(path: str | Path) -> SavedModel:
    """Read a saved model; nothing in the file is executed.

    Raises
    ------
    ModelFileError
        If the file is missing, damaged, not a model of thawline, of another version, or holds types that are not
        trusted.
    """
    path = Path(path)
    description = _described(path)
    pipeline = _load_pipeline(path)
    wrong = [name for name, kind in _FIELDS.items() if not isinstance(description.get(name, ...), kind)]
    if "layers" not in wrong and not all(map(_is_layer, description["layers"] or [None])):
        wrong.append("layers")
    if wrong:
        raise ModelFileError(f"{path} does not say its {', '.join(wrong)}; fit and save it again")
    try:
        find_head(description["head"])
    except FitError as error:
        raise ModelFileError(f"{path} holds a head of another thawline: {error}") from error
    fields = {name: description[name] for name in _FIELDS}
    return SavedModel(pipeline, **fields | {"classes": tuple(fields["classes"])})


def _is_layer(layer: Any) -> bool:
    kinds = {"spec": dict, "fingerprint": str, "dim": int, "request": dict}
    return isinstance(layer, dict) and all(isinstance(layer.get(name), kind) for name, kind in kinds.items())


def _described(path: Path) -> dict[str, Any]:
    """Return the description of a file that is whole and of this version."""
    try:
        with zipfile.ZipFile(path) as archive:
            found = _DESCRIPTION in archive.namelist()
            description = json.loads(archive.read(_DESCRIPTION)) if found else {}
            digest = _digest(archive, description) if isinstance(description, dict) else ""
    except OSError as error:
        reason = error.strerror or str(error)
        raise ModelFileError(f"cannot read the model {path}: {reason}{nearest_beside(path)}") from error
    except Exception as error:  # damaged bytes make zipfile and json raise nearly anything
        raise ModelFileError(f"{path} is damaged or no model file: {_one_line(error)}") from error
    if not isinstance(description, dict) or description.get("format") != FORMAT:
        raise ModelFileError(f"{path} is no model of thawline; expected a file written by: thawline fit --save")
    if description.get("version") != VERSION:
        raise ModelFileError(
            f"{path} has model format {description.get('version')}, expected {VERSION}; fit and save it again"
        )
    if description.get("digest") != digest:
        raise ModelFileError(f"{path} was changed after it was saved (digests differ); fit and save it again")
    return description


def _load_pipeline(path: Path) -> Pipeline:
    import skops.io

    try:
        untrusted = skops.io.get_untrusted_types(file=path)
        pipeline = None if untrusted else skops.io.load(path, trusted=[])
    except Exception as error:  # whoever forges a file may make the loader raise anything
        raise ModelFileError(f"{path} does not hold a scikit-learn pipeline: {_one_line(error)}") from error
    if untrusted:
        raise ModelFileError(f"{path} holds types that no saved head has, and was not loaded: {', '.join(untrusted)}")
    if not isinstance(pipeline, Pipeline):
        raise ModelFileError(f"{path} holds a {type(pipeline).__name__}, expected a scikit-learn pipeline")
    return pipeline


def _digest(archive: zipfile.ZipFile, description: dict[str, Any]) -> str:
    """Return a digest over the description but for its own digest, and over names and bytes of all other members."""
    rest = {key: value for key, value in description.items() if key != "digest"}
    digest = hashlib.blake2b(canonical_json(rest).encode(), digest_size=16)
    for name in sorted(archive.namelist()):
        if name != _DESCRIPTION:
            content = archive.read(name)
            digest.update(f"{name}\0{len(content)}\0".encode() + content)
    return digest.hexdigest()


def _one_line(error: Exception) -> str:
    return " ".join(f"{type(error).__name__} {error}".split())
