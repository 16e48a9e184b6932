"""The lecture's claims: their statistics against other implementations, and their page; the command in a short form."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import scipy.stats
import torch
from sklearn.linear_model import Ridge

from pipeline.errors import FitError
from pipeline.evaluation.intervals import corrected_t_test
from pipeline.images.decode import decode
from pipeline.images.sources.registry import Items, open_source
from pipeline.lecture import CLAIMS, lecture
from pipeline.lecturing import direct, gradients
from pipeline.lecturing.claim import Findings, Setting, mean_interval, seeds_figure, verdict
from pipeline.lecturing.stimuli import STIMULI, stimulus_source
from pipeline.lecturing.training import RATES, error_figure, train_nets
from pipeline.results import LectureFigure, silent


@pytest.fixture(scope="module")
def setting(tmp_path_factory: pytest.TempPathFactory, write_photos: Callable[..., Path]) -> Setting:
    photos = write_photos(tmp_path_factory.mktemp("lecture") / "photos", each=10)
    return Setting(open_source(photos), photos.parent / "work", True, silent)


def test_intervals_are_students() -> None:
    values = np.random.default_rng(0).normal(size=7)
    expected = scipy.stats.t.interval(0.95, 6, values.mean(), scipy.stats.sem(values))
    assert mean_interval(values) == pytest.approx(expected)
    assert mean_interval(values, tests=4) == pytest.approx(
        scipy.stats.t.interval(1 - 0.05 / 4, 6, values.mean(), scipy.stats.sem(values))
    )

    t, p = corrected_t_test(values, n_train=64, n_test=16)
    low, high = mean_interval(values, overlap=16 / 64)
    assert (high - low) / 2 == pytest.approx(values.mean() / t * scipy.stats.t.ppf(0.975, 6))
    assert (low <= 0 <= high) == (p >= 0.05)


def test_all_verdicts_of_a_claim_err_in_one_claim_of_twenty_at_most() -> None:
    """Four figures without any effect, five seeds each: any verdict but `open` is an error."""
    rng = np.random.default_rng(1)
    wrong = 0
    for _ in range(2000):
        figures = [seeds_figure("", rng.normal(size=5), expected=1, tests=4) for _ in range(4)]
        wrong += any(figure.verdict != "open" for figure in figures)
    assert 0.03 < wrong / 2000 < 0.065


def test_a_verdict_is_that_of_the_whole_interval() -> None:
    intervals = ((1, 2, 1), (-2, -1, 1), (-2, -1, -1), (0, 1, 1), (2, 2, 1))
    judged = [verdict((low, high), sign) for low, high, sign in intervals]
    assert judged == ["agrees", "contradicts", "agrees", "open", "open"]


def test_no_seed_trains_on_test_images(setting: Setting) -> None:
    splits = [item.split for item in setting.split_source.items]
    assert {name: splits.count(name) for name in ("train", "val", "test")} == {"train": 18, "val": 6, "test": 6}
    items = [item._replace(split="test" if row % 2 else "train") for row, item in enumerate(setting.source.items)]
    given = replace(setting.source, items=Items.of(items))
    kept = replace(setting, source=given).split_source
    assert {row for row, item in enumerate(kept.items) if item.split == "test"} == set(range(1, 30, 2))


@pytest.mark.parametrize("name", STIMULI)
def test_stimuli_are_drawn_anew_each_time_alike(name: str) -> None:
    one, other = stimulus_source(name, 2), stimulus_source(name, 2)
    images = [decode(one.read(item)).image for item in one.items]
    assert [one.read(item) for item in one.items] == [other.read(item) for item in other.items]
    assert len({image.tobytes() for image in images}) == 16
    assert all(np.asarray(image).std() > 20 for image in images)


def test_gratings_have_their_orientation() -> None:
    """The peak of the Fourier transform lies in the direction in which the class says that the waves run."""
    rng = np.random.default_rng(0)
    for kind in range(8):
        power = np.abs(np.fft.fft2(STIMULI["edges"](kind, rng) - 0.5))
        row, column = np.unravel_index(power[:, :32].argmax(), (64, 32))
        angle = np.rad2deg(np.arctan2(np.fft.fftfreq(64)[row], np.fft.fftfreq(64)[column])) % 180
        away = abs(angle - 22.5 * kind)
        assert min(away, 180 - away) < 11


def test_gradients_through_linear_layers_shrink_by_the_factor_of_the_weights(setting: Setting) -> None:
    """Twice the weights of a relu net: every layer passes twice the gradient on, exactly, as relu is homogeneous."""
    images, labels = gradients._batch(setting)
    ratios = [gradients._ratio(("relu", "none", "none", factor), 10, 3, images, labels) for factor in (1.0, 0.5)]
    # the loss's gradient at the scores differs, but it is the same below and above, up to the images' weights in it
    assert ratios[0] - ratios[1] == pytest.approx(7 * np.log10(2), abs=0.3)
    assert torch.is_tensor(images)
    assert images.std().item() == pytest.approx(1)


def test_r2_is_that_of_ridge_regression() -> None:
    rng = np.random.default_rng(0)
    features, scores = rng.normal(size=(60, 5)), np.eye(3)[rng.integers(0, 3, 60)]
    train, held = np.arange(40), np.arange(40, 60)
    errors, _ = direct._cross_validate([features], scores, 3, [(train, held), (held, train)])
    scaled = features / np.sqrt(features[train].var(axis=0).sum())
    tried = []
    for penalty in direct._PENALTIES:
        model = Ridge(penalty).fit(scaled[train], scores[train])
        tried.append((model.predict(scaled[held]) - scores[held]) ** 2)
    assert all(np.isclose(errors[held][:, k], [one[:, k] for one in tried]).all(axis=1).any() for k in range(3))


def test_nets_train_for_equal_steps(setting: Setting) -> None:
    (net,) = train_nets(setting, ["plain20[width=2]"], 1, 8).values()
    assert [result.seed for result in net.results] == [0, 1]
    assert {len(result.history) for result in net.results} == {1}
    assert {one.uris.tobytes() for one in net.predictions} == {net.predictions[0].uris.tobytes()}
    shown = error_figure("same", net, net, "", "", expected=1)
    assert (shown.value, shown.verdict) == (0.0, "open")
    assert net.training_errors[0] == pytest.approx(100 * (1 - net.results[0].history[-1]["train_acc"]))


def test_the_learning_rate_is_chosen_on_validation_images(setting: Setting, monkeypatch: pytest.MonkeyPatch) -> None:
    """The middle rate is the best on test, the other two on validation, of which the last has the lower loss."""
    scores = dict(zip(RATES, ((0.9, 0.5, 0.1), (0.8, 0.1, 0.9), (0.9, 0.4, 0.1)), strict=True))

    def fake(*_args: object, lr: float, seeds: tuple[int, ...], **_options: object) -> SimpleNamespace:
        names = ("validation_accuracy", "validation_log_loss", "accuracy")
        results = [
            SimpleNamespace(seed=seed, converged=True, **dict(zip(names, scores[lr], strict=True))) for seed in seeds
        ]
        return SimpleNamespace(results=results, predictions=[])

    monkeypatch.setattr("pipeline.lecturing.training.finetune", fake)
    (net,) = train_nets(replace(setting, quick=False), ["plain20"], 1, 8).values()
    assert net.rate == RATES[2]
    assert [result.seed for result in net.results] == [0, 1, 2, 3, 4]


def test_the_page_has_all_claims_of_the_folder(
    setting: Setting, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, thawline: Callable[..., Any]
) -> None:
    found = Findings([LectureFigure("a & b", 1234.5, (0.1, 0.25), "0.5", "someone", "agrees")], [], ["a note"])
    monkeypatch.setattr(gradients, "measure_claim", lambda _: found)
    monkeypatch.setattr(direct, "measure_claim", lambda _: found)
    lecture(["gradients"], setting.source, tmp_path)
    printed = thawline(
        "lecture", "direct", "--source", setting.source.location, "-o", tmp_path, "--quick", "--json"
    ).json
    (result,) = printed["results"]
    assert (result["claim"], result["quick"], result["figures"][0]["interval"]) == ("direct", True, [0.1, 0.25])
    page = (tmp_path / "lecture.html").read_text()
    assert all(page.count(f'id="{name}"') == 1 for name in ("gradients", "direct"))
    assert page.count("a &amp; b") == 2
    assert "1,234" in page
    assert "0.1 to 0.25" in page
    assert "http" not in page.replace("http-equiv", "")
    assert json.loads(Path(printed["files"]["direct"]).read_text())["charts"] == []


def test_the_command_lists_claims_and_refuses_others(thawline: Callable[..., Any], tmp_path: Path) -> None:
    assert [one["claim"] for one in thawline("lecture", "--json").json["claims"]] == list(CLAIMS)
    assert "degradation" in thawline("lecture").stdout
    thawline("lecture", "gradient", "-o", tmp_path / "new").assert_one_line(
        "no claim 'gradient'; did you mean gradients"
    )
    assert not (tmp_path / "new").exists()
    with pytest.raises(FitError):
        lecture(["gradient"])
