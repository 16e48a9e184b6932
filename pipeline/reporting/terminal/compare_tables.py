"""Terminal tables of a comparison."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from rich.table import Table

from pipeline.comparing.answer import duration
from pipeline.comparing.estimate import Planned, Power
from pipeline.comparing.folder import JobResult
from pipeline.comparing.methods import leaderboards
from pipeline.comparing.paired import Against, BestSet
from pipeline.evaluation.wording import ACCURACY, METRIC_TITLES, Measure, metric_text
from pipeline.reporting.terminal.tables import rows_table

MOST_ROWS = 12


def score_table(results: Sequence[JobResult], best_sets: Sequence[BestSet]) -> Table:
    """Return the methods of each source and number of labels that are best on test by the plan's metric.

    Numbers are means over seeds; a metric of classes other than accuracy has a column.
    """
    boards = leaderboards(results)
    first = next((score for board in boards for score in board.scores.values()), None)
    title = METRIC_TITLES[ACCURACY] if first is None else first.measure.title
    also = [METRIC_TITLES[one] for one in {job.result.metric for job in results} if METRIC_TITLES[one] != title]
    among = {(one.source, one.shots): one.methods for one in best_sets}
    rows = []
    for board in boards:
        for shots in reversed(board.shots):
            scores = sorted(board.at(shots), key=lambda score: score.rank)
            most = MOST_ROWS if shots == board.shots[-1] else 3
            for score in scores[:most]:
                interval = score.measure.interval_text(score.interval).removesuffix(" %")
                seconds = duration(score.mean("seconds") or 0.0)
                known = among.get((board.source, shots))
                best = "-" if known is None else "yes" if score.name in known else "no"
                chosen_by = [metric_text(score.first.result.metric, score.score) for _ in also]
                measured = [*chosen_by, score.measure.text(score.value), interval, best, seconds]
                rows.append((board.source, str(shots), score.name, *measured))
            if len(scores) > most:
                rows.append(("", "", f"… and {len(scores) - most} more", *("" for _ in also), "", "", "", ""))
    columns = ("source", "shots", "method", *also, title, "95 % interval", "may be best", "training")
    return rows_table(columns, rows)


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


def power_line(power: Power) -> str:
    """Return which differences the test images of a source can show."""
    found = f"a difference of {100 * power.smallest:.1f} points is found with 80 % power"
    if power.comparisons > 1:
        found += f" (of {100 * power.smallest_of_all:.1f} points with all {power.comparisons} comparisons planned)"
    alike = (
        f"; they come in {power.groups} groups, and the more the images of a group are alike, the less they show"
        if power.groups < power.test_images
        else ""
    )
    return (
        f"{power.source}: about {power.test_images} test images. If two methods disagree on "
        f"{100 * power.disagreement:.0f} % of these, {found}{alike}"
    )


def against_lines(against: Against | None) -> list[str]:
    """Return what changed since another run, in lines."""
    if against is None:
        return []
    lines = [f"against the other run: {len(against.changed)} of {against.compared} methods changed by more than noise"]
    for change in against.changed:
        measure = Measure(change.metric)
        gap = f"{measure.difference_text(change.difference)} {measure.unit or f'in {measure.title}'}"
        lines.append(f"  {change.method}, shots {change.shots}, {change.source}: {gap} (p = {change.p:.2g})")
    others = {
        "only in the other run": against.only_before,
        "only in this run": against.only_now,
        "not compared, for want of test images with the same answers": against.incomparable,
    }
    for what, names in others.items():
        if names:
            rest = f" and {len(names) - 3} more" if len(names) > 3 else ""
            lines.append(f"  {what}: {'; '.join(names[:3])}{rest}")
    return lines


def size_text(size: int) -> str:
    """Return a number of bytes as text, ``""`` for 0."""
    if not size:
        return ""
    return f"{size / 1e9:.1f} GB" if size >= 1e9 else f"{max(size / 1e6, 0.1):.1f} MB"
