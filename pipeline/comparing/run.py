"""Run the missing jobs: keep each result as soon as it is there, and go on after a failure."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from features_cache import ThawlineError, open_cache
from pipeline.comparing.comparison import Comparison
from pipeline.comparing.features import Features, depths
from pipeline.comparing.folder import HEAD, ExtractionCost, Failure, JobResult, RunFolder
from pipeline.comparing.jobs import Extraction, Finetune, Fit, fits, one_pass, rectangles
from pipeline.comparing.plan import PlanTable
from pipeline.errors import RunFolderError
from pipeline.options import head_name
from pipeline.results import ExtractResult, HeadResult, Progress
from pipeline.spec import Size

if TYPE_CHECKING:
    from pipeline.evaluation.predictions import Predictions


def run(comparison: Comparison) -> None:
    """Extract, fit and fine-tune what is missing.

    Results go to the run folder; what fails is appended to `comparison.failures`.
    """
    failed = _extract_all(comparison)
    folder = comparison.folder
    extracted: dict[Extraction, Features] = {}
    pending: list[tuple[Features, dict[Fit, str]]] = []
    lost: list[Fit] = []
    keys: set[str] = set()
    for extraction, found in comparison.features.items():
        if extraction in failed or found is None:
            asked = list(fits(comparison.plan, extraction, found.aliases if found else {}))
            comparison.failures += [Failure(str(job), failed.get(extraction, "not extracted")) for job in asked]
            lost += asked
            continue
        named = comparison.fits(extraction, found)  # two requests may lead to the same features: run each key once
        left = {job: key for job, key in named.items() if key not in keys and not folder.has(key)}
        extracted[extraction] = found
        pending.append((found, left))
        keys |= set(named.values())
    tunes = comparison.finetunes()
    for job, (_, key) in tunes.items():
        if folder.has(key) and not comparison.is_kept(job, key) and comparison.weights_of(job) is None:
            _load(job)  # to find out whether its weights are still the same
    missing = [(job, line, key) for job, (line, key) in tunes.items() if not comparison.is_kept(job, key)]
    keys |= {key for _, key in tunes.values()} - {key for *_, key in missing}  # a result of other weights is no result
    keys |= _may_still_hold(comparison, lost, extracted)
    folder.keep_only(key for key in keys if folder.has(key))
    comparison.total = len(comparison.failures) + sum(len(jobs) for _, jobs in pending) + len(missing)
    for found, jobs in pending:
        for block in rectangles(list(jobs)):
            _attempt(comparison, {job: jobs[job] for job in block}, partial(_fit, comparison, found))
    for job, line, key in missing:
        _attempt(comparison, {job: key}, partial(_finetune, comparison, line))


def _may_still_hold(comparison: Comparison, lost: Sequence[Fit], extracted: Mapping[Extraction, Features]) -> set[str]:
    """Return the keys of results that may be those of the `lost` fits, whose features could not be extracted.

    The key of a head covers its features. Of heads on `extracted` features all keys are known, so no others hold.
    """
    plan, names = comparison.plan, comparison.names
    target = None if comparison.labels is None else comparison.labels.target
    n_classes = {names[source]: len(images.classes) for source, images in comparison.labelled.items()}
    asked = set()
    for fit in lost:
        source, pool, how = names[fit.extraction.source], fit.extraction.request.pool, dict(fit.options)
        options = how.get("balanced", False), how.get("cv"), how.get("drop_leaks", False)
        asked.add((source, pool, fit.layer, head_name(fit.head), fit.seed, fit.shots, *options))
    known = [
        (names[extraction.source], file.handles["backbone"], extraction.request.pool, _settings(file.layers[name].spec))
        for extraction, found in extracted.items()
        for name, file in found.files.items()
    ]
    held = set()
    for key, one in comparison.folder.results.items():
        result, settings = one.result, {name: getattr(one, name) for name in ("precision", "store", "size", "white")}
        options = getattr(result, "balanced", False), result.cv, one.drop_leaks
        if (
            result.kind == HEAD
            and (one.source, result.pool, result.layer, result.head, result.seed, result.shots, *options) in asked
            and (one.source, result.backbone, result.pool, settings) not in known
            and (one.task, result.metric, result.target) == (plan.task, plan.metric, target)
            and one.n_classes in (0, n_classes.get(one.source))
        ):
            held.add(key)
    return held


def _settings(spec: Mapping[str, Any]) -> dict[str, Any]:
    """Return how a layer was extracted, as `JobResult` has it."""
    preprocessing = spec["preprocessing"]
    return {
        "precision": spec["precision"],
        "store": spec["store"],
        "size": tuple(preprocessing["size"]),
        "white": preprocessing.get("white"),
    }


def _extract_all(comparison: Comparison) -> dict[Extraction, str]:
    """Extract in as few calls as possible; return why some failed.

    Poolings share a pass of the network, and backbones with the same poolings share decoded images.
    """
    passes: dict[str, list[Extraction]] = {}
    for extraction in comparison.features:
        passes.setdefault(one_pass(extraction), []).append(extraction)
    groups: dict[str, list[Extraction]] = {}
    for alike in passes.values():
        first, pools = alike[0], [extraction.request.pool for extraction in alike]
        asked = first.request.to_json()
        del asked["backbone"], asked["weights_file"], asked["pool"]
        groups.setdefault(f"{first.source} {asked} {first.line.how()} {pools}", []).extend(alike)
    failed: dict[Extraction, str] = {}
    for group in groups.values():
        _try_to_extract(comparison, group, failed)
    return failed


def _try_to_extract(comparison: Comparison, group: Sequence[Extraction], failed: dict[Extraction, str]) -> None:
    try:
        _extract(comparison, group)
    except RunFolderError:
        raise
    except Exception as error:  # if there are several, try each alone: only those at fault fail, with their own reason
        if len(group) == 1:
            failed[group[0]] = _reason(error)
        else:
            for extraction in group:
                _try_to_extract(comparison, [extraction], failed)


def _extract(comparison: Comparison, group: Sequence[Extraction]) -> None:
    from pipeline.extract import extract

    first = group[0]
    images = comparison.images[first.source]
    asked, how = first.request, first.line.how() | {"output": comparison.cache(first.line)}
    requests = [extraction.request for extraction in group]
    backbones = [*dict.fromkeys(request.backbone for request in requests)]
    pools = [*dict.fromkeys(request.pool for request in requests)]
    settings: dict[str, Any] = {name: getattr(asked, name) for name in ("precision", "store", "size", "white")}
    progress = _prefixed(comparison.progress, "extract ")
    results = extract(images, backbones, asked.layers, pools, progress=progress, **settings, **how)
    _note_costs(comparison.folder, comparison.names[first.source], asked.size, results)
    for extraction in group:
        found, known = comparison.look_up(extraction), comparison.features[extraction]
        if found is None and len(group) > 1:
            _extract(comparison, [extraction])  # cached under another request: this call returns its files alone
            continue
        if found is None and known is not None:
            holders = {name: file for result in results for file in [open_cache(result.path)] for name in file.layers}
            found = replace(known, files={name: holders[name] for name in known.dims}, complete=True)
        comparison.features[extraction] = found
    comparison.notes += [note for result in results for note in result.notes]


def _note_costs(folder: RunFolder, source: str, size: Size | None, results: Sequence[ExtractResult]) -> None:
    """Note in `run.json` what an extraction cost, at once: a later run cannot measure it again.

    The seconds of a call are divided among its networks in proportion to their floating-point operations. Files of
    several poolings came from the same passes: each cost all of them.
    """
    from pipeline.comparing.estimate import operations

    info = folder.read_info()
    sharing = [result for result in results if result.computed]
    work = {
        result.path: result.computed * operations(result.backbone, size) if len(sharing) > 1 else 1.0
        for result in sharing
    }
    passes: dict[tuple[str, ...], float] = {}
    for result in sharing:
        view = str(open_cache(result.path).handles.get("view", ""))
        network = (result.backbone, view, *result.layers)
        passes[network] = max(work[result.path], passes.get(network, 0.0))
    shares = {path: share / sum(passes.values()) for path, share in work.items()}
    for result in results:
        name = Path(result.path).name
        before = info.extractions.get(name, ExtractionCost())
        info.extractions[name] = ExtractionCost(
            computed=before.computed + result.computed,
            seconds=before.seconds + result.seconds * shares.get(result.path, 0.0),
            source=source,
            backbone=result.backbone,
            rows=result.rows,
            unreadable=result.unreadable,
        )
    folder.write_info(info)


def _attempt(comparison: Comparison, jobs: Mapping[Any, str], call: Callable[[Mapping[Any, str]], None]) -> None:
    """Run jobs in one call; if that fails, run each that is left in a call of its own, so that few fail."""
    try:
        call(jobs)
    except RunFolderError:
        raise
    except Exception as error:
        left = {job: key for job, key in jobs.items() if not comparison.folder.has(key)}
        if len(jobs) > 1:
            for job, key in left.items():
                _attempt(comparison, {job: key}, call)
            return
        comparison.failures += [Failure(str(job), _reason(error)) for job in left]
        comparison.report_progress()


def _fit(comparison: Comparison, found: Features, block: Mapping[Fit, str]) -> None:
    from pipeline.fit import fit
    from pipeline.heads.registry import find_head

    task = comparison.plan.task
    keys = {(job.layer, find_head(job.head, task).name, job.seed, job.shots): key for job, key in block.items()}
    one = next(iter(block))
    request, options = one.extraction.request, dict(one.options)
    depth_of = depths(request, tuple(found.dims))

    def keep(result: HeadResult, predictions: Predictions) -> None:
        part = result.layer.split("+")[0]
        spec = found.files[part].layers[part].spec
        job = JobResult(
            key=keys[result.layer, result.head, result.seed, result.shots],
            source=comparison.names[one.extraction.source],
            result=result,
            n_classes=len(comparison.labelled[one.extraction.source].classes),
            task=task,
            drop_leaks=options.get("drop_leaks", False),
            depth=depth_of.get(result.layer),
            **_settings(spec),
        )
        comparison.keep(job, predictions)

    axes: list[Any] = [list(dict.fromkeys(values)) for values in zip(*(job[1:5] for job in block), strict=True)]
    layers, heads, seeds, shots = axes
    given = [line.how()["jobs"] for line in comparison.plan.of("fit") if "jobs" in line.values]
    jobs = min(given, default=None)  # one call may serve several [[fit]]: the smallest number holds for all
    progress = _prefixed(comparison.progress, f"{request.backbone} ")
    options |= {"labels": comparison.labels, "task": task, "metric": comparison.plan.metric, "jobs": jobs}
    report = fit(found.catalog(), layers, heads, seeds, shots, progress=progress, on_result=keep, **options)
    comparison.notes += report.notes


def _finetune(comparison: Comparison, line: PlanTable, block: Mapping[Finetune, str]) -> None:
    from pipeline.finetune import finetune
    from pipeline.options import tune_parameters

    ((job, key),) = block.items()
    options = tune_parameters(job.options)
    how = line.how() | {"output": comparison.cache(line)}
    progress = _prefixed(comparison.progress, f"finetune {options['backbone']} ")
    how |= {"labels": comparison.labels, "task": comparison.plan.task, "metric": comparison.plan.metric}
    draw: dict[str, Any] = {"seeds": [job.seed], "shots": [job.shots]}
    report = finetune(comparison.images[job.source], **draw, **options, **how, progress=progress)
    for results in report.extracted:
        _note_costs(comparison.folder, comparison.names[job.source], options.get("size"), results)
    own = {name: value for name, value in job.options if name not in ("backbone", "freeze")}
    name, weights = comparison.names[job.source], comparison.weights_of(job)
    told: dict[str, Any] = {"task": comparison.plan.task, "options": own, "weights": weights}
    result = JobResult(key, name, report.results[0], len(report.classes), **told)
    comparison.keep(result, report.predictions[0])
    comparison.notes += report.notes


def _load(job: Finetune) -> None:
    from pipeline.backbones.registry import load_backbone

    options = dict(job.options)
    with suppress(ThawlineError):  # training will say why
        load_backbone(str(options["backbone"]), options.get("size"))


def _prefixed(progress: Progress, prefix: str) -> Progress:
    return lambda done, total, text, bound="": progress(done, total, f"{prefix}{text}", bound)


def _reason(error: Exception) -> str:
    """Return an error in one line; those of other libraries with their type."""
    text = " ".join(str(error).split())
    return text if isinstance(error, ThawlineError) else f"{type(error).__name__}: {text}"
