"""Run the jobs that are missing, keep each result as soon as it is there, and go on after a failure."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from features_cache import ThawlineError
from pipeline.comparing.features import Features, depths, find_features, held_features
from pipeline.comparing.folder import Record, RunFolder
from pipeline.comparing.jobs import Extraction, Finetune, Fit, fits, rectangles
from pipeline.comparing.plan import Line
from pipeline.comparing.work import Failure, Work
from pipeline.errors import RunFolderError
from pipeline.images.sources.registry import ImageSource
from pipeline.results import ExtractResult, FitResult, Progress, to_json

if TYPE_CHECKING:
    from pipeline.evaluation.predictions import Predictions


def run(work: Work) -> None:
    """Extract, fit and fine-tune what is missing; failures are kept in `work`, everything else in the folder."""
    failed = _extract_all(work)
    pending: list[tuple[Features, dict[Fit, str]]] = []
    keys: set[str] = set()
    for extraction, found in work.features.items():
        if extraction in failed or found is None:
            asked = fits(work.plan, extraction, found.aliases if found else {})
            work.failures += [Failure(str(job), failed.get(extraction, "not extracted")) for job in asked]
            continue
        named = work.fits(extraction, found)  # two requests may come to the same features: each key is done once
        left = {job: key for job, key in named.items() if key not in keys and not work.folder.has(key)}
        pending.append((found, left))
        keys |= set(named.values())
    tunes = work.finetunes()
    keys |= {key for _, key in tunes.values()}
    # where an extraction failed, what is known of its source may yet be the plan's
    unsure = {work.images[extraction.source].name for extraction in failed}
    work.folder.keep_only(keys | {key for key, record in work.folder.records.items() if record["source"] in unsure})
    missing = [(job, line, key) for job, (line, key) in tunes.items() if not work.folder.has(key)]
    work.total = len(work.failures) + sum(len(jobs) for _, jobs in pending) + len(missing)
    for found, jobs in pending:
        for block in rectangles(list(jobs)):
            _attempt(work, {job: jobs[job] for job in block}, partial(_fit, work, found))
    for job, line, key in missing:
        _attempt(work, {job: key}, partial(_finetune, work, line))


def _extract_all(work: Work) -> dict[Extraction, str]:
    """Extract in as few calls as possible, so that backbones share what is read; return why some failed."""
    groups: dict[str, list[Extraction]] = {}
    for extraction in work.features:
        asked = extraction.request.to_json()
        del asked["backbone"], asked["weights_file"]
        groups.setdefault(f"{extraction.source} {asked} {extraction.line.how()}", []).append(extraction)
    failed: dict[Extraction, str] = {}
    for group in groups.values():
        _try_to_extract(work, group, failed)
    return failed


def _try_to_extract(work: Work, group: Sequence[Extraction], failed: dict[Extraction, str]) -> None:
    try:
        _extract(work, group)
    except RunFolderError:
        raise
    except Exception as error:  # one of several may be to blame: alone, each succeeds or gives its own reason
        if len(group) == 1:
            failed[group[0]] = _reason(error)
        else:
            for extraction in group:
                _try_to_extract(work, [extraction], failed)


def _extract(work: Work, group: Sequence[Extraction]) -> None:
    from pipeline.extract import extract

    first = group[0]
    asked, how = first.request, first.line.how() | {"output": work.cache(first.line)}
    backbones = [extraction.request.backbone for extraction in group]
    settings: dict[str, Any] = {"precision": asked.precision, "store": asked.store, "size": asked.size}
    tell = _prefixed(work.progress, "extract ")
    results = extract(first.source, backbones, asked.layers, asked.pool, progress=tell, **settings, **how)
    _note(work.folder, work.images[first.source].name, asked.size, results)
    for extraction in group:
        found = find_features(extraction, work.images[extraction.source], work.cache(extraction.line))
        known = work.features[extraction]
        if found is None and len(group) > 1:
            _extract(work, [extraction])  # its features were there under another request: which files they are in
        else:
            work.features[extraction] = found or (known and held_features(known, [result.path for result in results]))
    work.notes += [note for result in results for note in result.notes]


def _note(folder: RunFolder, source: str, size: int | None, results: Sequence[ExtractResult]) -> None:
    """Keep what an extraction cost, at once: a later run cannot measure it again.

    Backbones that shared a call share its seconds by their operations.
    """
    from pipeline.comparing.estimate import operations

    document = folder.read_json("run.json")
    sharing = [result for result in results if result.computed]
    work = [result.computed * operations(result.backbone, size) if len(sharing) > 1 else 1.0 for result in sharing]
    for result in results:
        entry = document["extractions"].setdefault(Path(result.path).name, {"computed": 0, "seconds": 0.0})
        entry |= {"source": source, "backbone": result.backbone, "rows": result.rows, "unreadable": result.unreadable}
    for result, share in zip(sharing, work, strict=True):
        entry = document["extractions"][Path(result.path).name]
        entry["computed"] += result.computed
        entry["seconds"] += result.seconds * share / sum(work)
    folder.write_json("run.json", document)


def _attempt(work: Work, jobs: Mapping[Any, str], call: Callable[[Mapping[Any, str]], None]) -> None:
    """Run jobs in one call, or, if that fails, those that are left each in its own: only what is to blame fails."""
    try:
        call(jobs)
    except RunFolderError:
        raise
    except Exception as error:
        left = {job: key for job, key in jobs.items() if not work.folder.has(key)}
        if len(jobs) > 1:
            for job, key in left.items():
                _attempt(work, {job: key}, call)
            return
        work.failures += [Failure(str(job), _reason(error)) for job in left]
        work.tell()


def _fit(work: Work, found: Features, block: Mapping[Fit, str]) -> None:
    from pipeline.fit import fit

    keys = {(job.layer, job.head.removesuffix("/standard"), job.seed, job.shots): key for job, key in block.items()}
    first = next(iter(block)).extraction
    source = work.images[first.source]
    places = depths(first.request, tuple(found.dims))

    def keep(result: FitResult, predictions: Predictions) -> None:
        key = keys[result.layer, result.head, result.seed, result.shots]
        part = result.layer.split("+")[0]
        spec = found.files[part].layers[part].spec
        about: Record = {"precision": spec["precision"], "store": spec["store"], "size": spec["preprocessing"]["size"]}
        depth = places.get(result.layer)  # results come as they end, charts go from the image upwards
        about |= {"drop_leaks": options.get("drop_leaks", False), "depth": depth}
        work.keep({"key": key, **_common(source), **to_json(result), **about}, predictions)

    axes: list[Any] = [list(dict.fromkeys(values)) for values in zip(*(job[1:5] for job in block), strict=True)]
    layers, heads, seeds, shots = axes
    options = dict(next(iter(block)).options)
    given = [line.how()["jobs"] for line in work.plan.of("fit") if "jobs" in line.values]
    jobs = min(given, default=None)  # one call may serve several lines: the most careful of them counts
    tell = _prefixed(work.progress, f"{first.request.backbone} ")
    report = fit(found.catalog(), layers, heads, seeds, shots, jobs=jobs, progress=tell, on_result=keep, **options)
    work.notes += report.notes


def _finetune(work: Work, line: Line, block: Mapping[Finetune, str]) -> None:
    from pipeline.finetune import finetune
    from pipeline.options import tune_parameters

    ((job, key),) = block.items()
    options = tune_parameters(job.options)
    how = line.how() | {"output": work.cache(line)}
    tell = _prefixed(work.progress, f"finetune {options['backbone']} ")
    report = finetune(job.source, seeds=[job.seed], shots=[job.shots], progress=tell, **options, **how)
    for results in report.extracted:
        _note(work.folder, work.images[job.source].name, options.get("size"), results)
    record = {"key": key, **_common(work.images[job.source]), **to_json(report.results[0])}
    record["options"] = {name: value for name, value in job.options if name not in ("backbone", "freeze")}
    work.keep(record, report.predictions[0])
    work.notes += report.notes


def _common(source: ImageSource) -> Record:
    return {"source": source.name, "n_classes": len(source.classes)}


def _prefixed(progress: Progress, prefix: str) -> Progress:
    return lambda done, total, text, bound="": progress(done, total, f"{prefix}{text}", bound)


def _reason(error: Exception) -> str:
    """Return one line: our own errors speak for themselves, others are called by their type."""
    text = " ".join(str(error).split())
    return text if isinstance(error, ThawlineError) else f"{type(error).__name__}: {text}"
