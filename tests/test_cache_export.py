from __future__ import annotations

import csv
import json
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from safetensors import safe_open

from features_cache import CacheError, CacheFile, CacheWriter, LayerInfo, Rows, export_features, open_cache

N, DONE_ROWS = 7, [1, 2, 4, 6]
LAYERS = [LayerInfo("a", 5, "float32", {}, "f"), LayerInfo("b.c", 3, "float16", {}, "g")]
URIS = [f'dir/"{i}", ü.png' for i in range(N)]
LABELS = np.array([0, 1, -1, 0, 0, 1, 1])


def make(path: Path, done: list[int]) -> CacheFile:
    rows = Rows(URIS, LABELS, ["train", ""] * 3 + ["test"], ["", "g"] * 3 + [""], *np.ones((2, N), int))
    with CacheWriter.create(path, rows, ["cat", "Löwe"], LAYERS, {}, {}) as writer:
        k = np.array(done, int)
        features = {"a": np.outer(k, np.arange(5)), "b.c": np.outer(k, [1, 2, 3])}
        writer.write(k, features, np.repeat(k, 16).reshape(-1, 16))
    return open_cache(path)


def expected(layer: str, done: list[int]) -> np.ndarray[tuple[int, ...], np.dtype[np.float64]]:
    return np.outer(done, np.arange(5) if layer == "a" else [1, 2, 3])


def table(done: list[int]) -> list[dict[str, str]]:
    names = ["cat", "Löwe", ""]
    splits, groups = ["train", ""] * 3 + ["test"], ["", "g"] * 3 + [""]
    return [
        {"uri": URIS[i], "label": names[LABELS[i]], "split": splits[i], "group": groups[i], "digest": f"{i:02x}" * 16}
        for i in done
    ]


@pytest.mark.parametrize("layer", ["a", "b.c"])
@pytest.mark.parametrize("done", [DONE_ROWS, list(range(N))], ids=["some", "all"])
def test_npy_has_the_done_rows_and_a_csv_beside_it(tmp_path: Path, layer: str, done: list[int]) -> None:
    file = make(tmp_path / "a.h5", done)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "x.csv").write_text("the user's own")
    written = export_features(file, layer, tmp_path / "out" / "x.npy")
    assert written == [tmp_path / "out" / "x.npy", tmp_path / "out" / "x.npy.csv"]
    features = np.load(written[0], allow_pickle=False)
    assert features.dtype == file.layers[layer].dtype
    np.testing.assert_array_equal(features, expected(layer, done))
    with written[1].open(newline="", encoding="utf-8") as stream:
        assert list(csv.DictReader(stream)) == table(done)
    assert sorted(entry.name for entry in (tmp_path / "out").iterdir()) == ["x.csv", "x.npy", "x.npy.csv"]
    assert (tmp_path / "out" / "x.csv").read_text() == "the user's own"


@pytest.mark.parametrize("layer", ["a", "b.c"])
def test_parquet_has_all_in_one_table(tmp_path: Path, layer: str) -> None:
    file = make(tmp_path / "a.h5", DONE_ROWS)
    (path,) = export_features(file, layer, tmp_path / "x.parquet")
    read = pq.read_table(path)
    kind = pa.float32() if layer == "a" else pa.float16()
    assert read.schema.field("features").type == pa.list_(kind, file.layers[layer].dim)
    vectors = read["features"].combine_chunks().flatten().to_numpy(zero_copy_only=False)
    np.testing.assert_array_equal(vectors.reshape(len(DONE_ROWS), -1), expected(layer, DONE_ROWS))
    assert read.drop_columns("features").to_pylist() == table(DONE_ROWS)


@pytest.mark.parametrize("layer", ["a", "b.c"])
def test_safetensors_has_features_labels_and_names(tmp_path: Path, layer: str) -> None:
    file = make(tmp_path / "a.h5", DONE_ROWS)
    (path,) = export_features(file, layer, tmp_path / "x.safetensors")
    (tmp_path / "plain").touch()
    assert path.stat().st_mode == (tmp_path / "plain").stat().st_mode, "others may read it, as the umask has it"
    with safe_open(path, "numpy") as read:
        features, labels, metadata = read.get_tensor("features"), read.get_tensor("labels"), read.metadata()
    assert features.dtype == file.layers[layer].dtype
    np.testing.assert_array_equal(features, expected(layer, DONE_ROWS))
    np.testing.assert_array_equal(labels, LABELS[DONE_ROWS])
    assert json.loads(metadata["classes"]) == ["cat", "Löwe"]
    assert json.loads(metadata["uri"]) == [row["uri"] for row in table(DONE_ROWS)]


def test_what_cannot_be_exported_is_refused_and_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = make(tmp_path / "a.h5", DONE_ROWS)
    cases = {
        ("a", "x.npz"): r"expected one of \.npy, \.parquet, \.safetensors",
        ("a", "x"): "expected one of",
        ("z", "x.npy"): "no layer z; it has a, b.c",
        ("a", "none/x.npy"): "cannot write .*no such file or folder",
    }
    for (layer, name), message in cases.items():
        with pytest.raises(CacheError, match=message):
            export_features(file, layer, tmp_path / name)
    with pytest.raises(CacheError, match="no finished row"):
        export_features(make(tmp_path / "b.h5", []), "a", tmp_path / "x.npy")
    for module, name, hint in (
        ("pyarrow", "x.parquet", r"thawline\[parquet\]"),
        ("safetensors.numpy", "x.safetensors", "pip"),
    ):
        with monkeypatch.context() as patch:
            patch.setitem(sys.modules, module, None)
            with pytest.raises(CacheError, match=hint):
                export_features(file, "a", tmp_path / name)
    with monkeypatch.context() as patch:
        patch.setattr(
            sys.modules["features_cache.export"], "_columns", lambda *_: {"uri": ["x" * 100_000_000]}
        )  # the header's limit
        with pytest.raises(CacheError, match=r"header too large; \.npy and \.parquet take any number"):
            export_features(file, "a", tmp_path / "x.safetensors")
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["a.h5", "b.h5"]


def test_an_existing_export_is_replaced(tmp_path: Path) -> None:
    (tmp_path / "x.npy").write_bytes(b"old")
    export_features(make(tmp_path / "a.h5", DONE_ROWS), "a", tmp_path / "x.npy")
    np.testing.assert_array_equal(np.load(tmp_path / "x.npy"), expected("a", DONE_ROWS))
