"""Caches and models that were made by older decoding rules: kept where nothing changed, computed again where it did."""

from __future__ import annotations

import io
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, TiffImagePlugin

from features_cache import Catalog, open_cache, verify
from pipeline.evaluation.rows import select
from pipeline.extract import extract
from pipeline.extraction.extractor import FeatureExtractor
from pipeline.fit import fit
from pipeline.predict import predict
from pipeline.spec import DECODE_POLICY, LayerSpec

NETWORK = "test_resnet@random:0"
OPTIONS = {"layers": ["input", "layer1"], "size": 32, "precision": "fp32", "engine": "torch"}


def grey_tiff(generator: np.random.Generator) -> bytes:
    """A 16-bit picture whose white is zero, which rules 1 decoded as a negative."""
    tags = TiffImagePlugin.ImageFileDirectory_v2()
    tags[262] = 0
    stream = io.BytesIO()
    Image.fromarray(generator.integers(0, 65_536, (40, 40), dtype=np.uint16)).save(stream, "TIFF", tiffinfo=tags)
    return stream.getvalue()


@pytest.fixture
def old_rules(monkeypatch: pytest.MonkeyPatch) -> Callable[[], pytest.MonkeyPatch]:
    """Extract as before DECODE_POLICY was 2."""

    def patch(patched: pytest.MonkeyPatch) -> None:
        spec = FeatureExtractor.spec
        patched.setattr(FeatureExtractor, "spec", lambda *given: replace(spec(*given), decode=1))
        patched.setattr("pipeline.spec.DECODE_POLICY", 1)
        patched.setattr("pipeline.extraction.open.DECODE_POLICY", 1)
        patched.setattr("pipeline.images.decode.PHOTOMETRIC_INTERPRETATION", -1)

    return patch


@pytest.fixture
def old_cache(make_photos: Callable[..., Path], tmp_path: Path, old_rules: Callable[..., None]) -> Callable[..., Path]:
    """Cache photos, of which `tiffs` are TIFFs, by the old rules."""

    def make(tiffs: tuple[str, ...] = ()) -> Path:
        photos, cache = make_photos(), tmp_path / "cache"
        for index, name in enumerate(tiffs):
            (photos / name).write_bytes(grey_tiff(np.random.default_rng(index)))
        with pytest.MonkeyPatch.context() as patched:
            old_rules(patched)
            extract(photos, [NETWORK], output=cache, **OPTIONS)
        return photos

    return make


def features(cache: Path) -> dict[str, np.ndarray]:
    (path,) = cache.glob("*.h5")
    file = open_cache(path)
    assert {info.spec["decode"] for info in file.layers.values()} == {DECODE_POLICY}
    assert all(LayerSpec.from_json(info.spec).fingerprint == info.fingerprint for info in file.layers.values())
    assert verify(path).sound
    return {name: np.array(file.matrix(name)) for name in file.layers}


def test_rows_that_the_new_rules_leave_as_they_are_are_carried_over(
    old_cache: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    photos = old_cache()
    (old,) = (tmp_path / "cache").glob("*.h5")
    before = {name: np.array(open_cache(old).matrix(name)) for name in OPTIONS["layers"]}
    monkeypatch.setattr("pipeline.images.loader.prepare_all", None)  # nothing is decoded
    (result,) = extract(photos, [NETWORK], output=tmp_path / "cache", **OPTIONS)
    assert (result.computed, result.reused, result.path) == (0, 24, str(old))
    for name, values in features(tmp_path / "cache").items():
        np.testing.assert_array_equal(values, before[name])
    monkeypatch.setattr("pipeline.extract.FeatureExtractor", None)
    extract(photos, [NETWORK], output=tmp_path / "cache", **OPTIONS)  # answered without the network


def test_tiffs_are_computed_again_whatever_their_names(old_cache: Callable[..., Path], tmp_path: Path) -> None:
    photos = old_cache(("red/a.tif", "red/b.png", "blue/c"))
    (file,) = Catalog(tmp_path / "cache").files
    before = {name: np.array(file.matrix(name)) for name in file.layers}
    uris = file.uris.tolist()
    (result,) = extract(photos, [NETWORK], output=tmp_path / "cache", **OPTIONS)
    assert result.computed == 3
    extract(photos, [NETWORK], output=tmp_path / "fresh", **OPTIONS)
    fresh = features(tmp_path / "fresh")
    for name, values in features(tmp_path / "cache").items():
        np.testing.assert_allclose(values, fresh[name], rtol=1e-5, atol=1e-5)
        changed = [uri for uri, old, new in zip(uris, before[name], values, strict=True) if (old != new).any()]
        assert changed == ["blue/c", "red/a.tif", "red/b.png"]


def test_an_interrupted_change_of_rules_goes_on(
    old_cache: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    photos = old_cache(("red/a.tif",))
    with monkeypatch.context() as patched:
        patched.setattr("pipeline.extract.fill", None)
        with pytest.raises(TypeError):
            extract(photos, [NETWORK], output=tmp_path / "cache", **OPTIONS)
    (result,) = extract(photos, [NETWORK], output=tmp_path / "cache", **OPTIONS)
    assert (result.computed, result.done) == (1, 25)
    features(tmp_path / "cache")


def test_fit_reads_files_of_todays_rules_and_says_so(old_cache: Callable[..., Path], tmp_path: Path) -> None:
    photos = old_cache(("red/a.tif",))
    (old,) = (tmp_path / "cache").glob("*.h5")
    kept = old.read_bytes()
    extract(photos, [NETWORK], output=tmp_path / "cache", **OPTIONS)
    old.with_name("older.h5").write_bytes(kept)
    for layer in select(Catalog(tmp_path / "cache")):
        assert [file.path for file, _ in layer.parts] == [old]
        assert layer.table.notes == (f"older.h5 is not read: {old.name} has its layers by today's decoding rules",)


@pytest.mark.parametrize("tiffs", [(), ("red/a.tif", "red/b.TIFF")])
def test_old_files_are_read_and_tiffs_in_them_named(
    old_cache: Callable[..., Path], tmp_path: Path, tiffs: tuple[str, ...]
) -> None:
    old_cache(tiffs)
    notes = fit(tmp_path / "cache", layers=["layer1"]).notes
    expected = (
        "2 TIFFs were decoded by older rules, which misread grey ones of more than 8 bits: run the same extract again"
    )
    assert (expected in notes) == bool(tiffs)


@pytest.mark.parametrize("tiffs", [(), ("red/a.tif",)])
def test_old_models_still_predict(old_cache: Callable[..., Path], tmp_path: Path, tiffs: tuple[str, ...]) -> None:
    photos = old_cache(tiffs)
    fit(tmp_path / "cache", layers=["layer1"], save=tmp_path / "model.skops")
    report = predict(tmp_path / "model.skops", photos, engine="torch")
    assert {item.state for item in report.predictions} == {"done"}
    told = [note for note in report.notes if "decoding rules" in note]
    assert len(told) == bool(tiffs)
