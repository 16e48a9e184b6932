"""Scripted benchmark: one plan, every job once, and a report that says whether to freeze or to fine-tune."""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass
from pathlib import Path

from pipeline.comparing.against import Against, compare_runs
from pipeline.comparing.answer import answer, extraction_seconds
from pipeline.comparing.check import check_finetunes, check_heads, open_sources, sketch_features
from pipeline.comparing.estimate import ACTIVATIONS, Planned, plan_extraction, plan_finetune, plan_fit
from pipeline.comparing.features import Features, fit_key
from pipeline.comparing.folder import Record, RunFolder, open_finished
from pipeline.comparing.jobs import Extraction, Fit, extractions, fits
from pipeline.comparing.methods import boards
from pipeline.comparing.plan import Plan, read_plan
from pipeline.comparing.run import run
from pipeline.comparing.work import Failure, Work
from pipeline.errors import RunFolderError
from pipeline.provenance import machine
from pipeline.results import Progress, silent


@dataclass(frozen=True)
class CompareReport:
    """What a run holds now.

    Parameters
    ----------
    results : list of dict
        One for each finished job, with the keys of `fit` and `finetune` and `key`, `source`.
    failures : list of Failure
    answer : list of str
        What the results say, in sentences.
    against : Against or None
        What changed since another run, where one was named.
    computed, reused : int
        Jobs done now, and before.
    seconds : float
    files : dict of str to str
        Where everything is.
    """

    results: list[Record]
    failures: list[Failure]
    answer: list[str]
    against: Against | None
    computed: int
    reused: int
    seconds: float
    files: dict[str, str]


def compare(
    plan: str | Path, output: str | Path, *, against: str | Path | None = None, progress: Progress | None = None
) -> CompareReport:
    """Do what is missing of a plan, and write the results and the report.

    Parameters
    ----------
    plan : str or Path
        A TOML file; see the README.
    output : str or Path
        The run folder; made if missing. A second run into it does only what is missing or changed.
    against : str or Path, optional
        Another run's folder, to compare the results with.
    progress : callable, optional
        ``progress(done, total, text)``.

    Returns
    -------
    CompareReport
        A failed job is in `failures`; the others are done all the same.

    Raises
    ------
    PlanError
        The plan asks for what does not exist; nothing was computed.
    RunFolderError
        The folder is another plan's, or cannot be written.
    """
    started = time.perf_counter()
    other = None if against is None else open_finished(against)
    work = _prepare(plan, output, progress)
    if work.is_done() and work.folder.report.exists():
        return _report(work, other, started)
    check_plan(work)
    with work.folder.claim():
        _begin(work)
        try:
            run(work)
        finally:
            _end(work, started)
        _render(work)
    return _report(work, other, started)


def dry_run(plan: str | Path, output: str | Path) -> list[Planned]:
    """Return the jobs of a plan with guesses at their time and disk; checks all of it and computes nothing.

    Parameters and errors are those of `compare`.
    """
    work = _prepare(plan, output, None)
    folder, planned = work.folder, []
    for extraction, found, jobs in check_plan(work):
        images = work.images[extraction.source]
        planned.append(plan_extraction(extraction, found, images, folder))
        for job in jobs:
            done = found.complete and folder.has(fit_key(job, found, images.name))
            planned.append(plan_fit(job, found, done, images, folder))
    stored: set[tuple[object, ...]] = set()
    for tune, (_, key) in work.finetunes().items():
        images = work.images[tune.source]
        activations = (tune.source, *(value for key, value in tune.options if key in ACTIVATIONS))
        planned.append(plan_finetune(tune, folder.has(key), images, stores=activations not in stored))
        stored.add(activations)
    return planned


def check_plan(work: Work) -> list[tuple[Extraction, Features, list[Fit]]]:
    """Return what is extracted and fitted; raise `PlanError` unless all that the plan names exists."""
    check_heads(work.plan)
    check_finetunes(work.plan)
    checked = []
    for extraction, known in work.features.items():
        found = known or sketch_features(work.plan, extraction)
        work.features[extraction] = found
        checked.append((extraction, found, list(fits(work.plan, extraction, found.aliases))))
    return checked


def _prepare(path: str | Path, output: str | Path, progress: Progress | None) -> Work:
    """Read the plan and look up what is there, without importing anything heavy."""
    plan = read_plan(path)
    asked = extractions(plan)
    folder = RunFolder(output)
    _require_own(folder, plan)
    work = Work(plan, folder, open_sources(plan), dict.fromkeys(asked), progress or silent)
    work.look_up()
    return work


def _require_own(folder: RunFolder, plan: Plan) -> None:
    """Refuse the folder of another plan: one of another file with another content."""
    before = folder.read_json("run.json")
    if before and before["plan"] != plan.meaning and before["plan_file"] != str(plan.path):
        raise RunFolderError(
            f"{folder.path} holds the run of another plan, {before['plan_file']}; choose another folder for {plan.path}"
        )


def _begin(work: Work) -> None:
    document = work.folder.read_json("run.json")
    document |= {"plan_file": str(work.plan.path), "plan": work.plan.meaning}
    document.setdefault("extractions", {})
    document.setdefault("runs", []).append(machine())
    work.folder.write("plan.toml", work.plan.text)
    work.folder.write_json("run.json", document)


def _end(work: Work, started: float) -> None:
    """Keep what the run cost and what went wrong, also when it was interrupted."""
    document = work.folder.read_json("run.json")
    seconds = time.perf_counter() - started
    document["runs"][-1] |= {"seconds": seconds, "computed": work.computed, "failed": len(work.failures)}
    document["notes"] = list(dict.fromkeys([*document.get("notes", []), *work.notes]))
    document["failures"] = [asdict(failure) for failure in work.failures]
    work.folder.write_json("run.json", document)
    work.folder.write_csv()


def _render(work: Work) -> None:
    """Write the report; a run without any result has none."""
    from pipeline.reporting.page.report import Seen, render

    if not work.folder.records:
        return
    seen = {source.name: Seen(source, {}) for source in work.images.values()}
    for extraction, found in work.features.items():
        if found is not None and found.files:
            fitted = dict.fromkeys(work.fits(extraction, found).values(), found)
            seen[work.images[extraction.source].name].features.update(fitted)
    work.folder.write("report.html", render(work.folder, work.plan.text, seen))


def _report(work: Work, other: RunFolder | None, started: float) -> CompareReport:
    folder = work.folder
    extraction = extraction_seconds(folder.read_json("run.json"))
    answers = [answer(board, folder.judged, extraction) for board in boards(folder.records.values())]
    sentences = [sentence for one in answers for sentence in (f"{one.headline}.", *one.sentences)]
    names = {"results": "results.jsonl", "table": "results.csv", "report": "report.html"}
    files = {name: str(folder.path / file) for name, file in names.items()}
    results = list(folder.records.values())
    reused = len(results) - work.computed
    changes = None if other is None else compare_runs(other, folder)
    seconds = time.perf_counter() - started
    return CompareReport(results, work.failures, sentences, changes, work.computed, reused, seconds, files)
