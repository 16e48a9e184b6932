"""Images per second of `thawline extract` beside the recipe most people write, on the same photos in the same run.

The plain recipe is a torchvision transform, a DataLoader (with no and with two workers; the better counts) and an
eager float32 network with its classifier taken off. Ours is `pipeline.extract.extract`, cache file and all. Both start
with the network loaded into memory; rounds alternate, medians are reported with the spread.

    python benchmarks/extract.py [SOURCE] [--backbone NAME]... [--rounds 3] [--images 400]

Without SOURCE, photos are made from scikit-learn's two sample pictures (crops, 400x533, JPEG).
"""

from __future__ import annotations

import json
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import click
import numpy as np
import torch
from PIL import Image
from rich.console import Console
from rich.table import Table
from sklearn.datasets import load_sample_images
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms

from pipeline.backbones.registry import Backbone
from pipeline.backbones.registry import load as load_backbone
from pipeline.extract import extract
from pipeline.images.source import open_source


class Photos(Dataset[torch.Tensor]):
    """Paths to preprocessed tensors, as a tutorial would write it."""

    def __init__(self, paths: list[Path], backbone: Backbone) -> None:
        rule = backbone.preprocessing
        mode = transforms.InterpolationMode(rule.interpolation)
        self.paths = paths
        self.transform = transforms.Compose(
            [
                transforms.Resize(rule.resize, interpolation=mode, antialias=True),
                transforms.CenterCrop(rule.size),
                transforms.ToTensor(),
                transforms.Normalize(rule.mean, rule.std),
            ]
        )

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> torch.Tensor:
        with Image.open(self.paths[index]) as image:
            tensor: torch.Tensor = self.transform(image.convert("RGB"))
            return tensor


def plain(paths: list[Path], backbone: Backbone, workers: int) -> float:
    """Return images/s of the plain recipe."""
    network = backbone.module
    name, _, last = str(backbone.classifier).rpartition(".")
    parent = network.get_submodule(name)
    classifier = getattr(parent, last)
    setattr(parent, last, torch.nn.Identity())
    try:
        loader = DataLoader(Photos(paths, backbone), batch_size=32, num_workers=workers)
        start = time.perf_counter()
        with torch.no_grad():
            features = torch.cat([network(batch) for batch in loader]).numpy()
        with tempfile.TemporaryFile() as file:
            np.save(file, features)
        return len(paths) / (time.perf_counter() - start)
    finally:
        setattr(parent, last, classifier)


def ours(source: Path, backbone: str) -> float:
    """Return images/s of `extract` into a fresh cache, once the network is loaded."""
    with tempfile.TemporaryDirectory() as cache:
        return extract(source, [backbone], output=cache)[0].images_per_second


def make_photos(folder: Path, count: int) -> None:
    """Write `count` different JPEG crops of two real photos, 400x533 pixels."""
    generator = np.random.default_rng(0)
    pictures = [Image.fromarray(picture) for picture in load_sample_images().images]
    for index in range(count):
        picture = pictures[index % 2]
        left, top = int(generator.integers(0, 100)), int(generator.integers(0, 27))
        crop = picture.crop((left, top, left + 533, top + 400))
        crop.save(folder / f"{index:05d}.jpg", quality=90)


def measure(rounds: int, runs: dict[str, Callable[[], float]]) -> dict[str, list[float]]:
    """Run every entry `rounds` times, alternating, so that noise of the machine meets all alike."""
    rates: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(rounds):
        for name, run in runs.items():
            rates[name].append(run())
    return rates


@click.command()
@click.argument("source", required=False, type=click.Path(exists=True, path_type=Path))
@click.option("--backbone", "-b", "backbones", multiple=True, default=("efficientnet_lite0", "resnet50@random:0"))
@click.option("--rounds", default=3, show_default=True)
@click.option("--images", default=400, show_default=True, help="How many photos to make when no SOURCE is given.")
def main(source: Path | None, backbones: tuple[str, ...], rounds: int, images: int) -> None:
    """Print a table and a JSON line."""
    with tempfile.TemporaryDirectory() as folder:
        if source is None:
            source = Path(folder)
            make_photos(source, images)
        items = open_source(source).items
        paths = [source / item.uri for item in items]
        table = Table("backbone", "plain, 0 workers", "plain, 2 workers", "thawline", "ratio", title="images/s")
        report = []
        for name in backbones:
            backbone = load_backbone(name)
            rates = measure(
                rounds,
                {
                    "plain0": lambda backbone=backbone: plain(paths, backbone, 0),  # type: ignore[misc]
                    "plain2": lambda backbone=backbone: plain(paths, backbone, 2),  # type: ignore[misc]
                    "thawline": lambda name=name: ours(source, name),  # type: ignore[misc]
                },
            )
            middle = {key: statistics.median(values) for key, values in rates.items()}
            ratio = middle["thawline"] / max(middle["plain0"], middle["plain2"])
            cells = [f"{middle[key]:.1f} ({min(rates[key]):.1f}–{max(rates[key]):.1f})" for key in rates]
            table.add_row(name, *cells, f"{ratio:.1f}")
            report.append({"backbone": name, "images": len(paths), "rates": rates, "ratio": ratio})
    Console(width=110).print(table)
    machine = {"cpu": platform.processor() or platform.machine(), "cores": os.cpu_count(), "torch": torch.__version__}
    click.echo(json.dumps({"machine": machine, "results": report}))


if __name__ == "__main__":
    main()
