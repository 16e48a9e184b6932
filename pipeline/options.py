"""What a plan may say: the long options of the commands that it stands for, what each takes, and its default."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

from features_cache import nearest
from pipeline.errors import FitError
from pipeline.finetuning.recipe import INITS, TRAIN_PRECISIONS, Recipe, parse_rate
from pipeline.spec import DEFAULT_BACKBONE, DEFAULT_LAYER, DEFAULT_POOL, POOLS, PRECISIONS, STORES

Check = Callable[[Any], str]
"""Returns what is wrong with a value, ``""`` if nothing is."""


class Option(NamedTuple):
    """One key of a plan's table.

    Parameters
    ----------
    parameter : str
        Name of the stage function's parameter.
    check : callable
        Says what is wrong with a value.
    default : object
        The command's own; ``None`` leaves the choice to the stage.
    crossed : bool
        Whether a list stands for as many jobs; other options say how to run and take one value.
    joined : bool
        Whether a list stands for one value instead: its texts, joined by commas.
    """

    parameter: str
    check: Check
    default: Any = None
    crossed: bool = True
    joined: bool = False


def _text(value: Any) -> str:
    return "" if isinstance(value, str) and value.strip() else f"expected a text, got {value!r}"


def _choice(*known: str) -> Check:
    def check(value: Any) -> str:
        if value in known:
            return ""
        return f"expected one of {', '.join(known)}, got {value!r}{nearest(str(value), known)}"

    return check


def _whole(least: int) -> Check:
    def check(value: Any) -> str:
        fits = isinstance(value, int) and not isinstance(value, bool) and value >= least
        return "" if fits else f"expected a whole number from {least} on, got {value!r}"

    return check


def _number(value: Any) -> str:
    fits = isinstance(value, int | float) and not isinstance(value, bool) and value > 0
    return "" if fits else f"expected a number above 0, got {value!r}"


def _not_negative(value: Any) -> str:
    fits = isinstance(value, int | float) and not isinstance(value, bool) and value >= 0
    return "" if fits else f"expected a number from 0 on, got {value!r}"


def _flag(value: Any) -> str:
    return "" if isinstance(value, bool) else f"expected true or false, got {value!r}"


def _rate(value: Any) -> str:
    try:
        parse_rate(str(value))
    except FitError as error:
        return str(error)
    return ""


def _shots(value: Any) -> str:
    fits = value == "all" or not _whole(1)(value)
    return "" if fits else f"expected a whole number of images a class, or 'all', got {value!r}"


_SEED = Option("seeds", _whole(0), 0)
_SHOTS = Option("shots", _shots, "all")
_MACHINE = {
    "engine": Option("engine", _text, "auto", crossed=False),
    "device": Option("device", _text, "auto", crossed=False),
    "workers": Option("workers", _whole(1), crossed=False),
    "output": Option("output", _text, crossed=False),
}

EXTRACT = {
    "backbone": Option("backbones", _text, DEFAULT_BACKBONE),
    "layer": Option("layers", _text, DEFAULT_LAYER),
    "pool": Option("pool", _choice(*POOLS), DEFAULT_POOL),
    "precision": Option("precision", _choice(*PRECISIONS), "auto"),
    "store": Option("store", _choice(*STORES), "float32"),
    "size": Option("size", _whole(1)),
    "batch-size": Option("batch_size", _whole(1), crossed=False),
    "on-error": Option("on_error", _choice("skip", "stop"), "skip", crossed=False),
    **_MACHINE,
}
FIT = {
    "head": Option("heads", _text, "logreg"),
    "layer": Option("layers", _text),
    "seed": _SEED,
    "shots": _SHOTS,
    "cv": Option("cv", _whole(2), crossed=False),
    "balanced": Option("balanced", _flag, default=False, crossed=False),
    "drop-leaks": Option("drop_leaks", _flag, default=False, crossed=False),
    "jobs": Option("jobs", _whole(1), crossed=False),
    "device": _MACHINE["device"],
}
FINETUNE = {
    "backbone": Option("backbone", _text, DEFAULT_BACKBONE),
    "freeze": Option("freeze", _text, "all"),
    "init": Option("init", _choice(*INITS), INITS[0]),
    "head-first": Option("head_first", _flag, default=False),
    "top": Option("top", _text, Recipe.top),
    "lr": Option("lr", _number),
    "layer-decay": Option("layer_decay", _number, Recipe.layer_decay),
    "lr-at": Option("lr_at", _rate, joined=True),
    "epochs": Option("epochs", _whole(1), Recipe.epochs),
    "patience": Option("patience", _whole(1), Recipe.patience),
    "batch-size": Option("batch_size", _whole(1), Recipe.batch_size),
    "optimizer": Option("optimizer", _text, Recipe.optimizer),
    "schedule": Option("schedule", _text, Recipe.schedule),
    "warmup": Option("warmup", _whole(0), Recipe.warmup),
    "weight-decay": Option("weight_decay", _not_negative, Recipe.weight_decay),
    "label-smoothing": Option("label_smoothing", _not_negative, Recipe.label_smoothing),
    "class-weights": Option("class_weights", _flag, Recipe.class_weights),
    "augment": Option("augment", _text, Recipe.augment),
    "views": Option("views", _whole(1)),
    "clip": Option("clip", _number),
    "precision": Option("precision", _choice(*TRAIN_PRECISIONS), "auto"),
    "store": Option("store", _choice(*STORES), "float32"),
    "size": Option("size", _whole(1)),
    "seed": _SEED,
    "shots": _SHOTS,
    **_MACHINE,
}
TABLES: dict[str, dict[str, Option]] = {"extract": EXTRACT, "fit": FIT, "finetune": FINETUNE}
SOURCE = Option("source", _text)


def tune_parameters(chosen: Iterable[tuple[str, Any]]) -> dict[str, Any]:
    """Return a fine-tune's options, by their keys, as parameters of `pipeline.finetune.finetune`."""
    found = {FINETUNE[key].parameter: value for key, value in chosen}
    if "lr_at" in found:
        found["lr_at"] = tuple(map(parse_rate, found["lr_at"].split(",")))
    return found


def shared() -> dict[str, Option]:
    """Return what may stand above the tables: ``source``, and defaults for keys that mean the same in several."""
    homes: dict[str, list[Option]] = {}
    for table in TABLES.values():
        for key, option in table.items():
            homes.setdefault(key, []).append(option)
    found = {key: options[0] for key, options in homes.items() if len(options) > 1 and key != "batch-size"}
    return {"source": SOURCE, **found}
