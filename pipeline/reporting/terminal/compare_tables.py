"""Terminal tables of a comparison."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from rich.table import Table

from pipeline.comparing.answer import duration, percent, points
from pipeline.comparing.estimate import Planned
from pipeline.comparing.folder import JobResult
from pipeline.comparing.methods import leaderboards
from pipeline.comparing.paired import Against
from pipeline.reporting.terminal.tables import rows_table

MOST_ROWS = 12


def score_table(results: Sequence[JobResult]) -> Table:
    """Return the best methods of each source and number of labels, means over seeds."""
    rows = []
    for board in leaderboards(results):
        for shots in reversed(board.shots):
            scores = sorted(board.at(shots), key=lambda score: -score.accuracy)
            most = MOST_ROWS if shots == board.shots[-1] else 3
            for score in scores[:most]:
                low, high = score.interval
                interval = f"{100 * low:.1f}–{100 * high:.1f}"
                seconds = duration(score.mean("seconds") or 0.0)
                rows.append((board.source, str(shots), score.name, percent(score.accuracy), interval, seconds))
            if len(scores) > most:
                rows.append(("", "", f"… and {len(scores) - most} more", "", "", ""))
    return rows_table(("source", "shots", "method", "accuracy", "95 % interval", "training"), rows)


def plan_tables(planned: Sequence[Planned]) -> Iterator[Table]:
    """Yield a table of each source, with one row for each job."""
    for source in dict.fromkeys(job.source for job in planned):
        rows = [
            (
                job.job.removesuffix(f", {source}"),
                "done" if job.done else f"about {duration(job.seconds)}",
                size_text(job.bytes),
            )
            for job in planned
            if job.source == source
        ]
        table = rows_table(("job", "time", "disk"), rows)
        table.title = source
        yield table


def plan_line(planned: Sequence[Planned]) -> str:
    """Return how many jobs there are, and what is left to do."""
    left = [job for job in planned if not job.done]
    seconds, size = sum(job.seconds for job in left), size_text(sum(job.bytes for job in left)) or "0 MB"
    return f"{len(planned)} jobs, {len(planned) - len(left)} of them done; about {duration(seconds)} and {size} to go"


def against_lines(against: Against | None) -> list[str]:
    """Return what changed since another run, in lines."""
    if against is None:
        return []
    lines = [f"against the other run: {len(against.changed)} of {against.compared} methods changed by more than noise"]
    for change in against.changed:
        gap = f"{points(change.difference)} points"
        lines.append(f"  {change.method}, shots {change.shots}, {change.source}: {gap} (p = {change.p:.2g})")
    for names, run in ((against.only_before, "the other run"), (against.only_now, "this run")):
        if names:
            rest = f" and {len(names) - 3} more" if len(names) > 3 else ""
            lines.append(f"  only in {run}: {'; '.join(names[:3])}{rest}")
    return lines


def size_text(size: int) -> str:
    """Return a number of bytes as text, ``""`` for 0."""
    if not size:
        return ""
    return f"{size / 1e9:.1f} GB" if size >= 1e9 else f"{max(size / 1e6, 0.1):.1f} MB"
