from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from pipeline.backbones.registry import load_backbone
from pipeline.backbones.taps import tap
from pipeline.errors import FitError
from pipeline.evaluation.splits import make_splits
from pipeline.finetuning import loop
from pipeline.finetuning.inputs import DecodedImages
from pipeline.fit import fit
from pipeline.images.sources.registry import open_source
from pipeline.pretrain import pretrain
from pipeline.pretraining.tasks import EgoMotion, MotionClasses, Rotation, Slowness, next_frames
from pipeline.pretraining.windows import (
    CANVAS,
    OFFSET,
    PAN,
    PAN_TURN,
    SHIFTS,
    TURNED,
    TURNS,
    Pose,
    first_pose,
    window,
)

TINY = "test_resnet"
OPTIONS: dict[str, Any] = {"size": 32, "device": "cpu", "precision": "fp32", "batch_size": 8}
Photos = Callable[..., Path]


def run(photos: Path, output: Path, task: str, **options: Any) -> Any:
    save = output.with_suffix(".safetensors")
    return pretrain(photos, TINY, task=task, save=save, output=output, **{"epochs": 1, **OPTIONS, **options})


@pytest.fixture(scope="module")
def picture() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (56, 56, 3)).astype(np.uint8)


def assert_inside_equal(found: np.ndarray, expected: np.ndarray) -> None:
    """Compare within rounding, without the outermost pixels, which lie on the border of two."""
    difference = found.astype(int) - expected
    assert abs(difference[1:-1, 1:-1]).max() <= 1


def test_a_window_that_moves_by_whole_pixels_is_a_slice(picture: np.ndarray) -> None:
    np.testing.assert_array_equal(window(picture, Pose(0, 0, 0), (32, 32)), picture[12:44, 12:44])
    np.testing.assert_array_equal(window(picture, Pose(4 / 32, -3 / 32, 0), (32, 32)), picture[9:41, 16:48])
    assert_inside_equal(window(picture, Pose(0, 0, 90), (32, 32)), np.rot90(picture[12:44, 12:44]))


def test_a_motion_is_in_the_directions_of_the_window(picture: np.ndarray) -> None:
    turned = Pose(0, 0, 90).moved(4 / 32, 0, 0)
    assert_inside_equal(window(picture, turned, (32, 32)), np.rot90(picture[16:48, 12:44]))


def test_no_corner_of_a_window_leaves_the_picture() -> None:
    side = round(CANVAS * 40)
    white = np.full((side, side, 3), 255, np.uint8)
    firsts = [
        Pose(x, y, turn) for x, y, turn in itertools.product((-OFFSET, OFFSET), (-OFFSET, OFFSET), (-TURNED, TURNED))
    ]
    motions = [*itertools.product(SHIFTS[::4], SHIFTS[::4], TURNS[::4])]
    motions += [*itertools.product((-PAN, PAN), (0.0,), (-PAN_TURN, PAN_TURN))]
    for first, motion in itertools.product(firsts, [(0.0, 0.0, 0.0), *motions]):
        assert (window(white, first.moved(*motion), (40, 40)) == 255).all(), (first, motion)
    drawn = first_pose(np.random.default_rng(0))
    assert max(abs(drawn.x), abs(drawn.y)) <= OFFSET
    assert abs(drawn.degrees) <= TURNED


def test_rotations_are_those_of_numpy(make_photos: Photos) -> None:
    images = DecodedImages(open_source(make_photos()), load_backbone(f"{TINY}@random:0", 32).preprocessing, "none")
    rows = np.array([3, 20])
    (turned,), targets = Rotation(images, augmented=False).read(rows, 7)
    (plain,) = images.read(rows, None)
    for pixels, turns, image in zip(turned.numpy(), targets.tolist(), [*plain.numpy()] * 4, strict=True):
        np.testing.assert_array_equal(pixels, np.rot90(image, turns))
    assert targets.tolist() == [0, 0, 1, 1, 2, 2, 3, 3]


def test_slowness_falls_with_differences_and_rises_when_features_collapse() -> None:
    rng = np.random.default_rng(0)
    both = rng.normal(size=(2, 40, 5))
    expected = 25 * np.mean((both[0] - both[1]) ** 2)
    for frames in both:
        covariance = np.cov(frames.T)
        expected += 25 * np.maximum(0, 1 - np.sqrt(np.diag(covariance) + 1e-4)).mean() / 2
        expected += ((covariance - np.diag(np.diag(covariance))) ** 2).sum() / 5
    slowness, nothing = Slowness(), torch.zeros(40)
    assert slowness(torch.from_numpy(both.reshape(80, 5)), nothing).item() == pytest.approx(expected, rel=1e-5)
    white, _ = np.linalg.qr(rng.normal(size=(40, 5)) - 0.5)
    white = (white - white.mean(0)) @ np.linalg.inv(np.linalg.cholesky(np.cov((white).T)).T)
    slow = torch.from_numpy(np.concatenate([white, white]))
    assert slowness(slow, nothing).item() == pytest.approx(0, abs=1e-6)
    assert slowness(torch.ones(80, 5), nothing).item() == pytest.approx(25 * 0.99)


def test_each_of_the_three_motions_counts() -> None:
    targets = torch.tensor([[0, 4, 2], [1, 1, 1]])
    scores = torch.zeros(2, 15)
    scores[0, [0, 9, 12]] = 9.0
    scores[1, [1, 5, 10]] = 9.0
    assert MotionClasses().right(scores, targets).tolist() == pytest.approx([1, 1 / 3])
    assert MotionClasses()(torch.zeros(2, 15), targets).item() == pytest.approx(np.log(5))


def test_frames_follow_each_other_in_their_group_alone() -> None:
    uris, groups = ["f10", "f2", "g1", "f11", "h"], ["f", "f", "g", "f", ""]
    assert next_frames(uris, groups, np.arange(5)) == {1: 0, 0: 3}
    assert next_frames(uris, groups, np.array([0, 1, 2])) == {1: 0}


@pytest.mark.parametrize("task", ["pseudo-classes", "slow"])  # one with classes, one without
def test_a_killed_run_gives_the_same_weights(
    task: str, make_photos: Photos, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loop, "SAVE_EVERY_S", 0.0)
    photos = make_photos(each=5)
    whole = run(photos, tmp_path / "whole", task, epochs=3)

    def stop(done: int, total: int, text: str, state: str = "") -> None:
        if "epoch 3" in state:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(photos, tmp_path / "cut", task, epochs=3, progress=stop)
    epochs: list[str] = []
    cut = run(photos, tmp_path / "cut", task, epochs=3, progress=lambda *call: epochs.append(call[-1]))
    assert not any("epoch 2/" in state for state in epochs)
    losses = [[epoch["train_loss"] for epoch in one.result.history] for one in (whole, cut)]
    assert losses[0] == losses[1]
    first, second = (load_file(one.result.path) for one in (whole, cut))
    begun = load_backbone(f"{TINY}@random:0", 32).module.state_dict()
    assert first.keys() == second.keys() == {name for name in begun if not name.startswith("fc.")}
    assert all(torch.equal(item, second[name]) for name, item in first.items())
    assert not torch.equal(first["layer1.0.conv1.weight"], begun["layer1.0.conv1.weight"])
    other = run(photos, tmp_path / "whole", task, epochs=3, seed=1)
    assert other.result.history[0]["train_loss"] != losses[0][0], "a seed has its own weights and checkpoint"


def test_the_best_weights_on_the_task_are_kept(make_photos: Photos, tmp_path: Path) -> None:
    result = run(make_photos(), tmp_path / "c", "ego-motion", epochs=8, patience=1, lr=0.03, warmup=0).result
    valid = [epoch["valid_loss"] for epoch in result.history]
    assert result.best_epoch == int(np.argmin(valid)) + 1
    assert len(valid) == min(8, result.best_epoch + 1)
    assert result.valid_loss == min(valid)
    assert result.steps == result.best_epoch * -(-result.n_train // 8)


def test_turns_of_a_gradient_are_learnt(tmp_path: Path) -> None:
    (tmp_path / "photos").mkdir()
    rng = np.random.default_rng(0)
    for number in range(24):
        rows = np.linspace(0, 200, 40)[:, None, None] + rng.integers(0, 50, (40, 40, 3))
        Image.fromarray(rows.astype(np.uint8)).save(tmp_path / "photos" / f"{number}.png")
    result = run(tmp_path / "photos", tmp_path / "c", "rotation", epochs=12, lr=0.01).result
    assert (result.n_train, result.n_val, result.chance) == (19, 5, 0.25)
    assert result.valid_accuracy > 0.8


def test_images_that_fit_tests_are_not_seen(
    make_photos: Photos, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    photos = make_photos()
    rows = sorted(photos.rglob("*.png"))
    lines = [
        f"{path.relative_to(tmp_path)},{path.parent.name if n % 4 else ''},g{n // 2}" for n, path in enumerate(rows)
    ]
    (tmp_path / "part.csv").write_text("path,label,group\n" + "\n".join(lines) + "\n")
    seen: set[int] = set()
    read = DecodedImages.read
    monkeypatch.setattr(
        DecodedImages, "read", lambda self, rows, view: seen.update(rows.tolist()) or read(self, rows, view)
    )
    report = run(tmp_path / "part.csv", tmp_path / "c", "ego-motion", seed=2)
    source = open_source(tmp_path / "part.csv")
    labels, groups = (np.array([getattr(item, name) for item in source.items]) for name in ("label", "group"))
    digests = np.array([np.frombuffer(f"{n:16}".encode(), np.uint8) for n in range(len(labels))])
    splits = make_splits(labels, np.full(len(labels), ""), groups, digests, 2)
    held = np.isin(groups, groups[splits.test])
    assert not seen & set(np.flatnonzero(held).tolist())
    unlabelled = (labels < 0) & ~held & ~np.isin(groups, groups[splits.val])
    assert set(np.flatnonzero(unlabelled).tolist()) <= seen
    assert report.result.n_train == len(splits.train) + unlabelled.sum()
    assert any(
        f"{len(splits.test)} images that seed 2 draws as test images are left out" in note for note in report.notes
    )


def test_images_of_one_class_are_as_if_they_had_no_label(make_photos: Photos, tmp_path: Path) -> None:
    photos = make_photos(("red",), each=10)
    result = run(photos, tmp_path / "a", "ego-motion").result
    assert (result.n_train, result.n_val) == (8, 2)
    rows = [
        f"{path.relative_to(tmp_path)},{'red' if int(path.stem) % 2 else ''}" for path in sorted(photos.rglob("*.png"))
    ]
    (tmp_path / "half.csv").write_text("\n".join(["path,label", *rows]) + "\n")
    result = run(tmp_path / "half.csv", tmp_path / "b", "ego-motion").result
    assert (result.n_train, result.n_val) == (8, 2)


@pytest.mark.parametrize("split", ["val", "test"])
def test_a_table_without_an_image_to_train_on_is_refused(make_photos: Photos, tmp_path: Path, split: str) -> None:
    rows = [f"{path.relative_to(tmp_path)},{split}" for path in sorted(make_photos().rglob("*.png"))]
    (tmp_path / "held.csv").write_text("\n".join(["path,split", *rows]) + "\n")
    with pytest.raises(FitError, match="pretraining needs at least two training images, got 0"):
        run(tmp_path / "held.csv", tmp_path / "a", "ego-motion")


def test_sequences_are_used_where_there_are_groups(make_photos: Photos, tmp_path: Path) -> None:
    photos = make_photos()
    rows = sorted(photos.rglob("*.png"))
    lines = [f"{path.relative_to(tmp_path)},{n // 6},{'val' if n >= 18 else 'train'}" for n, path in enumerate(rows)]
    (tmp_path / "film.csv").write_text("path,group,split\n" + "\n".join(lines) + "\n")
    result = run(tmp_path / "film.csv", tmp_path / "c", "slow").result
    assert (result.n_train, result.n_val) == (15, 5)
    assert result.shown == "sequences of frames: 3 groups in the order of their names"
    assert result.valid_accuracy is None
    assert run(photos, tmp_path / "d", "slow").result.shown == "synthetic pans over each image"


def test_views_of_ego_motion_are_moved_as_the_targets_say(make_photos: Photos) -> None:
    from pipeline.pretraining.tasks import Canvases

    moved: list[Pose] = []

    class Spy(Canvases):
        def pairs(self, rows: Any, view: int, move: Any) -> Any:
            rng = np.random.default_rng(view)
            moved.extend(move(Pose(0, 0, 0), rng) for _ in rows)
            return ()

    _, targets = EgoMotion(Spy(None, (32, 32), np.empty(0))).read(np.arange(6), 3)  # type: ignore[arg-type]
    for pose, (x, y, turn) in zip(moved, targets.tolist(), strict=True):
        assert pose == pytest.approx((SHIFTS[x], SHIFTS[y], TURNS[turn]))


def test_the_saved_backbone_is_one_like_any_other(
    thawline: Callable[..., Any], make_photos: Photos, tmp_path: Path
) -> None:
    photos, file = make_photos(), tmp_path / "own.safetensors"
    base = ("pretrain", photos, "-b", TINY, "--task", "pseudo-classes", "--size", 32, "--epochs", 1, "--device", "cpu")
    document = thawline(*base, "-o", tmp_path / "c", "--save", file, "--json").json
    assert document["saved"] == str(file)
    assert document["result"]["saved_as"] == f"{TINY}@{file}"
    assert document["result"]["chance"] == pytest.approx(1 / document["result"]["n_train"])
    printed = thawline(*base, "-o", tmp_path / "c", "--save", file).stdout
    assert f"backbone: -b {TINY}@{file} --size 32" in printed
    name, how = f"{TINY}@{file}", ("--size", 32, "--engine", "torch", "--precision", "fp32", "--device", "cpu")
    assert thawline("extract", photos, "-b", name, "-l", "stages", *how, "-o", tmp_path / "e").returncode == 0
    assert fit(tmp_path / "e", jobs=1).results[0].accuracy > 0.3
    tuned = thawline("finetune", photos, "-b", name, "--epochs", 1, *how, "-o", tmp_path / "t", "--json").json
    assert tuned["results"][0]["backbone"] == f"{TINY}@own.safetensors"
    loaded, state = load_backbone(name, 32), load_file(file)
    assert all(torch.equal(state[key], item) for key, item in loaded.module.state_dict().items())
    pixels = torch.randint(0, 256, (2, 32, 32, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    begun = load_backbone(f"{TINY}@random:0", 32)
    (found,), (before,) = (tap(one, ["penultimate"])(pixels) for one in (loaded, begun))
    assert not torch.equal(found, before)
    begun.module.load_state_dict(state, strict=False)
    assert torch.equal(found, tap(begun, ["penultimate"])(pixels)[0])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"task": "rotations"}, "did you mean rotation"),
        ({"task": "slow", "augment": "crop"}, "makes its own views"),
        ({"task": "pseudo-classes", "augment": "none"}, "told by augmented views"),
        ({"task": "rotation", "top": "hidden"}, "no option 'top'"),
    ],
)
def test_impossible_options_are_refused(options: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(FitError, match=message):
        pretrain("digits", TINY, save=tmp_path / "a.safetensors", **options)


def test_weights_are_not_drawn_over_those_that_are_named(tmp_path: Path) -> None:
    with pytest.raises(FitError, match=r"to begin with own\.pth, use init pretrained"):
        pretrain("digits", f"{TINY}@own.pth", task="slow", save=tmp_path / "a.safetensors")
