"""The page of the lecture's claims: figures, verdicts and published values, with a chart or two for each."""

from __future__ import annotations

from collections.abc import Sequence

from pipeline.comparing.answer import duration
from pipeline.reporting.page.method_charts import Chart
from pipeline.reporting.page.template import render_page
from pipeline.reporting.terminal.tables import interval_text, number_text
from pipeline.results import LectureResult


def render_lecture(claims: Sequence[tuple[LectureResult, Sequence[Chart]]]) -> str:
    """Return the page of claims that were measured, with their charts."""
    return render_page("lecture", claims=claims, number=number_text, interval=interval_text, duration=duration)
