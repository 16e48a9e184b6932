from __future__ import annotations

import io
import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from features_cache import DONE, PENDING, CacheError, CacheFile, Catalog, open_cache
from pipeline.arrays import IntArray
from pipeline.backbones.registry import load_backbone
from pipeline.backbones.thaw_line import find_line, split
from pipeline.engines import engine
from pipeline.errors import FitError
from pipeline.evaluation.rows import select
from pipeline.extract import extract
from pipeline.finetune import finetune
from pipeline.finetuning import data
from pipeline.finetuning.inputs import DecodedImages
from pipeline.finetuning.recipe import check_start, make_recipe
from pipeline.images import resize as transform
from pipeline.images.resize import prepare, prepare_all
from pipeline.images.sources import folder
from pipeline.spec import LayerSpec, Preprocessing, View

NET, LINE = "test_resnet@random:0", "layer4"
AUGMENT = "crop+flip+colour"
HOW: dict[str, Any] = {"size": 32, "engine": "torch", "device": "cpu", "precision": "fp32"}
Photos = Callable[..., Path]


@pytest.fixture(scope="module")
def backbone() -> Any:
    return load_backbone(NET, 32)


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """How often each file was read."""
    counts: Counter[str] = Counter()
    plain = folder.read_file

    def counting(path: Path) -> bytes:
        counts[f"{path.parent.name}/{path.name}"] += 1
        return plain(path)

    monkeypatch.setattr(folder, "read_file", counting)
    return counts


def tune(photos: Path, output: Path, **options: Any) -> Any:
    defaults = {"freeze": LINE, "epochs": 3, "batch_size": 8, "augment": AUGMENT, "views": 2}
    return finetune(photos, NET, output=output, **{**HOW, **defaults, **options})


def view_files(cache: Path, layer: str = LINE) -> dict[int, CacheFile]:
    """The files of views in finetune's folder, by number."""
    files = [file for file in Catalog(cache / "finetune").files if layer in file.layers]
    views = {file.layers[layer].spec["preprocessing"].get("view"): file for file in files}
    return {view: file for view, file in views.items() if view is not None}


def losses(report: Any) -> list[float]:
    return [epoch[name] for epoch in report.results[0].history for name in ("train_loss", "valid_loss")]


def augmented(path: Path, preprocessing: Preprocessing, view: int) -> np.ndarray:
    return prepare(path.read_bytes(), View(**vars(preprocessing), augment=AUGMENT, view=view))


def test_a_view_in_the_cache_is_what_torch_gives_of_the_augmented_image(
    make_photos: Photos, backbone: Any, tmp_path: Path
) -> None:
    photos = make_photos(each=4)
    results = extract(photos, [NET], [LINE], "flatten", tmp_path, augment=AUGMENT, views=[0, 3], **HOW)
    trunk, _ = split(backbone, find_line(backbone, LINE))
    mean, std = (
        torch.tensor(values).view(1, 3, 1, 1) for values in (backbone.preprocessing.mean, backbone.preprocessing.std)
    )
    for view, result in zip([0, 3], results, strict=True):
        file = open_cache(result.path)
        pixels = np.stack([augmented(photos / uri, backbone.preprocessing, view) for uri in file.uris])
        with torch.inference_mode():
            x = (torch.from_numpy(pixels).permute(0, 3, 1, 2) / 255 - mean) / std
            expected = trunk(x).flatten(1).numpy()
        np.testing.assert_allclose(file.matrix(LINE), expected, rtol=1e-4, atol=1e-4)
        spec = LayerSpec.from_json(file.layers[LINE].spec)
        assert spec.fingerprint == file.layers[LINE].fingerprint
        assert isinstance(spec.preprocessing, View)
        assert spec.preprocessing.view == view
    assert not np.allclose(*(open_cache(result.path).matrix(LINE) for result in results))


def test_all_views_share_one_read_one_decode_and_one_engine(
    make_photos: Photos, tmp_path: Path, reads: Counter[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    decoded, built = [], []
    decode, build = transform.decode, engine.build_engine
    monkeypatch.setattr(transform, "decode", lambda *call: decoded.append(call) or decode(*call))
    monkeypatch.setattr(engine, "build_engine", lambda *call: built.append(call) or build(*call))
    extract(make_photos(each=3), [NET], output=tmp_path, augment=AUGMENT, views=range(3), batch_size=2, **HOW)
    assert set(reads.values()) == {1}
    assert len(decoded) == 9
    assert len(built) == 1


def test_openvino_runs_more_views_than_it_likes_requests(make_photos: Photos, tmp_path: Path) -> None:
    photos = make_photos(classes=("one",), each=13)
    how = HOW | {"engine": "openvino"}
    together = extract(photos, [NET], output=tmp_path / "a", augment="crop", views=range(4), batch_size=2, **how)
    for view, result in enumerate(together):
        (alone,) = extract(photos, [NET], output=tmp_path / "b", augment="crop", views=[view], batch_size=2, **how)
        both = [open_cache(one.path).matrix("penultimate") for one in (result, alone)]
        np.testing.assert_allclose(*both, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("freeze", ["layer3", "all"])
def test_cached_views_train_like_the_same_views_decoded(make_photos: Photos, tmp_path: Path, freeze: str) -> None:
    photos = make_photos()
    cached = tune(photos, tmp_path / "cached", freeze=freeze, seeds=[1])
    shown = []

    class Repeated(DecodedImages):
        def read(self, rows: IntArray, view: int | None) -> Any:
            shown.append(view)
            return super().read(rows, None if view is None else view % 2)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(data, "DecodedImages", Repeated)
        decoded = tune(photos, tmp_path / "decoded", freeze=freeze, seeds=[1], views=None)
    assert losses(cached) == pytest.approx(losses(decoded), rel=1e-3)
    turns = [view % 2 for view in dict.fromkeys(shown) if view is not None]
    assert turns in ([0, 1, 0], [1, 0, 1]), "an epoch a view"
    assert cached.results[0].params["views"] == 2


def test_only_images_that_train_have_views_and_more_cost_only_what_is_new(
    make_photos: Photos, tmp_path: Path, reads: Counter[str]
) -> None:
    photos = make_photos(each=10)
    said: list[str] = []
    report = tune(photos, tmp_path, epochs=1, say=said.append)
    assert said == [
        f"activations at {LINE} of 30 images, plain and in 2 augmented views, take 0 MB in {tmp_path}/finetune"
    ]
    first = view_files(tmp_path)
    assert sorted(first) == [0, 1]
    for file in first.values():
        assert (file.states == DONE).sum() == report.results[0].n_train
        assert (file.states == PENDING).sum() == 30 - report.results[0].n_train
    said.clear()
    reads.clear()
    tune(photos, tmp_path, epochs=1, views=2, lr=0.1, say=said.append)
    assert not reads, "nothing is computed twice"
    assert said == [], "what is there takes no more space"
    tune(photos, tmp_path, epochs=1, views=3)
    assert set(reads.values()) == {1}
    assert len(reads) == report.results[0].n_train
    assert {view: file.path for view, file in view_files(tmp_path).items() if view < 2} == {
        view: file.path for view, file in first.items()
    }
    reads.clear()
    tune(photos, tmp_path, epochs=1, views=3, seeds=[0, 1])
    other = set(reads)
    done = view_files(tmp_path)[0].states == DONE
    assert len(other) == done.sum() - report.results[0].n_train > 0


def test_a_kill_while_views_are_made_costs_no_finished_one(
    make_photos: Photos, tmp_path: Path, reads: Counter[str]
) -> None:
    photos = make_photos(each=8)

    def stop(done: int, total: int, text: str, state: str = "") -> None:
        if done >= 12:
            raise KeyboardInterrupt

    how = {"augment": "crop", "views": [0, 1], "batch_size": 4, **HOW}
    with pytest.raises(KeyboardInterrupt):
        extract(photos, [NET], output=tmp_path, progress=stop, **how)
    begun = [int((file.states == DONE).sum()) for file in Catalog(tmp_path).files]
    reads.clear()
    results = extract(photos, [NET], output=tmp_path, **how)
    assert len(reads) == 24 - min(begun) < 24
    assert [result.done for result in results] == [24, 24]


@pytest.mark.parametrize("options", [{"top": "direct"}, {"head_first": True}])
def test_views_go_with_other_options(make_photos: Photos, tmp_path: Path, options: dict[str, Any]) -> None:
    report = tune(make_photos(), tmp_path, epochs=2, **options)
    assert len(report.results[0].history) == 2
    if "top" in options:
        images = view_files(tmp_path, "input")
        assert sorted(images) == [0, 1]
        assert np.abs(images[0].matrix("input") - images[1].matrix("input")).max() > 0.1


def test_what_training_leaves_behind_is_not_in_the_way_of_others(
    make_photos: Photos, tmp_path: Path, reads: Counter[str], thawline: Callable[..., Any]
) -> None:
    photos = make_photos()
    tune(photos, tmp_path, freeze="all", epochs=1, views=None, augment="none")
    with pytest.raises(CacheError, match="run the extraction"):
        Catalog(tmp_path)
    extract(photos, [NET], ["penultimate", LINE], output=tmp_path, **HOW)
    tune(photos, tmp_path, epochs=1)
    assert [layer.name for layer in select(Catalog(tmp_path))] == ["penultimate", LINE], "what fit takes"
    assert len(thawline("cache", "ls", tmp_path, "--json").json["files"]) == 1
    listed = thawline("cache", "ls", tmp_path / "finetune", "--json").json["files"]
    assert sorted(file["view"] for file in listed) == ["", "", f"{AUGMENT} 0", f"{AUGMENT} 1"]
    shutil.rmtree(tmp_path / "finetune")
    reads.clear()
    tune(photos, tmp_path, freeze="all", epochs=1, views=None, augment="none")
    assert not reads, "what is in the cache folder already is taken from there"


def test_one_decode_serves_plain_and_views(backbone: Any) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (700, 900, 3), np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "jpeg")
    wanted = [backbone.preprocessing, *(backbone.preprocessing.viewed(AUGMENT, view) for view in range(3))]
    for found, one in zip(prepare_all(buffer.getvalue(), wanted).pixels, wanted, strict=True):
        np.testing.assert_array_equal(found, prepare(buffer.getvalue(), one))
    assert len({one.geometry for one in wanted}) == 4


@pytest.mark.parametrize(
    ("options", "parts"),
    [
        ({"views": 3}, "nothing is augmented; name an augmentation, such as augment crop"),
        ({"views": 0, "augment": "crop"}, "views: expected a whole number, at least 1, got 0"),
    ],
)
def test_views_that_cannot_be_are_refused(options: dict[str, Any], parts: str) -> None:
    with pytest.raises(FitError, match=parts):
        make_recipe(options)


def test_without_anything_frozen_there_are_no_views(thawline: Callable[..., Any], make_photos: Photos) -> None:
    check_start(make_recipe({"augment": "crop", "views": 1}), NET, "all")
    base = ("finetune", make_photos(), "-b", NET, "--freeze", "none", "--augment", "crop", "--views", 2)
    thawline(*base).assert_one_line("freeze none", "leave out views")


def test_plain_and_views_have_different_requests(make_photos: Photos, tmp_path: Path) -> None:
    photos = make_photos(classes=("one",), each=2)
    calls = [{}, {"augment": "crop", "views": [0]}, {"augment": "flip", "views": [0]}]
    made = [extract(photos, [NET], output=tmp_path, **call, **HOW)[0] for call in calls]
    assert len({result.path for result in made}) == 3
    again = [extract(photos, [NET], output=tmp_path, **call, **HOW)[0] for call in calls]
    assert [result.path for result in again] == [result.path for result in made]
    assert [result.computed for result in again] == [0, 0, 0]
