"""Checks that everything a plan names exists on this machine, before anything is computed."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import fields, replace
from typing import Any

import numpy as np

from features_cache import TEXT, ThawlineError
from pipeline.comparing.features import Features
from pipeline.comparing.jobs import Extraction, finetunes
from pipeline.comparing.plan import Plan, PlanTable
from pipeline.evaluation.labels import LabelsTable, find_labels, labels_of
from pipeline.evaluation.metrics import check_metric
from pipeline.evaluation.targets import check_task
from pipeline.images.sources.registry import ImageSource, Items, open_source
from pipeline.options import CLASSIFICATION, NEAR, tune_parameters
from pipeline.spec import NO_POOL


def open_labels(plan: Plan) -> LabelsTable | None:
    """Return the table of labels that the plan names; None if labels are those of the sources."""
    first = next(iter(plan.labels), "")
    with errors_at(plan, None, first):
        return find_labels(plan.labels.get("labels"), plan.labels.get("target"), plan.labels.get("key"), plan.task)


def open_sources(plan: Plan) -> dict[str, ImageSource]:
    """Return the plan's sources by location."""
    written = plan.meaning["source"]
    opened = {}
    for text, source in zip(written if isinstance(written, list) else [written], plan.sources, strict=True):
        with errors_at(plan, None, text):
            opened[source] = open_source(source)
    return opened


def label_sources(plan: Plan, sources: Mapping[str, ImageSource], labels: LabelsTable | None) -> dict[str, ImageSource]:
    """Return the sources with the labels, splits and groups of their images, which a table may give.

    If several labels or numbers are predicted, the classes are the labels' names or nothing, and an image has label 0
    where its answer is known.

    Raises `PlanError` if the answers do not fit the task, or are of fewer than two classes.
    """
    labelled = {}
    for source, images in sources.items():
        with errors_at(plan, None, "task" if labels is None else "labels"):
            labelled[source] = _label(images, labels, plan.task)
        n_classes = len(labelled[source].classes)
        if plan.task != CLASSIFICATION:
            continue
        if n_classes < 2:
            message = f"{source}: a comparison needs images of at least two classes, found {n_classes}"
            raise plan.error(message, text="source" if labels is None else "labels")
        with errors_at(plan, None, "metric"):
            check_metric(plan.metric, n_classes)
    return labelled


def _label(images: ImageSource, labels: LabelsTable | None, task: str) -> ImageSource:
    if labels is None and task == CLASSIFICATION:
        return images
    rows = images.items.rows
    uris, splits, groups = (np.array(np.asarray(some).tolist()) for some in (rows.uris, rows.splits, rows.groups))
    known = labels_of(labels, uris, images.classes, np.asarray(rows.labels), splits, groups, task)
    told: dict[str, Any] = {"splits": known.splits.astype(TEXT), "groups": known.groups.astype(TEXT)}
    told["labels"] = known.labels if task == CLASSIFICATION else np.minimum(known.labels, 0)
    return replace(images, classes=known.classes, items=Items(replace(rows, **told)))


def check_heads(plan: Plan) -> None:
    """Raise `PlanError` unless every head exists, and the device that it is trained on."""
    from pipeline.engines.select import find_device
    from pipeline.heads.registry import find_head

    for line in plan.of("fit"):
        if line.how().get("drop_leaks") == NEAR and any(plan.of("finetune")):
            message = "drop-leaks near draws other splits than fine-tuning does; put the [[finetune]] in another plan"
            raise plan.error(message, line.table, line.place, NEAR)
        of_classes = {"shots": line.values["shots"] != ("all",), "balanced": line.how().get("balanced")}
        _check_options(plan, line, of_classes)
        with errors_at(plan, line, "device"):
            find_device(line.how()["device"])
        for name in line.values["head"]:
            with errors_at(plan, line, name):
                find_head(name, plan.task)


def _check_options(plan: Plan, line: PlanTable, of_classes: Mapping[str, Any]) -> None:
    """Raise `PlanError` for an option that is given although it is only for classes."""
    for name, given in of_classes.items():
        key = name.replace("_", "-")
        own = key in plan.meaning[line.table][line.place]
        with errors_at(plan, line if own else None, key):
            check_task(plan.task, None, **{key: given})


def sketch_features(plan: Plan, extraction: Extraction) -> Features:
    """Return an extraction's layers and their sizes without loading weights or images; raises `PlanError`."""
    from pipeline.backbones.layers import resolve_layers
    from pipeline.backbones.registry import check_weights, sketch
    from pipeline.backbones.taps import tap
    from pipeline.engines.select import resolve

    request, line = extraction.request, extraction.line
    if request.pool == NO_POOL:
        message = f"pool {NO_POOL} keeps whole activations, which heads do not read; use another"
        raise plan.error(message, line.table, line.place, NO_POOL)
    with errors_at(plan, line, request.backbone):
        check_weights(request.backbone)
        backbone = sketch(request.backbone, request.size)
    aliases = {}
    for layer in request.layers:
        with errors_at(plan, line, layer):
            aliases[layer] = resolve_layers(backbone, [layer])
    with errors_at(plan, line):
        how = line.how()
        resolve(how["engine"], how["device"], request.precision)
        names = [name for group in aliases.values() for name in group]
        return Features(aliases, tap(backbone, names, request.pool).dims[request.pool], {}, complete=False)


def check_finetunes(plan: Plan) -> None:
    """Raise `PlanError` unless every fine-tune's network and thaw line exist, and its options work together."""
    from pipeline.backbones.registry import check_weights, sketch
    from pipeline.backbones.thaw_line import find_line
    from pipeline.engines.select import resolve
    from pipeline.finetuning.groups import check_rates
    from pipeline.finetuning.recipe import Recipe, check_start, make_recipe

    for line, chosen in dict.fromkeys((line, job.options) for line, job in finetunes(plan)):
        options = dict(chosen)
        how, backbone, freeze = line.how(), options["backbone"], options["freeze"]
        training = tune_parameters(options.items())
        of_classes = {name: training[name] for name in ("class_weights", "label_smoothing")}
        _check_options(plan, line, {"shots": line.values["shots"] != ("all",), **of_classes})
        with errors_at(plan, line):
            recipe = make_recipe(
                {field.name: training[field.name] for field in fields(Recipe) if field.name in training}
            )
        with errors_at(plan, line, "views" if recipe.views else ""):
            check_start(
                recipe, backbone, freeze, **{name: training[name] for name in ("init", "head_first", "precision")}
            )
        with errors_at(plan, line, backbone):
            check_weights(f"{backbone}@random:0" if options["init"] == "random" else backbone)
            network = sketch(backbone, options.get("size"))
        with errors_at(plan, line, freeze):
            if freeze not in ("all", "none"):
                find_line(network, freeze)
        with errors_at(plan, line, "device"):
            resolve(how["engine"], how["device"], options["precision"])
        if recipe.lr_at:
            with errors_at(plan, line, "lr-at"):
                check_rates(network, freeze, recipe.lr_at)


@contextmanager
def errors_at(plan: Plan, line: PlanTable | None, text: str = "") -> Iterator[None]:
    """Turn an error of ours in the block into a `PlanError` that names the line of `text` in a table.

    The table is None for the part above all tables; without a text, the error names the line of the table's header.
    """
    try:
        yield
    except ThawlineError as error:
        table, place = (line.table, line.place) if line else ("", 0)
        raise plan.error(str(error), table, place, text) from error
