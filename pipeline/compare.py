"""A scripted benchmark: run every job of a plan once, and report whether to freeze or to fine-tune."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from pipeline.comparing.answer import Answer, answer, extraction_seconds
from pipeline.comparing.check import (
    check_finetunes,
    check_heads,
    label_sources,
    open_labels,
    open_sources,
    sketch_features,
)
from pipeline.comparing.comparison import Comparison
from pipeline.comparing.estimate import (
    ACTIVATIONS,
    Planned,
    Power,
    plan_extraction,
    plan_finetune,
    plan_fit,
    plan_power,
)
from pipeline.comparing.features import Features, fit_key
from pipeline.comparing.folder import Failure, Invocation, JobResult, RunFolder, open_finished
from pipeline.comparing.jobs import Extraction, Finetune, Fit, extractions, fits, one_pass
from pipeline.comparing.methods import leaderboards
from pipeline.comparing.paired import Against, BestSet, compare_runs
from pipeline.comparing.plan import read_plan
from pipeline.comparing.run import run
from pipeline.errors import RunFolderError
from pipeline.options import CLASSIFICATION
from pipeline.provenance import machine
from pipeline.results import Progress, silent


@dataclass(frozen=True)
class CompareReport:
    """What a run folder holds after a comparison.

    `answer` says in sentences what the results show, `best_sets` which methods may be the best, one record for each
    source and number of labels, and `against` what changed since another run, if one was named.
    `computed` results are new, `reused` ones were there before; `seconds` is the duration of this call, and `files` has
    the paths of the results, the table and the report.
    """

    results: list[JobResult]
    failures: list[Failure]
    answer: list[str]
    best_sets: list[BestSet]
    against: Against | None
    computed: int
    reused: int
    seconds: float
    files: dict[str, str]


def compare(
    plan: str | Path, output: str | Path, *, against: str | Path | None = None, progress: Progress | None = None
) -> CompareReport:
    """Run the jobs of a plan that are not done yet, and write the results and the report.

    Parameters
    ----------
    plan : str or Path
        A TOML file; `docs/comparing.md` describes its keys.
    output : str or Path
        The run folder; made if missing. A second run into it does only what is missing or changed.
    against : str or Path, optional
        Another run's folder, to compare the results with.
    progress : callable, optional
        ``progress(done, total, text)``.

    Returns
    -------
    CompareReport
        If a job fails, it is in `failures` and the others are still done.

    Raises
    ------
    PlanError
        The plan asks for something that does not exist; nothing was computed.
    RunFolderError
        The folder belongs to another plan, is damaged, or cannot be written.
    """
    started = time.perf_counter()
    other = None if against is None else open_finished(against)
    comparison = _prepare(plan, output, progress)
    if not (comparison.is_done() and comparison.folder.report.exists()):
        check_plan(comparison)
        with comparison.folder.claim():
            with _noted(comparison, started):
                run(comparison)
            answers = _answers(comparison)
            _write_report(comparison, answers)
    else:
        answers = _answers(comparison)
    return _summarise(comparison, answers, other, started)


@dataclass(frozen=True)
class DryRun:
    """The jobs of a plan, and if it is about classes, what the test images of each source will be able to show."""

    jobs: list[Planned]
    power: list[Power]


def dry_run(plan: str | Path, output: str | Path) -> DryRun:
    """Check the whole plan; return its jobs with estimates of time and disk space, and what it can show.

    Nothing is computed.

    Parameters and errors are those of `compare`.
    """
    comparison = _prepare(plan, output, None)
    folder, planned = comparison.folder, []
    compared: dict[str, list[Fit | Finetune]] = {}
    passes: set[str] = set()
    for extraction, found, jobs in check_plan(comparison):
        images, name = comparison.labelled[extraction.source], comparison.names[extraction.source]
        shares = one_pass(extraction) in passes
        planned.append(plan_extraction(extraction, found, len(images.items), name, folder, shares=shares))
        if not found.complete:
            passes.add(one_pass(extraction))
        compared.setdefault(extraction.source, []).extend(jobs)
        for job in jobs:
            done = found.complete and folder.has(fit_key(job, found, name, comparison.question))
            planned.append(plan_fit(job, found, done, images, folder, comparison.plan.task))
    stored: set[tuple[object, ...]] = set()
    for tune, (line, key) in comparison.finetunes().items():
        images = comparison.labelled[tune.source]
        activations = (tune.source, *(value for key, value in tune.options if key in ACTIVATIONS))
        device, stores = line.how()["device"], activations not in stored
        planned.append(plan_finetune(tune, comparison.is_kept(tune, key), images, device, stores=stores))
        stored.add(activations)
        compared.setdefault(tune.source, []).append(tune)
    of_classes = comparison.plan.task == CLASSIFICATION
    power = [plan_power(comparison.labelled[source], jobs) for source, jobs in compared.items() if of_classes]
    return DryRun(planned, power)


def check_plan(comparison: Comparison) -> list[tuple[Extraction, Features, list[Fit]]]:
    """Return the extractions with their layers and fits; raise `PlanError` if anything in the plan does not exist."""
    check_heads(comparison.plan)
    check_finetunes(comparison.plan)
    checked = []
    for extraction, known in comparison.features.items():
        found = known or sketch_features(comparison.plan, extraction)
        comparison.features[extraction] = found
        checked.append((extraction, found, list(fits(comparison.plan, extraction, found.aliases))))
    return checked


def _prepare(path: str | Path, output: str | Path, progress: Progress | None) -> Comparison:
    """Read the plan and look up what is done, without importing anything heavy."""
    plan = read_plan(path)
    asked = extractions(plan)
    folder = RunFolder(output)
    before = folder.read_info()
    if before.plan_file and before.plan != plan.meaning and before.plan_file != str(plan.path):
        raise RunFolderError(
            f"{folder.path} holds the run of another plan, {before.plan_file}; choose another folder for {plan.path}"
        )
    images, labels = open_sources(plan), open_labels(plan)
    labelled = label_sources(plan, images, labels)
    comparison = Comparison(plan, folder, images, labels, labelled, dict.fromkeys(asked), progress or silent)
    comparison.features.update({extraction: comparison.look_up(extraction) for extraction in asked})
    return comparison


@contextmanager
def _noted(comparison: Comparison, started: float) -> Iterator[None]:
    """Keep the plan and how it is run; afterwards what that cost and what went wrong, even if it was interrupted."""
    plan, folder = comparison.plan, comparison.folder
    info, invocation = folder.read_info(), Invocation(**machine())
    folder.write("plan.toml", plan.text)
    info = replace(info, plan_file=str(plan.path), plan=plan.meaning, runs=[*info.runs, invocation])
    folder.write_info(info)
    try:
        yield
    finally:
        seconds, failures = time.perf_counter() - started, comparison.failures
        ended = replace(invocation, seconds=seconds, computed=comparison.computed, failed=len(failures))
        info = folder.read_info()  # in which the run noted what extractions cost
        notes = list(dict.fromkeys([*info.notes, *comparison.notes]))
        folder.write_info(replace(info, runs=[*info.runs[:-1], ended], notes=notes, failures=failures))
        folder.write_csv()


def _answers(comparison: Comparison) -> list[Answer]:
    """Say what the results show, for each source."""
    folder = comparison.folder
    extraction = extraction_seconds(folder.read_info())
    return [answer(board, folder.predictions, extraction) for board in leaderboards(folder.results.values())]


def _write_report(comparison: Comparison, answers: Sequence[Answer]) -> None:
    """Write the report, unless there are no results."""
    from pipeline.reporting.page.report import Seen, render

    if not comparison.folder.results:
        return
    seen = {comparison.names[source]: Seen(images, {}) for source, images in comparison.labelled.items()}
    for extraction, found in comparison.features.items():
        if found is not None and found.files:
            fitted = dict.fromkeys(comparison.fits(extraction, found).values(), found)
            seen[comparison.names[extraction.source]].features.update(fitted)
    for result in comparison.folder.results.values():
        if result.source not in seen:
            raise RunFolderError(
                f"{comparison.folder.path / 'results.jsonl'} has a result of the source {result.source!r:.80}, "
                "which the plan does not have; remove its line"
            )
    comparison.folder.write("report.html", render(comparison.folder, comparison.plan.text, seen, answers))


def _summarise(
    comparison: Comparison, answers: Sequence[Answer], other: RunFolder | None, started: float
) -> CompareReport:
    folder = comparison.folder
    results = list(folder.results.values())
    names = {"results": "results.jsonl", "table": "results.csv", "report": "report.html"}
    return CompareReport(
        results=results,
        failures=comparison.failures,
        answer=[sentence for one in answers for sentence in (f"{one.headline}.", *one.sentences)],
        best_sets=[found for one in answers for found in one.best_sets.values()],
        against=None if other is None else compare_runs(other, folder),
        computed=comparison.computed,
        reused=len(results) - comparison.computed,
        seconds=time.perf_counter() - started,
        files={name: str(folder.path / file) for name, file in names.items()},
    )
