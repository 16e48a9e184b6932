"""Damage files at random, and count what is noticed: ``python benchmarks/damage.py``.

A cache file that is damaged outside its arrays (first line, table, HDF5's structure, class names) must be refused, or
read as if nothing were damaged. Inside them `verify` must name the row. Forged files (caches, saved heads, fine-tuned
networks, run folders), whose digests fit what was changed, may be read or refused, but only with a one-line error of
thawline. Each portion runs in a child process with a time limit and a limit on memory.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import io
import json
import pickle
import random
import resource
import subprocess
import sys
import tempfile
import traceback
import zipfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import safetensors
import safetensors.numpy

from features_cache import DONE, CacheError, CacheFile, CacheWriter, LayerInfo, Rows, ThawlineError, open_cache, verify
from features_cache.header import header_line, structure_digest

PORTION = 500
LIMIT_S = 120
LIMIT_BYTES = 8 << 30
VALUES: list[Any] = [
    None,
    True,
    -1,
    0,
    1,
    2**31,
    2**63,
    1e308,
    float("nan"),
    "",
    "x",
    "\0",
    "../x",
    "é",
    [],
    [1],
    {},
    {"a": 1},
]


def make(path: Path, rows: int = 30) -> None:
    """Write a small file: half of its rows done, one unreadable."""
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
    """Return all that a reader can learn from a file."""
    columns = [file.uris, file.labels, file.splits, file.groups, file.digests, file.sizes, file.mtimes_ns]
    columns += [file.states, file.reasons, file.run_ids, *(file.matrix(name) for name in file.layers)]
    facts = file.handles, file.request, file.classes, file.layers, file.n_rows, file.runs
    return pickle.dumps((facts, [column.tolist() for column in columns]))


def damage_structure(path: Path, seeds: range) -> Counter[str]:
    """Change one to twenty bytes before the first array that may change, once for each seed."""
    right, data = everything(open_cache(path)), path.read_bytes()
    end = open_cache(path).header.arrays["/runs"].offset
    table = int(data.split(b" ")[2]) + 128
    counts: Counter[str] = Counter()
    target = path.with_name("damaged.h5")
    for seed in seeds:
        generator, damaged = random.Random(seed), bytearray(data)
        for _ in range(generator.choice([1, 1, 2, 20])):
            place = generator.randrange(generator.choice([128, table, end]))
            damaged[place] = generator.choice([damaged[place] ^ 1 << generator.randrange(8), generator.randrange(256)])
        target.write_bytes(damaged)
        try:
            counts["right" if everything(open_cache(target)) == right else "wrong"] += 1
        except CacheError as error:
            counts["refused" if "\n" not in str(error) else "refused_in_many_lines"] += 1
    return counts


def damage_rows(path: Path, seeds: range) -> Counter[str]:
    """Flip one bit of what was written for a finished row, once for each seed; see whether `verify` names the row."""
    file, data = open_cache(path), path.read_bytes()
    done = np.flatnonzero(file.states == DONE).tolist()
    names = [
        "label",
        "digest",
        "size",
        "mtime_ns",
        "uri",
        "group",
        "split",
        "reason",
        "run",
        "source_crc",
        "result_crc",
    ]
    arrays = [*(f"/rows/{name}" for name in names), *(f"/{kind}/{x}" for kind in ("crc", "features") for x in "ab")]
    counts: Counter[str] = Counter()
    target = path.with_name("damaged.h5")
    for seed in seeds:
        generator, damaged = random.Random(seed), bytearray(data)
        place, row = file.header.arrays[generator.choice(arrays)], generator.choice(done)
        damaged[place.offset + row * place.row_bytes + generator.randrange(place.row_bytes)] ^= (
            1 << generator.randrange(8)
        )
        target.write_bytes(damaged)
        counts["named" if {finding.row for finding in verify(target).damaged} == {row} else "missed"] += 1
    return counts


def changed(value: Any, generator: random.Random) -> Any:
    """Return a copy of a JSON value with one part replaced, removed or repeated."""
    value = copy.deepcopy(value)
    node = value
    while isinstance(node, dict | list) and node:
        key = generator.choice(list(node) if isinstance(node, dict) else range(len(node)))
        inner = node[key]
        if isinstance(inner, dict | list) and inner and generator.random() < 0.8:
            node = inner
            continue
        if isinstance(inner, str) and generator.random() < 0.3:
            at = generator.randrange(len(inner) + 1)
            node[key] = inner[:at] + generator.choice(["9", "x", ".", "é", ""]) + inner[at + 1 :]
        elif generator.random() < 0.2:
            del node[key]
        else:
            node[key] = generator.choice(VALUES)
        return value
    return generator.choice(VALUES)


def forge_cache(path: Path, generator: random.Random) -> Callable[[], object]:
    """Change the table or the arrays of a cache, with a digest that fits; return what reads it."""
    data = path.read_bytes()
    _, _, table_bytes, checked, _, _ = data.split(b"\n", 1)[0].split(b" ")
    line_bytes = data.index(b"\n") + 1
    table = data[line_bytes : line_bytes + int(table_bytes)]
    body = bytearray(data)
    if generator.random() < 0.7:
        new = json.dumps(changed(json.loads(table), generator)).encode()
        body[line_bytes : line_bytes + len(new)] = new
    else:
        new = table
        for _ in range(generator.choice([1, 3, 30])):
            body[generator.randrange(line_bytes + len(new), len(body))] = generator.randrange(256)
    line = header_line(len(new), int(checked), len(body), "0" * 32)
    if len(line) != line_bytes:  # the table grew by a digit: it moves
        body = bytearray(line + new + bytes(body[len(line) + len(new) :]))
        line = header_line(len(new), int(checked), len(body), "0" * 32)
    digest = structure_digest(line, bytes(body[len(line) : int(checked)]))
    body[: len(line)] = header_line(len(new), int(checked), len(body), digest)
    target = path.with_name("forged.h5")
    target.write_bytes(body)

    def read() -> None:
        from pipeline.evaluation.rows import select

        everything(open_cache(target))
        verify(target)
        select(_catalog(target))

    return read


def _catalog(path: Path) -> Any:
    from features_cache import Catalog

    return Catalog(path)


def forge_head(path: Path, generator: random.Random) -> Callable[[], object]:
    """Change the schema, an array or the description of a saved head, with a digest that fits."""
    from pipeline.heads.saved import FORMAT, _content, load_model

    with zipfile.ZipFile(path.with_name("head.skops")) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    description = json.loads(members.pop("thawline.json"))
    name = generator.choice([*members, "thawline.json", "schema.json", "schema.json"])
    if name == "thawline.json":
        description = changed(description, generator)
    elif name == "schema.json":
        members[name] = json.dumps(changed(json.loads(members[name]), generator)).encode()
    else:
        flipped = bytearray(members[name])
        for _ in range(generator.choice([1, 3, 30])):
            flipped[generator.randrange(len(flipped))] = generator.randrange(256)
        members[name] = bytes(flipped)
    target = path.with_name("forged.skops")
    with zipfile.ZipFile(target, "w") as archive:
        for name, content in members.items():
            archive.writestr(name, content)
        if isinstance(description, dict):
            with contextlib.suppress(TypeError, ValueError):
                description["digest"] = FORMAT.digest(description, _content(archive))
        archive.writestr("thawline.json", json.dumps(description))

    def read() -> None:
        model = load_model(target)
        model.predict(np.zeros((2, 6), np.float32))

    return read


def forge_network(path: Path, generator: random.Random) -> Callable[[], object]:
    """Change the header, the description or the weights of a fine-tuned network, with a digest that fits."""
    from pipeline.backbones.network_file import FORMAT, _content, describe_network, is_network_file, load_network

    source, target = path.with_name("network.safetensors"), path.with_name("forged.safetensors")
    with safetensors.safe_open(source, "np") as file:
        description = json.loads((file.metadata() or {})["thawline"])
    tensors = safetensors.numpy.load_file(source)
    if generator.random() < 0.6:
        description = changed(description, generator)
        if isinstance(description, dict):
            with contextlib.suppress(TypeError, ValueError):
                description["digest"] = FORMAT.digest(description, _content(tensors))
        safetensors.numpy.save_file(tensors, target, {"thawline": json.dumps(description)})
    else:
        data = source.read_bytes()
        length = int.from_bytes(data[:8], "little")
        header = json.dumps(changed(json.loads(data[8 : 8 + length]), generator)).encode()
        forged = len(header).to_bytes(8, "little") + header + data[8 + length :]
        if generator.random() < 0.3:
            forged = forged[: generator.randrange(len(forged))]
        target.write_bytes(forged)

    def read() -> None:
        is_network_file(target)
        model = describe_network(target)
        load_network(target)
        model.predict(np.zeros((2, 3), np.float32))

    return read


def forge_run(path: Path, generator: random.Random) -> Callable[[], object]:
    """Change a line of `results.jsonl`, or `run.json`."""
    from pipeline.comparing.folder import RunFolder, open_finished

    folder = path.with_name("run")
    for name, line in (("results.jsonl", RESULT), ("run.json", {"started": "2024-01-01", "seconds": 1.0})):
        text = json.dumps(changed(line, generator))
        if generator.random() < 0.2:
            at = generator.randrange(len(text))
            text = text[:at] + generator.choice('{}[],"0e-x') * generator.choice([1, 1, 1, 100_000]) + text[at:]
        (folder / name).write_text(text + "\n")

    def read() -> None:
        RunFolder(folder).read_info()
        finished = open_finished(folder)
        for key in finished.results:
            if finished.has(key):
                finished.predictions(key)

    return read


SCORES = {
    "backbone": "embedded/efficientnet_lite0", "weights_digest": "w", "layer": "new_head", "pool": "flatten",
    "preprocessing": {
        "size": [8, 8], "resize": 8, "interpolation": "bilinear", "mean": [0.5, 0.5, 0.5], "std": [0.5, 0.5, 0.5],
    },
    "precision": "fp32", "store": "float32", "decode": 1,
}  # fmt: skip
FORGERS = {"cache": forge_cache, "head": forge_head, "network": forge_network, "run": forge_run}
RESULT = {
    "kind": "head", "key": "k", "source": "s", "backbone": "b", "layer": "a", "pool": "avg", "head": "logreg",
    "params": {"C": 1.0}, "seed": 0, "shots": "all", "n_train": 4, "n_val": 2, "n_test": 2, "accuracy": 0.5,
    "accuracy_ci95": [0.1, 0.9], "mean_per_class_accuracy": 0.5, "macro_f1": 0.5, "log_loss": 0.7, "ece": 0.1,
    "seconds": 1.0, "converged": True, "size": [224, 224], "depth": 1, "n_classes": 2,
}  # fmt: skip


def make_models(folder: Path) -> None:
    """Write a saved head, a fine-tuned network and an empty run folder to forge."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    from pipeline.backbones.network_file import TunedModel, save_network
    from pipeline.heads.saved import SavedModel, save_model
    from pipeline.spec import LayerSpec

    (folder / "run").mkdir()
    rng = np.random.default_rng(0)
    features, y = rng.normal(size=(12, 6)).astype(np.float32), np.arange(12) % 3
    fitted = make_pipeline(StandardScaler(), LogisticRegression()).fit(features, y)
    layer = {"spec": {"layer": "a"}, "fingerprint": "f", "dim": 6, "request": {"backbone": "b", "size": None}}
    save_model(
        folder / "head.skops", SavedModel(fitted, "logreg", {"C": 1.0}, [layer], ("a", "b", "c"), 1.5, {"accuracy": 1})
    )
    scores = LayerSpec.from_json(SCORES)
    weights = {"new_head.weight": np.ones((3, 4), np.float32), "stem.weight": np.ones((4, 3, 3, 3), np.float32)}
    save_network(
        folder / "network.safetensors", TunedModel(scores, "linear", ("a", "b", "c"), 1.5, {"accuracy": 1}), weights
    )


def forge(kind: str) -> Callable[[Path, range], Counter[str]]:
    """Return what forges one kind of file, once for each seed, and counts how reading it ends."""

    def forged(path: Path, seeds: range) -> Counter[str]:
        resource.setrlimit(resource.RLIMIT_DATA, (LIMIT_BYTES, LIMIT_BYTES))
        counts: Counter[str] = Counter()
        for seed in seeds:
            read = FORGERS[kind](path, random.Random(seed))
            try:
                with contextlib.redirect_stdout(io.StringIO()):
                    read()
                counts["read"] += 1
            except ThawlineError as error:
                counts["refused" if "\n" not in str(error) else "refused_in_many_lines"] += 1
            except Exception as error:
                where = traceback.extract_tb(error.__traceback__)[-1]
                counts["foreign_errors"] += 1
                print(f"{kind} {seed}: {error!r} at {where.filename}:{where.lineno}"[:300], file=sys.stderr)
        return counts

    return forged


def in_children(kind: str, path: Path, count: int) -> dict[str, int]:
    """Run `count` damages in portions; a child that hangs or crashes is counted, not waited for."""
    total: Counter[str] = Counter(damages=count)
    for start in range(0, count, PORTION):
        portion = [kind, str(path), str(start), str(min(start + PORTION, count))]
        try:
            child = subprocess.run(
                [sys.executable, __file__, "--child", *portion], capture_output=True, timeout=LIMIT_S
            )
            total.update(json.loads(child.stdout) if child.returncode == 0 else {"children_that_crashed": 1})
            sys.stderr.write(child.stderr.decode(errors="replace"))
        except subprocess.TimeoutExpired:
            total["children_that_hung"] += 1
    return dict(total)


def main() -> None:
    """Parse, damage, print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=6000, help="damages outside the arrays, and as many inside")
    parser.add_argument("--forged", type=int, default=20_000, help="forged files of each kind")
    parser.add_argument("--child", nargs=4, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        kind, name, start, stop = arguments.child
        damages = {"structure": damage_structure, "rows": damage_rows} | {one: forge(one) for one in FORGERS}
        print(json.dumps(damages[kind](Path(name), range(int(start), int(stop)))))
        return
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "cache.h5"
        make(path)
        make_models(Path(folder))
        counts = dict.fromkeys(("structure", "rows"), arguments.count) | dict.fromkeys(FORGERS, arguments.forged)
        print(json.dumps({kind: in_children(kind, path, count) for kind, count in counts.items()}))


if __name__ == "__main__":
    main()
