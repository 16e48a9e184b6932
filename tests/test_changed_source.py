"""What becomes of cached features, and of a run, when the source changes between or during the runs."""

from __future__ import annotations

import csv
import hashlib
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from features_cache import DONE, PENDING, AmbiguousCacheError, CacheError, CacheWriter, Catalog, open_cache, verify
from pipeline import extract as extract_module
from pipeline import predict as predict_module
from pipeline.backbones.registry import load_backbone
from pipeline.compare import compare
from pipeline.errors import FitError, SourceError
from pipeline.evaluation.rows import select
from pipeline.extract import extract
from pipeline.finetune import finetune
from pipeline.finetuning import data as data_module
from pipeline.finetuning.inputs import Subset
from pipeline.fit import fit
from pipeline.images.resize import prepare
from pipeline.images.sources.registry import open_source
from pipeline.predict import CHANGED, predict
from pipeline.rank import rank
from pipeline.results import Prediction

ROOT = Path(__file__).resolve().parents[1]

NETWORK = "test_resnet@random:0"
HOW: dict[str, Any] = {"backbones": [NETWORK], "size": 32, "precision": "fp32", "engine": "torch"}
Photos = Callable[..., Path]


@pytest.fixture
def manifest(make_photos: Photos) -> Path:
    """A manifest of 24 photos of three classes."""
    photos = make_photos()
    write_manifest(photos / "all.csv", {path: path.parent.name for path in sorted(photos.glob("*/*.png"))})
    return photos / "all.csv"


def write_manifest(path: Path, labels: dict[Path, str], split: str = "") -> None:
    with path.open("w", newline="") as stream:
        rows = [(image.relative_to(path.parent).as_posix(), label, split) for image, label in labels.items()]
        csv.writer(stream).writerows([("path", "label", "split"), *rows])


def read_labels(path: Path) -> dict[Path, str]:
    with path.open() as stream:
        return {path.parent / row["path"]: row["label"] for row in csv.DictReader(stream)}


def shown(cache: Path, layer: str) -> dict[str, str]:
    """The labels of the rows that `fit` would use, by uri."""
    (found,) = select(Catalog(cache), [layer])
    table = found.table
    return dict(zip(table.uris.tolist(), [table.classes[label] for label in table.labels], strict=True))


def listed(manifest: Path) -> dict[str, str]:
    return {path.relative_to(manifest.parent).as_posix(): label for path, label in read_labels(manifest).items()}


def test_labels_corrected_between_layers_hold_for_all_of_them(manifest: Path, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    extract(manifest, layers=["layer1"], output=cache, **HOW)
    extract(manifest, layers=["layer2"], pool="max", output=cache, **HOW)
    labels = read_labels(manifest)
    corrected = dict(zip(labels, ["a new class", *list(labels.values())[:-1]], strict=True))
    write_manifest(manifest, corrected, split="train")
    (result,) = extract(manifest, layers=["layer3"], output=cache, **HOW)
    (note,) = [note for note in result.notes if "brought up to date" in note]
    assert note.count(".h5") == 2
    assert "pending" not in note
    for layer in ("layer1", "layer2", "layer3"):
        assert shown(cache, layer) == listed(manifest)
    for file in Catalog(cache).files:
        assert set(file.splits) == {"train"}
        assert (file.states == DONE).all()
        assert verify(file.path).sound
    assert shown(cache, "layer1+layer3") == listed(manifest)
    (again,) = extract(manifest, layers=["layer1"], output=cache, **HOW)
    assert (again.computed, again.notes) == (0, [])


def test_images_that_move_come_and_go_do_so_in_all_layers(make_photos: Photos, tmp_path: Path) -> None:
    photos, cache = make_photos(), tmp_path / "cache"
    extract(photos, layers=["layer1"], output=cache, **HOW)
    before = open_cache(next(cache.glob("*.h5")))
    old = dict(zip(before.uris.tolist(), np.array(before.matrix("layer1")), strict=True))
    (photos / "red" / "0.png").rename(photos / "blue" / "from red.png")
    (photos / "red" / "1.png").unlink()
    Image.new("RGB", (40, 40), "red").save(photos / "red" / "new.png")
    Image.new("RGB", (40, 40), "blue").save(photos / "blue" / "2.png")  # in the place of another image
    (result,) = extract(photos, layers=["layer2"], output=cache, **HOW)
    assert any("brought up to date" in note and "(2 rows left pending)" in note for note in result.notes)
    (file,) = [file for file in Catalog(cache).files if "layer1" in file.layers]
    assert file.uris[file.states == PENDING].tolist() == ["blue/2.png", "red/new.png"]
    for row in np.flatnonzero(file.states == DONE):
        uri = str(file.uris[row]).replace("blue/from red", "red/0")
        np.testing.assert_array_equal(file.matrix("layer1")[row], old[uri])
    labels = shown(cache, "layer1+layer2")
    assert len(labels) == 22
    assert labels["blue/from red.png"] == "blue"
    (again,) = extract(photos, layers=["layer1"], output=cache, **HOW)
    assert (again.computed, again.done, again.notes) == (2, 24, [])


def test_bytes_that_change_unseen_are_pending_in_the_other_layers(make_photos: Photos, tmp_path: Path) -> None:
    photos, cache = make_photos(), tmp_path / "cache"
    extract(photos, layers=["layer1"], output=cache, **HOW)
    image = photos / "red" / "3.png"
    status, data = image.stat(), bytearray(image.read_bytes())
    data[60] ^= 1
    image.write_bytes(data)
    os.utime(image, ns=(status.st_atime_ns, status.st_mtime_ns))
    extract(photos, layers=["layer2"], output=cache, rehash=True, **HOW)
    (file,) = [file for file in Catalog(cache).files if "layer1" in file.layers]
    assert file.uris[file.states == PENDING].tolist() == ["red/3.png"]


@pytest.fixture
def disagreeing(manifest: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache as older releases left it: the second layer has corrected labels, the first has not."""
    cache = tmp_path / "cache"
    with monkeypatch.context() as patch:
        patch.setattr("pipeline.extract.bring_up_to_date", lambda *_: [])
        extract(manifest, layers=["layer1"], output=cache, **HOW)
        labels = read_labels(manifest)
        write_manifest(manifest, labels | {next(iter(labels)): "red"})
        extract(manifest, layers=["layer2"], output=cache, **HOW)
    return cache


def test_files_of_different_times_are_refused_until_one_layer_is_extracted_again(
    disagreeing: Path, manifest: Path, thawline: Callable[..., Any], tmp_path: Path
) -> None:
    others = tmp_path / "others"
    extract(manifest, layers=["layer1", "layer2"], output=others, **HOW)
    parts = "differ in 1 label; extract", str(manifest), "name one file instead of the folder"
    thawline("fit", disagreeing).assert_one_line(*parts)
    for layer in ("layer1", "layer2", "layer1+layer2"):
        thawline("fit", disagreeing, "-l", layer).assert_one_line(*parts)
    thawline("rank", disagreeing).assert_one_line(*parts)
    thawline("drift", disagreeing, others, "-l", "layer1").assert_one_line(*parts)
    thawline("cache", "export", disagreeing, tmp_path / "x.npy", "-l", "layer1").assert_one_line(*parts)
    assert "differ in 1 label" in thawline("cache", "ls", disagreeing).stderr
    assert len(fit(next(disagreeing.glob("*.h5")), heads=["centroid"], jobs=1).results) == 1
    (result,) = extract(manifest, layers=["layer2"], output=disagreeing, **HOW)  # complete, but the other is behind
    assert result.computed == 0
    assert shown(disagreeing, "layer1") == shown(disagreeing, "layer2") == listed(manifest)
    assert len(rank(disagreeing).ranking) == 2
    assert thawline("cache", "ls", disagreeing).stderr == ""


def test_a_file_that_is_being_written_stays_and_is_named(disagreeing: Path, manifest: Path) -> None:
    (busy,) = [file.path for file in Catalog(disagreeing).files if "layer1" in file.layers]
    with CacheWriter.resume(busy):
        (result,) = extract(manifest, layers=["layer2"], output=disagreeing, **HOW)
        (note,) = result.notes
        assert note.startswith(f"{busy.name} could not be brought up to date: ")
        assert "is writing it" in note
    with pytest.raises(CacheError, match="differ in 1 label"):
        fit(disagreeing, ["layer2"])


def test_a_copy_in_the_cache_is_refused_by_all_that_read_it(
    manifest: Path, tmp_path: Path, thawline: Callable[..., Any]
) -> None:
    cache = tmp_path / "cache"
    extract(manifest, layers=["layer1"], output=cache, **HOW)
    (path,) = cache.glob("*.h5")
    shutil.copy(path, cache / "copy.h5")
    parts = path.name, "copy.h5", "both hold layer1", "delete one of them, or move it to another folder"
    thawline("fit", cache).assert_one_line(*parts)
    thawline("rank", cache).assert_one_line(*parts)
    assert all(part in thawline("cache", "ls", cache).stderr for part in parts)
    with pytest.raises(AmbiguousCacheError, match="both hold layer1"):
        extract(manifest, layers=["layer1"], output=cache, **HOW)
    (cache / "copy.h5").unlink()
    assert shown(cache, "layer1") == listed(manifest)


PLAN = """
source = "photos/all.csv"
[[extract]]
backbone = "test_resnet@random:0"
layer = ["layer1", "layer2"]
size = 32
precision = "fp32"
engine = "torch"
output = "cache"
[[extract]]
backbone = "test_resnet@random:0"
layer = "layer1"
pool = "max"
size = 32
precision = "fp32"
engine = "torch"
output = "cache"
[[fit]]
layer = {layers}
head = "centroid"
"""


def test_compare_sees_the_labels_of_today(manifest: Path, tmp_path: Path) -> None:
    plan = tmp_path / "plan.toml"
    plan.write_text(PLAN.format(layers='"layer1"'))
    extract(manifest, layers=["layer2"], output=tmp_path / "cache", **HOW)
    compare(plan, tmp_path / "run")
    labels = read_labels(manifest)
    write_manifest(manifest, {image: label for image, label in labels.items() if label != "red"})
    report = compare(plan, tmp_path / "run")
    assert [(job.n_classes, job.result.n_pool + job.result.n_test) for job in report.results] == [(2, 16)] * 2
    assert not report.failures


@pytest.fixture
def two_part_model(make_photos: Photos, tmp_path: Path) -> Path:
    """A model that reads two layers of different poolings, so that `predict` goes over a source twice."""
    photos, cache = make_photos(name="known"), tmp_path / "known-cache"
    extract(photos, layers=["layer1"], output=cache, **HOW)
    extract(photos, layers=["layer2"], output=cache, **HOW)
    fit(cache, ["layer1+layer2"], ["centroid"], save=tmp_path / "model.skops", jobs=1)
    return tmp_path / "model.skops"


def between_passes(monkeypatch: pytest.MonkeyPatch, module: Any, change: Callable[[], None]) -> None:
    """Let `change` happen after the first call of `extract` in a module."""
    calls = []

    def extracting(*args: Any, **options: Any) -> Any:
        found = extract(*args, **options)
        calls.append(change() if not calls else None)
        return found

    monkeypatch.setattr(module, "extract", extracting)


def predicted(model: Path, source: Path, **options: Any) -> dict[str, Prediction]:
    return {one.uri: one for one in predict(model, source, engine="torch", **options).predictions}


@pytest.mark.parametrize("kept", [False, True])
def test_predict_labels_no_image_by_another(
    two_part_model: Path, make_photos: Photos, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, kept: bool
) -> None:
    photos = make_photos(name="new")
    right = {uri: one.label for uri, one in predicted(two_part_model, photos).items()}
    assert right == {uri: uri.split("/")[0] for uri in right}

    def change() -> None:
        Image.new("RGB", (40, 48), "white").save(photos / "blue" / "00.png")
        (photos / "blue" / "1.png").rename(photos / "red" / "99.png")
        (photos / "green" / "2.png").unlink()
        shutil.copy(photos / "red" / "4.png", photos / "blue" / "3.png")  # both layers have these bytes by now
        Image.new("RGB", (40, 48), "white").save(photos / "blue" / "5.png")

    between_passes(monkeypatch, predict_module, change)
    found = predicted(two_part_model, photos, output=tmp_path / "kept" if kept else None)
    gone = {"blue/1.png": "no such file", "green/2.png": "no such file", "blue/5.png": CHANGED}
    assert {uri: one.reason for uri, one in found.items() if one.state == "unreadable"} == gone
    assert {uri: one.label for uri, one in found.items() if one.state == "done"} == {
        uri: label for uri, label in (right | {"blue/3.png": "red"}).items() if uri not in gone
    }


RENAMER = """
import pathlib, sys, time
for number, file in enumerate(sorted(pathlib.Path(sys.argv[1]).glob("*.png"))[:60]):
    file.rename(file.with_name(f"{1000 + number} {file.name[5:]}"))  # the order of all others changes with it
    time.sleep(0.03)
"""


def test_predict_while_another_process_renames(
    two_part_model: Path, make_photos: Photos, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    moving = tmp_path / "moving"
    moving.mkdir()
    for number, photo in enumerate(sorted(make_photos(each=40, name="still").glob("*/*.png"))):
        photo.rename(moving / f"{number:04d} {photo.parent.name}.png")
    with subprocess.Popen([sys.executable, "-c", RENAMER, moving]) as renamer:
        between_passes(monkeypatch, predict_module, lambda: renamer.wait() and None)  # it also renames in the first
        found = predicted(two_part_model, moving)
    assert renamer.returncode == 0
    done = {uri: one.label for uri, one in found.items() if one.state == "done"}
    assert done == {uri: uri[5:-4] for uri in done}
    assert len(done) >= 60
    assert {one.reason for one in found.values() if one.state != "done"} <= {"no such file", CHANGED}


def trained_on(monkeypatch: pytest.MonkeyPatch) -> dict[bytes, set[int]]:
    """What `finetune` reads, once it ran: the labels under which each picture was shown, by a digest of its pixels."""
    shown: dict[bytes, set[int]] = {}
    batches = Subset.batches

    def noting(subset: Subset, epoch: int = 0) -> Iterator[Any]:
        for inputs, labels in batches(subset, epoch):
            for pixels, label in zip(inputs[0], labels.tolist(), strict=True):
                shown.setdefault(hashlib.blake2b(pixels.numpy().tobytes()).digest(), set()).add(label)
            yield inputs, labels

    monkeypatch.setattr(Subset, "batches", noting)
    return shown


TRAINING: dict[str, Any] = {"size": 32, "precision": "fp32", "engine": "torch", "epochs": 1, "batch_size": 8}


@pytest.mark.parametrize("kind", ["renamed", "added", "replaced"])
def test_finetune_shows_every_picture_under_its_own_label_or_stops(
    make_photos: Photos, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    photos = make_photos()

    def change() -> None:
        if kind == "added":
            Image.new("RGB", (40, 48), "white").save(photos / "blue" / "00.png")
        elif kind == "renamed":
            (photos / "red" / "0.png").rename(photos / "blue" / "00.png")
        else:
            shutil.copy(photos / "red" / "4.png", photos / "blue" / "3.png")

    shown = trained_on(monkeypatch)
    between_passes(monkeypatch, data_module, change)
    options = TRAINING | {"freeze": "none", "output": tmp_path / "cache"}
    if kind == "added":
        finetune(photos, NETWORK, **options)
        spec = load_backbone(NETWORK, 32).preprocessing
        items = [item for item in open_source(photos).items if item.uri != "blue/00.png"]
        own = {hashlib.blake2b(prepare((photos / one.uri).read_bytes(), spec).tobytes()).digest(): one for one in items}
        assert shown == {digest: {item.label} for digest, item in own.items()}
    else:
        reason = "it has other bytes" if kind == "replaced" else "no such file"
        with pytest.raises(SourceError, match=f"changed during training: {reason}; run the same command again"):
            finetune(photos, NETWORK, **options)


def test_finetune_joins_cached_activations_by_bytes(
    make_photos: Photos, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    photos = make_photos()
    between_passes(
        monkeypatch, data_module, lambda: shutil.copy(photos / "red" / "4.png", photos / "blue" / "3.png") and None
    )
    with pytest.raises(FitError, match=r"the source changed while .*\.h5 was extracted; run the same command again"):
        finetune(photos, NETWORK, freeze="layer3", top="direct", output=tmp_path / "cache", **TRAINING)


def test_a_comparison_is_of_one_listing(manifest: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = tmp_path / "plan.toml"
    plan.write_text(PLAN.format(layers='"layer1"'))
    labels = read_labels(manifest)
    between_passes(
        monkeypatch, extract_module, lambda: write_manifest(manifest, {k: v for k, v in labels.items() if v != "red"})
    )
    report = compare(plan, tmp_path / "run")
    assert [(job.n_classes, job.result.n_pool + job.result.n_test) for job in report.results] == [(3, 24)] * 2
    report = compare(plan, tmp_path / "run")
    assert [(job.n_classes, job.result.n_pool + job.result.n_test) for job in report.results] == [(2, 16)] * 2


TWO_COMMANDS = """
import os, sys
import pipeline.backbones.registry, pipeline.engines.torch_engine, cli  # once for both

children = []
for number in range(2):
    children.append(os.fork())
    if not children[-1]:
        told = os.open(f"{number}.txt", os.O_WRONLY | os.O_CREAT)
        os.dup2(told, 1)
        os.dup2(told, 2)
        cli.main()
        sys.exit()
print(*(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children))
"""


def test_two_processes_that_begin_one_file_share_it_or_one_says_what_to_do(make_photos: Photos, tmp_path: Path) -> None:
    photos = make_photos(each=30)
    command = [sys.executable, "-c", TWO_COMMANDS, "extract", photos, "-b", NETWORK, "--size", "32", "--engine"]
    command += ["torch", "--precision", "fp32", "-l", "layer1", "-o", tmp_path / "cache"]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=True)
    codes = [int(code) for code in done.stdout.split()]
    for number, code in enumerate(codes):
        if code:
            assert code == 1
            assert "is writing it; wait for it to end" in (tmp_path / f"{number}.txt").read_text()
    assert codes.count(0) >= 1
    (file,) = Catalog(tmp_path / "cache").files
    assert (file.states == DONE).all()
    assert verify(file.path).sound


def test_a_file_that_another_process_replaced_is_not_filled_by_row_number(
    make_photos: Photos, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    photos, cache = make_photos(), tmp_path / "cache"
    extract(photos, layers=["layer1"], output=cache, only=["red/7.png"], **HOW)
    resume = CacheWriter.resume

    def late(path: Path) -> CacheWriter:
        """As if another process had seen a new image just before the file is locked."""
        monkeypatch.setattr(CacheWriter, "resume", resume)
        Image.new("RGB", (40, 48), "white").save(photos / "blue" / "00.png")
        extract(photos, layers=["layer1"], output=cache, only=["blue/00.png"], **HOW)
        (photos / "blue" / "00.png").unlink()
        return resume(path)

    monkeypatch.setattr(CacheWriter, "resume", late)
    extract(photos, layers=["layer1"], output=cache, **HOW)
    extract(photos, layers=["layer1"], output=tmp_path / "fresh", **HOW)
    found, fresh = (Catalog(folder).find("layer1") for folder in (cache, tmp_path / "fresh"))
    assert found.uris.tolist() == fresh.uris.tolist()
    np.testing.assert_array_equal(found.digests, fresh.digests)


@pytest.mark.parametrize(
    ("change", "first", "hint"),
    [
        (lambda path: path.replace("/", "\\"), "blue\\0.png", "write / between folders instead of \\; paths are"),
        (lambda path: path.removesuffix(".png"), "blue/0", "paths are relative to the manifest's folder, {folder}"),
        (lambda path: f"/data/{path}", "/data/blue/0.png", "paths are relative to the manifest's folder, {folder}"),
    ],
)
def test_a_manifest_whose_paths_all_miss_says_so_at_once(
    manifest: Path, thawline: Callable[..., Any], tmp_path: Path, change: Any, first: str, hint: str
) -> None:
    text = manifest.read_text().splitlines()
    manifest.write_text("\n".join([text[0], *(",".join([change(p), q, r]) for p, q, r in csv.reader(text[1:]))]))
    command = ["extract", manifest, "-b", NETWORK, "--size", "32", "--engine", "torch", "-o", tmp_path / "cache"]
    parts = f"24 of 24 rows are unreadable, first: {first}: no such file; ", hint.format(folder=manifest.parent)
    for _ in range(2):
        thawline(*command).assert_one_line(*parts)
    thawline("fit", tmp_path / "cache").assert_one_line(*parts)
    thawline("rank", tmp_path / "cache").assert_one_line(*parts)
    with pytest.raises(FitError, match="24 of 24 rows are unreadable"):
        finetune(manifest, NETWORK, output=tmp_path / "cache", **TRAINING)


def test_one_readable_image_is_enough(make_photos: Photos, thawline: Callable[..., Any], tmp_path: Path) -> None:
    photos = make_photos(("blue",), 2)
    (photos / "blue" / "0.png").write_bytes(b"no image")
    command = ["extract", photos, "-b", NETWORK, "--size", "32", "--engine", "torch", "-o", tmp_path / "cache"]
    assert thawline(*command).returncode == 0
    (photos / "blue" / "1.png").write_bytes(b"neither")
    reason = "2 of 2 rows are unreadable, first: blue/0.png: not an image of a known format"
    found = thawline(*command)
    found.assert_one_line(reason)
    assert found.stderr.endswith("format\n"), "nothing is wrong with the path"
