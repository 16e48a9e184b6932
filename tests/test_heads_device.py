from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits
from sklearn.preprocessing import StandardScaler
from threadpoolctl import threadpool_limits

from features_cache import CacheWriter, LayerInfo, Rows
from pipeline.errors import EngineError, FitError
from pipeline.fit import fit
from pipeline.heads import logreg
from pipeline.heads.choose import Fold, scale, search, train_final
from pipeline.heads.logreg import Logreg
from pipeline.heads.registry import Head
from pipeline.heads.saved import load_model
from pipeline.heads.solvers.device import DeviceRows, run_one_by_one


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    with threadpool_limits(1):
        yield


@pytest.fixture
def strict(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make tensors of the CPU as strict as those of a GPU: nothing may take them for arrays unasked."""

    def refuse(self: torch.Tensor, *_: Any, **__: Any) -> None:
        raise TypeError("can't convert cuda:0 device type tensor to numpy")

    monkeypatch.setattr(torch.Tensor, "__array__", refuse)


def rows(classes: int, n: int = 300) -> tuple[Fold, np.ndarray]:
    """A fold of standardised digits, noisy enough to overlap, and fresh rows."""
    x, y = load_digits(n_class=classes, return_X_y=True)
    rng = np.random.default_rng(0)
    order = rng.permutation(len(x))
    x = StandardScaler().fit_transform(x) + 2 * rng.standard_normal(x.shape)
    x, y = x[order].astype(np.float32), y[order].astype(np.int64) * 2
    return Fold(x[:n], y[:n], x[n:], y[n:]), x[-200:]


def agree(device: str, classes: int, *, balanced: bool) -> None:
    fold, fresh = rows(classes, 200 if classes == 2 else 300)
    found = []
    for family in (Logreg(), Logreg(device)):
        head = Head("logreg", family, "none")
        choice = search(head, [fold], balanced=balanced)
        final = train_final(head, {"C": 0.1}, scale("none", fold.train, fresh, rotated=False), fold.y)
        found.append((choice, final.converged, final.estimator.predict(fresh), final.estimator.predict_proba(fresh)))
    (plain, converged, labels, probabilities), (mine, my_converged, my_labels, my_probabilities) = found
    assert mine.params == plain.params
    assert mine.score == pytest.approx(plain.score, abs=0.0021)  # a row on the border
    assert (mine.unconverged, my_converged) == (plain.unconverged, converged)
    assert (mine.temperature or 1) == pytest.approx(plain.temperature or 1, rel=0.02)
    assert my_labels.tolist() == labels.tolist()
    assert my_probabilities == pytest.approx(probabilities, abs=0.002)


@pytest.mark.usefixtures("strict")
@pytest.mark.parametrize(("classes", "balanced"), [(10, False), (4, True), (2, True)])
def test_tensors_give_the_choice_and_the_labels_of_arrays(classes: int, balanced: bool) -> None:
    agree("cpu", classes, balanced=balanced)


@pytest.mark.gpu
@pytest.mark.parametrize(("classes", "balanced"), [(10, False), (2, True)])
def test_a_gpu_gives_the_choice_and_the_labels_of_the_cpu(classes: int, balanced: bool) -> None:
    agree("cuda", classes, balanced=balanced)


def test_an_iteration_limit_is_reported_on_tensors_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipeline.heads.logreg.MOST_ITERATIONS", 2)
    fold, _ = rows(10)
    assert not Logreg("cpu").fit({"C": 10.0}, fold.train, fold.y).converged


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    fold, _ = rows(3)
    x, y = np.concatenate([fold.train, fold.held]), np.concatenate([fold.y, fold.y_held]) // 2
    n, zeros = len(x), np.zeros(len(x), np.int64)
    table = Rows([f"{i:03d}" for i in range(n)], y, [""] * n, [""] * n, zeros, zeros)
    handles = {"source": "digits", "backbone": "net", "pool": "avg"}
    request = {"backbone": "net", "layers": ["a"], "pool": "avg", "size": None, "precision": "auto"}
    layers = [LayerInfo("a", x.shape[1], "float32", {"layer": "a", "pool": "avg"}, "print")]
    digests = np.arange(n * 16, dtype=np.uint32).view(np.uint8)[: n * 16].reshape(n, 16)
    path = tmp_path / "file.h5"
    with CacheWriter.create(path, table, ("0", "1", "2"), layers, handles, request) as writer:
        writer.begin_run({})
        writer.write(np.arange(n), {"a": x}, digests)
    return path


@pytest.mark.usefixtures("strict")
def test_a_fit_sends_logistic_regression_to_the_device_and_the_rest_to_workers(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    moved: list[str] = []

    def spy(rows: np.ndarray, device: str) -> DeviceRows:
        moved.append(device)
        return DeviceRows(rows, "cpu")

    monkeypatch.setattr("pipeline.engines.select.find_device", lambda device: device)
    monkeypatch.setattr(logreg, "DeviceRows", spy)
    done: list[int] = []
    told: list[str] = []
    call = partial(fit, cache, heads=["centroid", "logreg", "ridge"], seeds=[0, 1], jobs=2)
    plain = call()
    mine = call(
        device="cuda:1",
        save=tmp_path / "m.skops",
        progress=lambda count, *_: done.append(count),
        on_result=lambda result, _: told.append(result.head),
    )
    assert set(moved) == {"cuda:1"}
    assert len(moved) == 8, "rows to learn from and to judge by, the same to calibrate, and all of them, for each seed"
    assert [result.head for result in mine.results] == [result.head for result in plain.results]
    assert [result.params for result in mine.results] == [result.params for result in plain.results]
    for ours, theirs in zip(mine.predictions, plain.predictions, strict=True):
        assert ours.y_pred.tolist() == theirs.y_pred.tolist()
    assert done == list(range(1, 7))
    assert sorted(told) == ["centroid/l2"] * 2 + ["logreg/l2"] * 2 + ["ridge/l2"] * 2
    saved = load_model(tmp_path / "m.skops")
    assert saved.head == mine.results[mine.best].head


def test_a_model_trained_on_tensors_is_saved_as_any_other(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pipeline.engines.select.find_device", lambda _device: "cpu")
    report = fit(cache, device="cuda", save=tmp_path / "m.skops")
    saved = load_model(tmp_path / "m.skops")
    classifier = saved.pipeline[-1]
    assert classifier.coef_.dtype == np.float64
    assert type(classifier.intercept_) is np.ndarray
    assert saved.temperature == report.results[0].temperature


def test_a_device_that_is_not_here_is_refused_and_auto_is_the_cpu(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(EngineError, match="no device cuda"):
        fit(cache, device="cuda")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(logreg, "DeviceRows", lambda *_: pytest.fail("the CPU needs no tensors"))
    assert fit(cache, device="auto").results[0].params == fit(cache, device="cpu").results[0].params


def test_too_little_memory_ends_a_fit_before_workers_begin(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def too_large(*_: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr("pipeline.engines.select.find_device", lambda _device: "cuda")
    monkeypatch.setattr(logreg, "DeviceRows", too_large)
    with pytest.raises(FitError, match="do not fit into the memory"):
        fit(cache, heads=["knn", "logreg"], jobs=2, device="cuda", progress=lambda *call: pytest.fail(str(call)))


def test_too_little_memory_is_one_line() -> None:
    def too_large() -> None:
        raise torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate")

    with pytest.raises(FitError, match="do not fit into the memory of the device; use device 'cpu'") as caught:
        list(run_one_by_one([(too_large, (), {})]))
    assert "\n" not in str(caught.value)


@pytest.mark.usefixtures("strict")
def test_rows_on_a_device_multiply_as_a_matrix() -> None:
    matrix = np.random.default_rng(0).standard_normal((5, 3)).astype(np.float32)
    moved = DeviceRows(matrix, "cpu")
    right, left = np.ones((2, 3), np.float32).T, np.ones((5, 2), np.float32).T
    for product, plain in ((moved @ right, matrix @ right), (left @ moved, left @ matrix)):
        assert type(product) is np.ndarray
        assert product == pytest.approx(plain)
