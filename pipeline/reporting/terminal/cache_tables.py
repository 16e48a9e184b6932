"""Terminal tables of a cache: its files, one file in detail, what a check found."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from features_cache import VerifyReport
from pipeline.extraction.inspection import FileDetails, FileSummary
from pipeline.reporting.terminal.tables import facts_table, layers_text, rows_table, shortened

MOST_NAMED = 20


def listing_table(files: Iterable[FileSummary]) -> Table:
    """One row for each file."""
    columns = ("file", "source", "backbone", "pool", "layers", "stored", "done", "unreadable", "pending", "MB", "age")
    rows = [
        (
            Path(file.path).name,
            file.source,
            file.backbone,
            _pool_text(file),
            layers_text(file.layers),
            f"{file.precision} {file.store}",
            f"{file.done}/{file.rows}",
            str(file.unreadable),
            str(file.pending),
            f"{file.bytes / 1e6:.1f}",
            _age(file.changed),
        )
        for file in files
    ]
    return rows_table(columns, rows)


def _pool_text(file: FileSummary) -> str:
    return f"{file.pool}, view {file.view}" if file.view else file.pool


def _age(changed: str) -> str:
    seconds = (datetime.now(UTC) - datetime.fromisoformat(changed)).total_seconds()
    for unit, length in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= length:
            return f"{seconds / length:.0f} {unit}"
    return "now"


def details_view(details: FileDetails) -> Group:
    """One file in parts with a heading each; long lists are cut, and ``--json`` has all of them."""
    summary = details.summary
    facts = [
        ("source", f"{summary.source} ({summary.location})"),
        ("backbone, pool", f"{summary.backbone}, {_pool_text(summary)}"),
        ("rows", f"{summary.rows}: {summary.done} done, {summary.unreadable} unreadable, {summary.pending} pending"),
        ("size, age", f"{summary.bytes / 1e6:.1f} MB, {_age(summary.changed)}"),
    ]
    shared, layers = _specs(details)
    parts: list[RenderableType] = [Text(summary.path, "bold"), facts_table(facts)]
    parts += [Text("\nspec of every layer", "bold"), facts_table((key, _short(value)) for key, value in shared.items())]
    parts += _part("layers", ("layer", "dim", "fingerprint", *(["spec"] if len(layers[0]) > 3 else [])), layers)
    parts += _part("classes", ("class", "train", "val", "test", "no split"), _class_rows(details.classes))
    parts += _part("runs", ("run", "started (UTC)", "rows", "engine", "device", "command"), map(_run_row, details.runs))
    unreadable = [(entry["uri"], entry["reason"]) for entry in details.unreadable]
    parts += _part("unreadable images", ("image", "reason"), unreadable)
    return Group(*parts, *_part("equal images", ("across splits", "images"), map(_twins, details.duplicates)))


def _part(title: str, columns: Sequence[str], rows: Iterable[Sequence[str]]) -> list[RenderableType]:
    listed = list(rows)
    if not listed:
        return []
    heading = Text.assemble("\n", (title, "bold"), f" ({len(listed)})")
    shown: list[RenderableType] = [heading, rows_table(columns, listed[:MOST_NAMED])]
    return shown + ([f"… and {len(listed) - MOST_NAMED} more"] if len(listed) > MOST_NAMED else [])


def _specs(details: FileDetails) -> tuple[dict[str, Any], list[tuple[str, ...]]]:
    """Return what the specs of all layers share, and a row for each layer that ends with what is its own, if any."""
    first, *others = details.specs.values()
    shared = {key: value for key, value in first.items() if all(other.get(key) == value for other in others)}
    shared = {key: value for key, value in shared.items() if key not in ("layer", "fingerprint")}
    rows: list[tuple[str, ...]] = []
    for name, spec in details.specs.items():
        own = {key: value for key, value in spec.items() if key not in ("layer", "fingerprint", *shared)}
        rest = [", ".join(f"{key} {_short(value)}" for key, value in own.items())] if own else []
        rows.append((name, str(details.summary.layers[name]), spec["fingerprint"], *rest))
    return shared, rows


def _short(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{key} {_short(item)}" for key, item in value.items())
    if isinstance(value, list):
        return " ".join(map(_short, value))
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _class_rows(classes: dict[str, dict[str, int]]) -> list[tuple[str, ...]]:
    splits = ("train", "val", "test", "")
    return [(name or "(none)", *(str(counts.get(split, 0)) for split in splits)) for name, counts in classes.items()]


def _run_row(run: dict[str, Any]) -> tuple[str, ...]:
    told = run | {"started": str(run.get("started", "-"))[:19].replace("T", " ")}
    return tuple(str(told.get(key, "-")) for key in ("run", "started", "rows", "engine", "device", "command"))


def _twins(twins: dict[str, Any]) -> tuple[str, str]:
    named = [f"{uri} ({split})" if split else uri for uri, split in zip(twins["uris"], twins["splits"], strict=True)]
    return "yes" if twins["across"] else "no", " = ".join(named)


def verify_table(reports: Iterable[VerifyReport]) -> Table:
    """One row for each file that was checked."""
    rows = []
    for report in reports:
        done, size = f"{report.done}/{report.rows}", f"{report.bytes_checked / 1e6:.1f}"
        findings = (len({finding.row for finding in report.damaged}), len(report.changed))
        rows.append((str(report.path), done, str(report.unreadable), str(report.pending), size, *map(str, findings)))
    columns = ("file", "done", "unreadable", "pending", "checked MB", "damaged rows", "changed images")
    return rows_table(columns, rows)


def finding_lines(reports: Iterable[VerifyReport], repaired: bool) -> list[str]:
    """Name at most `MOST_NAMED` damaged or changed rows of each file, and say what to do."""
    lines = []
    for report in reports:
        found = [
            f"{report.path.name} row {one.row}, {one.uri}: {one.what}" for one in (*report.damaged, *report.changed)
        ]
        lines += shortened(found, MOST_NAMED)
        if report.damaged_runs:
            lines.append(f"{report.path.name}: {len(report.damaged_runs)} records of extract runs are damaged")
        if not report.sound:
            lines.append(
                "damaged rows are pending now; compute them again with the same extract command"
                if repaired
                else "mark damaged rows as pending with: thawline cache verify --repair"
            )
        if report.changed:
            lines.append("compute changed images again with: thawline extract … --rehash")
    return lines
