"""What the cache costs, in one run on this machine: ``python benchmarks/cache.py``.

Kills, and damaged and forged files, have harnesses of their own beside this file, ``kills.py`` and ``fuzz.py``.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import statistics
import subprocess
import sys
import tarfile
import tempfile
import time
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import joblib
import numpy as np
from numpy.typing import NDArray
from PIL import Image

from features_cache import CacheWriter, LayerInfo, Rows, grow, open_cache, same_rows, verify
from pipeline.extract import extract
from pipeline.extraction.lookup import rows_of
from pipeline.images.sources.registry import open_source

TINY = {"backbones": ["resnet18@random:0"], "layers": ["layer1"], "size": 32}
Figures = dict[str, float]

FILES = 200
"""Archives, and shards, that are listed."""


def fill(path: Path, count: int, dim: int) -> None:
    """Write a complete cache of random features."""
    column, none = np.arange(count), [""] * count
    rows = Rows([f"{i:08d}.jpg" for i in range(count)], column % 10, none, none, column, column)
    layer = LayerInfo("a", dim, "float32", {}, "f")
    generator = np.random.default_rng(0)
    with CacheWriter.create(path, rows, list("abcdefghij"), [layer], {"source": "s"}, {}) as writer:
        for start in range(0, count, 4096):
            k = column[start : start + 4096]
            features = {"a": generator.standard_normal((len(k), dim), np.float32)}
            writer.write(k, features, generator.integers(0, 256, (len(k), 16)))


def photos(folder: Path, count: int, width: int, height: int, ending: str) -> Path:
    """Write smooth random pictures, each another one."""
    generator = np.random.default_rng(0)
    folder.mkdir()
    for number in range(count):
        small = Image.fromarray(generator.integers(0, 256, (min(height, 24), min(width, 32), 3), np.uint8))
        small.resize((width, height), Image.Resampling.BICUBIC).save(folder / f"{number:06d}.{ending}")
    return folder


def writing(folder: Path) -> Figures:
    """Share of an extraction's time that goes into the writer; stages and penultimate of the default network."""
    spent = 0.0

    def timed(method: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **options: Any) -> Any:
            nonlocal spent
            began = time.perf_counter()
            try:
                return method(*arguments, **options)
            finally:
                spent += time.perf_counter() - began

        return call

    source = photos(folder / "photos", 1500, 400, 533, "jpg")
    plain = {name: getattr(CacheWriter, name) for name in ("write", "close")}
    try:
        for name, method in plain.items():
            setattr(CacheWriter, name, timed(method))
        (result,) = extract(source, layers=["stages", "penultimate"], output=folder / "writing")
    finally:
        for name, method in plain.items():
            setattr(CacheWriter, name, method)
    return {"images_per_second": result.images_per_second, "writing_percent": 100 * spent / result.seconds}


def opening(folder: Path) -> Figures:
    """Milliseconds from path to matrix, and megabytes that it adds to the process."""
    figures = {}
    for count, name in ((10_000, "10k"), (1_000_000, "1M")):
        path = folder / f"{name}.h5"
        fill(path, count, 64)
        times = []
        before = _private_bytes()
        for _ in range(20):
            began = time.perf_counter()
            matrix = open_cache(path).matrix("a")
            times.append(1000 * (time.perf_counter() - began))
        figures[f"ms_{name}"] = statistics.median(times)
        figures[f"mb_{name}"] = (_private_bytes() - before) / 1e6
    shared = joblib.Parallel(2)(joblib.delayed(_worker)(matrix) for _ in range(2))
    return figures | {"matrix_mb": matrix.nbytes / 1e6, "worker_private_mb": max(shared)}


def _worker(matrix: NDArray[Any]) -> float:
    before = _private_bytes()
    float(matrix.sum())
    return (_private_bytes() - before) / 1e6


def _private_bytes() -> int:
    """Return the bytes that belong to this process alone."""
    lines = Path("/proc/self/smaps_rollup").read_text().splitlines()
    return 1024 * sum(int(line.split()[1]) for line in lines if line.startswith(("Private_Dirty", "Anonymous")))


def sources(folder: Path) -> Figures:
    """Peak memory of an extraction by its number of images; an unchanged source again, listed and re-read."""
    figures = {}
    many = photos(folder / "many", 50_000, 16, 16, "png")
    few = folder / "few"
    few.mkdir()
    for path in sorted(many.iterdir())[:5000]:
        os.link(path, few / path.name)
    for source, name in ((few, "5k"), (many, "50k")):
        command = [sys.executable, __file__, "--extract", str(source), str(folder / f"cache-{name}")]
        figures[f"peak_mb_{name}"] = float(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    for rehash, name in ((False, "recognised_per_second"), (True, "rehashed_per_second")):
        began = time.perf_counter()
        (result,) = extract(many, output=folder / "cache-50k", rehash=rehash, **TINY)  # type: ignore[arg-type]
        figures[name] = 50_000 / (time.perf_counter() - began)
        if result.computed:
            raise SystemExit("images were computed again")
    return figures


def listing(folder: Path) -> Figures:
    """Seconds of processor time and peak bytes for each row, of what is done before and beside computing.

    A folder, a manifest of its files, zip archives and tar shards of them are listed, the shards twice; rows of the
    folder are compared with an unchanged cache file of them; and that file grows by one row. Set TMPDIR to a folder in
    memory, where a million files are written faster.
    """
    count, figures = 1_000_000, Figures()
    images = folder / "images"
    for number in range(count):
        if number % 1000 == 0:
            (images / f"{number // 1000:04d}").mkdir(parents=True)
        (images / f"{number // 1000:04d}" / f"{number:08d}.png").write_bytes(b"%d" % number)
    uris = sorted(path.relative_to(folder).as_posix() for path in images.glob("*/*"))
    manifest = folder / "manifest.csv"
    manifest.write_text("path,label,split\n" + "".join(f"{uri},{uri[7:10]},train\n" for uri in uris))
    shards, archives = folder / "shards", folder / "archives"
    shards.mkdir()
    archives.mkdir()
    for number in range(FILES):
        with zipfile.ZipFile(archives / f"{number:05d}.zip", "w") as archive:
            for uri in uris[number::FILES]:
                archive.writestr(uri[7:], b"x")
        with tarfile.open(shards / f"{number:05d}.tar", "w") as shard:
            for uri in uris[number::FILES]:
                for member, data in ((f"{uri[12:-4]}.png", b"x"), (f"{uri[12:-4]}.cls", b"7")):
                    info = tarfile.TarInfo(member)
                    info.size = len(data)
                    shard.addfile(info, io.BytesIO(data))
    cache = folder / "cache" / "all.h5"
    sources = {"folder": images, "manifest": manifest, "archives": archives}
    sources |= {"shards": shards, "again": shards, "grow": images}
    for kind, path in sources.items():
        if kind == "grow":
            (images / "0000" / "new.png").write_bytes(b"new")
        command = [sys.executable, __file__, "--list", kind, str(path), str(cache)]
        env = os.environ | {"XDG_CACHE_HOME": str(folder / "user")}
        told = subprocess.run(command, check=True, capture_output=True, text=True, env=env).stdout
        figures |= {f"{name}_{kind}": value for name, value in json.loads(told).items()}
    return figures


def list_rows(kind: str, path: str, cache: str) -> Figures:
    """List a source, or let the cache of a folder grow; return microseconds, and peak bytes above the start, a row."""
    file = Path(cache)
    rows_of(open_source("digits"))  # imports
    before, began = _peak(), time.process_time()
    images = open_source(path)
    rows = rows_of(images)
    count = len(rows)
    figures = {"us": 1e6 * (time.process_time() - began) / count, "bytes": (_peak() - before) / count}
    layer = LayerInfo("a", 8, "float32", {}, "f")
    if kind == "folder":
        with CacheWriter.create(file, rows, images.classes, [layer], {"source": "s"}, {}) as writer:
            digests = np.random.default_rng(0).integers(0, 256, (count, 16), np.uint8)
            for start in range(0, count, 4096):
                k = np.arange(start, min(start + 4096, count))
                writer.write(k, {"a": np.zeros((len(k), 8), np.float32)}, digests[k])
        began = time.process_time()
        if not same_rows(open_cache(file), rows, images.classes):
            raise SystemExit("the source differs from its cache")
        figures["us_compared"] = 1e6 * (time.process_time() - began) / count
    if kind == "grow":
        began = time.process_time()
        grow(file, rows, images.classes, [layer], {"source": "s"}, {}).close()
        figures = {"us": 1e6 * (time.process_time() - began) / count, "bytes": (_peak() - before) / count}
    return figures


def _peak() -> int:
    return int(Path("/proc/self/status").read_text().partition("VmHWM:")[2].split()[0]) * 1024


def verifying(folder: Path) -> Figures:
    """Gigabytes a second that `verify` checks from the page cache."""
    figures = {}
    for dim in (320, 1280):
        path = folder / f"{dim}.h5"
        fill(path, 400_000_000 // (4 * dim), dim)
        verify(path)
        began = time.perf_counter()
        report = verify(path)
        figures[f"gb_per_second_{dim}"] = report.bytes_checked / 1e9 / (time.perf_counter() - began)
    return figures


def main() -> None:
    """Parse, measure, print."""
    parts = {"writing": writing, "opening": opening, "sources": sources, "listing": listing, "verifying": verifying}
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--part", choices=parts, action="append", help="measure only this; repeat")
    parser.add_argument("--extract", nargs=2, metavar=("SOURCE", "CACHE"), help=argparse.SUPPRESS)
    parser.add_argument("--list", nargs=3, metavar=("KIND", "SOURCE", "CACHE"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.list:
        print(json.dumps(list_rows(*arguments.list)))
        return
    if arguments.extract:
        extract(arguments.extract[0], output=arguments.extract[1], **TINY)  # type: ignore[arg-type]
        status = Path("/proc/self/status").read_text()
        print(int(status.partition("VmHWM:")[2].split()[0]) * 1.024e-3)
        return
    report = {}
    for name in arguments.part or parts:
        with tempfile.TemporaryDirectory() as folder:
            report[name] = {key: round(value, 3) for key, value in parts[name](Path(folder)).items()}
            print(name, *(f"{key} {value:g}" for key, value in report[name].items()), sep="  ", file=sys.stderr)
    print(json.dumps(report))


if __name__ == "__main__":
    main()
