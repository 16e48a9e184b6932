"""Run the jobs that are missing, keep each result as soon as it is there, and go on after a failure."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from pipeline.comparing.features import Features, depths, find_features, finetune_key, fit_key, held_features
from pipeline.comparing.folder import Judged, Record, RunFolder
from pipeline.comparing.jobs import Extraction, Finetune, Fit, finetunes, fits, rectangles
from pipeline.comparing.plan import Line, Plan
from pipeline.errors import RunFolderError
from pipeline.images.source import ImageSource
from pipeline.results import ExtractResult, FitResult, Progress, to_json

if TYPE_CHECKING:
    from pipeline.heads.predictions import TestPredictions


@dataclass(frozen=True)
class Failure:
    """A job that could not be done, and why in one line."""

    job: str
    reason: str


@dataclass
class Work:
    """What a plan asks for and how far it is.

    Parameters
    ----------
    plan : Plan
    folder : RunFolder
    images : dict of str to ImageSource
        By source, as named in the plan.
    features : dict of Extraction to Features
        What is known of each extraction; None before it was sketched or done.
    """

    plan: Plan
    folder: RunFolder
    images: Mapping[str, ImageSource]
    features: dict[Extraction, Features | None]
    progress: Progress
    failures: list[Failure] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    computed: int = 0

    def look_up(self) -> None:
        """Read from the caches what is extracted by now."""
        for extraction in self.features:
            found = find_features(extraction, self.images[extraction.source], self.cache(extraction.line))
            self.features[extraction] = found or self.features[extraction]

    def cache(self, line: Line) -> Path:
        """Return the cache folder of a line of the plan."""
        return Path(line.values.get("output", (self.folder.cache,))[0])

    def fits(self, extraction: Extraction, found: Features) -> dict[Fit, str]:
        """Return the fits on what is extracted, each with its key."""
        source = self.images[extraction.source].name
        return {job: fit_key(job, found, source) for job in fits(self.plan, extraction, found.aliases)}

    def is_done(self) -> bool:
        """Tell whether nothing is missing."""
        keys = {finetune_key(job, self.images[job.source]) for _, job in finetunes(self.plan)}
        for extraction, found in self.features.items():
            if found is None or not found.complete:
                return False
            keys |= set(self.fits(extraction, found).values())
        return keys == set(self.folder.records) and all(map(self.folder.has, keys))


def run(work: Work) -> None:
    """Extract, fit and fine-tune what is missing; failures are kept in `work`, everything else in the folder."""
    failed = _extract_all(work)
    pending: dict[Extraction, dict[Fit, str]] = {}
    keys: set[str] = set()
    for extraction, found in work.features.items():
        if extraction in failed or found is None:
            asked = fits(work.plan, extraction, found.aliases if found else {})
            work.failures += [Failure(str(job), failed.get(extraction, "not extracted")) for job in asked]
            continue
        named = work.fits(extraction, found)  # two requests may come to the same features: each key is done once
        pending[extraction] = {job: key for job, key in named.items() if key not in keys and not work.folder.has(key)}
        keys |= set(named.values())
    tunes = {job: (finetune_key(job, work.images[job.source]), line) for line, job in finetunes(work.plan)}
    keys |= {key for key, _ in tunes.values()}
    # where an extraction failed, what is known of its source may yet be the plan's
    unsure = {work.images[extraction.source].name for extraction in failed}
    work.folder.keep_only(keys | {key for key, record in work.folder.records.items() if record["source"] in unsure})
    missing = [(key, line, job) for job, (key, line) in tunes.items() if not work.folder.has(key)]
    total = sum(map(len, pending.values())) + len(missing)
    for extraction, jobs in pending.items():
        found = work.features[extraction]
        if found is not None:
            _fit_all(work, found, jobs, total)
    for key, line, job in missing:
        _attempt(work, {job: key}, total, partial(_finetune_one, work, line, total))


def _extract_all(work: Work) -> dict[Extraction, str]:
    """Extract in as few calls as possible, so that backbones share what is read; return why some failed."""
    groups: dict[str, list[Extraction]] = {}
    for extraction in work.features:
        asked = extraction.request.to_json()
        del asked["backbone"], asked["weights_file"]
        groups.setdefault(f"{extraction.source} {asked} {extraction.line.how()}", []).append(extraction)
    failed: dict[Extraction, str] = {}
    for group in groups.values():
        try:
            _extract(work, group)
        except RunFolderError:
            raise
        except Exception:  # one of several may be to blame: alone, each succeeds or gives its own reason
            for extraction in group:
                try:
                    _extract(work, [extraction])
                except Exception as error:
                    failed[extraction] = reason_of(error)
    return failed


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
    work.notes += [note for result in results for note in result.notes if note not in work.notes]


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


def _fit_all(work: Work, found: Features, jobs: Mapping[Fit, str], total: int) -> None:
    for block in rectangles(list(jobs)):
        _attempt(work, {job: jobs[job] for job in block}, total, partial(_fit, work, found, total))


def _attempt(work: Work, jobs: Mapping[Any, str], total: int, call: Callable[[Mapping[Any, str]], None]) -> None:
    """Run jobs in one call, or, if that fails, those that are left each in its own: only what is to blame fails."""
    try:
        call(jobs)
    except RunFolderError:
        raise
    except Exception as error:
        left = {job: key for job, key in jobs.items() if not work.folder.has(key)}
        if len(jobs) > 1:
            for job, key in left.items():
                _attempt(work, {job: key}, total, call)
            return
        work.failures += [Failure(str(job), reason_of(error)) for job in left]
        _tell(work, total)


def _fit(work: Work, found: Features, total: int, block: Mapping[Fit, str]) -> None:
    from pipeline.fit import fit

    keys = {(job.layer, job.head.removesuffix("/standard"), job.seed, job.shots): key for job, key in block.items()}
    first = next(iter(block)).extraction
    source = work.images[first.source]
    places = depths(first.request, tuple(found.dims))

    def keep(result: FitResult, predictions: TestPredictions) -> None:
        key = keys[result.layer, result.head, result.seed, result.shots]
        part = result.layer.split("+")[0]
        spec = found.files[part].layers[part].spec
        about: Record = {"precision": spec["precision"], "store": spec["store"], "size": spec["preprocessing"]["size"]}
        depth = places.get(result.layer)  # results come as they end, charts go from the image upwards
        about |= {"drop_leaks": options.get("drop_leaks", False), "depth": depth}
        record = {"key": key, **_common(source), **to_json(result), **about}
        _keep(work, record, predictions, total)

    axes: list[Any] = [list(dict.fromkeys(values)) for values in zip(*(job[1:5] for job in block), strict=True)]
    layers, heads, seeds, shots = axes
    options = dict(next(iter(block)).options)
    given = [line.how()["jobs"] for line in work.plan.of("fit") if "jobs" in line.values]
    jobs = min(given, default=None)  # one call may serve several lines: the most careful of them counts
    tell = _prefixed(work.progress, f"{first.request.backbone} ")
    report = fit(found.catalog(), layers, heads, seeds, shots, jobs=jobs, progress=tell, on_result=keep, **options)
    work.notes += [note for note in report.notes if note not in work.notes]


def _finetune_one(work: Work, line: Line, total: int, block: Mapping[Finetune, str]) -> None:
    from pipeline.comparing.options import tune_parameters
    from pipeline.finetune import finetune

    ((job, key),) = block.items()
    options = tune_parameters(job.options)
    how = line.how() | {"output": work.cache(line)}
    tell = _prefixed(work.progress, f"finetune {options['backbone']} ")
    report = finetune(job.source, seeds=[job.seed], shots=[job.shots], progress=tell, **options, **how)
    for results in report.extracted:
        _note(work.folder, work.images[job.source].name, options.get("size"), results)
    record = {"key": key, **_common(work.images[job.source]), **to_json(report.results[0])}
    record["options"] = {name: value for name, value in job.options if name not in ("backbone", "freeze")}
    _keep(work, record, report.predictions[0], total)
    work.notes += [note for note in report.notes if note not in work.notes]


def _common(source: ImageSource) -> Record:
    return {"source": source.name, "n_classes": len(source.classes)}


def _keep(work: Work, record: Record, said: TestPredictions, total: int) -> None:
    probability = None if said.probability is None else said.probability.astype(np.float32)
    work.folder.append(record, Judged(said.uris, said.y_true, said.y_pred, probability))
    work.computed += 1
    _tell(work, total)


def _tell(work: Work, total: int) -> None:
    work.progress(work.computed + len(work.failures), total, "all jobs")


def _prefixed(progress: Progress, prefix: str) -> Progress:
    return lambda done, total, text, bound="": progress(done, total, f"{prefix}{text}", bound)


def reason_of(error: Exception) -> str:
    """Return one line: our own errors speak for themselves, others are called by their type."""
    from features_cache import ThawlineError

    text = " ".join(str(error).split())
    return text if isinstance(error, ThawlineError) else f"{type(error).__name__}: {text}"
