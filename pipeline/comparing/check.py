"""Does everything that a plan names exist here? Asked before anything is computed."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import fields, replace
from typing import Any

from features_cache import ThawlineError
from pipeline.comparing.features import Features
from pipeline.comparing.jobs import Extraction, finetunes
from pipeline.comparing.plan import Line, Plan
from pipeline.images.sources.registry import ImageSource, open_source
from pipeline.options import tune_parameters


def open_sources(plan: Plan) -> dict[str, ImageSource]:
    """Return the plan's sources as the plan names them; those that share a name are called by their whole path.

    Raises
    ------
    PlanError
        One is missing, empty, or has no labelled images of two classes.
    """
    opened = {}
    for asked, source in zip(_as_written(plan), plan.sources, strict=True):
        with pointed(plan, "", 0, asked):
            opened[source] = open_source(source)
        if len(opened[source].classes) < 2:
            message = f"{source}: a comparison needs images of two classes or more, found {len(opened[source].classes)}"
            raise plan.error(message, "", 0, asked)
    names = Counter(images.name for images in opened.values())
    return {
        source: images if names[images.name] == 1 else replace(images, name=images.location)
        for source, images in opened.items()
    }


def check_heads(plan: Plan) -> None:
    """Raise `PlanError` unless every head, and the device that it is trained on, exists."""
    from pipeline.engines.select import find_device
    from pipeline.heads.registry import find_head

    for line in plan.of("fit"):
        with pointed(plan, "fit", line.place, "device"):
            find_device(line.how()["device"])
        for name in line.values["head"]:
            with pointed(plan, "fit", line.place, name):
                find_head(name)


def sketch_features(plan: Plan, extraction: Extraction) -> Features:
    """Return an extraction's layers without weights or images.

    Raises
    ------
    PlanError
        The backbone, its weights, a layer, the engine, the device or the precision does not exist here.
    """
    from pipeline.backbones.layers import resolve_layers
    from pipeline.backbones.registry import check_weights, sketch
    from pipeline.backbones.taps import tap
    from pipeline.engines.select import resolve

    asked, line = extraction.request, extraction.line
    with pointed(plan, "extract", line.place, asked.backbone):
        check_weights(asked.backbone)
        backbone = sketch(asked.backbone, asked.size)
    aliases = {}
    for layer in asked.layers:
        with pointed(plan, "extract", line.place, layer):
            aliases[layer] = resolve_layers(backbone, [layer])
    with pointed(plan, "extract", line.place):
        how = line.how()
        resolve(how["engine"], how["device"], asked.precision)
        names = [name for group in aliases.values() for name in group]
        return Features(aliases, tap(backbone, names, asked.pool).dims, {}, complete=False)


def check_finetunes(plan: Plan) -> None:
    """Raise `PlanError` unless every network that is fine-tuned exists, can thaw at its line, and can train so."""
    for line, options in dict.fromkeys((line, job.options) for line, job in finetunes(plan)):
        _check_finetune(plan, line, dict(options))


def _check_finetune(plan: Plan, line: Line, options: dict[str, Any]) -> None:
    from pipeline.backbones.registry import check_weights, sketch
    from pipeline.backbones.thaw_line import find_line
    from pipeline.engines.select import resolve
    from pipeline.finetuning.groups import check_rates
    from pipeline.finetuning.recipe import Recipe, check_start, make_recipe

    place, how = line.place, line.how()
    backbone, freeze = options["backbone"], options["freeze"]
    training = tune_parameters(options.items())
    recipe = {field.name: training[field.name] for field in fields(Recipe) if field.name in training}
    with pointed(plan, "finetune", place, backbone):
        check_weights(backbone)
    with pointed(plan, "finetune", place, freeze if freeze not in ("all", "none") else backbone):
        if freeze not in ("all", "none"):
            find_line(sketch(backbone, options.get("size")), freeze)
    with pointed(plan, "finetune", place):
        checked = make_recipe(recipe)
    with pointed(plan, "finetune", place, "device"):
        resolve(how["engine"], how["device"], options["precision"])
    with pointed(plan, "finetune", place, "views" if checked.views else ""):
        check_start(checked, backbone, freeze, **{name: training[name] for name in ("init", "head_first", "precision")})
    if checked.lr_at:
        with pointed(plan, "finetune", place, "lr-at"):
            check_rates(sketch(backbone, options.get("size")), freeze, checked.lr_at)


@contextmanager
def pointed(plan: Plan, table: str, place: int, text: str = "") -> Iterator[None]:
    """Make any error of ours in the block point at its line of the plan."""
    try:
        yield
    except ThawlineError as error:
        raise plan.error(str(error), table, place, text) from error


def _as_written(plan: Plan) -> list[str]:
    source = plan.meaning["source"]
    return source if isinstance(source, list) else [source]
