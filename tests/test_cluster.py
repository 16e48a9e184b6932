"""Work on Dask clusters: retries, workers that go, stops and errors; and a short form of the benchmark's kills."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from features_cache import DONE, CacheError, CacheWriter, PartPlan, open_cache
from pipeline.compare import compare
from pipeline.errors import EngineError
from pipeline.extract import extract
from pipeline.extraction import cluster, parts
from pipeline.extraction.cluster import open_cluster, parse_cluster
from pipeline.extraction.inspection import check
from pipeline.finetune import finetune
from pipeline.fit import fit
from pipeline.predict import predict

distributed = pytest.importorskip("distributed")
ROOT = Path(__file__).resolve().parents[1]
CALLS: list[Any] = []
"""What tasks note; the workers of these tests are threads of this process."""


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    """A scheduler with two workers, as somebody else would have started it."""
    with running() as one:
        yield one.scheduler_address


def running(workers: int = 2, **options: Any) -> Any:
    options = {"protocol": "tcp", "host": "127.0.0.1", "dashboard_address": "127.0.0.1:0", "memory_limit": 0} | options
    return distributed.LocalCluster(n_workers=workers, threads_per_worker=2, processes=False, **options)


@pytest.fixture(autouse=True)
def forget() -> None:
    CALLS.clear()


def square(number: int, progress: Any) -> int:
    progress(number, number, "", "bound by model")
    return number**2


def fail(name: str, error: type[Exception], times: int, progress: Any) -> str:
    CALLS.append(name)
    if CALLS.count(name) <= times:
        raise error("no luck")
    return name


def last(stop: float, progress: Any) -> None:
    """Run for so many seconds, and note how it ended."""
    began = time.monotonic()
    CALLS.append("began")
    try:
        while time.monotonic() - began < stop:
            progress(1, 2, "")
            time.sleep(0.01)
    except EngineError as error:
        CALLS.append(str(error))
        raise


def test_tasks_run_on_all_workers_and_report_their_rows(address: str) -> None:
    results: dict[str, int] = {}
    told: list[str] = []
    with open_cluster(address) as workers:
        assert workers.call(square, 7) == 49
        tasks = {str(number): (number,) for number in range(9)}
        failed = workers.call_each(square, tasks, results.__setitem__, lambda _, state: told.append(state))
        again = workers.call_each(square, {"3": (5,)}, results.__setitem__)
    assert failed == again == {}
    assert results == {str(number): number**2 for number in range(9)} | {"3": 25}  # not the old result of that name
    assert told[-1].startswith("2 workers")


def test_a_task_is_tried_three_times_but_not_after_an_error_of_ours(address: str) -> None:
    results: dict[str, str] = {}
    tasks = {"ok": ("ok", OSError, 2), "never": ("never", OSError, 9), "ours": ("ours", EngineError, 9)}
    with open_cluster(address) as workers:
        failed = workers.call_each(fail, tasks, results.__setitem__)
    assert results == {"ok": "ok"}
    assert {name: str(error) for name, error in failed.items()} == {"never": "OSError: no luck", "ours": "no luck"}
    assert [CALLS.count(name) for name in tasks] == [3, 3, 1]


def test_an_interrupt_stops_what_runs_on_workers_of_others(address: str) -> None:
    def interrupt(*_: Any) -> None:
        if CALLS:
            raise KeyboardInterrupt

    with open_cluster(address) as workers, pytest.raises(KeyboardInterrupt):
        workers.call_each(last, {"long": (60.0,)}, lambda *_: None, interrupt)
    deadline = time.monotonic() + 20
    while len(CALLS) < 2 and time.monotonic() < deadline:
        time.sleep(0.05)
    assert CALLS == ["began", "the run was given up"]


def test_work_that_does_not_move_is_an_error_that_names_it(address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cluster, "STALL_S", 1.0)
    with open_cluster(address) as workers, pytest.raises(EngineError, match=r"no row was finished .* in x\.p00007\.h5"):
        workers.call_each(last, {"x.p00007.h5": (60.0,)}, lambda *_: None, lambda *_: None)


def test_a_cluster_without_workers_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cluster, "PATIENCE_S", 0.3)
    with (
        running(0) as empty,
        open_cluster(empty.scheduler_address) as workers,
        pytest.raises(EngineError, match=r"no worker of tcp://.* came"),
    ):
        workers.call(square, 1)


@pytest.mark.parametrize("counts", ["", ":1", ":0:1"])
def test_classes_by_name_and_scheduler_files(counts: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = []

    def start() -> Any:
        made.append(running(0 if counts else 1))
        return made[-1]

    monkeypatch.setitem(sys.modules, "queues", types.SimpleNamespace(Queue=start))
    with open_cluster(f"queues.Queue{counts}") as workers:
        assert workers.call(square, 3) == 9
        (tmp_path / "scheduler.json").write_text(json.dumps({"address": made[0].scheduler_address}))
        with open_cluster(f"file:{tmp_path / 'scheduler.json'}") as same:
            assert same.call(square, 4) == 16
    assert made[0].status == distributed.Status.closed


def test_an_extraction_on_a_cluster_gives_what_one_process_gives(
    make_photos: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "queues", types.SimpleNamespace(Queue=lambda: running(2)))
    photos = make_photos(each=6)
    how: dict[str, Any] = {"size": 32, "precision": "fp32", "engine": "torch", "batch_size": 3}
    asked = [photos, ["test_resnet@random:0"], ["layer2", "penultimate"]]
    (whole,) = extract(*asked, output=tmp_path / "whole", **how)
    told: list[tuple[Any, ...]] = []
    how |= {"cluster": "queues.Queue:2", "output": tmp_path / "cache"}
    (parted,) = extract(*asked, part_rows=5, progress=lambda *now: told.append(now), **how)
    assert told[-1][:2] == (18, 18)
    files = [open_cache(result.path) for result in (whole, parted)]
    assert [len(file.parts) for file in files] == [1, 4]
    for layer in whole.layers:
        np.testing.assert_array_equal(*(np.asarray(file.matrix(layer)) for file in files))
    assert files[0].uris.tolist() == files[1].uris.tolist()
    assert (parted.rows, parted.done, parted.computed, parted.reused) == (18, 18, 18, 0)
    (again,) = extract(*asked, **how)
    assert (again.computed, again.reused) == (0, 18)
    (small,) = extract(photos, asked[1], ["layer1"], **how)  # fewer rows than a part has by default: one file
    assert (Path(small.path).suffix, small.computed) == (".h5", 18)
    for path in (photos / "blue").iterdir():
        path.unlink()
        path.write_bytes(b"no image")
    with pytest.raises(EngineError, match=r"2 of 4 parts failed; the same command does the rest: .*p00000.h5: blue/0"):
        extract(*asked, on_error="stop", **how)


QUEUE = "queues.Queue:2"


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The clusters of two workers that `QUEUE` started."""
    clusters: list[Any] = []

    def start() -> Any:
        clusters.append(running(2))
        return clusters[-1]

    monkeypatch.setitem(sys.modules, "queues", types.SimpleNamespace(Queue=start))
    return clusters


HOW: dict[str, Any] = {"size": 32, "precision": "fp32", "engine": "torch"}


def test_chosen_images_are_extracted_on_a_cluster(
    make_photos: Callable[..., Path], tmp_path: Path, started: list[Any]
) -> None:
    told: list[tuple[Any, ...]] = []
    chosen = {"blue/1.png", "blue/5.png", "red/0.png"}
    asked = [make_photos(each=6), ["test_resnet@random:0"], ["layer1"]]
    how = {"part_rows": 5, "only": chosen, "cluster": QUEUE, "output": tmp_path / "cache", **HOW}
    (made,) = extract(*asked, progress=lambda *now: told.append(now), **how)
    file = open_cache(made.path)
    assert set(file.uris[file.states == DONE].tolist()) == chosen
    assert (made.computed, told[-1][:2], len(file.parts)) == (3, (3, 3), 3), "a part without any of them is not begun"


@pytest.mark.parametrize("only", [None, {"red/0.png", "red/1.png"}])
def test_rehash_on_a_cluster_reads_files_that_are_not_in_parts(
    only: set[str] | None, make_photos: Callable[..., Path], tmp_path: Path, started: list[Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    photos = make_photos(each=3)
    path = photos / "red" / "0.png"
    Image.new("RGB", (40, 40), (1, 2, 3)).save(path, "BMP")
    asked, where = [photos, ["test_resnet@random:0"], ["layer1"]], {"output": tmp_path / "cache", **HOW}
    (made,) = extract(*asked, **where)
    before = np.array(open_cache(made.path).matrix("layer1"))
    status = path.stat()
    Image.new("RGB", (40, 40), (250, 2, 3)).save(path, "BMP")
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    call, states = cluster.Workers.call, []

    def noting(*given: Any) -> Any:
        result = call(*given)
        states.append(open_cache(made.path).states.tolist())
        return result

    monkeypatch.setattr(cluster.Workers, "call", noting)
    (again,) = extract(*asked, **where, rehash=True, only=only, cluster=QUEUE)
    assert states == [[DONE] * 9] * 2, "the plan loses nothing"
    assert (again.path, again.done) == (made.path, 9)
    changed = (np.asarray(open_cache(made.path).matrix("layer1")) != before).any(axis=1)
    assert open_cache(made.path).uris[changed].tolist() == ["red/0.png"]


def test_rehash_on_a_cluster_reads_each_part_once(
    make_photos: Callable[..., Path], tmp_path: Path, started: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked, where = [make_photos(each=3), ["test_resnet@random:0"], ["layer1"]], {"output": tmp_path / "cache", **HOW}
    extract(*asked, **where, part_rows=4)
    begun, begin_try = [], parts.begin_try

    def noting(plan: PartPlan, number: int, *given: Any, **named: Any) -> CacheWriter:
        begun.append(number)
        return begin_try(plan, number, *given, **named)

    monkeypatch.setattr(parts, "begin_try", noting)
    (again,) = extract(*asked, **where, rehash=True, cluster=QUEUE)
    assert (again.done, sorted(begun)) == (9, [0, 1, 2])


def test_verify_on_a_cluster_finds_and_repairs_what_one_process_does(
    make_photos: Callable[..., Path], tmp_path: Path, started: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    photos = make_photos(each=6)
    (made,) = extract(photos, ["test_resnet@random:0"], ["layer1"], output=tmp_path / "c", part_rows=5, **HOW)
    part = open_cache(made.path).parts[2]
    data, row = part.path.read_bytes(), part.matrix("layer1")[1].tobytes()
    part.path.write_bytes(data.replace(row, bytes(byte ^ 1 for byte in row)))
    (photos / "green" / "2.png").write_bytes(b"changed")
    monkeypatch.chdir(tmp_path)
    reports, alone = (check("c", "photos", cluster=name)[0] for name in (QUEUE, None))
    assert reports == alone
    assert len(started) == 1
    assert [finding.uri for one in reports for finding in one.damaged] == [str(part.uris[1])]
    assert [finding.uri for one in reports for finding in one.changed] == ["green/2.png"]
    check("c", mend=True, cluster=QUEUE)
    assert all(one.sound for one in check("c")[0])
    assert int(open_cache(made.path).pending.sum()) == 1

    def refuse(*_: Any) -> None:
        raise CacheError("no luck")

    monkeypatch.setattr("pipeline.extraction.inspection.verify", refuse)
    with pytest.raises(EngineError, match=r"4 of 4 files could not be verified: .*p0000\d.h5: no luck"):
        check("c", cluster=QUEUE)


def test_predict_and_finetune_extract_on_a_cluster(
    make_photos: Callable[..., Path], tmp_path: Path, started: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pipeline.extraction.parts.MOST_ROWS", 10)
    monkeypatch.chdir(tmp_path)
    photos, name = make_photos(each=8), "test_resnet@random:0"
    extract(photos, [name], ["layer1"], output="cache", **HOW)
    fit("cache", heads=["centroid"], save="m.skops")
    here = predict("m.skops", photos, engine="torch").predictions
    assert not started
    assert predict("m.skops", photos, cluster=QUEUE, engine="torch").predictions == here
    assert [path.suffix for path in Path("thawline-predictions").glob("*.plan")] == [".plan"]
    views: dict[str, Any] = {"freeze": "layer3", "epochs": 1, "augment": "flip", "views": 1, "device": "cpu", **HOW}
    far, near = (finetune(photos, name, output=one or "here", cluster=one, **views).results[0] for one in (QUEUE, None))
    assert [epoch | {"seconds": 0} for epoch in far.history] == [epoch | {"seconds": 0} for epoch in near.history]
    assert len(started) == 3, "predictions, plain images, views"
    assert {path.suffix for path in Path(QUEUE, "finetune").iterdir()} >= {".plan"}


def test_compare_extracts_on_a_cluster(
    make_photos: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "queues", types.SimpleNamespace(Queue=lambda: running(1)))
    make_photos(each=8)
    network = 'backbone = "test_resnet@random:0"\nlayer = "layer1"\nsize = 32\ncluster = "queues.Queue:1"'
    (tmp_path / "plan.toml").write_text(f'source = "photos"\n[[extract]]\n{network}\n[[fit]]\nhead = "centroid"\n')
    monkeypatch.setattr("pipeline.extraction.parts.MOST_ROWS", 10)
    report = compare(tmp_path / "plan.toml", tmp_path / "run")
    assert not report.failures
    assert [path.suffix for path in (tmp_path / "run" / "cache").glob("*.plan")] == [".plan"]


def test_a_scheduler_with_certificates(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("cryptography")
    import dask

    security = distributed.Security.temporary()
    tls = {f"client.{name}": getattr(security, f"tls_client_{name}") for name in ("key", "cert")}
    with running(1, protocol="tls", security=security) as own:
        assert own.scheduler_address.startswith("tls://")
        settings = {f"distributed.comm.tls.{name}": value for name, value in tls.items()}
        settings["distributed.comm.tls.ca-file"] = security.tls_ca_file
        with dask.config.set(settings), open_cluster(own.scheduler_address) as workers:
            assert workers.call(square, 5) == 25
        with pytest.raises(EngineError, match="cannot reach the cluster"), open_cluster(own.scheduler_address):
            pass


def test_processes_of_this_machine_have_an_environment_each_and_come_again() -> None:
    started, ask_again = cluster._start_here([{"CUDA_VISIBLE_DEVICES": "3"}, {"CUDA_VISIBLE_DEVICES": "5"}])
    try:
        with distributed.Client(started, set_as_default=False) as client:
            client.wait_for_workers(2, timeout=60)
            assert all(worker.startswith("tcp://127.0.0.1:") for worker in client.nthreads())
            found = client.run(lambda: os.environ["CUDA_VISIBLE_DEVICES"])
            assert sorted(found.values()) == ["3", "5"]
            del started.worker_spec[1]  # as after a nanny that gave up
            ask_again()
            assert sorted(started.worker_spec) == [0, 1]
    finally:
        started.close()


def test_devices_are_named_as_this_process_sees_them(monkeypatch: pytest.MonkeyPatch) -> None:
    count = 2
    cuda = types.SimpleNamespace(device_count=lambda: count)
    monkeypatch.setitem(sys.modules, "torch", types.SimpleNamespace(cuda=cuda))
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert cluster._gpus() == ["0", "1"]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,5")
    assert cluster._gpus() == ["3", "5"]
    count = 0
    with pytest.raises(EngineError, match="needs a CUDA device"):
        cluster._gpus()


@pytest.mark.parametrize("text", ["locl:4", "local:0", "local:2:4", "gpus:2", "a.B:3:1", "a.B:x", "", "4"])
def test_other_clusters_are_refused(text: str) -> None:
    with pytest.raises(EngineError, match=r"cluster: expected"):
        parse_cluster(text)


def test_what_is_not_there_is_one_line(tmp_path: Path) -> None:
    for text, why in ((f"file:{tmp_path}/no.json", "no scheduler file"), ("no_such_module.Cluster", "cannot start")):
        with pytest.raises(EngineError, match=why):
            extract("digits", output=tmp_path, cluster=text)


def test_kills_and_stops_lose_nothing_and_leave_nothing() -> None:
    command = [sys.executable, str(ROOT / "benchmarks" / "cluster.py"), "--rows", "48", "--pause", "3", "--workers"]
    command += ["--kills", "2", "--commands", "0", "--thrice", "0", "--stops", "1", "--engine", "0"]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment, timeout=600)
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert sorted(report) == ["stops", "workers"]
    for counts in report.values():
        for name in ("rows_lost", "rows_wrong", "tries_left", "workers_left", "processes_failed"):
            assert counts.get(name, 0) == 0, report
        assert counts["rows"] >= 48
