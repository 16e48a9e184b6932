from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from features_cache import DONE, PENDING, CacheWriter, Catalog, DamagedCacheError, open_cache, verify
from pipeline.backbones.registry import load_backbone
from pipeline.engines.torch_engine import TorchEngine
from pipeline.errors import BackboneError, EngineError, FitError, SourceError
from pipeline.evaluation.rows import select
from pipeline.extract import extract
from pipeline.extraction.lookup import rows_of
from pipeline.fit import fit
from pipeline.images.sources import folder
from pipeline.images.sources.registry import open_source
from pipeline.results import ExtractResult
from pipeline.spec import aliases_of

ONE, OTHER, LARGER = "test_resnet@random:0", "test_efficientnet@random:1", "googlenet@random:0"
OPTIONS = {"layers": ["penultimate"], "size": 64, "precision": "fp32", "engine": "torch"}


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """How often each file was read."""
    counts: Counter[str] = Counter()
    plain = folder.read_file

    def counting(path: Path) -> bytes:
        counts[path.name] += 1
        return plain(path)

    monkeypatch.setattr(folder, "read_file", counting)
    return counts


def features(result: ExtractResult) -> np.ndarray:
    file = open_cache(result.path)
    assert (file.states == DONE).all()
    return np.array(file.matrix("penultimate"))


def test_several_backbones_read_each_image_once_and_give_what_each_gives_alone(
    make_photos: Callable[..., Path], tmp_path: Path, reads: Counter[str]
) -> None:
    photos = make_photos(classes=("one",), each=11)
    both = extract(photos, [ONE, OTHER], output=tmp_path / "both", batch_size=4, **OPTIONS)
    assert set(reads.values()) == {1}
    assert [result.backbone for result in both] == [ONE, OTHER]
    for result in both:
        (alone,) = extract(photos, [result.backbone], output=tmp_path / "alone", batch_size=4, **OPTIONS)
        np.testing.assert_allclose(features(result), features(alone), rtol=1e-5, atol=1e-5)
        assert (result.computed, result.rows) == (11, 11)


def test_backbones_of_different_input_sizes_share_the_read(
    make_photos: Callable[..., Path], tmp_path: Path, reads: Counter[str]
) -> None:
    photos = make_photos(classes=("one",), each=3)
    how = {"precision": "fp32", "engine": "torch"}
    results = extract(photos, ["efficientnet_lite0", LARGER], ["input"], output=tmp_path / "both", **how)
    assert set(reads.values()) == {1}
    for result in results:
        (alone,) = extract(photos, [result.backbone], ["input"], output=tmp_path / "alone", **how)
        both = [open_cache(one.path).matrix("input") for one in (result, alone)]
        np.testing.assert_array_equal(*both)
    first, second = (open_cache(result.path).matrix("input") for result in results)
    assert not np.allclose(first, second)


def test_each_file_gets_only_the_rows_that_it_lacks(
    make_photos: Callable[..., Path], tmp_path: Path, reads: Counter[str]
) -> None:
    photos = make_photos(classes=("one",), each=6)
    cache = tmp_path / "cache"
    extract(photos, [ONE], output=cache, **OPTIONS)
    Image.new("RGB", (50, 50), (200, 10, 10)).save(photos / "one" / "new.png")
    Image.new("RGB", (50, 50), (200, 10, 10)).save(photos / "one" / "newer.png")
    (photos / "one" / "broken.png").write_bytes(b"no image")
    reads.clear()
    first, second = extract(photos, [ONE, OTHER], output=cache, batch_size=2, **OPTIONS)
    assert (first.computed, first.reused, first.unreadable) == (1, 7, 1)
    assert (second.computed, second.reused, second.unreadable) == (7, 1, 1)
    assert set(reads.values()) == {1}
    for result in (first, second):
        (alone,) = extract(photos, [result.backbone], output=tmp_path / "alone", **OPTIONS)
        done = open_cache(result.path).states == DONE
        mine, theirs = (open_cache(one.path).matrix("penultimate")[done] for one in (result, alone))
        np.testing.assert_allclose(mine, theirs, rtol=1e-5, atol=1e-5)


def test_what_one_file_has_of_an_image_and_the_other_lacks_is_computed_for_the_other(
    make_photos: Callable[..., Path], tmp_path: Path
) -> None:
    photos = make_photos(classes=("one",), each=4)
    cache = tmp_path / "cache"
    for result in extract(photos, [ONE, OTHER], output=cache, **OPTIONS):
        kept = features(result)
        place = open_cache(result.path).header.arrays["/rows/state"]
        with Path(result.path).open("r+b") as file:  # as if killed: other rows are pending in each file
            file.seek(place.offset + (1 if result.backbone == ONE else 2))
            file.write(bytes([PENDING]))
        np.save(tmp_path / result.backbone, kept)
    for result in extract(photos, [ONE, OTHER], output=cache, **OPTIONS):
        assert (result.computed, result.reused) == (1, 3)
        np.testing.assert_allclose(features(result), np.load(tmp_path / f"{result.backbone}.npy"), rtol=1e-5, atol=1e-5)


def test_an_error_in_one_backbone_keeps_what_both_have(
    make_photos: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    photos = make_photos(classes=("one",), each=9)
    (photos / "one" / "7.png").write_bytes(b"no image")
    with pytest.raises(SourceError, match=r"one/7.png.*or set on-error to skip"):
        extract(photos, [ONE, OTHER], output=tmp_path / "cache", batch_size=2, on_error="stop", **OPTIONS)
    files = [open_cache(path) for path in (tmp_path / "cache").glob("*.h5")]
    assert len(files) == 2
    assert all((file.states == DONE).sum() >= 4 for file in files)
    assert not list((tmp_path / "cache").glob("*.lock"))
    assert CacheWriter.resume(files[0].path).close() is None


# Several poolings


@pytest.fixture
def passes(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many images each call of a network was given."""
    counts: list[int] = []
    plain = TorchEngine.start

    def counting(engine: TorchEngine, pixels: np.ndarray) -> Callable[[], list[np.ndarray]]:
        counts.append(len(pixels))
        return plain(engine, pixels)

    monkeypatch.setattr(TorchEngine, "start", counting)
    return counts


def contents(folder: Path) -> dict[str, dict[str, np.ndarray]]:
    files = {path.name: open_cache(path) for path in folder.glob("*.h5")}
    assert all(verify(file.path).sound and not file.pending.any() for file in files.values())
    return {name: {layer: np.array(file.matrix(layer)) for layer in file.layers} for name, file in files.items()}


def assert_same(folder: Path, other: Path) -> None:
    """Check that two folders hold files of the same names and the same features, bit for bit."""
    mine, theirs = contents(folder), contents(other)
    assert mine.keys() == theirs.keys()
    for name, layers in mine.items():
        assert list(layers) == list(theirs[name])
        for layer, values in layers.items():
            np.testing.assert_array_equal(values, theirs[name][layer], strict=True)


@pytest.mark.parametrize(
    ("backbone", "engine", "layers", "pools"),
    [
        (ONE, "torch", ["input", "stages", "penultimate", "logits"], ["avg", "max", "avg+max", "gem", "grid2", "none"]),
        ("test_vit@random:0", "torch", ["blocks.3", "penultimate"], ["cls", "avg", "cls+avg", "none"]),
        (ONE, "openvino", ["layer2", "penultimate"], ["max", "avg"]),
    ],
)
def test_several_poolings_take_one_pass_and_give_what_each_gives_alone(
    make_photos: Callable[..., Path], tmp_path: Path, passes: list[int], backbone: str, engine: str, layers: list[str],
    pools: list[str],
) -> None:  # fmt: skip
    photos = make_photos(classes=("one",), each=3)
    how = OPTIONS | {"layers": layers, "engine": engine}
    if backbone.startswith("test_vit"):
        how["size"] = 32
    both = extract(photos, [backbone], pool=pools, output=tmp_path / "both", **how)
    assert [open_cache(result.path).handles["pool"] for result in both] == pools
    assert [result.computed for result in both] == [3] * len(pools)
    assert passes == ([3] if engine == "torch" else [])
    for pool in pools:
        extract(photos, [backbone], pool=pool, output=tmp_path / "alone", **how)
    assert_same(tmp_path / "both", tmp_path / "alone")
    again = extract(photos, [backbone], pool=pools, output=tmp_path / "both", **how)
    assert [(result.path, result.computed) for result in again] == [(result.path, 0) for result in both]


def test_a_pooling_that_is_cached_is_not_computed_again(
    make_photos: Callable[..., Path], tmp_path: Path, passes: list[int]
) -> None:
    photos = make_photos(classes=("one",), each=6)
    names = {item.uri for item in open_source(photos).items}
    cache, how = tmp_path / "cache", OPTIONS | {"layers": ["layer1", "penultimate"], "batch_size": 1}
    extract(photos, [ONE], pool="avg", output=cache, **how)
    extract(photos, [ONE], pool="max", output=cache, only=sorted(names)[:4], **how)  # as if it had been stopped
    kept = {
        path.name: path.stat().st_mtime_ns for path in cache.glob("*.h5") if "avg" in open_cache(path).handles["pool"]
    }
    passes.clear()
    avg, most, grid = extract(photos, [ONE], pool=["avg", "max", "grid2"], output=cache, **how)
    assert [(one.computed, one.reused) for one in (avg, most, grid)] == [(0, 6), (2, 4), (6, 0)]
    assert sum(passes) == 6
    assert {Path(avg.path).name: Path(avg.path).stat().st_mtime_ns} == kept
    for pool in ("avg", "max", "grid2"):
        extract(photos, [ONE], pool=pool, output=tmp_path / "alone", **how)
    assert_same(cache, tmp_path / "alone")


def test_views_and_poolings_are_crossed_and_each_view_takes_one_pass(
    make_photos: Callable[..., Path], tmp_path: Path, passes: list[int]
) -> None:
    photos, how = make_photos(classes=("one",), each=2), OPTIONS | {"augment": "crop", "views": [0, 1]}
    both = extract(photos, [ONE], pool=["avg", "grid2"], output=tmp_path / "both", **how)
    assert passes == [2, 2]
    handles = [open_cache(result.path).handles for result in both]
    assert [(one["pool"], one["view"]) for one in handles] == [
        ("avg", "crop 0"), ("avg", "crop 1"), ("grid2", "crop 0"), ("grid2", "crop 1")
    ]  # fmt: skip
    for pool in ("avg", "grid2"):
        extract(photos, [ONE], pool=pool, output=tmp_path / "alone", **how)
    assert_same(tmp_path / "both", tmp_path / "alone")


def test_each_pooling_continues_in_the_precision_it_was_begun_in(
    make_photos: Callable[..., Path], tmp_path: Path, passes: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    photos = make_photos(classes=("one",), each=4)
    how = OPTIONS | {"output": tmp_path / "cache", "precision": "auto"}
    first = next(item.uri for item in open_source(photos).items)
    monkeypatch.setattr("pipeline.engines.select.has_bf16", lambda _device: False)
    extract(photos, [ONE], pool="max", only=[first], **how)
    monkeypatch.setattr("pipeline.engines.select.has_bf16", lambda _device: True)
    results = extract(photos, [ONE], pool=["avg", "max", "gem"], **how)
    assert [(result.precision, result.computed) for result in results] == [("bf16", 4), ("fp32", 3), ("bf16", 4)]
    assert sorted(passes) == [1, 3, 4]  # avg and gem share theirs


def test_a_pooling_that_does_not_suit_leaves_no_file(make_photos: Callable[..., Path], tmp_path: Path) -> None:
    photos = make_photos(classes=("one",), each=1)
    for pools, message in ((["avg", "cls"], "layer layer1 of .* has no class token"), (["avg", "agv"], "mean avg")):
        with pytest.raises(BackboneError, match=message):
            extract(photos, [ONE], pool=pools, output=tmp_path / "cache", **OPTIONS | {"layers": ["layer1"]})
        assert not (tmp_path / "cache").exists()


def test_an_unknown_on_error_is_refused(make_photos: Callable[..., Path], tmp_path: Path) -> None:
    with pytest.raises(SourceError, match="'skip' or 'stop', got 'stpo'"):
        extract(make_photos(), on_error="stpo", output=tmp_path / "cache")
    assert not (tmp_path / "cache").exists()


def test_an_augmentation_is_checked_and_needs_views(make_photos: Callable[..., Path], tmp_path: Path) -> None:
    photos = make_photos(each=1)
    with pytest.raises(FitError, match="unknown augmentation 'nonsense'"):
        extract(photos, [ONE], output=tmp_path / "cache", augment="flip+nonsense")
    with pytest.raises(SourceError, match="augment 'flip' is for views, and none were asked for; give their numbers"):
        extract(photos, [ONE], output=tmp_path / "cache", augment="flip")
    assert not (tmp_path / "cache").exists()


def test_two_names_of_one_network_are_one(make_photos: Callable[..., Path], tmp_path: Path) -> None:
    photos = make_photos(classes=("one",), each=2)
    (result,) = extract(photos, [ONE, f"timm/{ONE}"], output=tmp_path / "cache", **OPTIONS)
    assert (result.backbone, result.computed) == (ONE, 2)


@pytest.mark.parametrize("wrong", ["resnet35", "resnet34@IMAGENET", "squeezenet1_0@random:0"])
def test_what_is_wrong_with_a_later_backbone_leaves_no_empty_file(
    make_photos: Callable[..., Path], tmp_path: Path, wrong: str
) -> None:
    options = OPTIONS | {"layers": ["layer1"]}
    with pytest.raises(BackboneError):
        extract(make_photos(classes=("one",), each=2), [ONE, wrong], output=tmp_path / "cache", **options)
    assert not (tmp_path / "cache").exists()


def test_a_cache_begun_in_a_precision_that_is_not_here_says_how_to_go_on(
    make_photos: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    photos, options = (
        make_photos(classes=("one",), each=1),
        {**OPTIONS, "precision": "auto", "output": tmp_path / "cache"},
    )
    monkeypatch.setattr("pipeline.engines.select.has_bf16", lambda _device: True)
    assert [result.precision for result in extract(photos, [ONE], **options)] == ["bf16"]
    monkeypatch.setattr("pipeline.engines.select.has_bf16", lambda _device: False)
    with pytest.raises(EngineError, match=r"are bf16, which cpu does not compute here; .*with precision fp32"):
        extract(photos, [ONE], **(options | {"layers": ["layer1"]}))


def test_layers_are_found_by_name_and_by_alias_however_they_were_asked_for(
    make_photos: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    photos, cache = make_photos(classes=("one",), each=1), tmp_path / "cache"
    names = ["layer1", "layer2", "layer3", "layer4"]

    def paths(layers: list[str]) -> set[str]:
        return {result.path for result in extract(photos, [ONE], output=cache, **OPTIONS | {"layers": layers})}

    first, second = paths(names[:3]), paths(["fc", "layer4"])
    monkeypatch.setattr("pipeline.extract.FeatureExtractor", None)  # no network is needed to look these up
    assert paths(["stages"]) == first | second
    assert paths(["logits"]) == second
    assert [layer.name for layer in select(Catalog(cache), ["stages", "logits"])] == [*names, "fc"]
    monkeypatch.setattr("pipeline.spec.DECODE_POLICY", 0)  # as if other rules had held when the files were made
    with pytest.raises(TypeError, match="NoneType"):
        paths(["stages"])


@pytest.mark.parametrize(
    "spec", [{}, {"decode": []}, {"pool": 1}, {"precision": None}, {"preprocessing": {"size": "x"}}]
)
def test_a_cache_that_does_not_say_how_it_was_extracted_is_refused(
    make_photos: Callable[..., Path], tmp_path: Path, spec: dict[str, Any]
) -> None:
    photos, cache = make_photos(classes=("one",), each=2), tmp_path / "cache"
    (result,) = extract(photos, [ONE], output=cache, **OPTIONS)
    file = open_cache(result.path)
    layers = [replace(info, spec=info.spec | spec if spec else {}) for info in file.layers.values()]
    Path(result.path).unlink()
    CacheWriter.create(
        result.path, rows_of(open_source(photos)), file.classes, layers, file.handles, file.request
    ).close()
    with pytest.raises(DamagedCacheError, match=r"does not say how its layers were extracted: (expected|the key)"):
        extract(photos, [ONE], output=cache, **OPTIONS)


@pytest.mark.parametrize("aliases", [None, 1.5, {"penultimate": 1}, {"penultimate": [1]}, {"penultimate": []}])
def test_aliases_that_make_no_sense_are_none(aliases: Any) -> None:
    assert aliases_of({"aliases": aliases}) == {}
    assert aliases_of({"aliases": {"stages": ["a", "b"]}}) == {"stages": ["a", "b"]}


@pytest.mark.parametrize(
    ("layer", "known"), [("classifier.1", ["penultimate"]), ("flatten", ["logits", "penultimate"])]
)
def test_logits_of_squeezenet_that_lack_its_last_relu_are_not_taken_for_logits(layer: str, known: list[str]) -> None:
    aliases = {"logits": [layer], "penultimate": ["features.12.cat"]}
    assert sorted(aliases_of({"backbone": "squeezenet1_1@random:0", "aliases": aliases})) == known
    assert sorted(aliases_of({"backbone": "vgg16", "aliases": aliases})) == ["logits", "penultimate"]


@pytest.mark.parametrize("grown", [False, True])
def test_an_image_that_could_not_be_read_once_is_read_the_next_time(
    make_photos: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, grown: bool
) -> None:
    photos, cache = make_photos(classes=("one",), each=4), tmp_path / "cache"
    (photos / "one" / "gone.png").symlink_to("nowhere")  # nothing to read: that shows without another attempt
    (photos / "one" / "broken.png").write_bytes(b"no image")
    plain = Path.read_bytes
    with monkeypatch.context() as patch:
        patch.setattr(Path, "read_bytes", lambda path: plain(path) if path.name != "2.png" else plain(photos))
        (first,) = extract(photos, [ONE], output=cache, **OPTIONS)
    assert (first.done, first.unreadable) == (3, 3)
    assert "directory" in open_cache(first.path).reasons[2]
    if grown:
        Image.new("RGB", (50, 50), "red").save(photos / "one" / "new.png")
    (second,) = extract(photos, [ONE], output=cache, **OPTIONS)
    assert (second.computed, second.done, second.unreadable) == (1 + grown, 4 + grown, 2)
    monkeypatch.setattr("pipeline.extract.open_files", None)
    (third,) = extract(photos, [ONE], output=cache, **OPTIONS)
    assert (third.computed, third.done, third.unreadable) == (0, 4 + grown, 2)
    assert verify(third.path).sound


def test_progress_and_result_say_what_bounds_the_speed(make_photos: Callable[..., Path], tmp_path: Path) -> None:
    calls = []
    (result,) = extract(make_photos(), [ONE], output=tmp_path, progress=lambda *call: calls.append(call), **OPTIONS)
    assert result.bound in ("decode", "model", "disk")
    assert [done for done, *_ in calls] == [0, 8, 16, 24]
    assert {(total, text) for _, total, text, _ in calls} == {(24, ONE)}
    megabytes, *states = [state for *_, state in calls]
    assert megabytes == f"{round(Path(result.path).stat().st_size / 1e6)} MB"
    assert all(state in ("bound by decode", "bound by model", "bound by disk") for state in states)
    (again,) = extract(tmp_path / "photos", [ONE], output=tmp_path, **OPTIONS)
    assert again.bound is None


def test_rows_whose_features_are_no_numbers_are_counted(make_photos: Callable[..., Path], tmp_path: Path) -> None:
    state = load_backbone(ONE).module.state_dict()
    state["fc.weight"] = torch.full_like(state["fc.weight"], 1e38)  # finite, but their sums are not
    torch.save(state, path := tmp_path / "large.pth")
    photos, how = make_photos(each=3), OPTIONS | {"layers": ["fc"]}
    (result,) = extract(photos, [f"{ONE.partition('@')[0]}@{path}"], output=tmp_path / "cache", **how)
    file = open_cache(result.path)
    bad = file.uris[~np.isfinite(file.matrix("fc")).all(axis=1)]
    assert result.done == 9
    assert len(bad) > 0
    assert result.notes == [
        f"{len(bad)} rows have NaN or infinite features, first {bad[0]}; no head can be fitted on them"
    ]
    with pytest.raises(FitError, match=rf"in {len(bad)} of 9 rows, first {bad[0]}; they were computed in fp32"):
        fit(tmp_path / "cache")
