"""Forge every kind of file that thawline reads, and count how reading ends: ``python benchmarks/fuzz.py``.

Each case makes a forged file from a seed and reads it the way the commands do. Digests are made to fit, so that what
stands behind them is tested. A case may end well or with a one-line error of thawline. Anything else is a foreign
error: its traceback is printed once, with the seed of the first case. ``python benchmarks/fuzz.py KIND --seed N`` runs
one case again. The kinds `structure` and `rows` are a cache with random damage and no fitting digests: it must be
refused, or be read as if nothing were damaged, and `verify` must name each damaged row.

Cases run in child processes with a limit on memory, each child some hundred cases. A case that takes longer than
`LIMIT_S`, or that ends the child, costs that child alone. The last column of the table is the most memory that a case
took.
"""

from __future__ import annotations

import os

os.environ |= {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}  # threads do not survive a fork

import argparse
import contextlib
import copy
import csv
import functools
import gc
import gzip
import io
import json
import pickle
import random
import re
import resource
import select
import shutil
import signal
import struct
import sys
import tarfile
import tempfile
import traceback
import warnings
import zipfile
import zlib
from collections import Counter, OrderedDict
from collections.abc import Callable, Generator
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np

from features_cache import (
    DONE,
    CacheFile,
    CacheWriter,
    LayerInfo,
    Rows,
    ThawlineError,
    export_features,
    open_cache,
    verify,
)
from features_cache.header import header_line, structure_digest

BATCH = 500
LIMIT_S = 120.0
LIMIT_BYTES = 4 << 30
STATUS = Path("/proc/self/status")

Read = Callable[[], object]
Forge = Callable[[random.Random], Read]
"""Makes a forged file and returns what reads it."""

# ---------------------------------------------------------------------------------------------------------- mutations

VALUES: list[Any] = [
    None, True, False, -1, 0, 1, 3, 2**31, 2**63, 10**30, 0.5, 1e308, float("nan"), float("inf"),
    "", "x", "\0", "../x", "é", "\ud800", "a\nb", "all", "0" * 5000, [], [1], ["x"], [[]], {}, {"a": 1},
]  # fmt: skip
WORDS = [0, 1, 2, 4, 0x7F, 0x80, 0xFF, 0x7FFF, 0x8000, 0xFFFF, 0x10000, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF]


def changed(value: Any, rng: random.Random) -> Any:
    """Return a copy of a JSON value with one part replaced, removed, moved or repeated."""
    value = copy.deepcopy(value)
    node = value
    while isinstance(node, dict | list) and node:
        keys = list(node) if isinstance(node, dict) else list(range(len(node)))
        key = rng.choice(keys)
        inner = node[key]
        if isinstance(inner, dict | list) and inner and rng.random() < 0.8:
            node = inner
            continue
        action = rng.random()
        if isinstance(inner, str) and action < 0.3:
            at = rng.randrange(len(inner) + 1)
            node[key] = inner[:at] + rng.choice(["9", "x", ".", "é", ""]) + inner[at + 1 :]
        elif action < 0.4:
            del node[key]
        elif action < 0.5:
            node[key] = copy.deepcopy(node[rng.choice(keys)])
        elif action < 0.55:
            node[key] = {"a": inner} if rng.random() < 0.5 else [inner, inner]
        elif action < 0.6 and isinstance(inner, int | float):
            node[key] = -inner if rng.random() < 0.5 else inner * rng.choice([2, 1000, 2**40])
        else:
            node[key] = rng.choice(VALUES)
        return value
    return rng.choice(VALUES)


def written(value: Any, rng: random.Random) -> bytes:
    """Return JSON, now and then with one key twice, too deep, or damaged."""
    text = json.dumps(value)
    if rng.random() < 0.15:
        at = rng.randrange(len(text) + 1)
        text = text[:at] + rng.choice('{}[],"0e-x') * rng.choice([1, 1, 1, 100_000]) + text[at:]
    if rng.random() < 0.05:
        text = text.replace("{", '{"kind": 1, "kind": [], ', 1)
    data = text.encode("utf-8", "surrogatepass")
    return damaged(data, rng) if rng.random() < 0.05 else data


def damaged(data: bytes, rng: random.Random) -> bytes:
    """Return bytes with bits flipped, numbers replaced, and parts cut, removed, repeated or swapped."""
    found = bytearray(data)
    for _ in range(rng.choice([1, 1, 2, 5, 30])):
        if not found:
            break
        at = rng.randrange(min(len(found), rng.choice([64, 512, len(found)])))
        other, length = rng.randrange(len(found)), rng.choice([1, 4, 16, 300])
        match rng.randrange(9):
            case 0 | 1:
                found[at] ^= 1 << rng.randrange(8)
            case 2:
                found[at] = rng.randrange(256)
            case 3 | 4:
                width = rng.choice([1, 2, 4])
                order = rng.choice([1, -1])  # little or big end first
                found[at : at + width] = (rng.choice(WORDS) & ((1 << 8 * width) - 1)).to_bytes(width, "little")[::order]
            case 5 if rng.random() < 0.3:
                del found[at:]
            case 6:
                del found[at : at + length]
            case 7:
                found[at:at] = found[other : other + length]
            case 8:
                found[at : at + length], found[other : other + length] = (
                    found[other : other + length],
                    found[at : at + length],
                )
    return bytes(found)


# ------------------------------------------------------------------------------------------------------------- images


def images(folder: Path) -> Forge:
    """Small pictures in all formats and many modes, loaded for a network of 224 pixels."""
    from PIL import Image

    from pipeline.images.loader import load_images
    from pipeline.images.sources.registry import open_source
    from pipeline.spec import Preprocessing

    preprocessing = Preprocessing((224, 224), 256, "bicubic", (0.5,) * 3, (0.5,) * 3)
    pixels = np.random.default_rng(0).integers(0, 255, (40, 60, 4), np.uint8)
    rgba = Image.fromarray(pixels)
    modes = {mode: rgba.convert(mode) for mode in ("RGB", "L", "P", "1", "LA", "CMYK", "F", "I")}
    modes |= {"RGBA": rgba, "I;16": Image.fromarray(pixels[..., 0].astype(np.uint16) * 250)}
    accepted: dict[str, tuple[str, list[str], list[dict[str, Any]]]] = {
        "JPEG": (".jpg", ["RGB", "L", "CMYK"], [{}, {"progressive": True}, {"exif": b"Exif\0\0MM\0*\0\0\0\x08"}]),
        "PNG": (".png", ["RGB", "L", "P", "1", "LA", "RGBA", "I;16"], [{}]),
        "TIFF": (
            ".tif",
            ["RGB", "L", "1", "CMYK", "F", "I;16", "RGBA"],
            [{}, {"compression": "tiff_lzw"}, {"compression": "jpeg"}, {"compression": "tiff_adobe_deflate"}],
        ),
        "GIF": (".gif", ["P", "L"], [{}]),
        "WEBP": (".webp", ["RGB", "RGBA"], [{}, {"lossless": True}]),
        "BMP": (".bmp", ["RGB", "L", "P", "1"], [{}]),
        "PPM": (".ppm", ["RGB", "L", "1"], [{}]),
    }
    originals: list[tuple[str, list[bytes]]] = []
    for form, (ending, names, settings) in accepted.items():
        found = []
        for name in names:
            for setting in settings:
                stream = io.BytesIO()
                with contextlib.suppress(OSError, ValueError, KeyError, SystemError):  # not every mode in every one
                    modes[name].save(stream, form, **setting)
                    found.append(stream.getvalue())
        originals.append((ending, found))

    def forge(rng: random.Random) -> Read:
        ending, found = rng.choice(originals)
        data = rng.choice(found)
        data = forged_png(data, rng) if ending == ".png" and rng.random() < 0.7 else damaged(data, rng)
        path = folder / ("forged" + rng.choice([ending, ending, "", ".jpg", ".xyz"]))
        path.write_bytes(data)
        return lambda: load(path)

    def load(path: Path) -> None:
        try:
            for batch in load_images(open_source(path), [0], [preprocessing], 1, workers=1):
                if batch[0].failure is not None:
                    raise RefusedError(batch[0].failure)
        finally:
            path.unlink()

    return forge


class RefusedError(ThawlineError):
    """An unreadable row: no error of a command."""


def forged_png(data: bytes, rng: random.Random) -> bytes:
    """Change chunks of a PNG, with checksums that fit."""
    chunks, at = [], 8
    while at + 8 <= len(data):
        length, kind = struct.unpack(">I4s", data[at : at + 8])
        chunks.append((kind, data[at + 8 : at + 8 + length]))
        at += 12 + length
    for _ in range(rng.choice([1, 1, 3])):
        index = rng.randrange(len(chunks))
        kind, content = chunks[index]
        match rng.randrange(6):
            case 0:
                chunks[index] = kind, damaged(content, rng)
            case 1:
                kind, content = chunks[0]
                sides = struct.pack(">II", *(rng.choice([0, 1, 5, 300, 13_000, 70_000, 2**31]) for _ in range(2)))
                rest = bytes([rng.choice([1, 2, 4, 8, 16]), rng.choice([0, 2, 3, 4, 6]), 0, 0, rng.choice([0, 1])])
                chunks[0] = kind, sides + (content[8:] if rng.random() < 0.7 else rest)
            case 2:
                names = [
                    b"tRNS",
                    b"PLTE",
                    b"iCCP",
                    b"zTXt",
                    b"iTXt",
                    b"gAMA",
                    b"eXIf",
                    b"acTL",
                    b"fcTL",
                    b"fdAT",
                    b"IHDR",
                ]
                chunks.insert(index, (rng.choice(names), rng.randbytes(rng.choice([0, 1, 4, 26, 300]))))
            case 3:
                chunks.insert(index, (b"zTXt", b"a\0\0" + zlib.compress(bytes(rng.choice([100, 2_000_000])))))
            case 4:
                del chunks[index]
            case 5:
                chunks.append(chunks.pop(index))
        if not chunks:
            break
    packed = (struct.pack(">I", len(c)) + k + c + struct.pack(">I", zlib.crc32(k + c)) for k, c in chunks)
    return data[:8] + b"".join(packed)


# ------------------------------------------------------------------------------------------------------------- caches


def make_cache(path: Path, rows: int = 30) -> None:
    """Write a small cache file: half of its rows done, one unreadable."""
    column = np.arange(rows)
    none = [""] * rows
    listed = Rows([f"{i}.png" for i in range(rows)], column % 2, ["train"] * rows, none, column + 1, column + 1)
    layers = [LayerInfo("a", 6, "float32", {"x": 1}, "f"), LayerInfo("b", 3, "float16", {}, "g")]
    with CacheWriter.create(path, listed, ["cat", "dog"], layers, {"source": "s"}, {"q": 1}) as writer:
        writer.begin_run({"engine": "torch"})
        k = np.arange(0, rows, 2)
        features = {"a": np.outer(k, np.arange(6)), "b": np.outer(k, [1, 2, 3])}
        writer.write(k, features, np.repeat(k, 16).reshape(-1, 16))
        writer.fail(1, "truncated", None)


def everything(file: CacheFile) -> bytes:
    """Return all that a reader can learn from a cache file."""
    columns = [file.uris, file.labels, file.splits, file.groups, file.digests, file.sizes, file.mtimes_ns]
    columns += [file.states, file.reasons, file.run_ids, *(np.asarray(file.matrix(name)) for name in file.layers)]
    facts = file.handles, file.request, file.classes, file.layers, file.n_rows, file.runs
    return pickle.dumps((facts, [column.tolist() for column in columns]))


def structure(folder: Path) -> Forge:
    """One to twenty bytes of a cache changed before the first array that may change."""
    path, target = folder / "sound.h5", folder / "forged.h5"
    make_cache(path)
    right, data = everything(open_cache(path)), path.read_bytes()
    end = open_cache(path).header.arrays["/runs"].offset
    table = int(data.split(b" ")[2]) + 128

    def forge(rng: random.Random) -> Read:
        found = bytearray(data)
        for _ in range(rng.choice([1, 1, 2, 20])):
            at = rng.randrange(rng.choice([128, table, end]))
            found[at] = rng.choice([found[at] ^ 1 << rng.randrange(8), rng.randrange(256)])
        target.write_bytes(found)
        return read

    def read() -> None:
        assert everything(open_cache(target)) == right, "a damaged file was read as something else"

    return forge


def rows(folder: Path) -> Forge:
    """One bit flipped in what was written for a finished row of a cache; `verify` must name the row."""
    path, target = folder / "sound.h5", folder / "forged.h5"
    make_cache(path)
    file, data = open_cache(path), path.read_bytes()
    done = np.flatnonzero(file.states == DONE).tolist()
    arrays = [
        *(name for name in file.header.arrays if name.startswith("/rows/") and name != "/rows/state"),
        *(f"/{kind}/{layer}" for kind in ("crc", "features") for layer in file.layers),
    ]

    def forge(rng: random.Random) -> Read:
        found = bytearray(data)
        array, row = file.header.arrays[rng.choice(arrays)], rng.choice(done)
        found[array.offset + row * array.row_bytes + rng.randrange(array.row_bytes)] ^= 1 << rng.randrange(8)
        target.write_bytes(found)
        return lambda: check(row)

    def check(row: int) -> None:
        assert {finding.row for finding in verify(target).damaged} == {row}, "verify did not name the damaged row"

    return forge


def caches(folder: Path) -> Forge:
    """The table or the arrays of an extracted cache changed, with digests and checksums that fit."""
    from features_cache import Catalog
    from pipeline.backbones import registry
    from pipeline.extract import extract
    from pipeline.extraction.inspection import check, detail, list_files
    from pipeline.fit import fit
    from pipeline.rank import rank

    photos, sound, target = make_photos(folder), folder / "sound", folder / "cache"
    asked: dict[str, Any] = {"backbones": ["tiny@random:0"], "layers": ["stem", "penultimate"], "size": 8}
    asked["engine"] = "torch"
    known = functools.cache(registry.load_backbone)
    mock.patch.object(registry, "load_backbone", known).start()  # tracing takes longest
    (result,) = extract(photos, output=sound, **asked)
    path = Path(result.path)
    data = path.read_bytes()
    _, _, table_bytes, checked, _, _ = data.split(b"\n", 1)[0].split(b" ")
    line_bytes = data.index(b"\n") + 1
    table = data[line_bytes : line_bytes + int(table_bytes)]
    header = open_cache(path).header

    def forge(rng: random.Random) -> Read:
        body = bytearray(data)
        new = table
        if rng.random() < 0.7:
            value = json.loads(table)
            for _ in range(rng.choice([1, 1, 2])):
                part = rng.choice(["", "", "layers", "request", "handles", "arrays"])
                if part and isinstance(value, dict) and part in value:
                    value[part] = changed(value[part], rng)
                else:
                    value = changed(value, rng)
            new = written(value, rng)
            body[line_bytes : line_bytes + len(new)] = new
        else:
            forge_rows(body, rng)
        length = len(header_line(len(new), int(checked), len(body), "0" * 32))
        if length != line_bytes:  # the number of bytes of the table has more or fewer digits: the table moves
            body = bytearray(bytes(length) + new + bytes(body[length + len(new) :]))
        seal(body, len(new))
        shutil.rmtree(target, ignore_errors=True)
        target.mkdir()
        forged = target / path.name
        forged.write_bytes(body)
        use = rng.choice(uses)
        return lambda: use(forged)

    def seal(body: bytearray, table_bytes: int) -> None:
        """Write a first line that fits."""
        line = header_line(table_bytes, int(checked), len(body), "0" * 32)
        digest = structure_digest(line, bytes(body[len(line) : int(checked)]))
        body[: len(line)] = header_line(table_bytes, int(checked), len(body), digest)

    def forge_rows(body: bytearray, rng: random.Random) -> None:
        """Change cells; the checksums of the rows are made to fit, half of the time."""
        from features_cache.checksums import crc_rows, records_of, source_crc

        for _ in range(rng.choice([1, 3, 30])):
            name = rng.choice(list(header.arrays))
            array = header.arrays[name]
            if array.nbytes:
                at = array.offset + rng.randrange(array.nbytes)
                body[at] = rng.choice([0, 1, 0x7F, 0x80, 0xFF, rng.randrange(256)])
        if rng.random() < 0.5:
            changed_path = folder / "changed.h5"
            seal(body, len(table))
            changed_path.write_bytes(body)
            with contextlib.suppress(ThawlineError):
                file = open_cache(changed_path)
                columns = [np.asarray(file.array(f"/rows/{one}")) for one in ("label", "split", "group", "uri")]
                sums = {
                    "/rows/source_crc": source_crc(*columns),
                    "/rows/result_crc": crc_rows(records_of(file, slice(None))),
                }
                sums |= {f"/crc/{layer}": crc_rows(np.asarray(file.matrix(layer))) for layer in file.layers}
                for one, values in sums.items():
                    array = header.arrays[one]
                    body[array.offset : array.end] = values.tobytes()

    def look(forged: Path) -> None:
        file = open_cache(forged)
        everything(file)
        detail(file)
        list_files(target)
        check(target, photos)
        for layer in file.layers:
            file.xy(layer)
        export_features(file, next(iter(file.layers)), target / "out.npy")

    def train(forged: Path) -> None:
        fit(Catalog(forged), heads=["centroid"], jobs=1)

    def save(forged: Path) -> None:
        fit(Catalog(forged), heads=["centroid"], jobs=1, save=target / "m.skops")

    def score(forged: Path) -> None:
        rank(target)

    def extract_again(forged: Path) -> None:
        with contextlib.suppress(ThawlineError):
            open_cache(forged)
        extract(photos, output=target, **asked)

    uses = [*[look, train, score, extract_again] * 4, save]
    return forge


def parts(folder: Path) -> Forge:
    """The plan of a cache in parts with keys and values changed, with a digest that fits, read and filled."""
    use_tiny_zoo()
    from features_cache.parts import table_digest
    from pipeline.backbones import registry
    from pipeline.extract import extract
    from pipeline.extraction.inspection import check, detail, list_files
    from pipeline.extraction.parts import Computing, fill_part
    from pipeline.fit import fit

    photos, sound, target = make_photos(folder), folder / "sound", folder / "cache"
    asked: dict[str, Any] = {"backbones": ["tiny@random:0"], "layers": ["stem", "penultimate"], "size": 8}
    asked["engine"] = "torch"
    mock.patch.object(registry, "load_backbone", functools.cache(registry.load_backbone)).start()
    (result,) = extract(photos, output=sound, part_rows=5, **asked)
    name, table = Path(result.path).name, json.loads(Path(result.path).read_bytes())
    table.pop("digest")

    def forge(rng: random.Random) -> Read:
        value = table
        for _ in range(rng.choice([1, 1, 2])):
            inner = rng.choice(["", "layers", "request", "handles", "parts", "parts"])
            whole = isinstance(value, dict) and inner in value
            value = {**value, inner: changed(value[inner], rng)} if whole else changed(value, rng)
        shutil.rmtree(target, ignore_errors=True)
        shutil.copytree(sound, target)
        plan = target / name
        sealed = {**value, "digest": table_digest(value)} if isinstance(value, dict) else value
        data = written(sealed, rng)
        plan.write_bytes(damaged(data, rng) if rng.random() < 0.2 else data)
        use = rng.choice([look, look, extract_again, fill_one, train])
        return lambda: use(plan)

    def look(plan: Path) -> None:
        file = open_cache(plan)
        everything(file)
        detail(file)
        list_files(target)
        check(target, photos)

    def train(plan: Path) -> None:
        fit(plan, heads=["centroid"], jobs=1)

    def extract_again(_: Path) -> None:
        extract(photos, output=target, **asked)

    def fill_one(plan: Path) -> None:
        plan.with_name(f"{plan.stem}.p00001.h5").unlink()
        run = str(plan.stat().st_mtime_ns)
        fill_part(run, str(plan), 1, str(photos), None, Computing(engine="torch"), lambda *_: None)

    return forge


def make_photos(folder: Path) -> Path:
    """Write twelve small pictures of two classes, and make the zoo with the network `tiny` known; return the folder."""
    from PIL import Image

    use_tiny_zoo()
    rng = np.random.default_rng(0)
    for number in range(12):
        path = folder / "photos" / ("ab"[number % 2]) / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 255, (9, 9, 3), np.uint8)).save(path)
    return folder / "photos"


def write_targets(photos: Path) -> Path:
    """Write a table with a column for each task, named as it, and return its path."""
    from pipeline.options import TASKS

    table = photos.parent / "targets.csv"
    rows = [f"{'ab'[i % 2]}/{i}.png,{'ab'[i % 2]},{('x', 'y', 'x|y', '|')[i // 2 % 4]},{i}" for i in range(12)]
    table.write_text("\n".join([f"uri,{','.join(TASKS)}", *rows]))
    return table


def use_tiny_zoo() -> None:
    """Make a network of a hundred weights known as `tiny`: real ones take seconds to build."""
    import torch
    from torch import nn

    from pipeline.backbones import registry
    from pipeline.spec import Preprocessing, Size

    class TinyZoo:
        def names(self) -> list[str]:
            return ["tiny"]

        def tags(self, name: str) -> tuple[str, ...]:
            return ()

        def cached(self, name: str, tag: str) -> bool:
            return False

        def build(self, name: str, size: Size | None, classes: int | None) -> nn.Module:
            layers: OrderedDict[str, nn.Module] = OrderedDict(stem=nn.Conv2d(3, 4, 3, 2), act=nn.ReLU())
            layers |= {"pool": nn.AdaptiveAvgPool2d(1), "flat": nn.Flatten(), "fc": nn.Linear(4, classes or 3)}
            return nn.Sequential(layers)

        def pretrained(self, name: str, tag: str, size: Size | None) -> nn.Module:
            raise NotImplementedError

        def preprocessing(self, name: str, tag: str | None) -> Preprocessing:
            return Preprocessing((8, 8), 8, "bilinear", (0.5,) * 3, (0.5,) * 3)

        def weights_paths(self, name: str, tag: str) -> list[Path]:
            return []

        def classifiers(self, name: str, module: nn.Module) -> tuple[str, ...]:
            return ("fc",)

    torch.set_num_threads(1)
    registry.ZOOS["tiny"] = TinyZoo()
    registry._owners.cache_clear()


# ------------------------------------------------------------------------------------------------------------- models


def heads(folder: Path) -> Forge:
    """The schema, an array, the description or the archive of a saved head changed, with a digest that fits."""
    from pipeline.extract import extract
    from pipeline.fit import fit
    from pipeline.heads.registry import FAMILIES_OF
    from pipeline.heads.saved import FORMAT, _content, load_model
    from pipeline.options import CLASSIFICATION, TASKS
    from pipeline.predict import predict

    photos, cache, target = make_photos(folder), folder / "cache", folder / "forged.skops"
    extract(photos, ["tiny@random:0"], ["penultimate"], output=cache, engine="torch", precision="fp32")
    originals = []
    for task, head in product(TASKS, ("logreg", "centroid", "knn", "rbf_svm", "linear_svm", "ridge", "svr")):
        if head not in FAMILIES_OF[task]:
            continue
        fit(cache, heads=[head], labels=write_targets(photos), target=task, task=task, save=folder / "head.skops")
        with zipfile.ZipFile(folder / "head.skops") as archive:
            originals.append({name: archive.read(name) for name in archive.namelist()})
    kept = set(cache.iterdir())

    def forge(rng: random.Random) -> Read:
        members = dict(rng.choice(originals))
        description: Any = json.loads(members.pop("thawline.json"))
        schema: Any = json.loads(members["schema.json"])
        for _ in range(rng.choice([1, 1, 2])):
            name = rng.choice([*members, "thawline.json", "thawline.json", "schema.json", "schema.json"])
            if name == "thawline.json":
                description = changed(description, rng)
            elif name == "schema.json":
                schema = changed(schema, rng)
            elif rng.random() < 0.2:
                members[name] = rng.choice([value for key, value in members.items() if key != "schema.json"])
            else:
                members[name] = forged_array(members[name], rng)
        members["schema.json"] = written(schema, rng)
        if rng.random() < 0.05:
            members.pop(rng.choice(list(members)))
        how = rng.choice([zipfile.ZIP_STORED] * 9 + [zipfile.ZIP_DEFLATED])
        with warnings.catch_warnings(), zipfile.ZipFile(target, "w", how) as archive:
            warnings.simplefilter("ignore")  # of members of one name
            for name, content in members.items():
                archive.writestr(name, content)
                if rng.random() < 0.02:
                    archive.writestr(name, damaged(content, rng))
            if isinstance(description, dict):
                with contextlib.suppress(TypeError, ValueError):
                    description["digest"] = FORMAT.digest(description, _content(archive))
            archive.writestr(
                "thawline.json", written(description, rng) if rng.random() < 0.1 else json.dumps(description)
            )
        if rng.random() < 0.05:
            target.write_bytes(damaged(target.read_bytes(), rng))
        whole = rng.random() < 0.2
        return lambda: read(whole)

    def read(whole: bool) -> None:
        model = load_model(target)
        (model.predict if model.task == CLASSIFICATION else model.predict_values)(np.zeros((2, 4), np.float32))
        if not whole:
            return
        try:
            predict(target, photos, cache, engine="torch")
        finally:
            for path in set(cache.iterdir()) - kept:
                path.unlink()

    return forge


def forged_array(data: bytes, rng: random.Random) -> bytes:
    """Change the header or the content of a ``.npy`` file."""
    if rng.random() < 0.4 or not data.startswith(b"\x93NUMPY"):
        return damaged(data, rng)
    length = int.from_bytes(data[8:10], "little")
    header, content = data[10 : 10 + length].decode("latin-1"), data[10 + length :]
    shape = rng.choice(["()", "(0,)", "(3,)", "(1, 1)", "(2, 2, 2)", "(1000000000,)", "(-1,)", "(2, 600000000)"])
    dtype = rng.choice(["<f8", "<f4", "<f2", "<i8", "|u1", "|O", "<U9", "|S3", "<c16", "<M8[s]", "|V8", ">f8"])
    if rng.random() < 0.6:
        header = re.sub(r"\([^)]*\)", shape, header)
    if rng.random() < 0.5:
        header = re.sub(r"'descr': '[^']*'", f"'descr': '{dtype}'", header)
    if rng.random() < 0.2:
        header = header.replace("False", "True")
    if rng.random() < 0.5:
        content = np.full(len(content) // 8, rng.choice([np.nan, np.inf, 0.0, -1.0, 1e300])).tobytes()
    encoded = header.encode("latin-1")
    return data[:8] + len(encoded).to_bytes(2, "little") + encoded + content


def networks(folder: Path) -> Forge:
    """The header, the description or the weights of a fine-tuned network changed, with a digest that fits."""
    import safetensors
    import safetensors.numpy
    import torch

    from pipeline.backbones.network_file import FORMAT, _content, describe_network, is_network_file
    from pipeline.backbones.registry import load_backbone
    from pipeline.finetune import finetune
    from pipeline.options import CLASSIFICATION, TASKS
    from pipeline.predict import predict

    photos, cache, target = make_photos(folder), folder / "cache", folder / "forged.safetensors"
    source = folder / "network.safetensors"
    originals = []
    for task in TASKS:
        told: Any = {"labels": write_targets(photos), "target": task, "task": task, "save": source, "output": cache}
        finetune(photos, "tiny@random:0", epochs=1, engine="torch", device="cpu", precision="fp32", **told)
        with safetensors.safe_open(source, "np") as file:
            sound = json.loads((file.metadata() or {})["thawline"])
        originals.append((sound, safetensors.numpy.load_file(source), source.read_bytes()))
    kept = set(cache.iterdir())

    def forge(rng: random.Random) -> Read:
        description, weights, data = rng.choice(originals)
        tensors = dict(weights)
        if rng.random() < 0.7:
            for _ in range(rng.choice([1, 1, 2])):
                if rng.random() < 0.6:
                    description = changed(description, rng)
                else:
                    forge_tensor(tensors, rng)
            if isinstance(description, dict):
                with contextlib.suppress(TypeError, ValueError):
                    description = description | {"digest": FORMAT.digest(description, _content(tensors))}
            text = written(description, rng).decode("utf-8", "replace")
            safetensors.numpy.save_file(tensors, target, {"thawline": text})
        else:
            length = int.from_bytes(data[:8], "little")
            header = written(changed(json.loads(data[8 : 8 + length]), rng), rng)
            target.write_bytes(len(header).to_bytes(8, "little") + header + data[8 + length :])
        if rng.random() < 0.1:
            target.write_bytes(damaged(target.read_bytes(), rng))
        return read

    def forge_tensor(tensors: dict[str, Any], rng: random.Random) -> None:
        name = rng.choice(list(tensors))
        old = tensors[name]
        dtype = rng.choice([np.float16, np.float64, np.int8, np.int64, np.bool_, np.uint8])
        forms: list[Any] = [
            np.zeros(rng.choice([(), (0,), (1,), (7, 9), (*old.shape, 1)]), old.dtype),
            np.zeros(old.shape, dtype),
            np.full(old.shape, rng.choice([np.nan, np.inf, 1e38]), old.dtype),
            tensors[rng.choice(list(tensors))],
        ]
        tensors[name] = np.ascontiguousarray(rng.choice(forms))
        if rng.random() < 0.2:
            tensors[rng.choice(["x", f"{name}.x", ""])] = tensors.pop(name)

    def read() -> None:
        is_network_file(target)
        model = describe_network(target)
        backbone = load_backbone(f"tiny@{target}")
        scores = backbone.module(torch.zeros(2, 3, *backbone.preprocessing.size))
        (model.predict if model.task == CLASSIFICATION else model.predict_values)(scores.numpy())
        try:
            predict(target, photos, cache, engine="torch")
        finally:
            for path in set(cache.iterdir()) - kept:
                path.unlink()

    return forge


# ------------------------------------------------------------------------------------------------ plans and run folders

PLAN: dict[str, Any] = {
    "source": "photos",
    "seed": [0, 1],
    "extract": [{"backbone": "tiny@random:0", "layer": ["penultimate"], "size": 8, "engine": "torch"}],
    "fit": [{"head": ["centroid", "ridge"], "shots": ["all", 2], "jobs": 1}],
    "finetune": [
        {"backbone": "tiny@random:0", "epochs": 1, "engine": "torch", "device": "cpu", "precision": "fp32"},
    ],
}  # fmt: skip


def toml_of(document: Any) -> str:
    """Return TOML, or what is nearly TOML if a value has no form in it."""
    lines, tables = [], []
    for key, value in document.items() if isinstance(document, dict) else [("source", document)]:
        if isinstance(value, list) and value and all(isinstance(one, dict) for one in value):
            tables += [line for one in value for line in (f"[[{key}]]", *(f"{k} = {_toml(v)}" for k, v in one.items()))]
        else:
            lines.append(f"{key} = {_toml(value)}")
    return "\n".join([*lines, *tables]) + "\n"


def _toml(value: Any) -> str:
    if isinstance(value, dict):
        return "{" + ", ".join(f"{json.dumps(key)} = {_toml(item)}" for key, item in value.items()) + "}"
    if isinstance(value, list):
        return f"[{', '.join(map(_toml, value))}]"
    if isinstance(value, float):
        return str(value)
    return json.dumps(value) if value is not None else "1979-05-27"


def plans(folder: Path) -> Forge:
    """A plan with keys, values, tables or text changed, for a dry run."""
    from pipeline.compare import dry_run

    make_photos(folder)
    target, output = folder / "plan.toml", folder / "run"
    options = ["pool", "store", "precision", "output", "batch-size", "cv", "lr-at", "views", "top", "x"]

    def forge(rng: random.Random) -> Read:
        document = PLAN
        for _ in range(rng.choice([1, 1, 2, 3])):
            document = changed(document, rng)
            if isinstance(document, dict) and rng.random() < 0.2:
                extracts = document.get("extract", ())
                tables = [one for one in extracts if isinstance(one, dict)] if isinstance(extracts, list) else []
                table = rng.choice([document, *tables])
                table[rng.choice(options)] = rng.choice(VALUES)
        data = toml_of(document).encode("utf-8", "surrogatepass")
        target.write_bytes(damaged(data, rng) if rng.random() < 0.3 else data)
        return lambda: dry_run(target, output)

    return forge


def runs(folder: Path) -> Forge:
    """Lines of `results.jsonl`, `run.json` or predictions of a run folder of any task changed."""
    from pipeline import compare as stage
    from pipeline.comparing.folder import open_finished
    from pipeline.options import CLASSIFICATION, TASKS
    from pipeline.reporting.terminal.compare_tables import against_lines, score_table

    table = write_targets(make_photos(folder))
    sound: dict[str, Path] = {}
    for task in TASKS:
        plan, sound[task] = folder / f"{task}.toml", folder / f"sound-{task}"
        heads = {"head": ["knn", "ridge"], "jobs": 1}
        asked = {"labels": str(table), "target": task, "task": task, "fit": [heads]}
        plan.write_text(toml_of(PLAN if task == CLASSIFICATION else PLAN | asked))
        report = stage.compare(plan, sound[task])
        assert not report.failures, report.failures
        (folder / task).mkdir()
        shutil.copytree(sound[task], folder / task / "run", ignore=shutil.ignore_patterns("cache"))
        (folder / task / "run" / "cache").symlink_to(sound[task] / "cache")
    whole = {
        task: {str(file.relative_to(run)): file.read_bytes() for file in run.rglob("*") if file.is_file()}
        for task, run in ((task, folder / task / "run") for task in TASKS)
    }
    mock.patch.object(stage, "run", return_value=None).start()  # what is missing stays so: reading is tested

    def forge(rng: random.Random) -> Read:
        task = rng.choice(TASKS)
        target, files = folder / task / "run", whole[task]
        for name, content in files.items():
            (target / name).write_bytes(content)
        what = rng.random()
        if what < 0.5:
            results = [json.loads(line) for line in files["results.jsonl"].splitlines()]
            for _ in range(rng.choice([1, 1, 3])):
                at = rng.randrange(len(results))
                results[at] = changed(results[at], rng)
            found = [written(one, rng) if rng.random() < 0.1 else json.dumps(one).encode() for one in results]
            (target / "results.jsonl").write_bytes(b"\n".join(found) + b"\n" * (rng.random() < 0.9))
        elif what < 0.7:
            (target / "run.json").write_bytes(written(changed(json.loads(files["run.json"]), rng), rng))
        else:
            name = rng.choice([name for name in files if name.startswith("predictions/")])
            (target / name).write_bytes(forged_predictions(files[name], rng))
        if rng.random() < 0.05:
            (target / "report.html").unlink()
        against = rng.choice([None, sound[task], target])
        return lambda: read(task, target, against)

    def read(task: str, target: Path, against: Path | None) -> None:
        open_finished(target)
        report = stage.compare(folder / f"{task}.toml", target if against != target else sound[task], against=against)
        score_table(report.results, report.best_sets)
        against_lines(report.against)
        json.dumps([result.to_json() for result in report.results])

    return forge


def forged_predictions(data: bytes, rng: random.Random) -> bytes:
    """Change the columns or the archive of predictions."""
    if rng.random() < 0.2:
        return damaged(data, rng)
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    name = rng.choice(list(members))
    match rng.randrange(4):
        case 0:
            del members[name]
        case 1:
            members[name] = rng.choice(list(members.values()))
        case 2:
            column = np.load(io.BytesIO(members[name]))
            minus = -column if column.dtype.kind in "if" else column
            repeated = np.repeat(column[:1], len(column))
            values = rng.choice([column[:-1], column[::-1], column[None], repeated, minus])
            stream = io.BytesIO()
            np.save(stream, values)
            members[name] = stream.getvalue()
        case 3:
            members[name] = forged_array(members[name], rng)
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w", zipfile.ZIP_DEFLATED) as archive:
        for key, content in members.items():
            archive.writestr(key, content)
    return stream.getvalue()


# -------------------------------------------------------------------------------------------------------------- sources


def read_source(path: Path) -> None:
    """List a source and read its images as `extract` does before decoding."""
    from pipeline.errors import UnreadableImageError
    from pipeline.extraction.lookup import rows_of
    from pipeline.images.sources.registry import open_source

    source = open_source(path)
    rows_of(source)
    source.notes  # noqa: B018
    for item in source.items:
        with contextlib.suppress(UnreadableImageError):
            source.read(item)


def manifests(folder: Path) -> Forge:
    """A manifest with cells, columns, quotes or bytes changed."""
    from PIL import Image

    Image.new("L", (3, 3)).save(folder / "0.png")
    target = folder / "m.csv"
    cells = [
        "", "0.png", "./0.png", "/etc", ".", "..", "a" * 300, "x/" * 3000, "a\nb", "\0", "é", "e\u0301", "\ud800",
        "train", "TEST", "valid", "fold", "1.0", "nan", '"', '""', ",", "\r", "\t", "x" * 140_000, "\ufeff",
    ]  # fmt: skip
    names = ["path", "label", "split", "group", "Path ", "class", "", "x", "subset"]

    def forge(rng: random.Random) -> Read:
        header = ["path", "label", "split", "group"]
        table = [[f"{i}.png", "ab"[i % 2], rng.choice(["train", "test", "val"]), str(i // 2)] for i in range(6)]
        for _ in range(rng.choice([1, 1, 2, 5])):
            row = rng.choice([header, *table])
            match rng.randrange(20):
                case 0:
                    row.append(rng.choice(cells))
                case 1 if row:
                    del row[rng.randrange(len(row))]
                case 2:
                    table.append(list(row))
                case _ if row:
                    row[rng.randrange(len(row))] = rng.choice(names if row is header else cells)
        stream = io.StringIO(newline="")
        with contextlib.suppress(csv.Error):
            dialect = rng.choice([csv.excel, csv.unix_dialect])  # the second quotes everything
            csv.writer(stream, dialect, delimiter=rng.choice(",,,,,;|\t")).writerows([header, *table])
        encoding = rng.choice(["utf-8"] * 8 + ["utf-8-sig", "utf-16"])
        data = stream.getvalue().encode(encoding, "surrogatepass")
        target.write_bytes(damaged(data, rng) if rng.random() < 0.2 else data)
        return lambda: read_source(target)

    return forge


def json_manifests(folder: Path) -> Forge:
    """A manifest of JSON lines with values, keys, lines or bytes changed."""
    target = folder / "m.jsonl"

    def forge(rng: random.Random) -> Read:
        rows = [{"path": f"{i}.png", "label": i % 2, "split": "train", "group": str(i)} for i in range(4)]
        lines = [written(changed(row, rng) if rng.random() < 0.4 else row, rng) for row in rows]
        if rng.random() < 0.2:
            lines.insert(
                rng.randrange(5), rng.choice([b"", b"[]", b"1", b"{", b'{"path": "\\ud800"}', b"\r", lines[0]])
            )
        data = rng.choice([b"\n", b"\n", b"\r\n", b"\n\n"]).join(lines)
        target.write_bytes(damaged(data, rng) if rng.random() < 0.3 else data)
        return lambda: read_source(target)

    return forge


def archives(folder: Path) -> Forge:
    """Names, headers, directories or bytes of zip archives changed."""
    target = folder / "a.zip"
    odd = [
        "a/../b.png",
        "/a.png",
        "../a.png",
        "a//b.png",
        ".",
        "é.png",
        ".x.png",
        "0.png",
        "x",
        "a\nb.png",
        "__MACOSX/a.png",
    ]

    def forge(rng: random.Random) -> Read:
        stream = io.BytesIO()
        with zipfile.ZipFile(stream, "w") as archive, warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of names that occur twice
            for number in range(4):
                name = rng.choice(odd) if rng.random() < 0.2 else f"{rng.choice('ab')}/{number}.png"
                method = rng.choice([zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
                archive.writestr(name, bytes(rng.choice([0, 1, 1000, 1 << 20])), method)
            archive.comment = bytes(rng.choice([0, 0, 300]))
        found = bytearray(stream.getvalue())
        for _ in range(rng.choice([0, 1, 1, 3])):
            magic, length = rng.choice([(b"PK\1\2", 46), (b"PK\1\2", 46), (b"PK\3\4", 30), (b"PK\5\6", 22)])
            starts = [one.start() for one in re.finditer(re.escape(magic), found)]
            if starts:
                at = rng.choice(starts) + rng.randrange(4, length)
                new = rng.choice([b"\xff" * 4, b"\xff\xff", b"\0", b"\1", rng.randbytes(2), rng.randbytes(4)])
                found[at : at + len(new)] = new
        target.write_bytes(damaged(bytes(found), rng) if rng.random() < 0.4 else found)
        return lambda: read_source(target)

    return forge


def gzipped_shards(folder: Path) -> Forge:
    """Members and bytes of gzipped shards changed, before and after they are packed."""
    from pipeline.images.sources import gzipped

    gzipped.SPACING = 1 << 14  # so that small shards have several blocks
    target = folder / "a.tar.gz"

    def forge(rng: random.Random) -> Read:
        stream = io.BytesIO()
        with tarfile.open(fileobj=stream, mode="w") as archive:
            for name in ("0.png", "0.cls", "1.png", "1.json"):
                info, label = tarfile.TarInfo(name), b'{"label": 1}' if name == "1.json" else b"a"
                size = rng.choice([0, 1, 600, 1 << 16])
                data = rng.randbytes(size) if rng.random() < 0.5 else bytes(size)
                data = label if "png" not in name and rng.random() < 0.95 else data
                info.size = len(data)
                archive.addfile(info, io.BytesIO(data))
        content = stream.getvalue()
        content = damaged(content, rng) if rng.random() < 0.3 else content
        middle = rng.randrange(len(content) + 1)
        parts = [content] if rng.random() < 0.7 else [content[:middle], content[middle:]]
        packed = b"".join(gzip.compress(part, rng.choice([0, 1, 9])) for part in parts)
        packed += rng.choice([b"", b"", bytes(9), b"PK", packed[:10]])
        target.write_bytes(damaged(packed, rng) if rng.random() < 0.5 else packed)
        return lambda: read_source(target)

    return forge


def tables(folder: Path) -> Forge:
    """Columns, metadata or bytes of Parquet and Arrow tables with images inside changed."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    def forge(rng: random.Random) -> Read:
        images = [
            {"bytes": bytes(rng.choice([0, 9, 500])), "path": rng.choice([None, "", "a/b.png"])} for _ in range(9)
        ]
        plain = pa.array([one["bytes"] for one in images], rng.choice([pa.binary(), pa.large_binary()]))
        others = [
            [0, 1, -1] * 3, [0, 1, 2] * 3, ["a", None, "b"] * 3, [0.5, None, float("nan")] * 3, [[1]] * 9, [True] * 9,
            ["train", "test", ""] * 3, [b"x"] * 9, [{"bytes": 1}] * 9, [1 << 40] * 9,
            pa.array(["a"] * 9).dictionary_encode(),
        ]  # fmt: skip
        names = ["image", "img", "label", "Label", "split", "group", "path", "x", "", "image.bytes"]
        columns = {"image": rng.choice([images, images, images, plain]), "label": others[0]}
        for _ in range(rng.choice([0, 0, 0, 1, 3])):
            columns[rng.choice(names)] = rng.choice([*others, images, plain])
        features = {"image": {"_type": "Image"}, "label": {"_type": "ClassLabel", "names": ["a", "b"]}}
        described: Any = {"info": {"features": features}}
        described = changed(described, rng) if rng.random() < 0.3 else described
        table = pa.table(columns).replace_schema_metadata({"huggingface": written(described, rng)})
        target = folder / rng.choice(["a.parquet", "a.arrow"])
        if target.suffix == ".parquet":
            pq.write_table(table, target, row_group_size=4, compression=rng.choice(["none", "snappy", "zstd"]))
        else:
            with pa.OSFile(str(target), "wb") as file, pa.ipc.new_stream(file, table.schema) as stream:
                stream.write_table(table, max_chunksize=4)
        if rng.random() < 0.5:
            target.write_bytes(damaged(target.read_bytes(), rng))
        return lambda: read_source(target)

    return forge


def shards(folder: Path) -> Forge:
    """Members, headers, labels or bytes of shards changed, with checksums that fit."""
    from PIL import Image

    stream = io.BytesIO()
    Image.new("RGB", (3, 3)).save(stream, "PNG")
    picture, target = stream.getvalue(), folder / "train-0.tar"
    kinds = [
        tarfile.REGTYPE, tarfile.AREGTYPE, tarfile.LNKTYPE, tarfile.SYMTYPE, tarfile.CHRTYPE, tarfile.DIRTYPE,
        tarfile.FIFOTYPE, tarfile.CONTTYPE, b"x", b"g", b"L", b"K", b"S", b"X", b"Z",
    ]  # fmt: skip
    odd = [
        "a/../b.png", "/a.png", "../a.png", "a//b.png", ".", "", "é.png", "a" * 150 + ".png", ".x.png",
        "2024.05.01.jpg", "0.png", "0.cls", "0.json", "x", "x.", "a\nb.png",
    ]  # fmt: skip

    def forge(rng: random.Random) -> Read:
        members: list[tuple[str, bytes]] = []
        for i in range(4):
            label = written(changed({"label": i % 2, "x": [1]}, rng) if rng.random() < 0.3 else {"label": i % 2}, rng)
            text = rng.choice([b"a", b"a", b"", b"\xff", b"\0", b"a\nb", b"1" * 5000])
            members += [(f"{i}.png", picture), (f"{i}.cls", text) if rng.random() < 0.5 else (f"{i}.json", label)]
        form = rng.choice([tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
        data = io.BytesIO()
        with tarfile.open(fileobj=data, mode="w", format=form) as archive:
            for name, content in members:
                info = tarfile.TarInfo(rng.choice(odd) if rng.random() < 0.1 else name)
                info.size = len(content)
                if rng.random() < 0.05:
                    info.type = rng.choice(kinds)
                if form == tarfile.PAX_FORMAT and rng.random() < 0.2:
                    key = rng.choice(
                        ["path", "size", "mtime", "GNU.sparse.map", "GNU.sparse.major", "GNU.sparse.size", "hdrcharset"]
                    )
                    info.pax_headers = {
                        key: rng.choice(["0", "-1", "1e400", "nan", "x", "\udcff", "9" * 30, "1,2,3", ""])
                    }
                with contextlib.suppress(ValueError, UnicodeError):
                    archive.addfile(info, io.BytesIO(content))
        found = bytearray(data.getvalue())
        if rng.random() < 0.6:
            forge_headers(found, rng)
        target.write_bytes(damaged(bytes(found), rng) if rng.random() < 0.3 else found)
        return lambda: read_source(target)

    def forge_headers(found: bytearray, rng: random.Random) -> None:
        for _ in range(rng.choice([1, 1, 3])):
            at = 512 * rng.randrange(max(1, len(found) // 512))
            start, length = rng.choice(
                [(0, 100), (100, 8), (124, 12), (136, 12), (156, 1), (157, 100), (257, 8), (345, 155)]
            )
            new = rng.choice(
                [
                    b"\x80" + rng.randbytes(11),
                    b"\xff" * 12,
                    b"77777777777\0",
                    b"-1\0",
                    b"\0" * 12,
                    rng.randbytes(12),
                    rng.choice(kinds),
                ]
            )
            found[at + start : at + start + min(length, len(new))] = new[:length]
            block = bytes(found[at : at + 512])
            if len(block) == 512:
                total = sum(block[:148]) + 8 * 32 + sum(block[156:])
                found[at + 148 : at + 156] = b"%06o\0 " % total

    return forge


KINDS: dict[str, Callable[[Path], Forge]] = {
    one.__name__: one
    for one in (
        *(structure, rows, images, caches, parts, heads, networks, plans, runs, manifests, shards),
        *(json_manifests, archives, gzipped_shards, tables),
    )
}

# -------------------------------------------------------------------------------------------------------------- running


@dataclass
class Tally:
    """How the cases of one kind ended."""

    kind: str
    ends: Counter[str] = field(default_factory=Counter)
    foreign: dict[str, tuple[int, int, str]] = field(default_factory=dict)
    """Where a foreign error came from: how often, the first seed, its traceback."""
    lost: list[int] = field(default_factory=list)
    """Seeds of cases that hung, or ended their process."""
    peak: tuple[float, int] = (0.0, 0)
    """Most megabytes that a case took, and its seed."""

    def add(self, outcome: dict[str, Any]) -> None:
        """Count one case."""
        self.ends[outcome["end"]] += 1
        self.peak = max(self.peak, (outcome["mb"], outcome["seed"]))
        if outcome["end"] in ("hung", "crashed"):
            self.lost.append(outcome["seed"])
        if where := outcome.get("where"):
            count, seed, text = self.foreign.get(where, (0, outcome["seed"], outcome["text"]))
            self.foreign[where] = (count + 1, seed, text)

    @property
    def row(self) -> str:
        """The row of the table."""
        ends = [self.ends[end] for end in ("read", "refused", "foreign", "hung", "crashed")]
        cells = [self.kind, sum(ends), *ends, f"{self.peak[0]:.0f}"]
        return f"| {' | '.join(map(str, cells))} |"


TITLE = "| kind | cases | read | refused | foreign errors | hangs | crashes | most MB |\n" + "|---" * 8 + "|"


def attempt(forge: Forge, seed: int) -> tuple[str, BaseException | None]:
    """Run one case; return how it ended, and what was raised."""
    try:
        read = forge(random.Random(seed))
        with contextlib.redirect_stdout(io.StringIO()):
            read()
        return "read", None
    except ThawlineError as error:
        return ("refused" if "\n" not in str(error) else "foreign"), error
    except Exception as error:
        return "foreign", error


def measured(forge: Forge, seed: int) -> dict[str, Any]:
    """Run one case; return how it ended, the memory it took, and for a foreign error where it came from."""
    if STATUS.exists():
        STATUS.with_name("clear_refs").write_text("5")  # the peak begins anew
    before = memory("VmRSS")
    end, error = attempt(forge, seed)
    outcome: dict[str, Any] = {"seed": seed, "end": end, "mb": (memory("VmHWM") - before) / 1e6}
    if end == "foreign" and error is not None:
        frames = traceback.extract_tb(error.__traceback__)
        ours = [one for one in frames if re.search(r"/(pipeline|features_cache)/", one.filename)] or frames
        outcome["where"] = f"{type(error).__name__} {Path(ours[-1].filename).name}:{ours[-1].lineno}"
        outcome["text"] = "".join(traceback.format_exception(error))
    return outcome


def memory(name: str) -> int:
    """Return an entry of this process's status, in bytes; 0 where there is none, as on macOS."""
    found = re.search(rf"{name}:\s+(\d+) kB", STATUS.read_text() if STATUS.exists() else "")
    return int(found[1]) * 1024 if found else 0


def run_kind(kind: str, cases: int) -> Tally:
    """Run the cases of one kind, in children; an interrupt ends them early."""
    tally = Tally(kind)
    with tempfile.TemporaryDirectory(prefix="fuzz-") as folder:
        forge = KINDS[kind](Path(folder))
        gc.freeze()
        start = 0
        with contextlib.suppress(KeyboardInterrupt):
            while start < cases:
                with contextlib.closing(in_child(forge, range(start, min(start + BATCH, cases)))) as outcomes:
                    for outcome in outcomes:
                        tally.add(outcome)
                        start = outcome["seed"] + 1
    return tally


def in_child(forge: Forge, seeds: range) -> Generator[dict[str, Any], None, None]:
    """Yield the outcome of each case; the last one is of a case that hung or crashed, if any did."""
    receiving, sending = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            os.close(receiving)
            if engine := sys.modules.get("pipeline.engines.engine"):
                vars(engine)["_process"] = None  # with one thread a network runs in a fork, too
            null = os.open(os.devnull, os.O_WRONLY)
            os.dup2(null, 1)
            os.dup2(null, 2)
            if taken := memory("VmData"):
                resource.setrlimit(resource.RLIMIT_DATA, (taken + LIMIT_BYTES, taken + LIMIT_BYTES))
            with os.fdopen(sending, "w") as stream:
                for seed in seeds:
                    stream.write(json.dumps(measured(forge, seed)) + "\n")
                    stream.flush()
        finally:
            os._exit(0)
    os.close(sending)
    seed, rest, end = seeds.start, b"", "crashed"
    try:
        while seed < seeds.stop:
            if not select.select([receiving], [], [], LIMIT_S)[0]:
                end = "hung"
                break
            if not (data := os.read(receiving, 1 << 16)):
                break
            *lines, rest = (rest + data).split(b"\n")
            for line in lines:
                yield json.loads(line)
                seed += 1
    finally:
        os.close(receiving)
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    if seed < seeds.stop:
        yield {"seed": seed, "end": end, "mb": 0.0}


def main() -> None:
    """Parse, run, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kinds", nargs="*", metavar="KIND", help=f"some of {', '.join(KINDS)}; all by default")
    parser.add_argument("--cases", type=int, default=20_000, help="of each kind, with the seeds from 0 on")
    parser.add_argument("--seed", type=int, help="run this one case, and show how it ends")
    arguments = parser.parse_args()
    kinds = arguments.kinds or list(KINDS)
    if arguments.seed is not None:
        with tempfile.TemporaryDirectory(prefix="fuzz-") as folder:
            end, error = attempt(KINDS[kinds[0]](Path(folder)), arguments.seed)
        print(end, *traceback.format_exception(error) if error else ())
        return
    print(TITLE, flush=True)
    bad = 0
    for kind in kinds:
        tally = run_kind(kind, arguments.cases)
        print(tally.row, flush=True)
        bad += len(tally.foreign) + len(tally.lost)
        for where, (count, seed, text) in tally.foreign.items():
            print(f"\n{kind}: {count} times {where}, first with seed {seed}\n{text}", file=sys.stderr)
        if tally.lost:
            print(f"{kind}: hung or crashed with seeds {tally.lost}", file=sys.stderr)
        print(f"{kind}: most memory with seed {tally.peak[1]}", file=sys.stderr)
    sys.exit(bad > 0)


if __name__ == "__main__":
    main()
