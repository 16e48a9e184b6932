"""Claims that are plans for `compare`: how they run, and differences of two of their methods."""

from __future__ import annotations

import json

from features_cache import atomic_write
from pipeline.compare import compare
from pipeline.comparing.folder import RunFolder, open_finished
from pipeline.comparing.methods import Leaderboard, MethodScore, leaderboards
from pipeline.comparing.paired import LEVEL, compare_scores
from pipeline.errors import FitError
from pipeline.images.sources.registry import open_source
from pipeline.lecturing.claim import Setting, p_text, verdict
from pipeline.results import LectureFigure


def run_plan(setting: Setting, name: str, plan: str) -> tuple[Leaderboard, RunFolder]:
    """Run a plan, whose `source` and `seed` are those of the setting, in a run folder of this name."""
    if open_source(setting.source.location).items != setting.source.items:
        raise FitError(
            f"the claim {name} is a plan for compare, which reads {setting.source.location} itself; give a source that "
            "lists exactly these images there"
        )
    path = setting.folder / f"{name}.toml"
    seeds = list(setting.seeds[:3])
    with atomic_write(path) as draft:
        draft.write_text(f"source = {json.dumps(setting.source.location)}\nseed = {seeds}\n{plan}", encoding="utf-8")
    report = compare(path, setting.folder / name, progress=setting.progress)
    if report.failures:
        failure = report.failures[0]
        raise FitError(f"{len(report.failures)} jobs of {path} failed, first {failure.job}: {failure.reason}")
    folder = open_finished(setting.folder / name)
    (board,) = leaderboards(folder.results.values())
    return board, folder


def lead_figure(
    name: str,
    first: MethodScore,
    second: MethodScore,
    folder: RunFolder,
    published: str = "",
    origin: str = "",
    *,
    expected: int = 0,
    tests: int = 1,
) -> LectureFigure:
    """Return by how many points the first method is ahead on test images, with a paired interval."""
    paired = compare_scores(first, second, folder.predictions, confidence=1 - LEVEL / tests)
    if paired is None:
        raise FitError(f"{first.name} and {second.name} share no test images")
    interval = (100 * paired.low, 100 * paired.high)
    judged = verdict(interval, expected) if expected else ""
    return LectureFigure(f"{name} ({p_text(paired.p)})", 100 * paired.difference, interval, published, origin, judged)
