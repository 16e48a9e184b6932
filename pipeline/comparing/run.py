"""Run the jobs that are missing, keep each result as soon as it is there, and go on after a failure."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from pipeline.comparing.features import Features, find_features, finetune_key, fit_key
from pipeline.comparing.folder import Judged, Record, RunFolder
from pipeline.comparing.jobs import Extraction, Finetune, Fit, Job, finetunes, fits, rectangles
from pipeline.comparing.plan import Line, Plan
from pipeline.errors import RunFolderError
from pipeline.images.source import ImageSource
from pipeline.results import ExtractResult, to_json

if TYPE_CHECKING:
    from pipeline.fit import TestPredictions

Progress = Callable[[int, int, str], None]


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
    extracted: list[ExtractResult] = field(default_factory=list)
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

    def keys(self) -> dict[str, Job] | None:
        """Return every job by its key; None while some image is not extracted."""
        keys: dict[str, Job] = {}
        for extraction, found in self.features.items():
            if found is None or not found.complete:
                return None
            keys |= {fit_key(job, found): job for job in fits(self.plan, extraction, found.aliases)}
        return keys | {finetune_key(job, self.images[job.source]): job for _, job in finetunes(self.plan)}

    def is_done(self) -> bool:
        """Tell whether nothing is missing."""
        keys = self.keys()
        return keys is not None and set(keys) == set(self.folder.records) and all(map(self.folder.has, keys))


def run(work: Work) -> None:
    """Extract, fit and fine-tune what is missing; failures are kept in `work`, everything else in the folder."""
    failed = _extract_all(work)
    work.look_up()
    pending: dict[Extraction, dict[Fit, str]] = {}
    keys: set[str] = set()
    for extraction, found in work.features.items():
        if extraction in failed or found is None:
            asked = fits(work.plan, extraction, found.aliases if found else {})
            work.failures += [Failure(str(job), failed.get(extraction, "not extracted")) for job in asked]
            continue
        named = {job: fit_key(job, found) for job in fits(work.plan, extraction, found.aliases)}
        keys |= set(named.values())
        pending[extraction] = {job: key for job, key in named.items() if not work.folder.has(key)}
    tunes = {job: (finetune_key(job, work.images[job.source]), line) for line, job in finetunes(work.plan)}
    keys |= {key for key, _ in tunes.values()}
    if not failed:
        work.folder.keep_only(keys)
    missing = [(key, line, job) for job, (key, line) in tunes.items() if not work.folder.has(key)]
    total = sum(map(len, pending.values())) + len(missing)
    for extraction, jobs in pending.items():
        _fit_all(work, extraction, jobs, total)
    for key, line, job in missing:
        _attempt(work, [job], total, lambda jobs, key=key, line=line: _finetune(work, key, line, jobs[0]))


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
    work.extracted += extract(first.source, backbones, asked.layers, asked.pool, progress=tell, **settings, **how)


def _fit_all(work: Work, extraction: Extraction, jobs: Mapping[Fit, str], total: int) -> None:
    """Fit layer by layer: what is lost to a kill is one layer's fits at most."""
    found = work.features[extraction]
    for layer in dict.fromkeys(job.layer for job in jobs):
        for block in rectangles([job for job in jobs if job.layer == layer]):
            _attempt(work, block, total, lambda block: _fit(work, found, block, jobs))


def _attempt(work: Work, jobs: Sequence[Job], total: int, call: Callable[[Sequence[Any]], None]) -> None:
    """Run jobs in one call, or, if that fails, each in its own, so that only those to blame fail."""
    try:
        call(jobs)
    except RunFolderError:
        raise
    except Exception as error:
        if len(jobs) > 1:
            for job in jobs:
                _attempt(work, [job], total, call)
            return
        work.failures.append(Failure(str(jobs[0]), reason_of(error)))
    work.progress(work.computed + len(work.failures), total, "all jobs")


def _fit(work: Work, found: Features | None, block: Sequence[Fit], keys: Mapping[Fit, str]) -> None:
    from pipeline.fit import fit

    assert found is not None  # noqa: S101 - told apart by the caller
    axes = [list(dict.fromkeys(values)) for values in zip(*(job[1:] for job in block), strict=True)]
    jobs = work.plan.of("fit")[0].values.get("jobs", (None,))[0]
    tell = _prefixed(work.progress, f"{block[0].extraction.request.backbone} ")
    report = fit(found.catalog(), *axes, jobs=jobs, progress=tell)
    source = work.images[block[0].extraction.source]
    for job, result, predictions in zip(block, report.results, report.predictions, strict=True):
        spec = found.files[job.layer.split("+")[0]].layers[job.layer.split("+")[0]].spec
        about = {"precision": spec["precision"], "store": spec["store"], "size": spec["preprocessing"]["size"]}
        about["n_classes"] = len(report.classes)
        _keep(work, {"key": keys[job], "source": source.name, **to_json(result), **about}, predictions)
    work.notes += [note for note in report.notes if note not in work.notes]


def _finetune(work: Work, key: str, line: Line, job: Finetune) -> None:
    from pipeline.comparing.options import FINETUNE
    from pipeline.finetune import finetune

    options = {FINETUNE[name].parameter: value for name, value in job.options}
    how = line.how() | {"output": work.cache(line)}
    tell = _prefixed(work.progress, f"finetune {options['backbone']} ")
    report = finetune(job.source, seeds=[job.seed], shots=[job.shots], progress=tell, **options, **how)
    record = {"key": key, "source": work.images[job.source].name, **to_json(report.results[0])}
    record["n_classes"] = len(report.classes)
    record["options"] = {name: value for name, value in job.options if name not in ("backbone", "freeze")}
    _keep(work, record, report.predictions[0])
    work.notes += [note for note in report.notes if note not in work.notes]


def _keep(work: Work, record: Record, said: TestPredictions) -> None:
    probability = None if said.probability is None else said.probability.astype(np.float32)
    work.folder.append(record, Judged(said.uris, said.y_true, said.y_pred, probability))
    work.computed += 1


def _prefixed(progress: Progress, prefix: str) -> Progress:
    return lambda done, total, text: progress(done, total, f"{prefix}{text}")


def reason_of(error: Exception) -> str:
    """Return one line: our own errors speak for themselves, others are called by their type."""
    from features_cache import ThawlineError

    text = " ".join(str(error).split())
    return text if isinstance(error, ThawlineError) else f"{type(error).__name__}: {text}"
