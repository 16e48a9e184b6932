"""Caches and models that were made by older decoding rules: kept where nothing changed, computed again where it did."""

from __future__ import annotations

import io
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, TiffImagePlugin

from features_cache import CacheError, Catalog, open_cache, verify
from pipeline.backbones.network_file import describe_network
from pipeline.backbones.pooling import PATCHES_ONLY
from pipeline.evaluation.rows import select
from pipeline.extract import extract
from pipeline.extraction.extractor import FeatureExtractor
from pipeline.finetune import finetune
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


def test_tokens_of_older_rules_are_not_carried_over(
    make_photos: Callable[..., Path], tmp_path: Path, old_rules: Callable[..., None]
) -> None:
    """Files of older rules may hold means of all tokens: none of their layers is taken for what it would be today."""
    photos, network, spec = make_photos(each=2), "test_vit@random:0", FeatureExtractor.spec
    options = OPTIONS | {"layers": ["blocks.3", "penultimate"], "size": None}
    with pytest.MonkeyPatch.context() as patched:
        old_rules(patched)
        patched.setattr(FeatureExtractor, "spec", lambda *given: replace(spec(*given), decode=1, prefix_tokens=None))
        patched.setattr("pipeline.backbones.trace._token_order", lambda _module: PATCHES_ONLY)
        (old,) = extract(photos, [network], output=tmp_path / "cache", **options)
    before = {name: np.array(open_cache(old.path).matrix(name)) for name in options["layers"]}
    kept = Path(old.path).read_bytes()
    (today,) = extract(photos, [network], output=tmp_path / "cache", **options)
    (fresh,) = extract(photos, [network], output=tmp_path / "fresh", **options)
    assert (today.path == old.path, today.computed, Path(old.path).read_bytes() == kept) == (False, 6, True)
    for name in options["layers"]:
        np.testing.assert_array_equal(open_cache(today.path).matrix(name), open_cache(fresh.path).matrix(name))
    differ = np.abs(before["blocks.3"] - open_cache(today.path).matrix("blocks.3")).max(axis=1)
    assert (differ > 1e-3).all()
    np.testing.assert_allclose(before["penultimate"], open_cache(today.path).matrix("penultimate"), rtol=1e-5)


def test_a_file_with_another_layer_of_older_rules_is_not_continued(
    make_photos: Callable[..., Path], tmp_path: Path
) -> None:
    """New rows of blocks.0 would be means of the patches, under rows that are means of all tokens."""
    photos, cache, spec = make_photos(each=2), tmp_path / "cache", FeatureExtractor.spec
    network, options = "test_vit@random:0", OPTIONS | {"size": None, "output": cache}
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(FeatureExtractor, "spec", lambda *given: replace(spec(*given), prefix_tokens=None))
        patched.setattr("pipeline.backbones.trace._token_order", lambda _module: PATCHES_ONLY)
        (old,) = extract(photos, [network], **options | {"layers": ["penultimate", "blocks.0"]})
    kept = Path(old.path).read_bytes()
    asked = options | {"layers": ["penultimate"]}
    (same,) = extract(photos, [network], **asked)
    assert (same.path, same.computed) == (old.path, 0)
    Image.new("RGB", (40, 40), (1, 2, 3)).save(photos / "red" / "new.png")
    with pytest.raises(CacheError, match=r"lacks rows, .* differently: penultimate, blocks\.0; move it elsewhere"):
        extract(photos, [network], **asked)
    assert Path(old.path).read_bytes() == kept
    Path(old.path).rename(tmp_path / "old.h5")
    assert extract(photos, [network], **asked)[0].computed == 7


def test_fit_reads_files_of_todays_rules_and_says_so(old_cache: Callable[..., Path], tmp_path: Path) -> None:
    photos = old_cache(("red/a.tif",))
    (old,) = (tmp_path / "cache").glob("*.h5")
    kept = old.read_bytes()
    extract(photos, [NETWORK], output=tmp_path / "cache", **OPTIONS)
    old.with_name("older.h5").write_bytes(kept)
    for layer in select(Catalog(tmp_path / "cache")):
        assert [file.path for file, _ in layer.parts] == [old]
        assert layer.table.notes == (f"older.h5 is not read: {old.name} has its layers by today's rules",)


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


# -- The white level ---------------------------------------------------------------------------------------------------


@pytest.fixture
def dim_photos(make_photos: Callable[..., Path]) -> Path:
    """Photos, of which six use 12 of 16 bits."""
    photos, generator = make_photos(), np.random.default_rng(4)
    for class_name in ("red", "blue"):
        for number in range(3):
            pixels = generator.integers(0, 4_096, (40, 40), dtype=np.uint16)
            Image.fromarray(pixels).save(photos / class_name / f"wide{number}.png")
    return photos


def test_images_that_keep_few_grey_levels_are_counted(dim_photos: Path, tmp_path: Path) -> None:
    (result,) = extract(dim_photos, [NETWORK], output=tmp_path / "cache", **OPTIONS)
    (note,) = result.notes
    assert note.startswith("6 grey images wider than 8 bits use less than a quarter")
    (stated,) = extract(dim_photos, [NETWORK], output=tmp_path / "cache", white=4_095, **OPTIONS)
    assert (stated.notes, stated.computed, stated.path == result.path) == ([], 30, False)
    (again,) = extract(dim_photos, [NETWORK], output=tmp_path / "cache", white=4_095, **OPTIONS)
    assert (again.computed, again.path) == (0, stated.path)
    (plain,) = extract(dim_photos, [NETWORK], output=tmp_path / "cache", **OPTIONS)
    assert (plain.computed, plain.path) == (0, result.path)


def test_a_white_level_that_is_not_stated_is_no_part_of_the_fingerprint(dim_photos: Path, tmp_path: Path) -> None:
    (plain,) = extract(dim_photos, [NETWORK], output=tmp_path / "cache", **OPTIONS)
    (stated,) = extract(dim_photos, [NETWORK], output=tmp_path / "cache", white=4_095, **OPTIONS)
    specs = [open_cache(one.path).layers["layer1"].spec for one in (plain, stated)]
    assert "white" not in specs[0]["preprocessing"]
    assert specs[1]["preprocessing"] == specs[0]["preprocessing"] | {"white": 4_095}
    assert "white" not in open_cache(plain.path).request


def test_a_model_predicts_with_the_white_level_that_it_was_trained_with(dim_photos: Path, tmp_path: Path) -> None:
    (stated,) = extract(dim_photos, [NETWORK], output=tmp_path / "cache", white=4_095, **OPTIONS)
    fit(stated.path, layers=["layer1"], save=tmp_path / "model.skops")
    report = predict(tmp_path / "model.skops", dim_photos, tmp_path / "kept", engine="torch")
    assert report.notes == []
    (kept,) = (tmp_path / "kept").glob("*.h5")
    np.testing.assert_allclose(
        open_cache(kept).matrix("layer1"), open_cache(stated.path).matrix("layer1"), rtol=1e-5, atol=1e-5
    )


def test_fine_tuning_with_a_white_level_keeps_it_in_the_network(dim_photos: Path, tmp_path: Path) -> None:
    saved = tmp_path / "tuned.safetensors"
    finetune(
        dim_photos, NETWORK, freeze="layer3", epochs=1, size=32, white=4_095, engine="torch", precision="fp32",
        save=saved, output=tmp_path / "cache",
    )  # fmt: skip
    assert describe_network(saved).scores.preprocessing.white == 4_095
    assert {item.state for item in predict(saved, dim_photos, engine="torch").predictions} == {"done"}
