"""Use a saved model: extract the layers that it reads from new images, then run its head.

A fine-tuned network is a backbone whose class scores are the layer to read. The features go through a cache like any
others, so a long prediction that was stopped continues where it was.
"""

from __future__ import annotations

import csv
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import gettempdir
from typing import NamedTuple

import numpy as np

from features_cache import DONE, UNREADABLE, CacheFile, atomic_write, explained, open_cache, scratch_folder
from pipeline.arrays import Float32Array
from pipeline.backbones.network_file import TunedModel, describe_network, is_network_file
from pipeline.errors import EngineError, TableError, resumable
from pipeline.evaluation.joined import JoinedColumn, JoinedColumns, place_columns, read_table
from pipeline.evaluation.keyed import KeyedTable
from pipeline.evaluation.rows import join_rows
from pipeline.evaluation.targets import BAR
from pipeline.extract import extract
from pipeline.heads.saved import SavedModel, load_model
from pipeline.images.sources.registry import ImageSource, open_source
from pipeline.options import CLASSIFICATION
from pipeline.results import Prediction, Progress
from pipeline.spec import DECODE_POLICY, REDECODED, LayerSpec, Size

WORTH_KEEPING = 1000
"""Features of more images than this, or of a cluster, are kept in `KEPT_FOLDER` if no folder was named."""
KEPT_FOLDER = "thawline-predictions"
"""Not the default folder of extraction: a second source there would make the next ``fit`` ambiguous."""
CHUNK = 4096
"""Rows that the model predicts at once."""
CHANGED = "it changed while the model's layers were extracted"
"""Why an image has no label although each layer could be computed."""


@dataclass(frozen=True)
class PredictReport:
    """Predictions in the order of the source, and what the user should know about them.

    `target` is the column of the table that the model learnt its labels from, None for labels of its source.
    """

    predictions: list[Prediction]
    notes: list[str]
    target: str | None


def predict(
    model: str | Path,
    source: str | Path,
    output: str | Path | None = None,
    *,
    table: str | Path | None = None,
    key: str | None = None,
    engine: str = "auto",
    device: str = "auto",
    cluster: str | None = None,
    progress: Progress | None = None,
) -> PredictReport:
    """Label every image of `source`.

    Parameters
    ----------
    model : str or Path
        A file that `pipeline.fit` or `pipeline.finetune` saved.
    source : str or Path
        Anything `pipeline.extract.extract` takes. Labels are ignored.
    output : str or Path, optional
        Folder of cache files for the features, or a URL of one. By default a temporary one, or
        ``thawline-predictions`` for sources of more than 1,000 images, and for a cluster.
    table, key : str or Path, optional
        A table with the columns that the model reads beside the features, and its column that names the images; see
        `pipeline.evaluation.joined.read_table`. An image that it does not name, or with an empty cell, gets no
        prediction. A category that the model never saw counts as none of those it knows.
    engine, device : str, default "auto"
        As for extraction.
    cluster : str, optional
        As for extraction; only that runs on the cluster.
    progress : callable, optional
        As for extraction.

    Raises
    ------
    ModelFileError
        The file is no model of ours, or its backbone gives other features here than the head was trained on.
    TableError
        The model reads columns and there is no table, or one that lacks them.
    ThawlineError
        As for extraction.

    Examples
    --------
    >>> from pipeline.extract import extract
    >>> from pipeline.fit import fit
    >>> caches = extract("photos", layers=["blocks.1"], size=32)
    >>> report = fit("thawline-cache", save="model.skops")
    >>> predict("model.skops", "new_photos").predictions[0]
    Prediction(uri='cat/0.png', label='cat', probability=..., state='done', reason='', value=None, scores=None)
    """
    used, layers = _load(model)
    beside = _read_columns(used, table, key)
    images = open_source(source)  # once, so that all layers are of the same images
    if beside is not None:
        beside.find(np.asarray(images.items.rows.uris))  # which may fail, before the work
    notes: list[str] = []
    if any(spec.decode != DECODE_POLICY for *_, spec in layers):
        layers = [layer._replace(spec=_of_todays_rules(layer.spec)) for layer in layers]
        notes += _misread(images)
    with _cache_folder(images, output, cluster, notes) as folder:
        paths = []
        for backbone, size, spec in layers:
            precision = _available_precision(spec.precision, engine, device, notes)
            results = extract(
                images,
                [backbone],
                [spec.layer],
                spec.pool,
                folder,
                precision=precision,
                store=spec.store,
                size=size,
                white=spec.preprocessing.white,
                engine=engine,
                device=device,
                cluster=cluster,
                expect=[spec],
                progress=progress,
            )
            notes += results[0].notes
            paths.append(results[0].path)
        files = [open_cache(path) for path in paths]
        joined, reasons = None, [""] * files[0].n_rows
        if beside is not None:
            joined, reasons, more = place_columns(beside, _columns_of(used), files[0].uris)
            notes += more
        predictions = _label(used, [layer.spec for layer in layers], files, joined, reasons)
        return PredictReport(predictions, list(dict.fromkeys(notes)), used.metrics.get("target"))


class _Layer(NamedTuple):
    """A layer that a model reads: the backbone and input size to ask for, and the features that must come of it."""

    backbone: str
    size: Size | None
    spec: LayerSpec


def _load(path: str | Path) -> tuple[SavedModel | TunedModel, list[_Layer]]:
    """Return a model and the layers that it reads; of a fine-tuned network, these are its own class scores."""
    if is_network_file(path):
        tuned = describe_network(path)
        return tuned, [_Layer(f"{tuned.scores.backbone}@{path}", None, tuned.scores)]
    saved = load_model(path)
    requests = [layer["request"] for layer in saved.layers]
    return saved, [
        _Layer(request["backbone"], request["size"], spec) for request, spec in zip(requests, saved.specs, strict=True)
    ]


def _columns_of(model: SavedModel | TunedModel) -> list[JoinedColumn]:
    return model.joined if isinstance(model, SavedModel) else []


def _read_columns(model: SavedModel | TunedModel, table: str | Path | None, key: str | None) -> KeyedTable | None:
    """Return the table of the columns that a model reads, None if it reads none."""
    columns = _columns_of(model)
    if not columns and (table or key):
        raise TableError("this model reads images alone, no columns of a table; leave out table and key")
    if columns and table is None:
        named = ", ".join(column.name for column in columns)
        raise TableError(f"this model reads {named} beside the images; name a table with these columns (table)")
    return None if table is None else read_table(table, columns, key)


def _of_todays_rules(spec: LayerSpec) -> LayerSpec:
    """Return the features to ask for instead of those of older decoding rules; see `pipeline.spec.DECODE_POLICY`."""
    return replace(spec, decode=DECODE_POLICY) if spec.decode in range(1, DECODE_POLICY) else spec


def _misread(images: ImageSource) -> Iterator[str]:
    if any(item.uri.lower().endswith(REDECODED) for item in images.items):
        yield (
            "the model was trained by older decoding rules, which misread grey TIFFs of more than 8 bits: "
            "train it again if it saw such images"
        )


def write_csv(predictions: Sequence[Prediction], path: Path) -> None:
    """Write ``uri,label,probability,state,reason`` rows; absent values are empty.

    A column ``value``, or ``score:LABEL`` for each of several labels, follows where the model gives them. An existing
    file is replaced, and stays as it was after an error. Raises `CacheError` if it cannot be written.
    """
    with explained(path, "write"), atomic_write(path) as draft, draft.open("w", newline="", encoding="utf-8") as stream:
        writer = csv.writer(stream)
        names = next((list(item.scores) for item in predictions if item.scores), [])
        numbers = ["value"] if any(item.value is not None for item in predictions) else []
        writer.writerow(
            ("uri", "label", "probability", "state", "reason", *numbers, *(f"score:{name}" for name in names))
        )
        for item in predictions:
            more = [item.value] * len(numbers) + [item.scores and item.scores[name] for name in names]
            writer.writerow((item.uri, item.label, item.probability, item.state, item.reason, *more))


def _available_precision(wanted: str, engine: str, device: str, notes: list[str]) -> str:
    """Return the precision of a layer of the model, or fp32, with a note, if this machine does not compute it."""
    from pipeline.engines.select import resolve

    try:
        return resolve(engine, device, wanted).precision
    except EngineError:
        resolved = resolve(engine, device, "fp32")
        notes.append(
            f"the model's features were {wanted}, which this machine does not compute: predicting with fp32 features"
        )
        return resolved.precision


@contextmanager
def _cache_folder(
    images: ImageSource, output: str | Path | None, cluster: str | None, notes: list[str]
) -> Iterator[str | Path]:
    if output is None and (cluster is not None or len(images.items) > WORTH_KEEPING):
        output = KEPT_FOLDER
        notes.append(
            f"the features of these images are kept in {KEPT_FOLDER}; delete it, or set output to another folder"
        )
    if output is not None:
        with resumable():
            yield output
    else:
        with scratch_folder(gettempdir()) as folder:
            yield Path(folder)


def _label(
    model: SavedModel | TunedModel,
    specs: Sequence[LayerSpec],
    files: Sequence[CacheFile],
    joined: JoinedColumns | None,
    lacking: Sequence[str],
) -> list[Prediction]:
    """Run the model over the images whose features are in all `files`, of the same bytes, and that lack no columns."""
    for file in files:
        file.check_columns()
    unread = [(file, np.flatnonzero(file.states == UNREADABLE)) for file in files]
    reasons = {uri: why for file, rows in unread for uri, why in zip(file.uris[rows], file.reasons[rows], strict=True)}
    predictions = [
        Prediction(uri, None, None, "unreadable", str(reasons.get(uri, CHANGED))) for uri in files[0].uris.tolist()
    ]
    for row, reason in enumerate(lacking):
        if reason and files[0].states[row] == DONE:
            predictions[row] = Prediction(predictions[row].uri, None, None, "incomplete", reason)
    rows = join_rows(files, (files[0].states == DONE) & np.array([not reason for reason in lacking]))
    for start in range(0, len(rows[0]), CHUNK):
        chunks = [numbers[start : start + CHUNK] for numbers in rows]
        parts = [
            file.features(spec.layer, chunk).astype(np.float32)
            for file, spec, chunk in zip(files, specs, chunks, strict=True)
        ]
        if joined is not None:
            parts.append(joined.features(chunks[0]))
        said = _say(model, files[0].uris[chunks[0]].tolist(), np.concatenate(parts, axis=1))
        for row, prediction in zip(chunks[0].tolist(), said, strict=True):
            predictions[row] = prediction
    return predictions


def _say(model: SavedModel | TunedModel, uris: list[str], features: Float32Array) -> Iterator[Prediction]:
    """Yield what the model predicts of rows of features (n, d)."""
    if model.task == CLASSIFICATION:
        labels, probabilities = model.predict(features)
        for index, uri in enumerate(uris):
            probability = None if probabilities is None else float(probabilities[index])
            yield Prediction(uri, model.classes[labels[index]], probability, "done")
        return
    for uri, found in zip(uris, model.predict_values(features).tolist(), strict=True):
        if model.thresholds is None:
            yield Prediction(uri, None, None, "done", value=found)
        else:
            told = zip(model.classes, found, model.thresholds, strict=True)
            names = [name for name, score, least in told if score >= least]
            scores = dict(zip(model.classes, found, strict=True))
            yield Prediction(uri, BAR.join(names) or BAR, None, "done", scores=scores)
