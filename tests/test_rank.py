from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy.stats import kendalltau

from features_cache import AmbiguousCacheError, CacheError, Catalog, open_cache
from pipeline import rank as rank_module
from pipeline.diagnostics.transfer_scores import h_score, indicators, leep, logme
from pipeline.evaluation.rows import Layer
from pipeline.extract import extract
from pipeline.rank import agreements, rank
from pipeline.results import LayerScore

NETWORK = "timm/test_resnet@random:0"


HOW: dict[str, Any] = {"precision": "fp32", "size": 32, "engine": "torch"}


@pytest.fixture(scope="module")
def made(write_photos: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("rank")
    photos = write_photos(root / "photos")
    for backbone, layers in ((NETWORK, ["layer1", "layer3", "logits"]), (NETWORK.replace(":0", ":1"), ["layer1"])):
        extract(photos, [backbone], layers, output=root / "cache", **HOW)
    return root / "cache"


@pytest.fixture
def cache(made: Path, tmp_path: Path) -> Path:
    """Two backbones over one source."""
    return Path(shutil.copytree(made, tmp_path / "cache"))


def test_layers_of_all_backbones_are_scored_on_training_rows_alone(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[np.ndarray] = []
    features = Layer.features
    monkeypatch.setattr(rank_module, "require_finite", lambda layer: None)
    monkeypatch.setattr(Layer, "features", lambda self, index: read.append(index) or features(self, index))
    report = rank(cache, seed=3)
    assert len(report.ranking) == 4
    assert [score.logme for score in report.ranking] == sorted((s.logme for s in report.ranking), reverse=True)
    rows = read[0]
    assert all((index == rows).all() for index in read)
    assert report.agreement == []
    for score in report.ranking:
        file = next(
            file
            for file in map(open_cache, cache.glob("*.h5"))
            if file.handles["backbone"] == score.backbone and score.layer in file.layers
        )
        matrix, labels = np.asarray(file.matrix(score.layer)[rows]), file.labels[rows]
        assert score.n_train == len(rows) == 15
        assert score.logme == logme(matrix, indicators(labels))
        assert score.h_score == h_score(matrix, labels)
        assert score.leep == (leep(matrix, labels) if score.layer == "fc" else None)


def test_the_order_is_compared_with_fitted_accuracies(cache: Path) -> None:
    report = rank(cache, fitted=True)
    assert all(0 <= score.accuracy <= 1 for score in report.ranking)
    assert report.agreement == agreements(report.ranking)
    assert len(rank(cache, backbone=report.ranking[0].backbone).ranking) < 4


def test_agreement_is_kendalls_tau_where_there_is_something_to_order() -> None:
    logmes, accuracies = [0.3, 0.2, 0.1, 0.0], [0.9, 0.95, 0.7, 0.6]
    scores = [
        LayerScore("net", "avg", str(k), 4, 9, logmes[k], 1.0, 0.5 if k < 2 else None, test_score=accuracies[k])
        for k in range(4)
    ]
    (found,) = agreements(scores)
    assert (found.score, found.layers) == ("logme", 4)
    assert found.kendall_tau == pytest.approx(kendalltau(logmes, accuracies).statistic) == pytest.approx(2 / 3)
    assert found.spearman_rho == pytest.approx(0.8)


def test_wide_layers_are_scored_on_fewer_rows_all_alike(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rank_module, "MOST_ROWS", 8)
    report = rank(cache)
    assert {score.n_train for score in report.ranking} <= set(range(6, 9))
    assert len({score.n_train for score in report.ranking}) == 1
    assert f"scores are of {report.ranking[0].n_train} training rows" in report.notes[-1]


def test_sources_are_not_mixed(cache: Path, make_photos: Callable[..., Path]) -> None:
    extract(make_photos(name="others"), [NETWORK], ["layer1"], output=cache, **HOW)
    with pytest.raises(AmbiguousCacheError, match=r"2 sources.*name one source: others, photos"):
        rank(cache)
    with pytest.raises(CacheError, match=r"no source photo; it has .*; did you mean photos"):
        rank(cache, source="photo")
    location = next(file.handles["location"] for file in Catalog(cache).files if file.handles["source"] == "photos")
    assert rank(cache, source=location).ranking == rank(cache, source="photos").ranking, "as fit has it"
    extract(make_photos(name="else/photos"), [NETWORK], ["layer1"], output=cache, precision="fp32", size=32)
    with pytest.raises(AmbiguousCacheError, match=r"2 sources.*name one source: /.*photos, /.*photos"):
        rank(cache, source="photos")


def test_the_commands(cache: Path, thawline: Callable[..., object], make_photos: Callable[..., Path]) -> None:
    found = thawline("rank", cache, "--fit", "--json").json
    assert set(found) == {"ranking", "agreement"}
    assert {"layer", "backbone", "pool", "logme", "h_score", "leep", "accuracy"} <= set(found["ranking"][0])
    assert "LogME" in thawline("rank", cache).stdout

    others = cache.parent / "others"
    extract(make_photos(("blue",), 20, "field"), [NETWORK], ["layer1"], output=others, **HOW)
    first = next(path for path in cache.glob("*.h5") if "layer3" in open_cache(path).layers)
    found = thawline("drift", first, others, "-l", "layer1", "--json").json
    assert (found["shared"], found["compared"], len(found["foreign_in_second"])) == (8, 12, 10)
    assert 0 < found["p_value"] <= 1
    assert "tells held-out images of the two sets apart" in thawline("drift", first, others, "-l", "layer1").stdout
    thawline("drift", cache, others, "-l", "layer1").assert_one_line("2 files", "name one of the files")
