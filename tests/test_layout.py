"""Tables in terminals of any width: what is wrapped, cut, left out or listed, and that no number ever breaks."""

from __future__ import annotations

import io

import pytest
from rich.console import Console, Group
from rich.table import Table

from pipeline.reporting.terminal.layout import lay_out
from pipeline.reporting.terminal.tables import prediction_table, rows_table
from pipeline.results import Prediction

RESULTS = rows_table(
    ("layer", "train/val/test", "accuracy", "95 % interval", "per class", "log-loss", "seconds"),
    [
        ("blocks.0", "76/20/24", "0.542", "0.351–0.721", "0.542", "1.707 → 1.034", "0.9"),
        ("penultimate", "4/0/24", "0.958", "0.798–0.993", "0.958", "1.382 → 0.164", "10.2"),
    ],
)
FILES = rows_table(
    ("file", "done", "unreadable"), [("photos-efficientnet_lite0-c8a44d76.h5", "120/120", "0"), ("b.h5", "7/9", "2")]
)


def shown(table: Table | Group, width: int) -> list[str]:
    stream = io.StringIO()
    Console(file=stream, width=width, markup=False, highlight=False).print(lay_out(table, width))
    return [line.rstrip() for line in stream.getvalue().splitlines()]


def test_what_fits_is_left_alone() -> None:
    lines = shown(RESULTS, 200)
    assert len(lines) == 3
    assert lines[0].split("  ")[0] == "layer"


@pytest.mark.parametrize("width", [80, 70, 60, 50, 40])
def test_narrow_results_stay_within_the_width_and_keep_their_numbers(width: int) -> None:
    lines = shown(RESULTS, width)
    assert max(map(len, lines)) <= width
    words = {word for line in lines for word in line.split()}
    assert {"blocks.0", "penultimate", "0.542", "0.958", "0.351–0.721", "0.798–0.993"} <= words
    for number in ("76/20/24", "1.707", "10.2"):
        heading = {"76/20/24": "train/val/test,", "1.707": "log-loss;", "10.2": "seconds,"}[number]
        assert number in words or heading.rstrip(",;") in " ".join(lines[-2:]), "what is left out is told"


def test_headings_give_way_before_cells() -> None:
    narrow = next(width for width in range(200, 0, -1) if len(shown(RESULTS, width)) > 3)
    lines = shown(RESULTS, narrow)
    assert len(lines) == 4, "one more line of headings"
    assert [line.split()[0] for line in lines[-2:]] == ["blocks.0", "penultimate"], "a line for each result"
    assert lines[-1].endswith("10.2")


def test_a_path_is_cut_where_nothing_else_helps() -> None:
    lines = shown(FILES, 40)
    assert max(map(len, lines)) <= 40
    cut = "".join(line.split()[0] for line in lines[1:-1])
    assert cut == "photos-efficientnet_lite0-c8a44d76.h5"
    assert lines[-1].split() == ["b.h5", "7/9", "2"]


def test_one_row_becomes_a_list() -> None:
    one = rows_table(("file", "done", "unreadable"), [("photos-efficientnet_lite0-c8a44d76.h5", "120/120", "0")])
    assert [line.split() for line in shown(one, 50)] == [
        ["file", "photos-efficientnet_lite0-c8a44d76.h5"],
        ["done", "120/120"],
        ["unreadable", "0"],
    ]


def test_cut_predictions_say_how_many_there_are() -> None:
    predictions = [Prediction(f"{number}.jpg", "cat", 0.9, "done") for number in range(23)]
    lines = shown(prediction_table(predictions, "label"), 80)
    assert len(lines) == 22
    assert lines[-1] == "… and 3 more; --csv has all"
    assert "more" not in shown(prediction_table(predictions[:20], "label"), 80)[-1]


def test_what_does_not_fit_at_all_becomes_lists() -> None:
    lines = shown(Group("above", FILES), 30)
    assert lines[0] == "above"
    assert [line.split()[-1] for line in lines if line.startswith("done")] == ["120/120", "7/9"]
