"""Images per second of `thawline extract` beside the recipe most people write, on the same photos in the same run.

The plain recipe is a torchvision transform, a DataLoader (with no and with two workers; the better counts) and an
eager float32 network with its classifier taken off. Ours is `pipeline.extract.extract`, cache file and all. Both start
with the network loaded into memory. Each measurement has a process of its own, they alternate, and medians are reported
with the spread. The bound is what decode (all cores decoding, no network) and model (batches in memory, no decode)
allow together: 1 / (1 / model + 1 / decode). Peak memory is that of our process.

    python benchmarks/extract.py [SOURCE] [--backbone NAME]... [--rounds 3] [--images 400]

Without SOURCE, photos are made from scikit-learn's two sample pictures (crops, 400x533, JPEG).
"""

from __future__ import annotations

import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch
from PIL import Image
from rich.console import Console
from rich.table import Table
from sklearn.datasets import load_sample_images
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms

from pipeline.backbones.backbone import Backbone
from pipeline.backbones.registry import load_backbone
from pipeline.backbones.taps import tap
from pipeline.engines.engine import build_engine, stream
from pipeline.engines.select import resolve
from pipeline.extract import extract
from pipeline.images.loader import default_workers, load_images
from pipeline.images.sources.registry import open_source


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


@contextmanager
def without_classifier(backbone: Backbone) -> Iterator[torch.nn.Module]:
    """Give the network with its classifier taken off, and put that back afterwards."""
    network = backbone.module
    name, _, last = backbone.classifiers[0].rpartition(".")
    parent = network.get_submodule(name)
    classifier = getattr(parent, last)
    setattr(parent, last, torch.nn.Identity())
    try:
        yield network
    finally:
        setattr(parent, last, classifier)


def plain(source: Path, backbone: Backbone, workers: int) -> float:
    """Return images/s of the plain recipe."""
    paths = [source / item.uri for item in open_source(source).items]
    with without_classifier(backbone) as network:
        loader = DataLoader(Photos(paths, backbone), batch_size=32, num_workers=workers)
        start = time.perf_counter()
        with torch.no_grad():
            features = torch.cat([network(batch) for batch in loader]).numpy()
        with tempfile.TemporaryFile() as file:
            np.save(file, features)
        return len(paths) / (time.perf_counter() - start)


def ours(source: Path, backbone: Backbone) -> float:
    """Return images/s of `extract` into a fresh cache, once the network is loaded."""
    with tempfile.TemporaryDirectory() as cache:
        return extract(source, [backbone.handle], output=cache)[0].images_per_second


def decode_rate(source: Path, backbone: Backbone) -> float:
    """Return images/s of reading and decoding alone."""
    images = open_source(source)
    start = time.perf_counter()
    count = sum(len(batch) for batch in load_images(images, range(len(images.items)), [backbone.preprocessing], 8))
    return count / (time.perf_counter() - start)


def model_rate(backbone: Backbone, seconds: float = 5.0) -> float:
    """Return images/s of the engine alone, on batches in memory."""
    resolved = resolve()
    engine = build_engine(tap(backbone, ["penultimate"]), resolved, resolved.batch_size)
    shape = (resolved.batch_size, *backbone.preprocessing.size, 3)
    pixels = np.random.default_rng(0).integers(0, 256, shape, np.uint8)
    list(stream(engine, [pixels] * 4))
    count, start = 0, time.perf_counter()
    while time.perf_counter() - start < seconds:
        count += sum(len(features) for features, *_ in stream(engine, [pixels] * 16))
    return count / (time.perf_counter() - start)


MEASURES: dict[str, Callable[[Path, Backbone], float]] = {
    "plain, 0 workers": lambda source, backbone: plain(source, backbone, 0),
    "plain, 2 workers": lambda source, backbone: plain(source, backbone, 2),
    "thawline": ours,
    "model": lambda source, backbone: model_rate(backbone),
    "decode": decode_rate,
}


def in_a_process(source: Path, backbone: str, what: str, cores: int | None = None) -> tuple[float, float]:
    """Return images/s and peak memory in MB of one of `MEASURES`, in a process of its own."""
    command = [sys.executable, __file__, str(source), "-b", backbone, "--child", what]
    affinity = sorted(os.sched_getaffinity(0))[:cores]
    limited = ["taskset", "-c", ",".join(map(str, affinity)), *command]
    done = subprocess.run(limited, check=True, capture_output=True, text=True)
    rate, peak = json.loads(done.stdout)
    return rate, peak


def make_photos(folder: Path, count: int) -> None:
    """Write `count` different JPEG crops of two real photos, 400x533 pixels."""
    generator = np.random.default_rng(0)
    pictures = [Image.fromarray(picture) for picture in load_sample_images().images]
    for index in range(count):
        picture = pictures[index % 2]
        left, top = int(generator.integers(0, 100)), int(generator.integers(0, 27))
        crop = picture.crop((left, top, left + 533, top + 400))
        crop.save(folder / f"{index:05d}.jpg", quality=90)


def compare(source: Path, name: str, rounds: int) -> dict[str, Any]:
    """Measure one backbone in every way, in turn, so that the machine's noise meets all alike."""
    runs = {what: [] for what in MEASURES}  # type: dict[str, list[tuple[float, float]]]
    for _ in range(rounds):
        for what, found in runs.items():
            found.append(in_a_process(source, name, what))
    rates = {what: [rate for rate, _ in found] for what, found in runs.items()}
    middle = {what: statistics.median(found) for what, found in rates.items()}
    bound = 1 / (1 / middle["model"] + 1 / middle["decode"])
    return {
        "backbone": name,
        "rates": rates,
        "ratio": middle["thawline"] / max(middle["plain, 0 workers"], middle["plain, 2 workers"]),
        "bound": bound,
        "share_of_bound": middle["thawline"] / bound,
        "one_core": in_a_process(source, name, "thawline", cores=1)[0],
        "peak_mb": max(peak for _, peak in runs["thawline"]),
    }


def table_of(report: list[dict[str, Any]]) -> Table:
    """Return the report as a table of medians (lowest–highest)."""
    spread, alone = list(MEASURES)[:3], list(MEASURES)[3:]
    table = Table("backbone", *spread, "ratio", *alone, "of bound", "1 core", "MB", title="images/s", box=None)
    for entry in report:
        rates = entry["rates"]
        middle = {what: statistics.median(found) for what, found in rates.items()}
        table.add_row(
            entry["backbone"],
            *(f"{middle[what]:.1f} ({min(rates[what]):.1f}–{max(rates[what]):.1f})" for what in spread),
            f"{entry['ratio']:.1f}",
            *(f"{middle[what]:.0f}" for what in alone),
            f"{entry['share_of_bound']:.0%}",
            f"{entry['one_core']:.0f}",
            f"{entry['peak_mb']:.0f}",
        )
    return table


@click.command()
@click.argument("source", required=False, type=click.Path(exists=True, path_type=Path))
@click.option("--backbone", "-b", "backbones", multiple=True, default=("efficientnet_lite0", "resnet50@random:0"))
@click.option("--rounds", default=3, show_default=True)
@click.option("--images", default=400, show_default=True, help="How many photos to make when no SOURCE is given.")
@click.option("--child", hidden=True, help="Measure one thing.")
def main(source: Path | None, backbones: tuple[str, ...], rounds: int, images: int, child: str | None) -> None:
    """Print a table and a JSON line."""
    if child is not None and source is not None:
        click.echo(json.dumps([MEASURES[child](source, load_backbone(backbones[0])), peak_mb()]))
        return
    with tempfile.TemporaryDirectory() as folder:
        if source is None:
            source = Path(folder)
            make_photos(source, images)
        report = [compare(source, name, rounds) for name in backbones]
        count = len(open_source(source).items)
    Console(width=160).print(table_of(report))
    machine = {"cpu": cpu_name(), "cores": default_workers(), "torch": torch.__version__, "images": count}
    click.echo(json.dumps({"machine": machine, "results": report}))


def peak_mb() -> float:
    """Return the most memory that this process has held, in MB."""
    status = Path("/proc/self/status").read_text()
    return int(status.partition("VmHWM:")[2].split()[0]) * 1.024e-3


def cpu_name() -> str:
    """Return the processor's name and what of it computes bf16."""
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    flags = {flag for line in lines if line.startswith("flags") for flag in line.split()}
    return f"{names[0] if names else platform.machine()}, {' '.join(sorted(flags & {'avx512_bf16', 'amx_bf16'}))}"


if __name__ == "__main__":
    main()
