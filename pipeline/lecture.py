"""The lecture's claims: each measured on the stages of this package, beside the published values, on one page."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING

from features_cache import atomic_write, explained, nearest
from pipeline.errors import FitError
from pipeline.images.sources.registry import ImageSource, open_source
from pipeline.provenance import machine
from pipeline.results import LectureResult, Progress, from_json, silent, to_json

if TYPE_CHECKING:
    from pipeline.reporting.page.method_charts import Chart

CLAIMS = {
    "degradation": "Deeper plain nets are worse, in training already; deeper residual nets are not.",
    "gradients": "Gradients vanish on their way down through logistic and tanh units, and explode with large weights.",
    "modules": "Inception modules that reduce channels first cost a fraction of naive ones, at no loss of accuracy.",
    "direct": "Direct input-to-output connections capture the easy, linear part, often 80-90 % of the variance.",
    "thaw": "Freeze the network where labels are scarce; fine-tune it where they are plentiful.",
    "initialisation": "Pretrained weights are a better start than random ones, at equal steps.",
    "hierarchy": "Networks learn a hierarchy: early layers read edges best, later ones textures, parts and objects.",
}
"""What each claim says. The module `pipeline.lecturing.NAME` measures it."""
ALL = "all"


@dataclass(frozen=True)
class LectureReport:
    """The claims of one call, in the order of the lecture, and the files: the page, and one of numbers a claim."""

    results: list[LectureResult]
    files: dict[str, str]


def lecture(
    names: Sequence[str],
    source: str | Path | ImageSource = "digits",
    output: str | Path = "thawline-lecture",
    *,
    quick: bool = False,
    progress: Progress | None = None,
) -> LectureReport:
    """Measure some of the lecture's claims, and write a page of all that were measured into this folder.

    Parameters
    ----------
    names : sequence of str
        Keys of `CLAIMS`, or ``"all"``.
    source : str, Path or ImageSource, default "digits"
        Labelled images.
    output : str or Path, default "thawline-lecture"
        Folder for the page, and for caches and checkpoints, so that the same call again is fast.
    quick : bool, default False
        Run each claim in a short form, which shows that it works, not that it holds.
    progress : callable, optional
        ``progress(done, total, text)``.

    Raises
    ------
    FitError
        If there is no such claim, or the source cannot be split.
    ThawlineError
        Whatever the stages raise.
    """
    for name in names:
        if name not in CLAIMS and name != ALL:
            raise FitError(
                f"there is no claim '{name}'{nearest(name, [*CLAIMS, ALL])}; it is one of {', '.join(CLAIMS)}"
            )
    from pipeline.lecturing.claim import Setting

    folder = Path(output)
    setting = Setting(open_source(source), folder / ("quick" if quick else "work"), quick, progress or silent)
    with explained(setting.folder, "make"):
        setting.folder.mkdir(parents=True, exist_ok=True)
    results = []
    for name, statement in CLAIMS.items():
        if name in names or ALL in names:
            began, at = time.perf_counter(), machine()
            found = import_module(f"pipeline.lecturing.{name}").measure_claim(setting)
            on, seconds = f"{at['cores']} x {at['cpu']}", time.perf_counter() - began
            of = (name, statement, setting.source.name, quick, found.figures, found.notes, seconds, at["started"], on)
            results.append(LectureResult(*of))
            _write(
                folder / f"{name}.json", json.dumps({**to_json(results[-1]), "charts": list(map(asdict, found.charts))})
            )
    _write(folder / "lecture.html", _page(folder))
    numbers = {result.claim: str(folder / f"{result.claim}.json") for result in results}
    return LectureReport(results, {"page": str(folder / "lecture.html"), **numbers})


def _page(folder: Path) -> str:
    from pipeline.reporting.page.lecture import render_lecture
    from pipeline.reporting.page.method_charts import Chart

    claims: list[tuple[LectureResult, list[Chart]]] = []
    for name in CLAIMS:
        if (folder / f"{name}.json").exists():
            kept = json.loads((folder / f"{name}.json").read_text(encoding="utf-8"))
            claims.append((from_json(LectureResult, kept, name), [Chart(**chart) for chart in kept["charts"]]))
    return render_lecture(claims)


def _write(path: Path, text: str) -> None:
    with explained(path, "write"), atomic_write(path) as draft:
        draft.write_text(text, encoding="utf-8")
