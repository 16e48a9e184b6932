"""What fine-tuning is worth over a head on frozen features, and what it costs.

Three tables, as one JSON document with --json. Accuracy: logistic regression on frozen features beside new tops trained
above several thaw lines, on the same splits. Cached trunk: seconds of an epoch from cached activations and of the whole
network with the same line (decoded images kept in memory), each precision apart, and by how much the training losses of
their first epochs differ. Speed: images/s of an epoch that trains everything, beside a loop as a tutorial writes it (a
DataLoader, eager, float32); that one comes first, for our allocator setting would help it, too.

    python benchmarks/finetune.py SOURCE [--seeds 3] [--epochs 20] [--line LAYER]... [--peer NAME]...
"""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch
from PIL import Image
from rich.console import Console
from rich.table import Table
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms

from pipeline.backbones.backbone import Backbone
from pipeline.backbones.registry import load_backbone
from pipeline.engines.select import Resolved, resolve
from pipeline.extract import extract
from pipeline.finetune import finetune
from pipeline.finetuning.data import TrainingSetup, prepare_data
from pipeline.finetuning.inputs import DecodedImages, InputReader, Subset
from pipeline.finetuning.loop import standardise, train
from pipeline.finetuning.network import ThawedNetwork, train_precision
from pipeline.finetuning.objective import Classification
from pipeline.finetuning.recipe import Recipe
from pipeline.fit import fit
from pipeline.images.sources.registry import ImageSource, open_source
from pipeline.results import silent

BATCH = 32
TABLES = ("speed", "trunk", "accuracy")


class Photos(Dataset[tuple[torch.Tensor, int]]):
    """Paths to preprocessed tensors and labels, as a tutorial would write it."""

    def __init__(self, folder: Path, source: ImageSource, backbone: Backbone) -> None:
        rule = backbone.preprocessing
        self.items = [(folder / item.uri, item.label) for item in source.items]
        self.transform = transforms.Compose(
            [
                transforms.Resize(rule.resize),
                transforms.CenterCrop(rule.size),
                transforms.ToTensor(),
                transforms.Normalize(rule.mean, rule.std),
            ]
        )

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        path, label = self.items[index]
        with Image.open(path) as image:
            return self.transform(image.convert("RGB")), label


def tutorial(folder: Path, name: str, device: str = "cpu", workers: int = 0) -> float:
    """Return images/s of one epoch of a plain loop that trains everything; on a GPU in bf16."""
    backbone, source = load_backbone(name), open_source(folder)
    network, cuda = backbone.module.requires_grad_(True).train().to(device), device != "cpu"
    photos = Photos(folder, source, backbone)
    loader = DataLoader(photos, BATCH, shuffle=True, drop_last=True, num_workers=workers, pin_memory=cuda)
    optimizer = torch.optim.SGD(network.parameters(), lr=1e-3, momentum=0.9)
    criterion = torch.nn.CrossEntropyLoss()
    began, images = time.perf_counter(), 0
    for inputs, labels in loader:
        optimizer.zero_grad()
        with torch.autocast(torch.device(device).type, torch.bfloat16, enabled=cuda):
            loss = criterion(network(inputs.to(device, non_blocking=True)), labels.to(device, non_blocking=True))
        loss.backward()
        optimizer.step()
        images += len(labels)
    if cuda:
        torch.cuda.synchronize(device)
    return images / (time.perf_counter() - began)


def epochs_of(
    backbone: Backbone, reader: InputReader, source: ImageSource, freeze: str, precisions: tuple[str, str], count: int
) -> list[dict[str, Any]]:
    """Train on all images and return the history."""
    labels = np.array([item.label for item in source.items])
    network = ThawedNetwork(backbone, freeze, "linear", len(source.classes))
    network.trunk_precision, network.precision = precisions
    rows = Subset(reader, np.arange(len(labels)), labels, BATCH, 0)
    standardise(network, rows, "cpu")
    with tempfile.TemporaryDirectory() as folder:
        checkpoint = Path(folder) / "run.pt"
        recipe = Recipe(epochs=count, optimizer="sgd", warmup=0)
        done = train(network, recipe, 1e-3, rows, None, Classification(), checkpoint, 0, "cpu", silent, "benchmark")
    return done.history


def trunk_rows(folder: Path, name: str, lines: list[str], cache: Path) -> list[dict[str, Any]]:
    """Compare the cached trunk with the whole network, by line and precision."""
    rows = []
    source = open_source(folder)
    for precision in dict.fromkeys(("fp32", resolve().precision)):
        for line in lines:
            setup = TrainingSetup(
                source, name, line, Recipe(), "pretrained", False, False, cache, precision, "float32", None, None,
                "auto", "cpu", None, None, silent, lambda _: None,
            )  # fmt: skip
            data = prepare_data(setup, [(0, "all")])
            images = DecodedImages(source, data.backbone.preprocessing, "none")
            both = (precision, "fp32")
            cached = epochs_of(data.backbone, data.reader, source, line, both, 2)
            whole = epochs_of(data.backbone, images, source, line, both, 2)
            seconds = [history[-1]["seconds"] for history in (cached, whole)]
            losses = [history[0]["train_loss"] for history in (cached, whole)]
            rows.append(
                {
                    "precision": precision,
                    "line": line,
                    "cached s/epoch": seconds[0],
                    "whole s/epoch": seconds[1],
                    "times": seconds[1] / seconds[0],
                    "loss difference": abs(losses[0] - losses[1]),
                }
            )
    return rows


def accuracy_rows(
    folder: Path, name: str, freezes: list[str], seeds: list[int], epochs: int, cache: Path
) -> list[dict[str, Any]]:
    """Compare a head on frozen features with training above each line."""
    began = time.perf_counter()
    extract(folder, [name], output=cache / "fit")
    report = fit(cache / "fit", seeds=seeds)
    results = {"logreg on frozen features": (report.results, time.perf_counter() - began)}
    for freeze in freezes:
        began = time.perf_counter()
        tuned = finetune(folder, name, freeze=freeze, seeds=seeds, epochs=epochs, output=cache / "tune")
        results[f"freeze {freeze}"] = list(tuned.results), time.perf_counter() - began
    return [
        {
            "method": method,
            "seed": one.seed,
            "accuracy": one.accuracy,
            "from": one.accuracy_ci95[0],
            "to": one.accuracy_ci95[1],
            "trained weights": getattr(one, "trainable_parameters", 0),
            "seconds (all seeds)": seconds,
        }
        for method, (found, seconds) in results.items()
        for one in found
    ]


def speed_rows(folder: Path, peers: list[str]) -> list[dict[str, Any]]:
    """Compare epochs that train everything."""
    source = open_source(folder)
    plain = {name: tutorial(folder, name) for name in peers}
    rows = []
    for name in peers:
        backbone = load_backbone(name)
        resolved = Resolved("torch", "cpu", "fp32")
        precision = train_precision(ThawedNetwork(backbone, "none", "linear", 2), resolved, "auto")
        images = DecodedImages(source, backbone.preprocessing, "none")
        history = epochs_of(backbone, images, source, "none", ("fp32", precision), 2)
        ours = len(source.items) / history[-1]["seconds"]
        rows.append(
            {
                "backbone": name,
                "precision": precision,
                "tutorial": plain[name],
                "ours": ours,
                "times": ours / plain[name],
            }
        )
    return rows


def show(title: str, rows: list[dict[str, Any]]) -> None:
    """Print one table."""
    table = Table(*rows[0], title=title)
    for row in rows:
        table.add_row(*(f"{value:.4g}" if isinstance(value, float) else str(value) for value in row.values()))
    Console(width=140).print(table)


@click.command()
@click.argument("source", type=click.Path(exists=True, path_type=Path))
@click.option("-b", "--backbone", default="efficientnet_lite0", show_default=True)
@click.option("--line", multiple=True, default=["all", "blocks.5", "blocks.4", "blocks.3"], show_default=True)
@click.option("--freeze", multiple=True, default=["all", "blocks.4", "none"], show_default=True)
@click.option("--peer", multiple=True, default=["resnet18@random:0", "efficientnet_lite0"], show_default=True)
@click.option("--seeds", default=3, show_default=True)
@click.option("--epochs", default=20, show_default=True, help="At most, for accuracy.")
@click.option("--table", multiple=True, type=click.Choice(TABLES), help="Only these; repeat.")
@click.option("--json", "as_json", is_flag=True)
def main(
    source: Path,
    backbone: str,
    line: tuple[str, ...],
    freeze: tuple[str, ...],
    peer: tuple[str, ...],
    seeds: int,
    epochs: int,
    table: tuple[str, ...],
    as_json: bool,
) -> None:
    """Measure and print."""
    seeds_used = list(range(seeds))
    tables: dict[str, list[dict[str, Any]]] = {}
    with tempfile.TemporaryDirectory() as folder:
        cache = Path(folder)
        measured: dict[str, Callable[[], list[dict[str, Any]]]] = {
            "speed": lambda: speed_rows(source, list(peer)),
            "trunk": lambda: trunk_rows(source, backbone, list(line), cache),
            "accuracy": lambda: accuracy_rows(source, backbone, list(freeze), seeds_used, epochs, cache),
        }
        for title in table or measured:
            tables[title] = measured[title]()
            if not as_json:
                show(title, tables[title])
    if as_json:
        click.echo(json.dumps(tables))


if __name__ == "__main__":
    main()
