from __future__ import annotations

import csv
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from features_cache import CacheFile, CacheWriter, LayerInfo, Rows, open_cache
from pipeline.diagnostics.confident import doubt_labels
from pipeline.diagnostics.out_of_fold import choose_params, out_of_fold
from pipeline.errors import FitError
from pipeline.heads.registry import find_head
from pipeline.suspects import suspects, write_labels

COUNT, DIM, CLASSES = 300, 16, ("ant", "bee", "cat", "dog")


def write(path: Path, features: np.ndarray, labels: np.ndarray, images: np.ndarray | None = None) -> CacheFile:
    n = len(features)
    groups = [f"g{i // 2}" for i in range(n)]
    rows = Rows([f"{i:04d}" for i in range(n)], labels, ["train", "test", ""] * (n // 3), groups, *np.ones((2, n), int))
    layer = LayerInfo("a", features.shape[1], "float32", {"precision": "fp32"}, "f")
    numbers = np.arange(n) if images is None else images
    with CacheWriter.create(path, rows, CLASSES, [layer], {"source": "s"}, {}) as writer:
        writer.write(np.arange(n), {"a": features}, numbers.astype("<u8").repeat(2).view(np.uint8).reshape(n, 16))
    return open_cache(path)


@pytest.fixture(scope="module")
def blobs() -> tuple[np.ndarray, np.ndarray]:
    """Features that tell four classes apart, and these classes."""
    generator = np.random.default_rng(0)
    truth = generator.integers(0, 4, COUNT)
    return 2.2 * np.eye(4, DIM)[truth] + 0.45 * generator.standard_normal((COUNT, DIM)), truth


@pytest.fixture(scope="module")
def wrong() -> np.ndarray:
    return np.sort(np.random.default_rng(1).permutation(COUNT)[: COUNT // 20])


@pytest.fixture(scope="module")
def cache(blobs: tuple[np.ndarray, np.ndarray], wrong: np.ndarray, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache in which 5 % of the labels are wrong."""
    features, truth = blobs
    labels = truth.copy()
    labels[wrong] = (truth[wrong] + 1) % 4
    path = tmp_path_factory.mktemp("suspects") / "a.h5"
    write(path, features, labels)
    return path


def naive(probabilities: np.ndarray, labels: np.ndarray) -> list[bool]:
    """Confident learning row by row, as the paper has it."""
    classes = range(probabilities.shape[1])
    usual = {
        j: np.mean([p[j] for p, label in zip(probabilities, labels, strict=True) if label == j]) for j in set(labels)
    }
    flagged = []
    for p, label in zip(probabilities, labels, strict=True):
        likely = [j for j in classes if j in usual and p[j] >= usual[j]]
        flagged.append(bool(likely) and max(likely, key=lambda j: p[j]) != label)
    return flagged


def test_flags_are_those_of_confident_learning() -> None:
    generator = np.random.default_rng(3)
    probabilities = generator.dirichlet(np.ones(5), 400)
    labels = np.where(generator.random(400) < 0.7, probabilities.argmax(axis=1), generator.integers(0, 4, 400))
    doubts = doubt_labels(probabilities, labels)
    assert doubts.flagged.tolist() == naive(probabilities, labels.tolist())
    assert 20 < doubts.flagged.sum() < 200
    assert sorted(doubts.order.tolist()) == list(range(400))
    equal = doubt_labels(probabilities, probabilities.argmax(axis=1))  # no mistakes to count, so equal rates
    given = probabilities.max(axis=1)
    assert (np.diff(given[equal.order]) >= 0).all(), "then the order is that of the label's probability"
    assert (doubts.suggested != labels).all()


def test_no_row_is_judged_by_a_head_that_saw_it_or_its_group() -> None:
    generator = np.random.default_rng(4)
    features = generator.standard_normal((90, 40)).astype(np.float32)
    units = np.arange(90) // 3
    labels = generator.integers(0, 2, 30)[units]  # noise that could only be learnt by heart, from rows of the group
    features += features[units * 3]
    head = find_head("knn/none")
    probabilities = out_of_fold(lambda rows: features[rows], labels, units, 2, head, {"k": 1}, 0, lambda: None)
    assert 0.3 < np.mean(probabilities.argmax(axis=1) == labels) < 0.7
    alone = out_of_fold(lambda rows: features[rows], labels, np.arange(90), 2, head, {"k": 1}, 0, lambda: None)
    assert np.mean(alone.argmax(axis=1) == labels) > 0.8, "without groups it is"
    with pytest.raises(FitError, match="gives no probabilities"):
        choose_params(lambda rows: features[rows], labels, units, find_head("ridge"), 0)


def test_wrong_labels_are_found_with_the_right_ones(
    cache: Path, wrong: np.ndarray, blobs: tuple[np.ndarray, np.ndarray]
) -> None:
    report = suspects(cache, threshold=0.999)
    first = report.suspects[: len(wrong)]
    found = [int(one.uri) for one in first if int(one.uri) in wrong]
    assert len(found) >= 0.8 * len(first), "precision of the top 5 %"
    right = [CLASSES[blobs[1][int(one.uri)]] == one.suggested for one in first if int(one.uri) in wrong]
    assert np.mean(right) == 1
    for one in first:
        assert one.suggested_probability > one.probability
        assert len(one.neighbours) == 3
        assert one.uri not in [each.uri for each in one.neighbours]
    trust = report.planted
    assert trust.planted == round(0.05 * COUNT)
    assert trust.recall == trust.found / trust.planted >= 0.8
    assert trust.precision <= trust.precision_new
    assert trust.precision == trust.found / trust.flagged
    assert report.accuracy > 0.85
    assert any("labels of test images" in note for note in report.notes)


def test_equal_images_with_several_labels_come_first(
    tmp_path: Path, blobs: tuple[np.ndarray, np.ndarray], thawline: Callable[..., Any]
) -> None:
    features, labels = blobs[0].copy(), blobs[1].copy()
    images = np.arange(COUNT)
    images[200], features[200], labels[200] = 100, features[100], (labels[100] + 2) % 4
    images[201] = 101
    features[201], labels[201] = features[101], labels[101]
    write(tmp_path / "a.h5", features, labels, images)
    found = thawline("suspects", tmp_path, "--threshold", 0.999, "--json").json
    assert found["conflicts"] == [
        {
            "uris": ["0100", "0200"],
            "labels": [CLASSES[labels[100]], CLASSES[labels[200]]],
            "suggested": CLASSES[blobs[1][100]],
        }
    ]
    assert not {"0100", "0200"} & {one["uri"] for one in found["suspects"]}
    assert found.keys() == {"layer", "head", "accuracy", "conflicts", "suspects", "planted"}
    shown = thawline("suspects", tmp_path, "--threshold", 0.999).stdout
    assert "equal images with different labels" in shown
    assert "labels that were changed on purpose" in shown


def test_labels_go_out_as_a_table(cache: Path, wrong: np.ndarray, tmp_path: Path, thawline: Callable[..., Any]) -> None:
    report = suspects(cache, threshold=0.999)
    changed = write_labels(report, tmp_path / "labels.csv")
    with (tmp_path / "labels.csv").open(newline="") as stream:
        rows = list(csv.DictReader(stream))
    assert list(rows[0]) == ["uri", "label", "split", "group"]
    assert changed == len(report.suspects)
    file = open_cache(cache)
    given = [CLASSES[label] for label in file.labels.tolist()]
    differing = {row["uri"] for row, label in zip(rows, given, strict=True) if row["label"] != label}
    assert differing == {one.uri for one in report.suspects}
    (tmp_path / "corrections.csv").write_text('uri,label\r\n"0004","new ""class"""\r\n')
    asked = ("suspects", cache, "--threshold", 0.999, "--labels-out", tmp_path / "own.csv")
    thawline(*asked, "--corrections", tmp_path / "corrections.csv")
    with (tmp_path / "own.csv").open(newline="") as stream:
        own = list(csv.DictReader(stream))
    assert [(row["uri"], row["label"]) for row, label in zip(own, given, strict=True) if row["label"] != label] == [
        ("0004", 'new "class"')
    ]
    (tmp_path / "corrections.csv").write_text("uri,label\nnosuch,ant\n")
    refused = thawline(*asked, "--corrections", tmp_path / "corrections.csv")
    assert refused.returncode == 1
    assert "1 corrections are of images without a label in a.h5, first nosuch" in refused.stderr
    (tmp_path / "corrections.csv").write_text("name,label\n")
    thawline(*asked, "--corrections", tmp_path / "corrections.csv").assert_one_line("uri and label", "name, label")
    (tmp_path / "corrections.csv").write_text("uri,label\n0004,ant\n0004,bee\n")
    said = "names '0004' twice, with label 'ant' and 'bee'"
    thawline(*asked, "--corrections", tmp_path / "corrections.csv").assert_one_line(said)
    (tmp_path / "corrections.jsonl").write_text('{"uri":"0004","label":"ant"}\n{"uri":"0005","label":""}\n')
    thawline(*asked, "--corrections", tmp_path / "corrections.jsonl").assert_one_line("found none in row 2")
    (tmp_path / "corrections.csv").write_text("uri,label\n")
    assert thawline(*asked, "--corrections", tmp_path / "corrections.csv").returncode == 0, "nothing was marked"
    assert thawline("suspects", cache, "--corrections", tmp_path / "own.csv").returncode == 2


@pytest.mark.parametrize(
    ("labels", "said"),
    [
        (np.full(30, -1), "no row has a label"),
        (np.zeros(30, int), "at least two classes"),
        (np.r_[np.zeros(28, int), 1, 1], "cannot make folds"),
    ],
)
def test_bad_labels_are_one_line(tmp_path: Path, labels: np.ndarray, said: str, thawline: Callable[..., Any]) -> None:
    write(tmp_path / "a.h5", np.random.default_rng(0).standard_normal((30, 4)), labels)
    thawline("suspects", tmp_path, "--threshold", 0.999).assert_one_line(said)


def test_bad_features_are_one_line(tmp_path: Path, thawline: Callable[..., Any]) -> None:
    features = np.ones((30, 4))
    write(tmp_path / "a.h5", features, np.arange(30) % 4)
    assert "Traceback" not in thawline("suspects", tmp_path, "--threshold", 0.999).stderr, "all images look the same"
    features[3] = np.nan
    shutil.rmtree(tmp_path, ignore_errors=True)
    tmp_path.mkdir()
    write(tmp_path / "a.h5", features, np.arange(30) % 4)
    thawline("suspects", tmp_path, "--threshold", 0.999).assert_one_line("NaN or infinite", "0003")
