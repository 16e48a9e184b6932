from __future__ import annotations

import hashlib
import json
import re
import subprocess
import sys
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import features_cache
from features_cache import CacheWriter, LayerInfo, Rows

FORMAT = (Path(features_cache.__file__).parent / "FORMAT.md").read_text(encoding="utf-8")
EXAMPLES = re.findall(r"```python\n(.*?)```", FORMAT, re.DOTALL)
LAYERS = [LayerInfo("a.half", 3, "float16", {"k": 1}, "f1"), LayerInfo("last", 4, "float32", {"k": 2}, "f2")]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    n = 9
    uris, groups = [f"ä/{i}.png" for i in range(n)], ["g" * i for i in range(n)]
    rows = Rows(uris, np.arange(n) % 3 - 1, ["train", "", "val"] * 3, groups, np.arange(n), np.arange(n) + 5)
    with CacheWriter.create(tmp_path / "cache.h5", rows, ["x", "ÿ"], LAYERS, {"source": "s"}, {"q": 1}) as writer:
        writer.begin_run({"engine": "torch"})
        k = np.array([1, 2, 5, 7])
        features = {"a.half": np.outer(k, [1, 2, 3]), "last": np.outer(k, [1, 0, 0, 0.5])}
        writer.write(k, features, np.repeat(k, 16).reshape(-1, 16))
        writer.fail(3, "no image", None)
    return tmp_path


@pytest.mark.parametrize(("number", "library"), [(0, "h5py"), (1, "numpy")])
def test_an_example_needs_one_library_and_finds_the_features(folder: Path, number: int, library: str) -> None:
    code = EXAMPLES[number]
    assert set(re.findall(r"^import (\w+)", code, re.MULTILINE)) == {"json", library}
    command = [sys.executable, "-I", "-W", "error", "-c", code]
    output = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=True, timeout=60).stdout
    mean = np.outer([1, 2, 5, 7], [1, 2, 3]).mean()
    assert output.split() == ["a.half", "(4,", "3)", str(mean), "ä/1.png", "{'k':", "1}"]


def read_by_the_words_of_the_format(path: Path) -> tuple[bytes, list[int], dict[str, Any], dict[str, Any]]:
    """Sections 1 to 3, in code of their own."""
    data = path.read_bytes()
    line = data[: data.index(b"\n") + 1]
    magic, version, *numbers, digest = line.split(b" ")
    table_bytes, checked, file_bytes = map(int, numbers)
    assert (magic, version, file_bytes) == (b"thawline-cache", b"1", len(data))
    covered = line[: -len(digest)] + data[len(line) : checked]
    assert hashlib.blake2b(covered, digest_size=16).hexdigest().encode() + b"\n" == digest
    table = json.loads(data[len(line) : len(line) + table_bytes])
    arrays = {}
    for name, place in table["arrays"].items():
        count = int(np.prod(place["shape"]))
        flat = np.frombuffer(data, place["dtype"], count, place["offset"])
        arrays[name] = flat.reshape(place["shape"])
    return data, [len(line) + table_bytes, checked], table, arrays


def test_the_parts_lie_where_the_format_says(folder: Path) -> None:
    data, (table_end, checked), table, arrays = read_by_the_words_of_the_format(folder / "cache.h5")
    block = data.index(b"\x89HDF\r\n\x1a\n")
    assert block >= 512
    assert block & (block - 1) == 0
    assert not data[table_end:block].strip(b"\0")
    assert data[block + 8] == 0  # version of the superblock
    places = {name: (place["offset"], arrays[name].nbytes) for name, place in table["arrays"].items()}
    assert places["/runs"][0] == checked
    changing = sorted(place for name, place in places.items() if name != "/classes")
    assert changing[0][0] == checked
    assert sum(places["/classes"]) <= checked
    for (offset, size), (following, _) in zip(changing, [*changing[1:], (len(data), 0)], strict=True):
        assert offset + size == following


def test_the_table_of_arrays_is_the_one_in_the_format(folder: Path) -> None:
    _, _, table, _ = read_by_the_words_of_the_format(folder / "cache.h5")
    section = FORMAT.split("## 3. ")[1].split("## 4. ")[0]
    listed = re.findall(r"^\| `(/[^`]+)` \| (.+?) \| (.+?) \|", section, re.MULTILINE)
    expanded: dict[str, tuple[str, list[int]]] = {}
    sizes = {"C": 2, "N": 9, "16": 16, "128": 128}
    for name, dtype, shape in listed:
        for layer in LAYERS if "LAYER" in name else [None]:
            extent = [layer.dim if layer and part == "dim" else sizes[part] for part in shape.split(", ")]
            expanded[name.replace("LAYER", layer.name if layer else "")] = (dtype, extent)
    assert set(expanded) == set(table["arrays"])
    for name, (dtype, extent) in expanded.items():
        place = table["arrays"][name]
        assert place["shape"] == extent
        kinds = [kind.replace("\\|", "|") for kind in re.findall(r"`([^`]+)`", dtype)]
        assert any(place["dtype"] == kind or (kind == "|S" and place["dtype"].startswith("|S")) for kind in kinds)


def test_checksums_and_states_are_those_of_the_format(folder: Path) -> None:
    _, _, _, arrays = read_by_the_words_of_the_format(folder / "cache.h5")

    def joined(row: int, *names: str) -> int:
        return zlib.crc32(b"".join(arrays[f"/rows/{name}"][row : row + 1].tobytes() for name in names))

    assert arrays["/rows/state"].tolist() == [0, 1, 1, 2, 0, 1, 0, 1, 0]
    for row, state in enumerate(arrays["/rows/state"].tolist()):
        assert arrays["/rows/source_crc"][row] == joined(row, "label", "split", "group", "uri")
        if state:
            found = joined(row, "digest", "size", "mtime_ns", "run", "reason")
            assert arrays["/rows/result_crc"][row] == found
        if state == 1:
            for layer in LAYERS:
                assert arrays[f"/crc/{layer.name}"][row] == zlib.crc32(arrays[f"/features/{layer.name}"][row].tobytes())
    assert arrays["/rows/reason"][3] == b"no image"
    assert [name.decode() for name in arrays["/classes"]] == ["x", "ÿ"]
    text, crc = arrays["/runs"][0].split(b"\n")
    assert int(crc, 16) == zlib.crc32(text)
    assert len(crc) == 8
    assert json.loads(text)["run"] == 0
    assert json.loads(text)["rows"] == 4
