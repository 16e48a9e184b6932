"""Use a saved model: the same layers of the same backbone over new images, then its head.

A fine-tuned network is a backbone, too, whose class scores are the layer to read.

The features go through a cache like any others, so a long prediction that was stopped goes on from there.
"""

from __future__ import annotations

import csv
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import NamedTuple

import numpy as np

from features_cache import DONE, CacheFile, open_cache
from pipeline.backbones.network_file import TunedModel, describe_network, is_network_file
from pipeline.errors import EngineError, resumable
from pipeline.extract import extract
from pipeline.heads.saved import SavedModel, load_model
from pipeline.images.sources.registry import open_source
from pipeline.results import Prediction, Progress
from pipeline.spec import LayerSpec

WORTH_KEEPING = 1000
"""Sources with more images than this go through a cache that stays, even when none was named: `KEPT`."""
KEPT = "thawline-predictions"
"""Not where ``extract`` puts its files: a second source there would make the next ``fit`` ambiguous."""
CHUNK = 4096


@dataclass(frozen=True)
class PredictReport:
    """Predictions in the order of the source, and what the user should know about them."""

    predictions: list[Prediction]
    notes: list[str]


def predict(
    model: str | Path,
    source: str | Path,
    output: str | Path | None = None,
    *,
    engine: str = "auto",
    device: str = "auto",
    progress: Progress | None = None,
) -> PredictReport:
    """Label every image of `source`.

    Parameters
    ----------
    model : str or Path
        What ``fit --save`` or ``finetune --save`` wrote.
    source : str or Path
        Anything `pipeline.extract.extract` takes; labels it may have are ignored.
    output : str or Path, optional
        Folder of cache files to go through. By default a temporary one, or ``thawline-predictions`` for sources of more
        than 1,000 images.
    engine, device : str, default "auto"
        As for extraction.
    progress : callable, optional
        As for extraction.

    Raises
    ------
    ModelFileError
        The file is no model of ours, or its backbone resolves to other features than the head was trained on.
    ThawlineError
        Whatever extraction raises.
    """
    used, layers = _load(model)
    notes: list[str] = []
    with _cache_folder(source, output, notes) as folder:
        files = []
        for backbone, size, spec in layers:
            precision = _available_precision(spec.precision, engine, device, notes)
            results = extract(
                source,
                [backbone],
                [spec.layer],
                spec.pool,
                folder,
                precision=precision,
                store=spec.store,
                size=size,
                engine=engine,
                device=device,
                expect=[spec],
                progress=progress,
            )
            notes += results[0].notes
            files.append(open_cache(results[0].path))
        return PredictReport(_label(used, [layer.spec for layer in layers], files), list(dict.fromkeys(notes)))


class _Layer(NamedTuple):
    """What a model reads: the backbone and input size to ask for, and what they must resolve to."""

    backbone: str
    size: int | None
    spec: LayerSpec


def _load(path: str | Path) -> tuple[SavedModel | TunedModel, list[_Layer]]:
    """Return a model and the layers that it reads; a fine-tuned network's last step reads its own class scores."""
    if is_network_file(path):
        tuned = describe_network(path)
        return tuned, [_Layer(f"{tuned.scores.backbone}@{path}", None, tuned.scores)]
    saved = load_model(path)
    asked = [(layer["request"], LayerSpec.from_json(layer["spec"])) for layer in saved.layers]
    return saved, [_Layer(request["backbone"], request["size"], spec) for request, spec in asked]


def write_csv(predictions: Sequence[Prediction], path: Path) -> None:
    """Write ``uri,label,probability,state,reason`` rows; absent values are empty."""
    with path.open("w", newline="", encoding="utf-8") as stream:
        writer = csv.writer(stream)
        writer.writerow(("uri", "label", "probability", "state", "reason"))
        for item in predictions:
            writer.writerow((item.uri, item.label, item.probability, item.state, item.reason))


def _available_precision(wanted: str, engine: str, device: str, notes: list[str]) -> str:
    """Return the precision of a layer of the model, or fp32, and note it, where this machine does not have it."""
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
def _cache_folder(source: str | Path, output: str | Path | None, notes: list[str]) -> Iterator[Path]:
    if output is None and len(open_source(source).items) > WORTH_KEEPING:
        output = KEPT
        notes.append(f"the features of these images are kept in {KEPT}, which may be deleted; -o names another folder")
    if output is not None:
        with resumable():
            yield Path(output)
    else:
        with TemporaryDirectory(prefix="thawline-") as folder:
            yield Path(folder)


def _label(model: SavedModel | TunedModel, specs: Sequence[LayerSpec], files: Sequence[CacheFile]) -> list[Prediction]:
    """Run the model over the rows that are done; all `files` have the same rows in the same order."""
    done = np.all([file.states == DONE for file in files], axis=0)
    predictions = [
        Prediction(uri, None, None, "unreadable", next(filter(None, reasons), ""))
        for uri, *reasons in zip(files[0].uris, *(file.reasons for file in files), strict=True)
    ]
    rows = np.flatnonzero(done)
    for start in range(0, len(rows), CHUNK):
        chunk = rows[start : start + CHUNK]
        parts = [file.matrix(spec.layer)[chunk].astype(np.float32) for file, spec in zip(files, specs, strict=True)]
        labels, probabilities = model.predict(np.concatenate(parts, axis=1))
        for place, row in enumerate(chunk):
            probability = None if probabilities is None else float(probabilities[place])
            predictions[row] = Prediction(predictions[row].uri, model.classes[labels[place]], probability, "done")
    return predictions
