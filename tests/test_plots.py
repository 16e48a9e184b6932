from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from fontTools.fontBuilder import FontBuilder
from fontTools.pens.ttGlyphPen import TTGlyphPen
from matplotlib.figure import Figure
from matplotlib.font_manager import fontManager
from PIL import Image
from threadpoolctl import threadpool_limits

from features_cache import CacheError
from pipeline.evaluation.intervals import wilson
from pipeline.extract import extract
from pipeline.reporting.charts.accuracy import Line, draw_depth
from pipeline.reporting.charts.confusion import confusion_figure
from pipeline.reporting.charts.embedding import embedding_figure
from pipeline.reporting.charts.fit_pictures import depth_figure, labels_figure, save
from pipeline.reporting.charts.reliability import reliability_figure
from pipeline.reporting.charts.theme import (
    LONGEST,
    MOST_LINES,
    SCREEN,
    Theme,
    _fonts_for,
    characters_without_font,
    save_figure,
    short,
)
from pipeline.reporting.page.svg import PAGE, to_svg
from pipeline.results import FitResult


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    with threadpool_limits(1):
        yield


def predictions(k: int, n: int = 300) -> tuple[np.ndarray, np.ndarray, list[str]]:
    rng = np.random.default_rng(0)
    y = rng.integers(0, k, n)
    names = [f"class {number} with a name that costs $5 and $$ and never seems to end" for number in range(k)]
    return y, np.where(rng.random(n) < 0.7, y, rng.integers(0, k, n)), names


def result(layer: str, accuracy: float, head: str = "logreg", shots: int | str = "all", seed: int = 0) -> FitResult:
    return FitResult(
        kind="head", backbone="net", layer=layer, pool="avg", head=head, params={}, seed=seed, shots=shots, n_train=80,
        n_val=20, n_test=50, accuracy=accuracy, accuracy_ci95=(0, 1), mean_per_class_accuracy=accuracy,
        macro_f1=accuracy, log_loss=None, ece=None, seconds=1.0, converged=True,
    )  # fmt: skip


def texts(figure: Figure) -> list[str]:
    figure.draw_without_rendering()
    return [text.get_text() for axes in figure.axes for text in axes.texts]


def test_the_image_itself_comes_before_all_layers() -> None:
    figure = depth_figure([result(layer, 0.5) for layer in ("layer1", "penultimate", "input")])
    figure.draw_without_rendering()
    assert [label.get_text() for label in figure.axes[0].get_xticklabels()] == ["input", "layer1", "penultimate"]


@pytest.mark.parametrize("k", [2, 10, 40, 130])
def test_confusion_matrix_has_any_number_of_classes(k: int, tmp_path: Path) -> None:
    y, found, names = predictions(k)
    figure = confusion_figure(y, found, names)
    shown = np.asarray(figure.axes[0].images[0].get_array())
    expected = np.zeros((k, k))
    np.add.at(expected, (y, found), 1)
    np.testing.assert_allclose(shown, expected / np.maximum(expected.sum(axis=1, keepdims=True), 1))
    if k <= 10:
        assert sorted(map(int, texts(figure))) == sorted(expected[expected > 0].astype(int))
    ticks = [label.get_text() for label in figure.axes[0].get_yticklabels()]
    assert (ticks == [short(name) for name in names]) == (k <= 120)
    save(figure, tmp_path, "m")
    figure.draw_without_rendering()
    for axes in figure.axes:
        inside = axes.get_tightbbox()
        assert inside is not None
        assert inside.x0 >= 0
        assert inside.y0 >= 0, "labels are not cut off"


def test_depth_curve_has_means_over_seeds_and_wilsons_intervals() -> None:
    values = {"low": (0.4, 0.48), "mid": (0.8, 0.92), "top": (0.6, 0.8)}
    results = [result(layer, value, seed=seed) for layer, pair in values.items() for seed, value in enumerate(pair)]
    axes = depth_figure(results).axes[0]
    line, _, (bars,) = axes.containers[0].lines
    np.testing.assert_allclose(line.get_ydata(), [0.44, 0.86, 0.7])
    ends = np.array([segment[:, 1] for segment in bars.get_segments()])
    np.testing.assert_allclose(ends, [wilson(round(50 * mean), 50) for mean in (0.44, 0.86, 0.7)])
    assert [tick.get_text() for tick in axes.get_xticklabels()] == list(values)


def test_budget_curve_goes_through_means_and_its_band_over_seeds() -> None:
    values = {5: (0.4, 0.5), 20: (0.6, 0.8), "all": (0.9, 0.9)}
    results = [
        result("top", value, shots=shots, seed=seed)
        for shots, pair in values.items()
        for seed, value in enumerate(pair)
    ]
    axes = labels_figure(results, n_classes=2).axes[0]
    np.testing.assert_allclose(axes.lines[0].get_xdata(), [5, 20, 50])
    np.testing.assert_allclose(axes.lines[0].get_ydata(), [0.45, 0.7, 0.9])
    band = axes.collections[0].get_paths()[0].vertices
    assert {tuple(point) for point in np.round(band, 6)} >= {(5, 0.4), (5, 0.5), (20, 0.6), (20, 0.8), (50, 0.9)}
    assert [tick.get_text() for tick in axes.get_xticklabels()] == ["5", "20", "all"]


def test_of_many_lines_the_best_are_drawn() -> None:
    results = [result(f"layer{k}", k / 40, shots=shots) for k in range(30) for shots in (1, "all")]
    axes = labels_figure(results, 2).axes[0]
    assert [text.get_text() for text in axes.figure.legends[0].get_texts()] == [f"layer{k}" for k in range(22, 30)]
    assert len(axes.lines) == MOST_LINES


def test_reliability_shows_accuracy_by_confidence() -> None:
    sure = np.array([[0.95, 0.05]] * 10 + [[0.4, 0.6]] * 10)
    y = np.array([0] * 9 + [1] + [1] * 5 + [0] * 5)
    axes = reliability_figure(y, {"as trained": sure}).axes
    line = axes[0].containers[0].lines[0]
    np.testing.assert_allclose(np.column_stack(line.get_data()), [(0.6, 0.5), (0.95, 0.9)])
    assert [bar.get_height() for bar in axes[1].patches] == [0, 0, 0, 0, 0, 10, 0, 0, 0, 10]
    assert "calibration error 0.075" in axes[0].get_legend().get_texts()[1].get_text()


@pytest.mark.parametrize(("k", "n", "legend"), [(2, 6, 3), (30, 150, 31), (100, 200, 12)])
def test_the_map_colours_what_can_be_told_apart(k: int, n: int, legend: int) -> None:
    y, found, names = predictions(k, n)
    y[:k] = np.arange(k)
    found[:2] = [1, 0]
    features = np.eye(k, 12, dtype=np.float32)[y] + np.random.default_rng(1).standard_normal((n, 12)).astype("f")
    figure = embedding_figure(features, y, found, names)
    pca, tsne = figure.axes
    assert len(figure.legends[0].get_texts()) == legend
    for axes in (pca, tsne):
        points = sum(len(drawn.get_offsets()) for drawn in axes.collections if drawn.get_label() != "mistakes")
        assert points == n
        looks = {(str(drawn.get_facecolor()), drawn.get_paths()[0].vertices.tobytes()) for drawn in axes.collections}
        assert len(looks) == legend, "no two classes look the same"


def test_a_picture_that_cannot_be_written_leaves_the_old_one(tmp_path: Path, file_limit: None) -> None:
    path = tmp_path / "confusion.png"
    path.write_bytes(b"old")
    with pytest.raises(CacheError, match="file-size limit"):
        save_figure(confusion_figure(*predictions(2)), path, dpi=100)
    assert [found.read_bytes() for found in tmp_path.iterdir()] == [b"old"]


def test_long_names_are_shortened_in_the_middle() -> None:
    assert short("cat") == "cat"
    long = short("a" * 50 + "z" * 50)
    assert len(long) == LONGEST
    assert long.startswith("aaa")
    assert long.endswith("zzz")


def test_a_name_with_dollars_is_no_formula(tmp_path: Path) -> None:
    y = np.array([0, 1])
    _, svg = save(confusion_figure(y, y, ["US$_1$", "cat"]), tmp_path, "m")
    assert "US$_1$</text>" in svg.read_text()


@pytest.fixture
def cat_font(tmp_path: Path) -> Iterator[str]:
    """The name of an installed font that has one Chinese character."""
    pen = TTGlyphPen(None)
    for number, point in enumerate([(0, 0), (0, 1000), (1000, 1000), (1000, 0)]):
        (pen.lineTo if number else pen.moveTo)(point)
    pen.closePath()
    font = FontBuilder(1000)
    font.setupGlyphOrder([".notdef", "cat"])
    font.setupCharacterMap({ord("猫"): "cat"})
    font.setupGlyf({".notdef": pen.glyph(), "cat": pen.glyph()})
    font.setupHorizontalMetrics(dict.fromkeys((".notdef", "cat"), (1000, 0)))
    font.setupHorizontalHeader(ascent=1000, descent=0)
    font.setupNameTable({"familyName": "Cat Sans", "styleName": "Regular"})
    font.setupOS2()
    font.setupPost()
    font.save(tmp_path / "cat.ttf")
    fonts = list(fontManager.ttflist)
    fontManager.addfont(tmp_path / "cat.ttf")
    _fonts_for.cache_clear()
    yield "Cat Sans"
    fontManager.ttflist = fonts
    _fonts_for.cache_clear()


def test_names_are_drawn_with_a_font_that_has_their_characters(cat_font: str, tmp_path: Path) -> None:
    y, found, _ = predictions(2)
    figure = confusion_figure(y, found, ["猫", "dog"])
    save(figure, tmp_path, "confusion")
    for axis in (figure.axes[0].xaxis, figure.axes[0].yaxis):
        assert axis.get_ticklabels()[0].get_fontfamily()[-1] == cat_font
    assert characters_without_font(["猫", "dog"]) == ""


def test_characters_that_no_font_has_are_told_and_raise_no_warning(tmp_path: Path) -> None:
    y, found, _ = predictions(2)
    picture, drawing = save(confusion_figure(y, found, ["\ue123\ue124", "dog"]), tmp_path, "confusion")
    assert picture.stat().st_size > 1000
    assert "\ue123\ue124" in drawing.read_text(encoding="utf-8")
    assert to_svg(confusion_figure(y, found, ["\ue123", "dog"]), "a chart").count("<svg") == 1


@pytest.mark.parametrize(("theme", "chosen"), [(SCREEN, "b 0.900"), (PAGE, "b 90.0")])
def test_the_layer_chosen_on_validation_is_named_in_a_depth_curve(theme: Theme, chosen: str) -> None:
    seeds, intervals = [(0.5,), (0.8, 1.0), (0.95,)], [(0.4, 0.6), (0.8, 0.95), (0.9, 1.0)]
    line = Line("logreg", [0, 1, 2], [0.5, 0.9, 0.95], intervals, ["a", "b", "c"], seeds, chosen=1)
    with theme.figure(4, 3) as figure:
        alone, beside = figure.subplots(1, 2)
        draw_depth(alone, [line], theme, ("raw pixels", 0.25))
        draw_depth(beside, [line, line], theme)
    (text,) = alone.texts
    assert (text.get_text(), text.xy) == (chosen, (1, 1.0)), "above the interval and every seed"
    labels = alone.get_legend_handles_labels()[1]
    assert labels == [f"raw pixels {theme.share(0.25)}", "logreg"]
    assert beside.get_legend_handles_labels()[1] == [f"logreg: {chosen}"] * 2


def test_points_that_are_not_the_best_are_hollow() -> None:
    results = [
        replace(result(layer, value), validation_accuracy=1 - value)
        for layer, value in (("a", 0.5), ("b", 0.9), ("c", 0.88))
    ]
    figure = depth_figure(results, {("b", "logreg", "all"), ("c", "logreg", "all")})
    axes = figure.axes[0]
    hollow = [line for line in axes.lines if line.get_markerfacecolor() == axes.get_facecolor()]
    assert [line.get_xydata().tolist() for line in hollow] == [[[0, 0.5]]]
    assert [text.get_text() for text in axes.texts] == ["a 0.500"], "chosen on validation, though it is worst on test"
    assert "filled points may be the best" in axes.get_title()


def test_the_command_draws_what_there_is_to_show(
    make_photos: Callable[..., Path], tmp_path: Path, thawline: Callable[..., object]
) -> None:
    how = {"output": tmp_path / "c", "size": 32, "engine": "torch"}
    extract(make_photos(each=12), ["timm/test_resnet@random:0"], ["layer1", "layer2"], **how)
    arguments = (
        "fit",
        tmp_path / "c",
        "--shots",
        2,
        "--shots",
        "all",
        "--jobs",
        1,
        "--plot",
        tmp_path / "new" / "plots",
    )
    plots = thawline(*arguments, "--json").json["plots"]
    names = ["confusion", "depth", "budget", "reliability", "embedding"]
    assert [Path(path).name for path in plots] == [f"{name}.{kind}" for name in names for kind in ("png", "svg")]
    for path in plots[::2]:
        with Image.open(path) as picture:
            assert min(picture.size) > 400
    assert "blue" in Path(plots[1]).read_text(), "text in an SVG stays text"

    plain = ("fit", tmp_path / "c", "-l", "layer1", "--head", "ridge", "--jobs", 1)
    assert "plots" not in thawline(*plain, "--json").json
    assert thawline(*plain, "--plot", tmp_path / "few").stdout.count("picture: ") == 4
    (tmp_path / "file").write_text("")
    thawline(*plain, "--plot", tmp_path / "file" / "plots").assert_one_line("file")
