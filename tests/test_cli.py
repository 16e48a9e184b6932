from __future__ import annotations

import csv
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

ROOT = Path(__file__).resolve().parents[1]
COMMANDS = ("demo", "backbones", "layers", "extract", "fit", "predict", "export")
NETWORK = ("-b", "resnet18@random:0", "--size", "32")


def thawline(*arguments: object, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "cli", *map(str, arguments)]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    return subprocess.run(command, capture_output=True, text=True, cwd=cwd, env=environment, timeout=120, check=False)


def json_of(result: subprocess.CompletedProcess[str]) -> dict:
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout)


def assert_one_line(result: subprocess.CompletedProcess[str], *parts: str) -> None:
    assert result.returncode == 1, result.stderr
    assert result.stdout == ""
    assert result.stderr.count("\n") == 1, result.stderr
    for part in parts:
        assert part in result.stderr


@pytest.mark.parametrize("command", [(), *[(name,) for name in COMMANDS]], ids=str)
def test_help_answers_without_heavy_imports(command: tuple[str, ...]) -> None:
    heavy = ("torch", "timm", "sklearn", "h5py", "matplotlib", "PIL", "rich")
    code = (
        f"import sys, cli\ntry:\n cli.thawline([*{command!r}, '--help'])\nexcept SystemExit as e: assert e.code == 0\n"
        f"assert not set(sys.modules) & set({heavy!r}), set(sys.modules) & set({heavy!r})"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.returncode == 0, done.stderr
    assert "Usage:" in done.stdout


def test_every_command_stands_in_the_readme() -> None:
    readme = (ROOT / "README.md").read_text()
    for command in COMMANDS:
        assert f"thawline {command}" in readme


def test_extract_fit_predict(make_photos: Callable[..., Path], tmp_path: Path) -> None:
    photos, cache, model = make_photos(), tmp_path / "cache", tmp_path / "model.skops"
    (photos / "red" / "broken.png").write_bytes(b"no image")
    shutil.copy(photos / "red" / "0.png", photos / "red" / "twin.png")

    first = json_of(thawline("extract", photos, *NETWORK, "-l", "layer1", "-o", cache, "--json"))["caches"][0]
    assert (first["rows"], first["done"], first["unreadable"]) == (26, 25, 1)
    assert (first["computed"], first["reused"]) == (24, 1), "equal images are computed once"
    assert first["layers"] == {"layer1": 64}

    again = json_of(thawline("extract", photos, *NETWORK, "-l", "layer1", "-o", cache, "--json"))["caches"][0]
    assert (again["computed"], again["reused"], again["path"]) == (0, 25, first["path"])

    arguments = ("fit", cache, "--head", "logreg", "--head", "ridge", "--seed", 0, "--seed", 1, "--save", model)
    results = json_of(thawline(*arguments, "--json"))["results"]
    assert [(r["head"], r["seed"]) for r in results] == [("logreg", 0), ("logreg", 1), ("ridge", 0), ("ridge", 1)]
    assert all(r["accuracy"] == 1.0 and r["accuracy_ci95"][0] < 1 for r in results)
    assert results[2]["log_loss"] is None, "ridge has no probabilities"

    table = tmp_path / "predictions.csv"
    predictions = json_of(thawline("predict", model, photos, "--csv", table, "--json"))["predictions"]
    assert len(predictions) == 26
    for found in predictions:
        if found["uri"] == "red/broken.png":
            assert (found["state"], found["label"], found["probability"]) == ("unreadable", None, None)
        else:
            assert (found["state"], found["label"]) == ("done", found["uri"].split("/")[0])
    rows = list(csv.DictReader(table.read_text().splitlines()))
    assert [row["uri"] for row in rows] == [found["uri"] for found in predictions]

    one = json_of(thawline("predict", model, photos / "blue" / "0.png", "--json"))["predictions"]
    assert [found["label"] for found in one] == ["blue"]


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (("extract", "nowhere"), ("nowhere",)),
        (("extract", "empty"), ("empty",)),
        (("extract", "photos", "-b", "resnet81"), ("resnet81", "resnet18")),
        (("extract", "photos", "-b", "resnet18@random:0", "-l", "layer9"), ("layer9", "layer4")),
        (("extract", "photos", "-o", "a-file"), ("a-file",)),
        (("extract", "photos", "--device", "cuda:99"), ("cuda:99",)),
        (("fit", "nowhere"), ("nowhere",)),
        (("fit", "empty"), ("empty",)),
        (("fit", "noise.h5"), ("noise.h5",)),
        (("predict", "nowhere.skops", "photos"), ("nowhere.skops",)),
        (("predict", "noise.h5", "photos"), ("noise.h5",)),
        (("layers", "resnet81"), ("resnet81", "resnet18")),
        (("backbones", "no-such-thing"), ("no-such-thing",)),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else None,
)
def test_bad_input_is_one_line(make_photos: Callable[..., Path], tmp_path: Path, arguments, parts) -> None:
    make_photos(each=1)
    (tmp_path / "empty").mkdir()
    (tmp_path / "a-file").write_text("not a folder")
    (tmp_path / "noise.h5").write_bytes(bytes(range(256)) * 40)
    assert_one_line(thawline(*arguments, cwd=tmp_path), *parts)


def test_usage_errors_exit_with_2(tmp_path: Path) -> None:
    assert thawline("extract").returncode == 2
    assert thawline("fit", "cache", "--shots", "few", cwd=tmp_path).returncode == 2


def test_heads_ask_for_labels(tmp_path: Path) -> None:
    folder = tmp_path / "flat"
    folder.mkdir()
    for index in range(3):
        Image.fromarray(np.full((32, 32, 3), 80 * index, np.uint8)).save(folder / f"{index}.png")
    json_of(thawline("extract", folder, *NETWORK, "-l", "input", "-o", tmp_path / "cache", "--json"))
    assert_one_line(thawline("fit", tmp_path / "cache"), "label")


def test_an_unknown_layer_of_a_cache_names_those_it_has(make_photos: Callable[..., Path], tmp_path: Path) -> None:
    json_of(thawline("extract", make_photos(), *NETWORK, "-l", "input", "-o", tmp_path / "cache", "--json"))
    assert_one_line(thawline("fit", tmp_path / "cache", "-l", "imput"), "imput", "input")


def test_on_error_stop_keeps_what_was_computed(make_photos: Callable[..., Path], tmp_path: Path) -> None:
    photos, cache = make_photos(), tmp_path / "cache"
    (photos / "red" / "broken.png").write_bytes(b"no image")
    arguments = ("extract", photos, *NETWORK, "-l", "input", "-o", cache, "--batch-size", 4)
    assert_one_line(thawline(*arguments, "--on-error", "stop"), "red/broken.png")
    result = json_of(thawline(*arguments, "--json"))["caches"][0]
    assert result["unreadable"] == 1
    assert result["done"] == 24
    assert result["computed"] < 24


def test_an_interrupt_commits_and_exits_with_130(make_photos: Callable[..., Path], tmp_path: Path) -> None:
    photos = make_photos(each=40)
    arguments = ["extract", str(photos), "-b", "resnet18@random:0", "-o", str(tmp_path / "cache"), "--batch-size", "2"]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(
        [sys.executable, "-m", "cli", *arguments], stderr=subprocess.PIPE, stdout=subprocess.PIPE, env=environment
    )
    while not list((tmp_path / "cache").glob("*.h5")) and process.poll() is None:
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130, errors
    assert b"goes on from there" in errors
    result = json_of(thawline(*arguments, "--json"))["caches"][0]
    assert result["done"] == 120
