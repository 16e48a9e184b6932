from __future__ import annotations

import csv
import io
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import cli
from features_cache import CacheError, Catalog
from pipeline.extract import extract
from pipeline.fit import fit
from pipeline.predict import predict, write_csv
from pipeline.results import Prediction

ROOT = Path(__file__).resolve().parents[1]
COMMANDS = tuple(
    "demo backbones layers extract cache fit finetune predict export rank drift compare".split()  # noqa: SIM905
)
NETWORK = ("-b", "test_resnet@random:0", "--size", "32")
TORCH = (*NETWORK, "--engine", "torch")


Thawline = Callable[..., Any]


def test_help_answers_without_heavy_imports() -> None:
    heavy = {"torch", "openvino", "timm", "sklearn", "h5py", "matplotlib", "PIL", "rich"}
    calls = [["--help"], *[[name, "--help"] for name in COMMANDS]]
    code = (
        f"import sys, cli\nfrom pipeline.commands.group import thawline\nfor call in {calls!r}:\n"
        " try:\n  thawline(call)\n except SystemExit as e: assert e.code == 0, call\n"
        f" assert not set(sys.modules) & {heavy!r}, (call, set(sys.modules) & {heavy!r})"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("Usage:") == len(calls)


def test_every_command_is_documented() -> None:
    pages = [ROOT / "README.md", *(ROOT / "docs").glob("*.md")]
    text = "\n".join(page.read_text(encoding="utf-8") for page in pages)
    assert [command for command in COMMANDS if f"thawline {command}" not in text] == []


def test_extract_fit_predict(thawline: Thawline, make_photos: Callable[..., Path], tmp_path: Path) -> None:
    photos, cache, model = make_photos(), tmp_path / "cache", tmp_path / "model.skops"
    (photos / "red" / "broken.png").write_bytes(b"no image")
    (photos / "red" / "phone.heic").write_bytes(b"another kind of image")
    shutil.copy(photos / "red" / "0.png", photos / "red" / "twin.png")

    extracted = thawline("extract", photos, *NETWORK, "-l", "layer1", "-o", cache, "--json")
    first = extracted.json["caches"][0]
    assert first["notes"][0].startswith("1 .heic passed over")
    assert f"note: {first['notes'][0]}\n" in extracted.stderr
    assert (first["rows"], first["done"], first["unreadable"]) == (26, 25, 1)
    assert (first["computed"], first["reused"]) == (24, 1), "equal images are computed once"
    assert first["layers"] == {"layer1": 32}

    again = thawline("extract", photos, *NETWORK, "-l", "layer1", "-o", cache, "--json").json["caches"][0]
    assert (again["computed"], again["reused"], again["path"]) == (0, 25, first["path"])

    arguments = ("fit", cache, "--head", "logreg", "--head", "ridge", "--seed", 0, "--seed", 1, "--save", model)
    results = thawline(*arguments, "--json").json["results"]
    assert [(r["head"], r["seed"]) for r in results] == [
        (head, seed) for head in ("logreg/l2", "ridge/l2") for seed in (0, 1)
    ]
    assert all(r["accuracy"] == 1.0 and r["accuracy_ci95"][0] < 1 for r in results)
    assert results[2]["log_loss"] is None, "ridge has no probabilities"

    table = tmp_path / "predictions.csv"
    predictions = thawline("predict", model, photos, "--csv", table, "--json").json["predictions"]
    assert len(predictions) == 26
    for found in predictions:
        if found["uri"] == "red/broken.png":
            assert (found["state"], found["label"], found["probability"]) == ("unreadable", None, None)
        else:
            assert (found["state"], found["label"]) == ("done", found["uri"].split("/")[0])
    rows = list(csv.DictReader(table.read_text().splitlines()))
    assert [row["uri"] for row in rows] == [found["uri"] for found in predictions]

    lost = thawline("predict", model, photos, "--csv", tmp_path / "no" / "x.csv")
    assert (lost.returncode, lost.stdout) == (1, "")
    assert "no folder" in lost.stderr

    one = thawline("predict", model, photos / "blue" / "0.png", "--json").json["predictions"]
    assert [found["label"] for found in one] == ["blue"]


def test_joined_layers_are_predicted_each_at_its_own_precision(
    make_photos: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pipeline.engines.select.has_bf16", lambda _device: True)  # torch emulates it
    photos, cache = make_photos(each=5), tmp_path / "cache"
    for layer, precision in (("layer1", "fp32"), ("layer2", "bf16")):
        extract(photos, ["test_resnet@random:0"], [layer], output=cache, precision=precision, engine="torch")
    fit(cache, ["layer1+layer2"], ["centroid"], save=tmp_path / "m.skops", jobs=1)
    monkeypatch.setattr("pipeline.predict.WORTH_KEEPING", 1)
    monkeypatch.chdir(tmp_path)
    report = predict(tmp_path / "m.skops", photos, engine="torch")
    assert "thawline-predictions" in report.notes[0], "kept, apart from the cache that fit reads, and told"
    trained, used = (
        {name: info.fingerprint for file in Catalog(folder).files for name, info in file.layers.items()}
        for folder in (cache, "thawline-predictions")
    )
    assert trained == used


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (("extract", "nowhere"), ("nowhere",)),
        (("extract", "empty"), ("empty",)),
        (("extract", "photos", "-b", "resnet81"), ("resnet81", "resnet18")),
        (("extract", "photos", *TORCH, "-l", "layer9"), ("layer9", "layer4")),
        (("extract", "photos", *TORCH, "-o", "a-file"), ("a-file",)),
        (("extract", "photos", "--device", "cuda:99"), ("cuda:99",)),
        (("fit", "nowhere"), ("nowhere",)),
        (("fit", "empty"), ("empty",)),
        (("fit", "noise.h5"), ("noise.h5",)),
        (("predict", "nowhere.skops", "photos"), ("nowhere.skops",)),
        (("predict", "noise.h6", "photos"), ("noise.h6", "did you mean noise.h5?")),
        (("predict", "noise.h5", "photos"), ("noise.h5",)),
        (("layers", "resnet81"), ("resnet81", "resnet18")),
        (("backbones", "no-such-thing"), ("no-such-thing",)),
        (("fit", "nowhere", "--save", "m.pkl"), ("m.pkl", "such as m.skops")),
        (("finetune", "nowhere", "--save", "m.pth"), ("m.pth", "such as m.safetensors")),
        (("finetune", "nowhere", "--save", "no/m.safetensors"), ("no folder no",)),
        (("finetune", "nowhere", "--picture", "p.jpg"), ("p.jpg", "such as p.png")),
        (("export", "nowhere", "--onnx", "m.pt"), ("m.pt", "such as m.onnx")),
        (("export", "nowhere", "--onnx", "no/m.onnx"), ("no folder no",)),
        (("predict", "nowhere", "photos", "--csv", "p.json"), ("p.json", "such as p.csv")),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else None,
)
def test_bad_input_is_one_line(
    thawline: Thawline, make_photos: Callable[..., Path], tmp_path: Path, arguments, parts
) -> None:
    make_photos(each=1)
    (tmp_path / "empty").mkdir()
    (tmp_path / "a-file").write_text("not a folder")
    (tmp_path / "noise.h5").write_bytes(bytes(range(256)) * 40)
    thawline(*arguments, cwd=tmp_path).assert_one_line(*parts)


def test_predictions_that_cannot_be_written_leave_the_old_file(tmp_path: Path, file_limit: None) -> None:
    path = tmp_path / "predictions.csv"
    path.write_text("old")
    with pytest.raises(CacheError, match="file-size limit"):
        write_csv([Prediction(f"{number}.png", "cat", 0.5, "done") for number in range(1000)], path)
    assert [found.read_text() for found in tmp_path.iterdir()] == ["old"]


def test_usage_errors_exit_with_2(thawline: Thawline, tmp_path: Path) -> None:
    assert thawline("extract").returncode == 2
    assert thawline("fit", "cache", "--shots", "few", cwd=tmp_path).returncode == 2
    assert thawline("extract", "photos", "--workers", "0", cwd=tmp_path).returncode == 2
    for option, value, said in (
        ("--lr", "0", "above 0"),
        ("--epochs", "0", "x>=1"),
        ("--lr-at", "fc=0", "rate above 0"),
    ):
        wrong = thawline("finetune", "photos", option, value, cwd=tmp_path)
        assert wrong.returncode == 2
        assert option in wrong.stderr
        assert said in wrong.stderr
    thawline("extract", "photos", "--workers", "auto", "--batch-size", "2", cwd=tmp_path).assert_one_line("photos")


def test_heads_ask_for_labels(thawline: Thawline, tmp_path: Path) -> None:
    folder = tmp_path / "flat"
    folder.mkdir()
    for index in range(3):
        Image.fromarray(np.full((32, 32, 3), 80 * index, np.uint8)).save(folder / f"{index}.png")
    assert thawline("extract", folder, *TORCH, "-l", "input", "-o", tmp_path / "cache").returncode == 0
    thawline("fit", tmp_path / "cache").assert_one_line("label")


def test_an_unknown_layer_of_a_cache_names_those_it_has(
    thawline: Thawline, make_photos: Callable[..., Path], tmp_path: Path
) -> None:
    assert thawline("extract", make_photos(), *TORCH, "-l", "input", "-o", tmp_path / "cache").returncode == 0
    thawline("fit", tmp_path / "cache", "-l", "imput").assert_one_line("imput", "input")


def test_on_error_stop_keeps_what_was_computed(
    thawline: Thawline, make_photos: Callable[..., Path], tmp_path: Path
) -> None:
    photos, cache = make_photos(), tmp_path / "cache"
    (photos / "red" / "broken.png").write_bytes(b"no image")
    arguments = ("extract", photos, *TORCH, "-l", "input", "-o", cache, "--batch-size", 4)
    thawline(*arguments, "--on-error", "stop").assert_one_line("red/broken.png")
    result = thawline(*arguments, "--json").json["caches"][0]
    assert result["unreadable"] == 1
    assert result["done"] == 24
    assert result["computed"] < 24


def test_output_in_any_encoding(
    thawline: Thawline, make_photos: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    photos, cache, model = make_photos(("猫", "b"), each=10), tmp_path / "cache", tmp_path / "m.skops"
    extract(photos, ["test_resnet@random:0"], ["layer1"], output=cache, engine="torch")
    printed = {}
    for encoding, *command in (("ascii", "fit", cache, "--save", model), ("cp1252", "predict", model, photos)):
        bytes_written = io.BytesIO()
        with monkeypatch.context() as patch:
            patch.setattr("sys.argv", ["thawline", *map(str, command)])
            patch.setattr("sys.stdout", io.TextIOWrapper(bytes_written, encoding=encoding, write_through=True))
            cli.main()
            printed[command[0]] = bytes_written.getvalue().decode(encoding)
    assert re.search(r"\d\.\d{3}-\d\.\d{3}", printed["fit"]), "an interval"
    assert r"\u732b/0.png" in printed["predict"]
    document = thawline("predict", model, photos, "--json")
    assert document.stdout.isascii()
    assert {found["label"] for found in document.json["predictions"]} == {"猫", "b"}


@pytest.mark.filterwarnings("default")
def test_warnings_of_a_library_are_one_note(
    thawline: Thawline, bad_exif: Callable[[int], bytes], tmp_path: Path
) -> None:
    for kept in range(1, 6):
        (tmp_path / f"{kept}.jpg").write_bytes(bad_exif(kept))
    done = thawline("extract", tmp_path, *TORCH, "-l", "input", "-o", tmp_path / "cache", "--json")
    assert done.json["caches"][0]["done"] == 5
    (note,) = [line for line in done.stderr.splitlines() if "PIL" in line]
    assert note.startswith("note: 5 warnings of PIL, first: Corrupt EXIF data.")
    assert "UserWarning" not in done.stderr


def test_an_interrupt_in_the_middle_of_an_import_is_one(thawline: Thawline, monkeypatch: pytest.MonkeyPatch) -> None:
    def importing(*_: object, **__: object) -> None:
        try:
            raise KeyboardInterrupt
        except KeyboardInterrupt as error:
            raise ImportError("initialization failed") from error

    monkeypatch.setattr("pipeline.backbones.registry.list_backbones", importing)
    done = thawline("backbones")
    assert done.returncode == 130
    assert done.stderr == "thawline: interrupted\n", "a command that keeps nothing promises nothing"


def test_an_interrupt_of_imports_that_swallow_it_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "click.py").write_text(
        "import os, signal, time\n"
        "try:\n"
        "    os.kill(os.getpid(), signal.SIGINT)\n"
        "    time.sleep(10)\n"
        "except BaseException:\n"
        "    pass\n"
    )
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(tmp_path), str(ROOT)])}
    code = "import signal, cli; signal.signal(signal.SIGINT, signal.default_int_handler); cli.main()"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    assert (done.returncode, done.stderr) == (130, "thawline: interrupted\n")


def test_who_interrupts_twice_sees_no_second_error() -> None:
    code = (
        "import atexit, os, signal, cli, pipeline.commands.group as group\n"
        "atexit.register(os.kill, os.getpid(), signal.SIGINT)\n"
        "def interrupt(**_): raise KeyboardInterrupt\n"
        "group.thawline = interrupt\n"
        "cli.main()"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=False)
    assert (done.returncode, done.stderr) == (130, "thawline: interrupted\n")


def test_an_interrupt_commits_and_exits_with_130(
    thawline: Thawline, make_photos: Callable[..., Path], tmp_path: Path
) -> None:
    photos = make_photos(each=40)
    network = ["-b", "resnet18@random:0", "--size", "112", "--engine", "torch"]
    arguments = ["extract", str(photos), *network, "-o", str(tmp_path / "cache"), "--batch-size", "2"]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(
        [sys.executable, "-m", "cli", *arguments], stderr=subprocess.PIPE, stdout=subprocess.PIPE, env=environment
    )
    while not list((tmp_path / "cache").glob("*.h5")) and process.poll() is None:
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130, errors
    assert b"goes on from there" in errors
    result = thawline(*arguments, "--json").json["caches"][0]
    assert result["done"] == 120
