"""Reads a plan file, and checks all that can be checked from its text alone."""

from __future__ import annotations

import re
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from features_cache import nearest
from pipeline.errors import FitError, PlanError
from pipeline.evaluation.targets import check_task
from pipeline.images.sources.remote import is_url
from pipeline.options import CLASSIFICATION, DEFAULT_HEADS, LABELS, METRICS, TABLES, Option, shared_keys


@dataclass(frozen=True, eq=False)
class PlanTable:
    """One ``[[table]]`` of a plan with defaults filled in; `place` is its index among the tables of that name, from 0.

    A single value is a tuple of one. Keys that have neither a value nor a default are left out.
    """

    table: str
    place: int
    values: Mapping[str, tuple[Any, ...]]

    def how(self) -> dict[str, Any]:
        """Return the options that say how to run and are not crossed, as parameters of the stage."""
        options = TABLES[self.table]
        return {options[key].parameter: values[0] for key, values in self.values.items() if not options[key].crossed}


@dataclass(frozen=True)
class Plan:
    """A whole plan; its path and its sources are absolute, but for URLs and the source ``"digits"``.

    `lines` are first all extract tables, then all fit tables, then all finetune tables. `labels` are the arguments of
    `pipeline.evaluation.labels.find_labels` that the plan gives, the task among them, and `metric` is what all jobs
    choose by. `meaning` is the parsed TOML document; plans with equal documents are the same plan.
    """

    path: Path
    text: str
    sources: tuple[str, ...]
    lines: tuple[PlanTable, ...]
    meaning: dict[str, Any]
    labels: Mapping[str, Any] = field(default_factory=dict)
    metric: str = METRICS[0]

    @property
    def task(self) -> str:
        """What is predicted, one of `pipeline.options.TASKS`."""
        return str(self.labels.get("task", CLASSIFICATION))

    def of(self, table: str) -> list[PlanTable]:
        """Return all tables of one name."""
        return [line for line in self.lines if line.table == table]

    def error(self, message: str, table: str = "", place: int = 0, text: str = "") -> PlanError:
        """Return an error that names the file and the line of `text` in a table (or above all tables)."""
        return PlanError(f"{self.path.name} line {line_number(self.text, table, place, text)}: {message}")


def read_plan(path: str | Path) -> Plan:
    """Read a plan from a TOML file; raises `PlanError`, which names the line, if no command takes what it holds."""
    path = Path(path).absolute()
    try:
        text = path.read_text(encoding="utf-8")
        document = tomllib.loads(text)
    except OSError as error:
        near = nearest(path.name, [other.name for other in path.parent.glob("*.toml")])
        raise PlanError(f"{path}: cannot read the plan: {error.strerror}{near}") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise PlanError(f"{path.name}: expected TOML: {error}") from None
    return _build(Plan(path, text, (), (), document))


def line_number(text: str, table: str = "", place: int = 0, wanted: str = "") -> int:
    r"""Return the number, from 1, of a table's first line that holds `wanted`, or of its header if none does.

    `place` is the table's index among those of its name, which is ``""`` for the part above all tables; `wanted` is a
    key, or a value as it is written.

    Examples
    --------
    >>> line_number('source = "digits"\n[[fit]]\nhead = "ridge"', "fit", 0, "ridge")
    3
    """
    lines = text.splitlines() or [""]
    headers = [number for number, line in enumerate(lines) if line.lstrip().startswith("[") and "=" not in line]
    own = [number for number in headers if re.match(rf"\s*\[\[?\s*{re.escape(table)}\s*\]", lines[number])]
    start = own[min(place, len(own) - 1)] if table and own else 0
    end = next((number for number in headers if number > start), len(lines))
    word = re.compile(rf"(?<![\w.+-]){re.escape(wanted)}(?![\w.+-])")
    return 1 + next((n for n in range(start, end) if wanted and word.search(lines[n].split("#")[0])), start)


def _build(plan: Plan) -> Plan:
    common: dict[str, tuple[Any, ...]] = {}
    for key, value in plan.meaning.items():
        if key not in TABLES:
            common[key] = _values(plan, shared_keys(), key, value, "", 0)
    if "source" not in common:
        raise plan.error("expected a key 'source' that names a folder of images, or digits")
    labels: dict[str, Any] = {one.parameter: common[one.name] for one in LABELS if one.name in common}
    labels |= {name: values[0] for name, values in labels.items() if name != "target"}
    if "labels" in labels:
        labels["labels"] = str(plan.path.parent / labels["labels"])
    task = labels.get("task", CLASSIFICATION)
    try:
        metric = check_task(task, common.get("metric", (None,))[0])
    except FitError as error:
        raise plan.error(str(error), text="metric") from None
    lines = []
    for table, options in TABLES.items():
        entries = plan.meaning.get(table, [])
        if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
            raise plan.error(f"expected [[{table}]] with two brackets", table, 0, table)
        for place, entry in enumerate(entries):
            own = {key: _values(plan, options, key, value, table, place) for key, value in entry.items()}
            known = {key: option.default for key, option in options.items() if key != "output"}
            if table == "fit":
                known["head"] = DEFAULT_HEADS[task]
            defaults = {key: (default,) for key, default in known.items() if default is not None}
            above = {key: values for key, values in common.items() if key in options}
            lines.append(PlanTable(table, place, _rooted(plan, defaults | above | own)))
    _require_work(plan, lines)
    sources = tuple(_absolute(source, plan.path.parent) for source in common["source"])
    return Plan(plan.path, plan.text, sources, tuple(lines), plan.meaning, labels, metric)


def _absolute(source: str, folder: Path) -> str:
    """Return the absolute path of a source that is relative to `folder`; URLs and ``"digits"`` stay as they are."""
    path = folder / source
    return source if is_url(source) or (source == "digits" and not path.exists()) else str(path)


def _values(plan: Plan, options: Mapping[str, Option], key: str, value: Any, table: str, place: int) -> tuple[Any, ...]:
    """Return the checked values of a key as a tuple."""
    where = f"[[{table}]]" if table else "a plan"
    if key not in options:
        homes = [name for name, known in TABLES.items() if key in known]
        hint = f"; it belongs in [[{homes[0]}]]" if homes else nearest(key, [*options, *(() if table else TABLES)])
        if table and key in shared_keys():
            hint = "; it belongs above the tables"
        raise plan.error(f"{where} has no key '{key}'{hint}", table or key, place, key)
    option = options[key]
    values = tuple(value) if isinstance(value, list) else (value,)
    if not values:
        raise plan.error(f"'{key}' is an empty list; expected a value", table, place, key)
    if len(values) > 1 and option.plan == "once" and not option.repeat:
        raise plan.error(f"'{key}' says how to run and takes one value, got a list of {len(values)}", table, place, key)
    for number, one in enumerate(values):
        if reason := option.kind.problem(one):
            raise plan.error(f"'{key}': {reason}", table, place, key)
        if one in values[:number]:
            raise plan.error(f"'{key}' has {one!r} twice, which would be the same job", table, place, key)
    return (",".join(values),) if option.plan == "joined" else values


def _rooted(plan: Plan, values: dict[str, tuple[Any, ...]]) -> dict[str, tuple[Any, ...]]:
    """Make the paths of the cache folder and of weights files absolute."""
    folder = plan.path.parent
    if "output" in values:
        values["output"] = (str(folder / values["output"][0]),)
    if "backbone" in values:
        values["backbone"] = tuple(_weights_path(folder, name) for name in values["backbone"])
    return values


def _weights_path(folder: Path, backbone: str) -> str:
    name, at, weights = backbone.partition("@")
    file = folder / weights
    return f"{name}{at}{file}" if at and Path(weights).suffix and file.exists() else backbone


def _require_work(plan: Plan, lines: list[PlanTable]) -> None:
    tables = {line.table for line in lines}
    if "fit" in tables and "extract" not in tables:
        raise plan.error("[[fit]] has no features to train on; add an [[extract]]", "fit")
    if "extract" in tables and "fit" not in tables:
        raise plan.error(
            "[[extract]] has no heads to train; add a [[fit]], which may be empty (it then trains logreg)", "extract"
        )
    if not tables:
        raise plan.error("expected at least [[extract]] and [[fit]], or a [[finetune]]")
