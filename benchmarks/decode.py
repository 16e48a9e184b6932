"""Decoded images a second and core, from a JPEG's bytes to the network's input, beside Pillow's plain path.

The plain path is what a torchvision recipe does before it makes a tensor: open, convert to RGB, `Resize`, `CenterCrop`.
Both run on the same bytes in turn, in one thread; then ours in all threads of the loader, from files. Photos are made
from scikit-learn's two sample pictures. The last column is the largest mean difference of a photo, in grey levels.

    python benchmarks/decode.py [--seconds 5]
"""

from __future__ import annotations

import io
import json
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import numpy as np
from PIL import Image
from rich.console import Console
from rich.table import Table
from sklearn.datasets import load_sample_images
from torchvision import transforms

from pipeline.images.loader import default_workers, load_images
from pipeline.images.resize import prepare
from pipeline.images.sources.registry import open_source
from pipeline.spec import Preprocessing

RULE = Preprocessing((224, 224), 256, "bilinear", (0.0, 0.0, 0.0), (1.0, 1.0, 1.0))
SIZES = ((533, 400), (1600, 1200), (4000, 3000))
PLAIN = transforms.Compose([transforms.Resize(RULE.resize), transforms.CenterCrop(RULE.size)])


def make_photos(size: tuple[int, int]) -> list[bytes]:
    """Return the two sample pictures as JPEGs of `size` (width, height)."""
    photos = []
    for picture in load_sample_images().images:
        stream = io.BytesIO()
        Image.fromarray(picture).resize(size, Image.Resampling.LANCZOS).save(stream, "JPEG", quality=90)
        photos.append(stream.getvalue())
    return photos


def plain(data: bytes) -> np.ndarray:
    """Decode as a torchvision recipe does."""
    with Image.open(io.BytesIO(data)) as image:
        return np.asarray(PLAIN(image.convert("RGB")))


def rate(decode: Callable[[bytes], np.ndarray], photos: list[bytes], seconds: float) -> float:
    """Return images/s of one thread."""
    count, began = 0, time.perf_counter()
    while time.perf_counter() - began < seconds:
        for photo in photos:
            decode(photo)
        count += len(photos)
    return count / (time.perf_counter() - began)


def threads_rate(photos: list[bytes], count: int) -> float:
    """Return images/s of the loader with a thread a core, over `count` different files."""
    with tempfile.TemporaryDirectory() as folder:
        for number in range(count):  # what follows a JPEG's end is not decoded
            (Path(folder) / f"{number:05d}.jpg").write_bytes(photos[number % len(photos)] + number.to_bytes(4, "big"))
        source = open_source(folder)
        began = time.perf_counter()
        done = sum(len(batch) for batch in load_images(source, range(count), [RULE], 8))
        return done / (time.perf_counter() - began)


def measure(size: tuple[int, int], seconds: float) -> dict[str, Any]:
    """Measure photos of one size."""
    photos = make_photos(size)
    halves = [(rate(plain, photos, seconds / 2), rate(ours, photos, seconds / 2)) for _ in range(2)]
    slow, fast = (sum(side) / 2 for side in zip(*halves, strict=True))
    pairs = [(plain(photo).astype(int), ours(photo).astype(int)) for photo in photos]
    return {
        "photos": f"{size[0]}x{size[1]}",
        "plain": slow,
        "thawline": fast,
        "times": fast / slow,
        "all threads": threads_rate(photos, max(16, int(fast * seconds))),
        "difference": max(float(np.abs(a - b).mean()) for a, b in pairs),
    }


def ours(data: bytes) -> np.ndarray:
    """Decode as `extract` does."""
    return prepare(data, RULE)


@click.command()
@click.option("--seconds", default=5.0, show_default=True, help="For each measurement.")
def main(seconds: float) -> None:
    """Print a table and a JSON line."""
    report = [measure(size, seconds) for size in SIZES]
    table = Table(*report[0], title=f"images/s; all threads: {default_workers()}")
    for row in report:
        table.add_row(*(f"{value:.1f}" if isinstance(value, float) else value for value in row.values()))
    Console(width=110).print(table)
    click.echo(json.dumps(report))


if __name__ == "__main__":
    main()
