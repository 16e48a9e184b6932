"""Saved heads: a skops file with a description of the layers that the head reads; loading it runs no code from it.

The archive holds what `skops.io.dump` wrote, and one more member, ``thawline.json``: everything else that `predict`
needs, and a digest of the whole file. So ``skops.io.load`` alone gives the scikit-learn pipeline; several labels it
predicts from 0.5 or 0 on, not from our thresholds.
"""

from __future__ import annotations

import json
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from sklearn.pipeline import Pipeline

from features_cache import parse_json
from pipeline.arrays import Float32Array, Float64Array
from pipeline.errors import BackboneError, FitError, ModelFileError
from pipeline.evaluation.calibration import tempered
from pipeline.evaluation.joined import JoinedColumn, is_joined_column
from pipeline.heads.family import Family
from pipeline.heads.registry import find_head
from pipeline.model_file import TASK_DEFAULTS, ModelFormat, check_destination, fits_task, named, reading, writing
from pipeline.options import CLASSIFICATION, REGRESSION
from pipeline.spec import LayerSpec, parse_size

FORMAT = ModelFormat(
    name="thawline-model",
    version=1,
    fields={
        "head": str,
        "params": dict,
        "layers": list,
        "classes": list,
        "temperature": float | None,
        "metrics": dict,
        "versions": dict,
        "task": str,
        "thresholds": list | None,
        "columns": list,
    },
    libraries=("thawline", "scikit-learn", "numpy", "skops"),
    remedy="fit and save it again",
    defaults={**TASK_DEFAULTS, "columns": []},
)
_DESCRIPTION = "thawline.json"
_CLASSES = frozenset(
    {"Pipeline", "StandardScaler", "Normalizer", "LogisticRegression", "LinearSVC", "SVC", "KNeighborsClassifier"}
    | {"RidgeClassifier", "LabelBinarizer", "PCA", "ColumnTransformer", "OneVsRestClassifier"}
    | {"Ridge", "SVR", "KNeighborsRegressor"}
)
"""The scikit-learn classes of saved heads. Others, which skops would trust, may take any amount of memory."""
_VALUES = frozenset({"DictNode", "ListNode", "TupleNode", "JsonNode", "TypeNode", "NdArrayNode", "SliceNode"})
"""What skops calls the other parts of saved heads."""


@dataclass(frozen=True)
class SavedModel:
    """A trained head, and which features it reads.

    Parameters
    ----------
    pipeline : Pipeline
        Scaler (where there is one) and estimator; takes features (n, d), with joined columns behind them, gives class
        numbers, labels or numbers.
    head : str
        Name of the head, such as ``"logreg"``.
    params : dict
        Its chosen parameters.
    layers : list of dict
        In the order in which their features are joined: ``spec`` (a `LayerSpec` as JSON), ``fingerprint``, ``dim`` and
        ``request`` (what to ask of the extractor: backbone as the user wrote it, layer, pool, size, precision, ...).
    classes : tuple of str
        Names of the classes or labels by number; empty for numbers.
    temperature : float or None
        Calibrates the probabilities, see `pipeline.evaluation.calibration`; ``None`` leaves them as they are.
    metrics : dict
        The result of the same model, as JSON.
    task : str
        What it predicts, one of `pipeline.options.TASKS`.
    thresholds : list of float or None
        Scores from which on each of several labels is predicted.
    columns : list of dict
        Columns of a table that stand behind the features: ``name``, and ``categories`` or None for numbers.
    versions : dict of str to str
        Libraries it was made with; `save_model` fills them in.
    """

    pipeline: Pipeline
    head: str
    params: dict[str, Any]
    layers: list[dict[str, Any]]
    classes: tuple[str, ...]
    temperature: float | None
    metrics: dict[str, Any]
    task: str = CLASSIFICATION
    thresholds: list[float] | None = None
    columns: list[dict[str, Any]] = field(default_factory=list)
    versions: dict[str, str] = field(default_factory=dict)

    @property
    def specs(self) -> list[LayerSpec]:
        """Specs of `layers`; raises `ModelFileError` if they do not say what was extracted."""
        try:
            return [LayerSpec.from_json(layer["spec"]) for layer in self.layers]
        except ValueError as error:
            raise ModelFileError(
                f"the model does not say how its layers were extracted: {error}; {FORMAT.remedy}"
            ) from error

    @property
    def joined(self) -> list[JoinedColumn]:
        """The columns of a table that stand behind the features."""
        return [JoinedColumn.from_json(told) for told in self.columns]

    def predict(self, features: NDArray[np.floating[Any]]) -> tuple[NDArray[np.int64], NDArray[np.float64] | None]:
        """Label rows of features.

        Parameters
        ----------
        features : (n, d) float
            The layers' features side by side, then those of joined columns; d is the sum of their dims.

        Returns
        -------
        labels : (n,) int64
            Indices into `classes`.
        probability : (n,) float64 or None
            Calibrated probability of the label; ``None`` for heads without probabilities.

        Raises
        ------
        ModelFileError
            If the model was trained on another number of features, or its classifier does not work.
        """
        if self.task != CLASSIFICATION:
            raise ModelFileError(f"the model is for task '{self.task}' and predicts no class; use predict_values")
        probabilities = None
        with self._explained():
            rows, classifier, family = self._scaled(features)
            labels = np.asarray(classifier.predict(rows), np.int64)
            if family.probabilities:
                probabilities = family.predict_proba(classifier, rows)
            columns = np.searchsorted(self.pipeline.classes_, labels)
        known = labels.shape == features.shape[:1] and ((labels >= 0) & (labels < len(self.classes))).all()
        if not known or (probabilities is not None and len(labels) and columns.max() >= probabilities.shape[-1]):
            raise _other_classes()
        if probabilities is None:
            return labels, None
        if self.temperature is not None:
            probabilities = tempered(probabilities, self.temperature)
        return labels, probabilities[np.arange(len(labels)), columns]

    def predict_values(self, features: NDArray[np.floating[Any]]) -> Float64Array:
        """Return the scores (n, K) of several labels, or numbers (n,), for features (n, d); raises as `predict`."""
        with self._explained():
            rows, estimator, family = self._scaled(features)
            found = np.asarray(
                estimator.predict(rows) if self.task == REGRESSION else family.scores(estimator, rows), np.float64
            )
        shape = (len(features),) if self.task == REGRESSION else (len(features), len(self.classes))
        if found.shape != shape or not np.isfinite(found).all():
            raise _other_classes()
        return found

    def _scaled(self, features: NDArray[np.floating[Any]]) -> tuple[Float32Array, Any, Family]:
        """Return what the estimator reads, the estimator, and its family."""
        expected = sum(layer["dim"] for layer in self.layers) + sum(column.dim for column in self.joined)
        if features.shape[1] != expected:
            names = [*(layer["spec"]["layer"] for layer in self.layers), *(column.name for column in self.joined)]
            raise ModelFileError(
                f"the model takes {expected} features of {'+'.join(names)}, got {features.shape[1]}; "
                "extract the layers it names"
            )
        features = features.astype(np.float32, copy=False)
        rows = self.pipeline[:-1].transform(features) if len(self.pipeline) > 1 else features
        return rows, self.pipeline[-1], find_head(self.head, self.task).family

    @contextmanager
    def _explained(self) -> Iterator[None]:
        """Turn what a forged estimator raises into one line."""
        try:
            yield
        except ModelFileError:
            raise
        except Exception as error:  # it can raise anything
            raise ModelFileError(f"the model's classifier fails: {named(error)}; {FORMAT.remedy}") from error


def _other_classes() -> ModelFileError:
    return ModelFileError(f"the model's classifier gives other classes than its description; {FORMAT.remedy}")


def save_model(path: str | Path, model: SavedModel) -> None:
    """Write `model` to `path`; an existing file is replaced, and stays as it was after an error.

    Raises
    ------
    ModelFileError
        If the file cannot be written.
    """
    import skops.io  # imports torch, which nothing else in a fit needs

    fields = {name: getattr(model, name) for name in FORMAT.fields}
    with writing(check_destination(path, ".skops")) as draft:
        skops.io.dump(model.pipeline, draft)
        with zipfile.ZipFile(draft, "a") as archive:
            description = FORMAT.describe(fields, _content(archive))
            archive.writestr(_DESCRIPTION, json.dumps(description, indent=1, allow_nan=False))


def load_model(path: str | Path) -> SavedModel:
    """Read a saved head; nothing in the file is executed.

    Raises
    ------
    ModelFileError
        If the file is missing, damaged, not a model of thawline, of another version, or holds types that are not
        trusted.
    """
    path = Path(path)
    description = _read_description(path)
    pipeline = _read_pipeline(path)
    fields = FORMAT.read_fields(path, description)
    if not fields["layers"] or not all(map(_is_layer, fields["layers"])):
        raise FORMAT.lacks(path, "layers")
    if not all(map(is_joined_column, fields["columns"])):
        raise FORMAT.lacks(path, "columns")
    if not fits_task(fields):
        raise FORMAT.lacks(path, "task", "thresholds")
    try:
        find_head(fields["head"], fields["task"])
    except FitError as error:
        raise ModelFileError(f"{path} holds a head that this version of thawline does not have: {error}") from error
    return SavedModel(pipeline, **fields | {"classes": tuple(fields["classes"])})


def _is_layer(layer: Any) -> bool:
    kinds = {"spec": dict, "fingerprint": str, "dim": int, "request": dict}
    typed = isinstance(layer, dict) and all(isinstance(layer.get(name), kind) for name, kind in kinds.items())
    if not typed or layer["dim"] < 1 or not isinstance(layer["spec"].get("layer"), str):
        return False
    request = layer["request"]
    try:
        parse_size(request.get("size", ""))
    except BackboneError:
        return False
    return isinstance(request.get("backbone"), str)


def _read_description(path: Path) -> dict[str, Any]:
    """Return the description, once format, version and digest are checked."""
    with reading(path), zipfile.ZipFile(path) as archive:
        size = sum(member.file_size for member in archive.infolist())
        if size > path.stat().st_size:  # what we save is not compressed
            raise ModelFileError(f"{path} was not loaded: it would unpack to {size} bytes; {FORMAT.remedy}")
        found = _DESCRIPTION in archive.namelist()
        description = FORMAT.check(path, parse_json(archive.read(_DESCRIPTION)) if found else None)
        FORMAT.check_digest(path, description, _content(archive))
        _check_schema(path, parse_json(archive.read("schema.json")))
    return description


def _check_schema(path: Path, schema: Any) -> None:
    """Refuse what skops would load but no saved head has: other classes, and an array that is loaded several times."""
    strange: set[str] = set()
    owners: dict[str, Any] = {}
    waiting = [schema]
    while waiting:
        node = waiting.pop()
        waiting += node.values() if isinstance(node, dict) else node if isinstance(node, list) else ()
        if not isinstance(node, dict) or "__loader__" not in node:
            continue
        name = str(node.get("__class__"))
        if node["__loader__"] not in _VALUES and (node["__loader__"], name in _CLASSES) != ("ObjectNode", True):
            strange.add(name)
        if (file := node.get("file")) is not None and owners.setdefault(str(file), node["__id__"]) != node["__id__"]:
            strange.add(f"{file}, twice")
    if strange:
        raise ModelFileError(
            f"{path} was not loaded: it holds types that no saved head has: {', '.join(sorted(strange))}"
        )


def _read_pipeline(path: Path) -> Pipeline:
    import skops.io

    try:
        untrusted = skops.io.get_untrusted_types(file=path)
        pipeline = None if untrusted else skops.io.load(path, trusted=[])
    except Exception as error:  # a forged file can make the loader raise anything
        raise ModelFileError(f"{path} does not hold a scikit-learn pipeline: {named(error)}") from error
    if untrusted:
        raise ModelFileError(f"{path} was not loaded: it holds types that no saved head has: {', '.join(untrusted)}")
    if not isinstance(pipeline, Pipeline):
        raise ModelFileError(f"{path} holds a {type(pipeline).__name__}, expected a scikit-learn pipeline")
    return pipeline


def _content(archive: zipfile.ZipFile) -> Iterator[bytes]:
    """Yield what the digest covers besides the description: name, length and bytes of every other member."""
    for name in sorted(archive.namelist()):
        if name != _DESCRIPTION:
            content = archive.read(name)
            yield f"{name}\0{len(content)}\0".encode() + content
