from __future__ import annotations

import csv
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
import torchvision
from numpy.typing import NDArray
from PIL import Image
from rich.progress import Progress as Bars
from scipy.stats import binomtest
from scipy.stats import t as t_distribution

from features_cache import CacheLockedError, ThawlineError
from pipeline.backbones.registry import load_backbone
from pipeline.compare import CompareReport, compare, dry_run
from pipeline.comparing import comparison
from pipeline.comparing.answer import answer, extraction_seconds, seconds
from pipeline.comparing.check import open_sources
from pipeline.comparing.features import Features
from pipeline.comparing.folder import ExtractionCost, JobResult, RunFolder, RunInfo
from pipeline.comparing.methods import MethodScore, leaderboards
from pipeline.comparing.paired import best_set, compare_scores
from pipeline.comparing.plan import read_plan
from pipeline.engines.torch_engine import TorchEngine
from pipeline.errors import RunFolderError
from pipeline.evaluation.intervals import corrected_t_test, effective_rows, paired_interval, smallest_difference
from pipeline.evaluation.predictions import Predictions
from pipeline.extract import extract
from pipeline.finetuning.recipe import Recipe
from pipeline.fit import fit
from pipeline.reporting.charts.reliability import reliability
from pipeline.reporting.page.method_charts import pareto
from pipeline.reporting.page.model_charts import calibration_chart, class_chart
from pipeline.reporting.page.pictures import lay_out_map
from pipeline.reporting.terminal import progress
from pipeline.results import FinetuneResult, silent, to_json

ROOT = Path(__file__).resolve().parents[1]
Thawline = Callable[..., Any]
PLAN = """\
source = "photos"
seed = [0, 1]
shots = [2, "all"]

[[extract]]
backbone = "test_resnet@random:0"
layer = ["layer1", "input"]
size = 32
engine = "torch"

[[fit]]
head = ["logreg", "centroid"]
"""


@pytest.fixture(scope="module")
def photos(write_photos: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_photos(tmp_path_factory.mktemp("compare") / "photos")


@pytest.fixture(scope="module")
def finished(photos: Path) -> CompareReport:
    """A whole run, made once; tests that go on from it copy its folder."""
    plan = photos.parent / "plan.toml"
    plan.write_text(PLAN)
    return compare(plan, photos.parent / "run")


@pytest.fixture
def plan(photos: Path, tmp_path: Path) -> Path:
    path = tmp_path / "plan.toml"
    path.write_text(PLAN.replace("photos", str(photos)))
    return path


@pytest.fixture
def run(finished: CompareReport, photos: Path, plan: Path, tmp_path: Path) -> Path:
    """The finished run as if it were that of `plan`."""
    copy = Path(shutil.copytree(photos.parent / "run", tmp_path / "run"))
    document = json.loads((copy / "run.json").read_text())
    (copy / "run.json").write_text(json.dumps({**document, "plan_file": str(plan)}))
    return copy


def lines_of(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "results.jsonl").read_text().splitlines()]


def test_a_run_holds_what_fit_returns(finished: CompareReport, photos: Path) -> None:
    run = photos.parent / "run"
    assert (finished.computed, finished.reused, finished.failures) == (16, 0, [])
    records = lines_of(run)
    assert [result.to_json() for result in finished.results] == records

    alone = fit(run / "cache", heads=["logreg", "centroid"], seeds=[0, 1], shots=[2, "all"], jobs=1)
    same = ("backbone", "layer", "head", "seed", "shots", "n_train", "n_val", "n_test", "accuracy", "macro_f1")
    expected = {tuple(to_json(result)[key] for key in same) for result in alone.results}
    assert {tuple(record[key] for key in same) for record in records} == expected
    assert set(to_json(alone.results[0])) <= set(records[0]), "the keys are those of fit, and some more"

    table = list(csv.DictReader((run / "results.csv").read_text().splitlines()))
    assert [row["accuracy"] for row in table] == [str(record["accuracy"]) for record in records]
    assert json.loads(table[0]["accuracy_ci95"]) == records[0]["accuracy_ci95"]
    assert (run / "plan.toml").read_text() == PLAN
    provenance = json.loads((run / "run.json").read_text())
    assert provenance["runs"][0]["versions"]["scikit-learn"]


def test_a_rerun_adds_nothing_and_imports_nothing_heavy(finished: CompareReport, photos: Path) -> None:
    plan, run = photos.parent / "plan.toml", photos.parent / "run"
    before = {path: path.stat().st_mtime_ns for path in run.rglob("*") if path.is_file()}
    code = (
        f"import sys; from pipeline.compare import compare; report = compare({str(plan)!r}, {str(run)!r})\n"
        f"assert (report.computed, report.reused) == (0, 16) and report.answer == {finished.answer!r}\n"
        "heavy = {'torch', 'timm', 'sklearn', 'matplotlib', 'jinja2'} & set(sys.modules); assert not heavy, heavy"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.returncode == 0, done.stderr
    assert before == {path: path.stat().st_mtime_ns for path in run.rglob("*") if path.is_file()}, "nothing is touched"


def test_after_a_kill_only_the_rest_is_done(plan: Path, run: Path) -> None:
    lines = (run / "results.jsonl").read_text().splitlines(keepends=True)
    whole = {json.loads(line)["key"]: json.loads(line) for line in lines}
    (run / "results.jsonl").write_text("".join(lines[:9]) + lines[9][: len(lines[9]) // 2])  # a torn last line
    (run / "report.html").unlink()
    lost = json.loads(lines[3])["key"]
    (run / "predictions" / f"{lost}.npz").unlink()

    report = compare(plan, run)
    assert report.computed == 16 - 9 + 1
    found = {record["key"]: record for record in lines_of(run)}
    assert len(lines_of(run)) == 16, "the lost one was superseded"
    for key, record in whole.items():
        assert {**record, "seconds": 0} == {**found[key], "seconds": 0}
    assert (run / "report.html").exists()


def test_a_job_that_lost_its_predictions_and_now_fails_is_left_out(
    plan: Path, run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_luck(*_: Any, **__: Any) -> None:
        raise ZeroDivisionError("no luck")

    monkeypatch.setattr("pipeline.fit.fit", no_luck)
    lost = lines_of(run)[3]["key"]
    (run / "predictions" / f"{lost}.npz").unlink()
    (run / "report.html").unlink()
    report = compare(plan, run)
    assert [failure.reason for failure in report.failures] == ["ZeroDivisionError: no luck"]
    assert len(report.results) == 15
    assert lost not in {result.key for result in report.results}
    assert "no luck" in (run / "report.html").read_text()


def test_a_damaged_line_is_named(plan: Path, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "results.jsonl").write_text(f"{json.dumps(record('a').to_json())}\nnonsense\n")
    with pytest.raises(RunFolderError, match="line 2"):
        compare(plan, tmp_path / "run")


def test_bytes_that_are_no_text_are_damage_and_do_not_shift_what_is_cut_off(tmp_path: Path) -> None:
    results = tmp_path / "results.jsonl"
    results.write_bytes(b'{"key": "\xff"}\n{"key": "to')
    with pytest.raises(RunFolderError, match="line 1 is damaged: expected JSON"), RunFolder(tmp_path).claim():
        pass
    line = json.dumps(record("ä").to_json(), ensure_ascii=False) + "\n"
    results.write_text(line + '{"key": "to')
    with RunFolder(tmp_path).claim():
        assert results.read_text() == line


GONE = object()


def id_of(value: object) -> str:
    return "missing" if value is GONE else repr(value)


def with_key(document: dict[str, Any], key: str, value: Any) -> dict[str, Any]:
    return {name: old for name, old in document.items() if name != key} | ({} if value is GONE else {key: value})


def error_of(call: Callable[[], Any]) -> str:
    """The message of a `RunFolderError`, or an empty one."""
    try:
        call()
    except RunFolderError as error:
        return str(error)
    return ""


@pytest.mark.parametrize("kind", ["head", "finetune"])
@pytest.mark.parametrize("value", [GONE, None, "word", 1.5, True, [], {}, [[]]], ids=id_of)
def test_a_damaged_key_of_a_result_is_one_error_or_does_no_harm(kind: str, value: Any, tmp_path: Path) -> None:
    tuned = {"kind": "finetune", "freeze": "all", "epochs": 3, "options": {"lr": 0.1}}
    whole = record("x", **(tuned if kind == "finetune" else {"size": [32, 32], "depth": 1})).to_json()
    refused = set()
    for key in whole:
        (tmp_path / "results.jsonl").write_text(json.dumps(with_key(whole, key, value)) + "\n")
        if message := error_of(lambda: RunFolder(tmp_path)):
            assert f"{tmp_path / 'results.jsonl'} line 1 is damaged: " in message
            assert f"'{key}'" in message
            refused.add(key)
            continue
        (board,) = leaderboards(RunFolder(tmp_path).results.values())
        found = answer(board, lambda _: said(np.ones(20, bool)), {})
        assert found.headline.startswith("Best here")
    assert {"kind", "accuracy", "n_test"} <= refused, "no value here can stand for these"
    if value is GONE:
        added = {"n_classes", "precision", "store", "size", "drop_leaks", "depth", "options", "freeze", "epochs"}
        assert not refused & (added | {"n_pool", "balanced", "history"}), "old run folders lack these"


@pytest.mark.parametrize("value", [GONE, None, "word", 1.5, [], {}, [[]]], ids=id_of)
def test_a_damaged_key_of_run_json_is_one_error_or_does_no_harm(value: Any, run: Path) -> None:
    whole = json.loads((run / "run.json").read_text())
    for key in whole:
        (run / "run.json").write_text(json.dumps(with_key(whole, key, value)))
        message = error_of(lambda: extraction_seconds(RunFolder(run).read_info()))
        if value is not GONE and not isinstance(value, type(whole[key])):
            assert f"{run / 'run.json'} is damaged: expected '{key}' to be" in message
        else:
            assert message == "" or value == [[]]


def test_keys_of_a_later_version_are_ignored(tmp_path: Path) -> None:
    (tmp_path / "results.jsonl").write_text(json.dumps(record("x").to_json() | {"carbon": 1}) + "\n")
    assert RunFolder(tmp_path).results == {"x": record("x")}


def test_damaged_predictions_are_named(tmp_path: Path) -> None:
    said = Predictions(np.array(["a"]), np.array([0]), np.array([1]), None)
    folder = RunFolder(tmp_path)
    with folder.claim():
        folder.append(record("one", n_test=1), said)
    assert not folder.predictions("one").right.any()
    file = tmp_path / "predictions" / "one.npz"
    file.write_bytes(file.read_bytes()[:-40])
    with pytest.raises(RunFolderError, match=r"one\.npz is damaged; remove it"):
        folder.predictions("one")


@pytest.mark.parametrize(
    "columns",
    [
        {"uris": np.array(["a", "a"])},
        {"uris": np.array([b"a", b"b"])},
        {"y_true": np.array([0])},
        {"y_true": np.array([0, -1])},
        {"y_pred": np.array([0, 2])},
        {"y_pred": np.array([0.0, 1.0])},
        {"probability": np.array(["x", "y"])},
    ],
)
def test_columns_that_are_not_those_of_the_test_images_are_damage(
    tmp_path: Path, columns: dict[str, NDArray[Any]]
) -> None:
    sound = {"uris": np.array(["a", "b"]), "y_true": np.array([0, 1]), "y_pred": np.array([0, 1])}
    folder = RunFolder(tmp_path)
    with folder.claim():
        folder.append(record("one", n_test=2), Predictions(**sound, probability=np.array([0.5, 0.5])))
    assert folder.predictions("one").right.all()
    np.savez(tmp_path / "predictions" / "one.npz", **sound | columns)
    with pytest.raises(RunFolderError, match=r"one\.npz is damaged"):
        folder.predictions("one")


def test_predictions_that_unpack_to_more_than_any_are_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    said = Predictions(np.array(["a" * 1000]), np.array([0]), np.array([1]), None)
    folder = RunFolder(tmp_path)
    with folder.claim():
        folder.append(record("one", n_test=1), said)
    assert (tmp_path / "predictions" / "one.npz").stat().st_size < 2000
    monkeypatch.setattr("pipeline.comparing.folder.PREDICTIONS_LIMIT", 4000)
    with pytest.raises(RunFolderError, match=r"one\.npz is damaged"):
        folder.predictions("one")


@pytest.mark.parametrize(
    ("key", "value", "problem"),
    [
        ("shots", "alé", "'shots': expected"),
        ("shots", 0, "'shots': expected"),
        ("shots", -1, "'shots': expected"),
        ("metric", "accurac", "'metric': expected one of accuracy, .*; did you mean accuracy?"),
        ("source", "\ud800", "expected JSON: .* surrogates not allowed"),
    ],
)
def test_values_that_make_no_sense_are_damage(tmp_path: Path, key: str, value: int | str, problem: str) -> None:
    (tmp_path / "results.jsonl").write_text(json.dumps(record("x").to_json() | {key: value}) + "\n")
    with pytest.raises(RunFolderError, match=f"line 1 is damaged: {problem}"):
        RunFolder(tmp_path)


def test_a_result_of_a_source_that_the_plan_lacks_is_damage(plan: Path, run: Path) -> None:
    forged = [json.dumps(line | {"source": "../x"}) for line in lines_of(run)]
    (run / "results.jsonl").write_text("\n".join(forged) + "\n")
    (run / "report.html").unlink()
    with pytest.raises(RunFolderError, match=r"results\.jsonl has a result of the source '\.\./x', which the plan"):
        compare(plan, run)


def test_an_edited_plan_does_what_is_new_and_drops_what_is_gone(plan: Path, run: Path) -> None:
    plan.write_text(plan.read_text().replace('"centroid"', '"knn"'))
    report = compare(plan, run)
    assert (report.computed, report.reused) == (8, 8)
    assert {record["head"] for record in lines_of(run)} == {"logreg/l2", "knn/l2"}
    gone = [json.loads(line) for line in (run / "superseded.jsonl").read_text().splitlines()]
    assert {record["head"] for record in gone} == {"centroid/l2"}


def test_a_head_is_not_taken_for_the_same_with_another_scaling(plan: Path, run: Path) -> None:
    text = plan.read_text()
    plan.write_text(text.replace('"logreg", "centroid"', '"centroid", "centroid/standard", "centroid/l2"'))
    report = compare(plan, run)
    assert (report.computed, report.reused) == (8, 8)
    assert {record["head"] for record in lines_of(run)} == {"centroid/l2", "centroid/standard"}
    plan.write_text(text.replace('"logreg", "centroid"', '"centroid/none"'))
    assert compare(plan, run).computed == 8


def test_a_changed_image_runs_all_again(plan: Path, run: Path, photos: Path, tmp_path: Path) -> None:
    changed = photos / "red" / "0.png"
    before, times = changed.read_bytes(), changed.stat()
    Image.new("RGB", (40, 40), "red").save(changed)
    try:
        assert compare(plan, run).computed == 16
    finally:
        changed.write_bytes(before)
        os.utime(changed, ns=(times.st_atime_ns, times.st_mtime_ns))


def test_the_folder_of_another_plan_is_refused(plan: Path, run: Path, tmp_path: Path, thawline: Thawline) -> None:
    other = tmp_path / "other.toml"
    other.write_text(plan.read_text().replace("[0, 1]", "[0]"))
    thawline("compare", other, "-o", run).assert_one_line("another plan", "plan.toml", "other.toml")
    plan.write_text(plan.read_text() + "# the same in other words\n")
    assert compare(plan, run).computed == 0, "what counts is what a plan says"


def test_a_source_is_gone_through_once_for_all_its_fine_tunes(
    photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "tunes.toml").write_text(f'source = "{photos}"\nseed = [0, 1, 2]\n[[finetune]]\n')
    tunes = read_plan(tmp_path / "tunes.toml")
    sources = open_sources(tunes)
    listed: list[Any] = []
    monkeypatch.setattr(comparison, "listing_digest", lambda images: listed.append(images) or "digest")
    jobs = comparison.Comparison(tunes, RunFolder(tmp_path / "run"), sources, None, sources, {}, silent).finetunes()
    assert len({key for _, key in jobs.values()}) == 3
    assert listed == list(sources.values())


def test_a_failing_job_is_recorded_and_the_rest_goes_on(
    plan: Path, run: Path, thawline: Thawline, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = ModuleType("pipeline.finetune")

    def finetune(*_: Any, **options: Any) -> None:
        raise ZeroDivisionError(f"no\nluck with {options['freeze']}")

    module.finetune = finetune  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "pipeline.finetune", module)
    tune = '\n[[finetune]]\nbackbone = "test_resnet@random:0"\nsize = 32\nshots = "all"\nseed = 0\n'
    plan.write_text(plan.read_text() + tune)
    done = thawline("compare", plan, "-o", run, "--json")
    assert done.returncode == 1
    report = json.loads(done.stdout)
    assert (report["computed"], report["reused"]) == (0, 16)
    (failure,) = report["failures"]
    assert failure["reason"] == "ZeroDivisionError: no luck with all"
    assert failure["job"] in done.stderr
    assert "ZeroDivisionError: no luck with all" in (run / "report.html").read_text()


def test_an_extraction_that_fails_alone_is_not_tried_again(
    plan: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tried: list[Any] = []
    module = ModuleType("pipeline.extract")

    def extract(*call: Any, **_: Any) -> None:
        tried.append(call)
        raise ZeroDivisionError("no luck")

    module.extract = extract  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "pipeline.extract", module)
    report = compare(plan, tmp_path / "run")
    assert {failure.reason for failure in report.failures} == {"ZeroDivisionError: no luck"}
    assert len(tried) == 1


def test_only_the_backbone_that_fails_fails(plan: Path, run: Path, tmp_path: Path) -> None:
    (tmp_path / "bad.pth").write_bytes(b"no weights")
    both = '["test_resnet@random:0", "test_resnet@bad.pth"]'
    plan.write_text(plan.read_text().replace('"test_resnet@random:0"', both))
    report = compare(plan, run)
    assert (report.computed, report.reused) == (0, 16)
    assert len(report.failures) == 16
    assert all("bad.pth" in failure.reason for failure in report.failures)


def test_results_of_a_source_that_is_gone_go_even_where_an_extraction_fails(
    plan: Path, run: Path, photos: Path, tmp_path: Path
) -> None:
    (tmp_path / "bad.pth").write_bytes(b"no weights")
    shutil.copytree(photos, tmp_path / "others")
    text = plan.read_text().replace(str(photos), "others").replace("[0, 1]", "0").replace('[2, "all"]', '"all"')
    plan.write_text(text.replace('"test_resnet@random:0"', '["test_resnet@random:0", "test_resnet@bad.pth"]'))
    told: list[tuple[int, int]] = []
    report = compare(plan, run, progress=lambda *call: told.append(call[:2]) if call[2] == "all jobs" else None)
    assert (report.computed, report.reused, len(report.failures)) == (4, 0, 4)
    assert told == [(done, 8) for done in (5, 6, 7, 8)], "what failed counts on both sides"
    assert {one.source for one in report.results} == {"others"}


def test_only_heads_that_a_failed_extraction_may_be_about_stay(
    plan: Path, run: Path, calls: list[Any], tmp_path: Path
) -> None:
    tune = '\n[[finetune]]\nbackbone = "test_resnet@random:0"\nsize = 32\nseed = 0\nshots = "all"\nepochs = 2\n'
    plan.write_text(plan.read_text() + tune)
    assert compare(plan, run).computed == 1
    lost = lines_of(run)[0]
    changes = [{}, {"seed": 9}, {"layer": "layer9"}, {"pool": "max"}, {"balanced": True}, {"cv": 5}]
    changes.append({"backbone": lost["backbone"]})  # of which all keys are known
    for key, change in zip("bcdefgh", changes, strict=True):
        shutil.copy(run / "predictions" / f"{lost['key']}.npz", run / "predictions" / f"{key}.npz")
        with (run / "results.jsonl").open("a") as file:
            file.write(json.dumps({**lost, "backbone": "test_resnet@bad.pth", "key": key, **change}) + "\n")
    (tmp_path / "bad.pth").write_bytes(b"no weights")
    extraction, others = plan.read_text().split("[[fit]]")
    both = extraction.replace('"test_resnet@random:0"', '["test_resnet@random:0", "test_resnet@bad.pth"]')
    text = f"{both}[[fit]]{others}"
    plan.write_text(text.replace("seed = [0, 1]", f"seed = [{lost['seed']}]").replace("epochs = 2", "epochs = 3"))
    report = compare(plan, run)
    assert len(report.failures) == 8
    heads = [one for one in report.results if one.result.kind == "head"]
    assert {one.result.seed for one in heads} == {lost["seed"]}, "seeds of what was extracted are known"
    assert [one.key for one in heads if one.result.backbone.endswith("bad.pth")] == ["b"], "which the plan may mean"
    assert len(heads) == 9, "eight fits of what was extracted, and that one"
    assert [one.options["epochs"] for one in report.results if one.result.kind == "finetune"] == [3]


def test_features_that_are_there_under_another_request_are_used_once(plan: Path, photos: Path, tmp_path: Path) -> None:
    long = "timm/test_resnet@random:0"
    extract(photos, [long], ["layer1", "input"], output=tmp_path / "shared", size=32, engine="torch")
    both = f'["test_resnet@random:0", "{long}"]\noutput = "shared"'
    plan.write_text(plan.read_text().replace('"test_resnet@random:0"', both).replace("[0, 1]", "0"))
    report = compare(plan, tmp_path / "run")
    assert report.failures == []
    assert (report.computed, len(report.results), len(list((tmp_path / "shared").glob("*.h5")))) == (8, 8, 1)


def test_the_poolings_of_a_plan_take_one_pass_that_each_of_them_costs(
    photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    passes, start = [], TorchEngine.start
    monkeypatch.setattr(TorchEngine, "start", lambda *given: passes.append(len(given[1])) or start(*given))
    shutil.copytree(photos, tmp_path / "photos")
    text = PLAN.replace("[0, 1]", "0").replace('[2, "all"]', '"all"').replace('["logreg", "centroid"]', '"centroid"')
    (tmp_path / "one.toml").write_text(text)
    table = text[text.index("[[extract]]") : text.index("[[fit]]")]
    pools = table + 'pool = ["avg", "max"]\n\n'  # the other backbone has one pooling alone
    other = table.replace("@random:0", "@random:1") + 'pool = "gem"\n\n'
    (tmp_path / "plan.toml").write_text(text.replace(table, pools + other))
    guesses = [job.seconds for job in dry_run(tmp_path / "plan.toml", tmp_path / "run").jobs if "extract " in job.job]
    assert [seconds > 0 for seconds in guesses] == [True, False, True]
    report = compare(tmp_path / "plan.toml", tmp_path / "run")
    assert (report.failures, sum(passes)) == ([], 2 * 24)
    found = {(one.result.backbone, one.result.pool) for one in report.results}
    assert found == {("test_resnet@random:0", "avg"), ("test_resnet@random:0", "max"), ("test_resnet@random:1", "gem")}
    assert len(list((tmp_path / "run" / "cache").glob("*.h5"))) == 3
    costs = [one for one in RunFolder(tmp_path / "run").read_info().extractions.values() if one.backbone.endswith(":0")]
    assert len({one.seconds for one in costs}) == 1
    assert costs[0].seconds > 0


def test_each_head_is_shown_with_its_own_features(plan: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn = []

    def watched(features: Features, layer: str, judged: Predictions) -> Any:
        drawn.append(features.files[layer].layers[layer].spec["preprocessing"]["size"])
        return lay_out_map(features, layer, judged)

    monkeypatch.setattr("pipeline.reporting.page.report.lay_out_map", watched)
    tables = """
[[extract]]
backbone = "test_resnet@random:0"
layer = ["penultimate", "layer4", "layer1"]
size = [32, 48]
engine = "torch"
[[extract]]
backbone = "test_resnet@random:0"
layer = "input"
size = 32
engine = "torch"
[[fit]]
head = "centroid"
"""
    plan.write_text(plan.read_text().partition("seed")[0] + tables)
    report = compare(plan, tmp_path / "run")
    best = leaderboards(report.results)[0].best("head")
    assert best is not None
    assert [tuple(size) for size in drawn] == [best.method.size]
    deep = sorted((one.depth or 0, one.result.layer) for one in report.results if one.result.layer != "input")
    assert list(dict.fromkeys(layer for _, layer in deep)) == ["layer1", "layer4", "penultimate"]


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The calls of `pipeline.finetune.finetune`, which loads the network but fits a head instead."""
    made_calls: list[Any] = []
    module = ModuleType("pipeline.finetune")

    @dataclass
    class Report:
        results: list[Any]
        predictions: list[Any]
        notes: list[str]
        classes: tuple[str, ...]
        extracted: list[list[Any]]

    def finetune(source: str, seeds: list[int], shots: list[Any], **options: Any) -> Report:
        made_calls.append((seeds, shots, options["freeze"], options["backbone"]))
        load_backbone(options["backbone"], options["size"])
        made = fit(options["output"], ["layer1"], seeds=seeds, shots=shots, jobs=1)
        return Report(
            [FinetuneResult(**vars(result) | tuned) for result in made.results],
            made.predictions,
            made.notes,
            made.classes,
            [],
        )

    module.finetune = finetune  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "pipeline.finetune", module)
    tuned = {"kind": "finetune", "freeze": "all", "validation_accuracy": 0.6}
    return made_calls


def test_fine_tunes_are_compared_with_heads(plan: Path, run: Path, calls: list[Any]) -> None:
    plan.write_text(plan.read_text() + '\n[[finetune]]\nbackbone = "test_resnet@random:0"\nsize = 32\nseed = 0\n')
    report = compare(plan, run)
    assert [(seeds, shots) for seeds, shots, *_ in calls] == [([0], [2]), ([0], ["all"])]
    tunes = [one for one in report.results if one.result.kind == "finetune"]
    assert [one.options["epochs"] for one in tunes] == [Recipe.epochs] * 2
    assert any("fine-tuning was right in" in sentence for sentence in report.answer)


@pytest.fixture
def squeezenet(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """Puts weights of a seed behind the name `squeezenet1_1`."""
    monkeypatch.setattr(torch.hub, "_hub_dir", str(tmp_path / "hub"))
    weights = tmp_path / "hub" / "checkpoints" / "squeezenet1_1-b8a52dc0.pth"
    weights.parent.mkdir(parents=True)

    def put(seed: int) -> None:
        torch.manual_seed(seed)
        torch.save(torchvision.models.squeezenet1_1(weights=None).state_dict(), weights)

    return put


def test_a_fine_tune_is_repeated_once_the_weights_behind_its_name_are_others(
    plan: Path, run: Path, calls: list[Any], squeezenet: Callable[[int], None], tmp_path: Path
) -> None:
    weights = tmp_path / "hub" / "checkpoints" / "squeezenet1_1-b8a52dc0.pth"
    squeezenet(0)
    tune = '\n[[finetune]]\nbackbone = "squeezenet1_1"\nsize = 32\nseed = 0\nshots = "all"\n'
    plan.write_text(plan.read_text() + tune)
    assert [compare(plan, run).computed for _ in range(2)] == [1, 0]
    weights.touch()
    assert compare(plan, run).computed == 0, "another time, the same weights"
    squeezenet(1)
    assert not dry_run(plan, run).jobs[-1].done
    assert [compare(plan, run).computed for _ in range(2)] == [1, 0]
    assert len(calls) == 2


def test_a_fine_tune_of_other_weights_that_fails_is_a_failure_and_no_result(
    plan: Path, run: Path, calls: list[Any], squeezenet: Callable[[int], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_luck(*_: Any, **__: Any) -> None:
        raise ZeroDivisionError("no luck")

    tune = '\n[[finetune]]\nbackbone = "squeezenet1_1"\nsize = 32\nseed = 0\nshots = "all"\n'
    plan.write_text(plan.read_text() + tune)
    squeezenet(0)
    assert compare(plan, run).computed == 1
    squeezenet(1)
    monkeypatch.setattr(sys.modules["pipeline.finetune"], "finetune", no_luck)
    for _ in range(2):
        report = compare(plan, run)
        assert [failure.reason for failure in report.failures] == ["ZeroDivisionError: no luck"]
        assert {one.result.kind for one in report.results} == {"head"}
    superseded = [json.loads(line) for line in (run / "superseded.jsonl").read_text().splitlines()]
    assert [line["kind"] for line in superseded] == ["finetune"]


def test_a_dry_run_lists_every_job_and_knows_what_is_done(plan: Path, run: Path, tmp_path: Path) -> None:
    planned = dry_run(plan, tmp_path / "new").jobs
    assert len(planned) == 1 + 16
    assert planned[0].bytes == 24 * (32 + 3072) * 4, "24 images, float32"
    assert all(job.seconds > 0 and not job.done for job in planned)
    assert all(job.done for job in dry_run(plan, run).jobs)


def test_a_dry_run_says_which_differences_the_test_images_can_show(
    plan: Path, tmp_path: Path, photos: Path, thawline: Thawline
) -> None:
    (power,) = dry_run(plan, tmp_path / "new").power
    assert (power.test_images, power.groups, power.comparisons) == (5, 5, 3), "20 % of 24; 2 layers x 2 heads"
    assert power.smallest == smallest_difference(5, 0.1)
    assert power.smallest_of_all == smallest_difference(5, 0.1, comparisons=3)
    rows = [f"{path},{path.parent.name},{path.stem}" for path in sorted(photos.rglob("*.png"))]
    (tmp_path / "grouped.csv").write_text("\n".join(["path,label,group", *rows]) + "\n")
    plan.write_text(plan.read_text().replace(str(photos), "grouped.csv").replace("[[fit]]", "[[fit]]\ncv = 2"))
    (power,) = dry_run(plan, tmp_path / "new").power
    assert (power.test_images, power.groups) == (24, 8), "each image is a test image of one fold"
    out = thawline("compare", plan, "-o", tmp_path / "new", "--dry-run").stdout
    assert "grouped: about 24 test images. If two methods disagree on 10 % of these, a difference of" in out
    assert "with all 3 comparisons planned); they come in 8 groups" in out
    document = thawline("compare", plan, "-o", tmp_path / "new", "--dry-run", "--json").json
    assert list(document) == ["jobs", "power"]


def test_a_dry_run_names_a_source_once(photos: Path, tmp_path: Path, thawline: Callable[..., Any]) -> None:
    second = shutil.copytree(photos, tmp_path / "second")
    plan = tmp_path / "plan.toml"
    extraction = '[[extract]]\nlayer = "input"\nbackbone = "test_resnet@random:0"\nsize = 32\n'
    plan.write_text(f'source = ["{photos}", "{second}"]\n{extraction}[[fit]]\nhead = ["centroid", "knn"]\n')
    done = thawline("compare", plan, "-o", tmp_path / "run", "--dry-run")
    assert done.stdout.count(str(photos)) == done.stdout.count(str(second)) == 1
    assert done.stdout.count("fit centroid on input of test_resnet@random:0, seed 0, shots all  ") == 2
    jobs = thawline("compare", plan, "-o", tmp_path / "run", "--dry-run", "--json").json["jobs"]
    assert [job["source"] for job in jobs].count(str(photos)) == 3


def test_two_sources_of_one_name_stay_apart(photos: Path, tmp_path: Path) -> None:
    second = Path(shutil.copytree(photos, tmp_path / "second" / "photos"))
    plan = tmp_path / "plan.toml"
    plan.write_text(
        f'source = ["{photos}", "{second}"]\n[[extract]]\nlayer = "input"\nbackbone = "test_resnet@random:0"\n'
        'size = 32\n[[fit]]\nhead = "centroid"\n'
    )
    report = compare(plan, tmp_path / "run")
    assert [one.source for one in report.results] == [str(photos), str(second)]
    page = Path(report.files["report"]).read_text()
    assert str(second) in page
    assert page.count("<h1>") == 1


def test_differences_of_layers_that_were_chosen_by_test_hold_for_all_of_these(plan: Path, run: Path) -> None:
    plan.write_text(plan.read_text().replace('[2, "all"]', "2"))
    report = compare(plan, run)
    folder, (board,) = RunFolder(run), leaderboards(report.results)
    first, second = (
        max((one for one in board.at(2) if one.method.head == head), key=lambda one: one.value)
        for head in ("centroid/l2", "logreg/l2")
    )
    told = []
    for comparisons in (1, 4):  # the best of two layers each
        paired = compare_scores(first, second, folder.predictions, confidence=1 - 0.05 / comparisons)
        assert paired is not None
        text = first.measure.difference_text
        ends = (paired.low, paired.high), (-paired.high, -paired.low)
        told.append([f"{text(low)} to {text(high)}" for low, high in ends])
    page = (run / "report.html").read_text()
    assert not any(interval in page for interval in told[0])
    assert all(interval in page for interval in told[1])


def test_against_another_run_names_what_changed(
    finished: CompareReport, photos: Path, plan: Path, run: Path, thawline: Thawline
) -> None:
    one = photos.parent / "run"
    same = compare(plan, run, against=one).against
    assert same is not None
    assert (same.compared, same.changed) == (8, [])
    assert "0 of 8 methods changed by more than noise" in thawline("compare", plan, "-o", run, "--against", one).stdout
    thawline("compare", plan, "-o", run, "--against", photos.parent / "rnu").assert_one_line("rnu", "run")


def test_heads_of_older_versions_keep_their_scaling() -> None:
    old = record("a").to_json() | {"head": "logreg"}
    assert JobResult.from_json(old).result.head == "logreg/standard"
    assert JobResult.from_json(old | {"head": "logreg/l2"}).result.head == "logreg/l2"


def record(key: str, seed: int = 0, **changes: Any) -> JobResult:
    """A result as a line of results.jsonl holds it, with changes."""
    known = {
        "key": key, "source": "photos", "kind": "head", "backbone": "a", "layer": "b", "pool": "avg",
        "head": "logreg/l2", "params": {}, "seed": seed, "shots": "all", "n_classes": 2,
        "n_train": 60, "n_val": 20, "n_test": 20,
        "accuracy": 0.5, "accuracy_ci95": [0.3, 0.7], "mean_per_class_accuracy": 0.5, "macro_f1": 0.5,
        "log_loss": None, "ece": None, "validation_accuracy": 0.5, "seconds": 1.0, "converged": True,
    }  # fmt: skip
    return JobResult.from_json({**known, **changes})


def names_of(records: list[JobResult]) -> list[str]:
    return list(dict.fromkeys(score.name for score in leaderboards(records)[0].scores.values()))


def test_seeds_that_draw_their_own_weights_are_one_method() -> None:
    tuned = {"kind": "finetune", "freeze": "none", "epochs": 1}

    def scores(init: str) -> list[MethodScore]:
        runs = [record(f"{seed}", seed, **tuned, backbone=f"a@random:{seed}", params={"init": init}) for seed in (0, 1)]
        return list(leaderboards(runs)[0].scores.values())

    (score,) = scores("random")
    assert list(score.by_seed) == [0, 1]
    assert score.method.backbone == "a@random"
    assert len(scores("pretrained")) == 2, "the plan names two backbones with weights of their own"


def said(right: np.ndarray, first: int = 0) -> Predictions:
    uris = np.array([f"{number}.png" for number in range(first, first + len(right))])
    truth = np.zeros(len(right), np.int64)
    return Predictions(uris, truth, np.where(right, 0, 1), None)


def test_one_test_set_is_judged_by_mcnemar() -> None:
    a, b = np.arange(20) < 15, np.arange(20) % 2 == 0
    board = leaderboards([record("x", accuracy=0.75), record("y", head="knn/l2", accuracy=0.5)])[0]
    first, second = board.scores.values()
    paired = compare_scores(first, second, {"x": said(a), "y": said(b)}.__getitem__)
    assert paired is not None
    assert paired.difference == pytest.approx(0.25)
    only_a, only_b = int((a & ~b).sum()), int((b & ~a).sum())
    assert paired.p == pytest.approx(binomtest(only_a, only_a + only_b, 0.5).pvalue)


def test_images_that_only_one_run_has_do_not_count() -> None:
    board = leaderboards([record("x", accuracy=1.0)])[0]
    (score,) = board.scores.values()
    paired = compare_scores(
        score, score, lambda _: said(np.ones(20, bool)), lambda _: said(np.arange(20) < 10, first=10)
    )
    assert paired is not None
    assert paired.difference == 0, "of the ten images that both know, both were right about all"
    nothing = compare_scores(score, score, lambda _: said(np.ones(5, bool)), lambda _: said(np.ones(5, bool), first=5))
    assert nothing is None


def test_five_test_sets_drawn_by_seed_are_judged_over_seeds() -> None:
    lead = [0.1, 0.15, 0.1, 0.15, 0.1]
    records = [record(f"{head}{seed}", seed, head=head, accuracy=0.5 + lead[seed] * (head == "knn"), n_train=10,
                      n_val=0, n_pool=80) for head in ("logreg", "knn") for seed in range(5)]  # fmt: skip
    first, second = leaderboards(records)[0].scores.values()

    def read(key: str) -> Predictions:
        seed = int(key[-1])
        right = 10 + round(20 * lead[seed]) * key.startswith("knn")
        return said(np.arange(20) < right, first=20 * seed)

    paired = compare_scores(second, first, read)
    assert paired is not None
    assert paired.test == "corrected resampled t-test over 5 seeds"
    assert (paired.n_seeds, paired.n_images, paired.shared) == (5, 100, False)
    assert paired.difference == pytest.approx(np.mean(lead))
    t, p = corrected_t_test(np.array(lead), 80, 20)
    assert paired.p == pytest.approx(p), "few shots, drawn from 80 rows"
    reach = paired.difference / t * t_distribution.ppf(0.975, 4)
    assert (paired.low, paired.high) == pytest.approx((paired.difference - reach, paired.difference + reach))
    assert paired.spread == pytest.approx((0.1, 0.15))


@pytest.mark.parametrize("seeds", [2, 5])
def test_seeds_that_cannot_be_judged_alone_are_judged_by_the_images_of_all(seeds: int) -> None:
    records = [record(f"{head}{seed}", seed, head=head, accuracy=0.5 + 0.1 * (head == "knn"))
               for head in ("logreg", "knn") for seed in range(seeds)]  # fmt: skip
    first, second = leaderboards(records)[0].scores.values()
    right = {"k": np.arange(20) < 14, "l": np.arange(20) >= 6 - 2}
    paired = compare_scores(second, first, lambda key: said(right[key[0]], first=20 * int(key[-1])))
    assert paired is not None
    assert (paired.test, paired.n_images, paired.n_seeds) == ("McNemar's exact test", 20 * seeds, seeds)
    assert (paired.first, paired.second) == (pytest.approx(0.7), pytest.approx(0.8))
    assert paired.p == pytest.approx(binomtest(4 * seeds, 10 * seeds, 0.5).pvalue)


def test_equal_accuracies_of_all_seeds_leave_an_interval_all_the_same() -> None:
    records = [record(f"{head}{seed}", seed, head=head) for head in ("logreg", "knn") for seed in range(5)]
    first, second = leaderboards(records)[0].scores.values()
    right = {"k": np.arange(20) < 14, "l": np.arange(20) >= 6}
    paired = compare_scores(second, first, lambda key: said(right[key[0]], first=20 * int(key[-1])))
    assert paired is not None
    assert (paired.difference, paired.p, paired.test) == (0, 1, "McNemar's exact test")
    assert (paired.low, paired.high) == pytest.approx(paired_interval(*(np.tile(right[key], 5) for key in "kl")))
    assert paired.low < -0.1 < 0.1 < paired.high


def test_the_difference_that_would_be_found_is_that_of_the_confidence_of_the_interval() -> None:
    first, second = leaderboards([record("x"), record("y", head="knn/l2")])[0].scores.values()
    right, groups = {"x": np.arange(20) < 18, "y": np.arange(20) < 16}, np.repeat(np.arange(10).astype(str), 2)
    leads = right["x"].astype(float) - right["y"]
    for of, clusters in ((None, None), (groups, np.repeat(np.arange(10), 2))):
        read = {key: replace(said(one), groups=of) for key, one in right.items()}.__getitem__
        for comparisons in (1, 10):
            paired = compare_scores(first, second, read, confidence=1 - 0.05 / comparisons)
            n = effective_rows(leads, clusters, 1 - 0.05 / comparisons)
            assert paired is not None
            assert paired.smallest == pytest.approx(smallest_difference(n, 0.1, comparisons))


def test_seeds_of_one_test_set_count_its_images_once() -> None:
    records = [record(f"{head}{seed}", seed, head=head) for head in ("logreg", "knn") for seed in range(3)]
    first, second = leaderboards(records)[0].scores.values()
    right = {"k": np.arange(20) < 14, "l": np.arange(20) >= 6 - 2}
    paired = compare_scores(second, first, lambda key: said(right[key[0]]))
    assert paired is not None
    assert (paired.n_images, paired.n_groups, paired.n_seeds, paired.shared) == (20, 20, 3, True)
    assert paired.p == pytest.approx(binomtest(4, 10, 0.5).pvalue), "as with one seed"
    one = paired_interval(right["k"], right["l"])
    assert (paired.low, paired.high) == pytest.approx(one, abs=0.03), "but for Student's t"


def test_groups_of_test_images_are_compared_as_groups() -> None:
    first, second = leaderboards([record("x"), record("y", head="knn/l2")])[0].scores.values()
    right = {"x": np.arange(20) < 20, "y": np.arange(20) % 5 < 3}
    groups = np.repeat(["a", "b", "c", "d"], 5)
    paired = compare_scores(first, second, lambda key: replace(said(right[key]), groups=groups))
    assert paired is not None
    assert (paired.n_groups, paired.p, paired.is_real) == (4, 2 / 16, False)
    alone = compare_scores(first, second, lambda key: said(right[key]))
    assert alone is not None
    assert alone.is_real


def test_what_may_be_the_best_is_told_by_number_of_labels() -> None:
    heads = {"logreg/l2": 19, "knn/l2": 18, "ridge/l2": 4}
    records = [record(head, head=head, validation_accuracy=right / 20) for head, right in heads.items()]
    records.append(record("few", head="knn/l2", shots=5))
    (board,) = leaderboards(records)
    found = answer(board, lambda key: said(np.arange(20) < heads.get(key, 3)), {})
    assert list(found.best_sets) == ["all"], "one method alone is compared with nothing"
    best = found.best_sets["all"]
    assert (best.compared, best.chosen, best.methods) == (3, "logreg/l2 on b", ["logreg/l2 on b", "knn/l2 on b"])
    expected = (
        "Any of these 2 of 3 methods may be the best, and with 95 % confidence no other: logreg/l2 on b, knn/l2 on b."
    )
    assert expected in found.sentences
    records = [record(head, head=head, validation_accuracy=1 - right / 20) for head, right in heads.items()]
    found = answer(leaderboards(records)[0], lambda key: said(np.arange(20) < heads[key]), {})
    assert "So ridge/l2 on b, chosen on validation, is not the best." in found.sentences
    alone = leaderboards([record("a", head="logreg/l2"), record("b", head="knn/l2")])[0]
    separate = {"a": said(np.ones(20, bool)), "b": said(np.ones(20, bool), first=20)}
    assert best_set(alone, "all", separate.__getitem__) is None, "no test image in common"


def verdict(
    frozen: dict[Any, float], tuned: dict[Any, float], right: tuple[int, int], n_test: int = 20, seeds: int = 1
) -> Any:
    known = {"n_test": n_test}
    records = [
        record(f"f{shots}", seed, shots=shots, accuracy=value, **known)
        for shots, value in frozen.items()
        for seed in range(seeds)
    ]
    extra = known | {"kind": "finetune", "freeze": "none", "options": {}, "seconds": 60.0}
    records += [
        record(f"t{shots}", seed, shots=shots, accuracy=value, **extra)
        for shots, value in tuned.items()
        for seed in range(seeds)
    ]
    judged = {"f": said(np.arange(20) < right[0]), "t": said(np.arange(20) < right[1])}
    return answer(leaderboards(records)[0], lambda key: judged[key[0]], {("photos", "a"): 2.0})


def test_the_answer_says_whether_the_difference_is_real() -> None:
    level = verdict({5: 0.5, "all": 0.9}, {5: 0.4, "all": 0.95}, (18, 19))
    assert level.headline == "Freeze: fine-tuning is not measurably better here, and takes 20 times as long"
    text = " ".join(level.sentences)
    low, high = paired_interval(np.arange(20) < 19, np.arange(20) < 18)
    between = f"between {-100 * low:.1f} points worse and {100 * high:.1f} points better"
    assert "On the same 20 test images, fine-tuning was right in 95.0 % and freezing in 90.0 %" in text
    assert f"fine-tuning is {between} (95 % interval, McNemar's exact test), so the difference may be chance" in text
    assert re.search(r"A difference of \d+\.\d points would be found here with 80 % power", text)
    assert "Any of the 2 methods may be the best" in text
    assert "points better with 5 labels a class; between" in level.sentences[-1]

    better = verdict({5: 0.5, "all": 0.5}, {5: 0.6, "all": 1.0}, (10, 20))
    low, high = paired_interval(np.arange(20) < 20, np.arange(20) < 10)
    assert better.headline == f"Fine-tune: it is {100 * low:.1f} to {100 * high:.1f} points better here"
    assert (
        "With 95 % confidence, whole network fine-tuned is the best of the 2 methods trained here." in better.sentences
    )
    wider = paired_interval(np.arange(20) < 20, np.arange(20) < 10, confidence=0.975)
    assert f"{100 * wider[0]:.1f} to {100 * wider[1]:.1f} points better with all labels" in better.sentences[-1]

    worse = verdict({5: 0.5, "all": 1.0}, {5: 0.4, "all": 0.5}, (20, 10))
    assert worse.headline == better.headline.replace("Fine-tune", "Freeze")


def test_fewer_labels_are_compared_where_fine_tuning_had_no_more() -> None:
    found = verdict({5: 0.5, "all": 0.9}, {5: 1.0}, (10, 20))
    assert re.fullmatch(r"Fine-tune: it is \d+\.\d to \d+\.\d points better here", found.headline)
    assert "at 5 labels a class" in found.sentences[0]
    assert "no number of labels in common" in verdict({"all": 0.9}, {5: 1.0}, (10, 20)).sentences[-1]
    assert "Nothing was fine-tuned" in verdict({"all": 0.9}, {}, (10, 20)).sentences[-1]


def test_curves_over_labels_are_drawn_further() -> None:
    shots = [1, 2, 4, 8, 16]
    frozen = {count: 0.9 - 0.3 / count for count in shots}
    catching_up = verdict(frozen, {count: 0.95 - 0.6 * count**-0.5 for count in shots}, (18, 18), n_test=4000, seeds=2)
    forecast = next(text for text in catching_up.sentences if text.startswith("If the curves over labels go on"))
    numbers = re.findall(r"(\d+)–(\d+) % with (\d+) labels a class", forecast)
    assert [int(labels) for _, _, labels in numbers] == [32, 64, 32, 64]
    laws = 2 * [lambda n: 0.9 - 0.3 / n] + 2 * [lambda n: 0.95 - 0.6 * n**-0.5]
    for (low, high, labels), law in zip(numbers, laws, strict=True):
        assert int(low) - 1 <= 100 * law(int(labels)) <= int(high) + 1
    assert "cannot be told" in catching_up.sentences[-1], "0.875 against 0.895 with 64 labels"
    behind = verdict(frozen, {count: 0.5 - 0.3 / count for count in shots}, (18, 18), n_test=4000, seeds=2)
    assert behind.sentences[-1] == "Fine-tuning would not overtake up to 64 labels a class."
    steep = verdict(
        dict.fromkeys(shots, 0.68),
        {count: max(0.0, 1 - 1.2 * count**-0.45) for count in shots},
        (13, 13),
        4000,
        seeds=2,
    )
    found = re.fullmatch(r"Fine-tuning would overtake between (\d+) and (\d+) labels a class\.", steep.sentences[-1])
    assert found is not None, "they are level at 18.9"
    assert 16 <= int(found[1]) <= 19 < int(found[2]) <= 64
    few = verdict({1: 0.5, 2: 0.6}, {1: 0.4, 2: 0.6}, (9, 9), seeds=2)
    one_seed = verdict(frozen, frozen, (9, 9))
    assert not any("If the curves" in text for text in few.sentences + one_seed.sentences)


@pytest.mark.parametrize(("freeze", "expected"), [("none", 1.0), ("all", 3.0), ("layer1", 3.0), (None, 3.0)])
def test_whatever_freezes_pays_for_the_extraction(freeze: str | None, expected: float) -> None:
    kind = {} if freeze is None else {"kind": "finetune", "freeze": freeze, "options": {}}
    (score,) = leaderboards([record("x", **kind)])[0].scores.values()
    costs = {
        "small.h5": ExtractionCost(10, 0.1, "photos", "a", rows=20),
        "large.h5": ExtractionCost(10, 1.0, "photos", "a", rows=20),
        "other.h5": ExtractionCost(10, 100.0, "drawings", "a", rows=20),
    }
    assert seconds(score, extraction_seconds(RunInfo(extractions=costs))) == expected


def test_methods_are_chosen_by_validation_not_by_test() -> None:
    board = leaderboards(
        [record("x", layer="b", accuracy=0.9, validation_accuracy=0.6), record("y", layer="c", validation_accuracy=0.8)]
    )[0]
    best = board.best("head")
    assert best is not None
    assert best.name == "logreg/l2 on c"


def test_an_option_that_only_one_method_has_tells_them_apart() -> None:
    tuned = {"kind": "finetune", "freeze": "all"}
    records = [record("x", options={"lr": 0.1}, **tuned), record("y", options={"lr": 0.1, "views": 4}, **tuned)]
    assert names_of(records) == ["new top trained by backprop", "new top trained by backprop, views 4"]


def test_heads_that_differ_in_how_they_are_tested_have_names_of_their_own() -> None:
    records = [record("x"), record("y", cv=3), record("z", cv=5), record("w", drop_leaks=True)]
    names = ["logreg/l2 on b", "logreg/l2 on b, 3-fold", "logreg/l2 on b, 5-fold", "logreg/l2 on b, leaks dropped"]
    assert names_of(records) == names


def test_methods_are_told_apart_by_what_was_trained_not_by_their_names() -> None:
    seeds = leaderboards([record("x"), record("y", seed=1), record("z", layer="b on c")])[0]
    assert [len(score.by_seed) for score in seeds.scores.values()] == [2, 1]
    assert [score.method.layer for score in seeds.scores.values()] == ["b", "b on c"]
    tuned = {"kind": "finetune", "freeze": "all"}
    rates = [record("x", options={"lr": 1}, **tuned), record("y", options={"lr": 2}, **tuned)]
    first, second = dict.fromkeys(method for method, _ in leaderboards(rates)[0].scores)
    assert first != second
    assert first == replace(second, options=first.options)


def test_names_say_what_differs_and_nothing_else() -> None:
    assert names_of([record("x"), record("y", layer="c")]) == ["logreg/l2 on b", "logreg/l2 on c"]
    tune = {"kind": "finetune", "freeze": "blocks.4"}
    records = [
        record("x"),
        record("y", backbone="z", pool="max"),
        record("t", **tune, options={"lr": 0.1, "epochs": 3}),
        record("u", **tune, options={"lr": 0.2, "epochs": 3}),
    ]
    assert names_of(records) == [
        "logreg/l2 on b, a, avg",
        "logreg/l2 on b, z, max",
        "fine-tuned above blocks.4, lr 0.1, a",
        "fine-tuned above blocks.4, lr 0.2, a",
    ]


def test_the_pareto_front_is_what_nothing_beats() -> None:
    costs, values = np.array([3.0, 1.0, 2.0, 2.0, 4.0]), np.array([0.9, 0.5, 0.4, 0.7, 0.8])
    assert pareto(costs, values).tolist() == [1, 3, 0]


def test_reliability_counts_every_row_once() -> None:
    probability = np.array([0.05, 0.55, 0.58, 1.0], np.float32)
    sure, right, counts = reliability(probability, np.array([True, True, False, True]))
    assert counts.tolist() == [1, 0, 0, 0, 0, 2, 0, 0, 0, 1]
    assert right.tolist() == [1.0, 0.5, 1.0]
    assert sure == pytest.approx([0.05, 0.565, 1.0])


def test_calibration_tells_the_error_of_what_predict_tells_and_the_one_before() -> None:
    mended = record("x", ece=0.25, ece_calibrated=0.0625)
    board = leaderboards(
        [mended, record("y", layer="c", ece=0.125, ece_calibrated=None), record("z", head="ridge", ece=None)]
    )[0]
    truth = said(np.arange(20) < 15)
    judged = {
        key: replace(truth, probability=np.full(20, share)) for key, share in (("x", 0.7), ("y", 0.9), ("z", None))
    }
    judged["z"] = truth
    chart = calibration_chart(list(board.scores.values()), judged)
    assert chart is not None
    assert [row[1:] for row in chart.rows] == [("70.0 %", "75.0 %", 20), ("90.0 %", "75.0 %", 20)]
    assert "error 0.062, uncalibrated 0.250" in chart.svg
    assert "error 0.125<" in chart.svg


def test_the_hardest_class_comes_first() -> None:
    (score,) = leaderboards([record("x")])[0].scores.values()
    truth = np.repeat([0, 1, 3], 10)
    found = np.where(np.arange(30) % 10 < np.repeat([9, 4, 7], 10), truth, 2)
    judged = Predictions(np.array([f"{number}.png" for number in range(30)]), truth, found, None)
    chart = class_chart([score], {"x": judged}, ("a", "b", "c", "d"))
    assert chart is not None
    assert chart.rows == [("b", 10, "40.0 %"), ("d", 10, "70.0 %"), ("a", 10, "90.0 %")]


def test_a_run_folder_in_use_is_refused(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "run")
    with folder.claim(), pytest.raises(CacheLockedError, match="is writing it"), RunFolder(folder.path).claim():
        pass


def test_full_bars_make_room_for_the_job_that_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[Any] = []
    monkeypatch.setattr(
        "rich.progress.Progress", lambda *columns, **how: drawn.append(Bars(*columns, **how)) or drawn[0]
    )
    with progress.progress_bar() as report:
        for job in range(3):
            report(10 if job < 2 else 5, 10, f"job {job}")
        assert [task.description for task in drawn[0].tasks if task.visible] == ["job 2"]


@pytest.mark.parametrize("name", ["results.jsonl", "results.jsonl.lock"])
def test_a_link_in_a_strangers_run_folder_is_not_written_through(tmp_path: Path, name: str) -> None:
    letter = tmp_path / "letter.txt"
    letter.write_text("a line without an end")
    run = tmp_path / "run"
    run.mkdir()
    (run / name).symlink_to(letter)
    with pytest.raises(ThawlineError, match="is a link or no regular file; remove it"), RunFolder(run).claim():
        pass
    assert letter.read_text() == "a line without an end"


def test_a_line_nested_beyond_reason_is_a_damaged_line(tmp_path: Path) -> None:
    (tmp_path / "results.jsonl").write_text("[" * 100_000 + "\n")
    with pytest.raises(RunFolderError, match="line 1 is damaged: expected JSON"):
        RunFolder(tmp_path)
