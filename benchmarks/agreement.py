"""How close the engines are to torch's float32, and whether a classifier can tell: ``python benchmarks/agreement.py``.

SOURCE is a labelled image source; without one, scikit-learn's digits are taken. Accuracy is that of logistic regression
(C = 0.1, standardised) over five stratified folds, the same for all. bf16 is left out where the CPU has none.

With ``--layer logits`` all are compared with what the network itself returns for the same pixels, without any of our
graphs, and the share of images with the same largest logit is told.
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

import click
import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import StratifiedKFold, cross_val_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from threadpoolctl import threadpool_limits

from features_cache import open_cache
from pipeline.arrays import Float32Array
from pipeline.backbones.aliases import LOGITS
from pipeline.backbones.registry import load_backbone
from pipeline.backbones.taps import normalisation
from pipeline.engines.select import has_bf16
from pipeline.extract import extract
from pipeline.images.resize import prepare
from pipeline.images.sources.registry import open_source

WAYS = (("torch", "fp32"), ("openvino", "fp32"), ("torch", "bf16"), ("openvino", "bf16"))


@click.command()
@click.argument("source", default="digits")
@click.option("--backbone", "-b", default="efficientnet_lite0", show_default=True)
@click.option("--layer", "-l", default="penultimate", show_default=True)
def main(source: str, backbone: str, layer: str) -> None:
    """Print a table and a JSON line."""
    columns = ["engine", "precision", "largest difference", "cosine, mean", "cosine, least", "accuracy"]
    table = Table(*columns, *(["same largest"] if layer == LOGITS else []), box=None)
    report = []
    reference = own_logits(source, backbone) if layer == LOGITS else None
    for engine, precision in WAYS if has_bf16("cpu") else WAYS[:2]:
        with tempfile.TemporaryDirectory() as folder:
            (result,) = extract(source, [backbone], [layer], output=Path(folder), engine=engine, precision=precision)
            file = open_cache(result.path)
            X, y = file.xy(*file.layers)
            features = np.array(X)
        reference = features if reference is None else reference
        norms = np.linalg.norm(features, axis=1) * np.linalg.norm(reference, axis=1)
        cosines = (features * reference).sum(axis=1) / norms
        folds = StratifiedKFold(5, shuffle=True, random_state=0)
        model = make_pipeline(StandardScaler(), LogisticRegression(C=0.1, max_iter=2000))
        with threadpool_limits(1):
            accuracy = float(cross_val_score(model, features, y, cv=folds, n_jobs=2).mean())
        entry = {
            "engine": engine,
            "precision": precision,
            "largest_difference": float(np.abs(features - reference).max() / np.abs(reference).max()),
            "cosine_mean": float(cosines.mean()),
            "cosine_least": float(cosines.min()),
            "accuracy": accuracy,
        }
        if layer == LOGITS:
            entry["same_largest"] = float(np.mean(features.argmax(axis=1) == reference.argmax(axis=1)))
        report.append(entry)
        table.add_row(
            *(
                f"{value:.2g}" if "diff" in key else f"{value:.5f}" if isinstance(value, float) else str(value)
                for key, value in entry.items()
            )
        )
    Console(width=110).print(table)
    click.echo(json.dumps({"source": source, "backbone": backbone, "layer": layer, "results": report}))


def own_logits(source: str, name: str) -> Float32Array:
    """Return what the network returns for each image (n, K)."""
    backbone, images = load_backbone(name), open_source(source)
    scale, shift = normalisation(backbone.preprocessing)
    found = []
    with torch.inference_mode():
        for item in images.items:
            pixels = torch.from_numpy(prepare(images.read(item), backbone.preprocessing))
            found.append(backbone.module(pixels.permute(2, 0, 1)[None].float() * scale + shift).numpy())
    return np.concatenate(found)


if __name__ == "__main__":
    main()
