"""Are pretrained weights a better start than random ones?"""

from __future__ import annotations

from collections.abc import Sequence

from pipeline.comparing.methods import MethodScore, best_of
from pipeline.errors import FitError
from pipeline.lecturing.claim import Findings, Setting
from pipeline.lecturing.plans import lead_figure, run_plan
from pipeline.lecturing.thaw import SIZE
from pipeline.results import LectureFigure
from pipeline.spec import DEFAULT_BACKBONE

_PLAN = """\
size = {size}

[[finetune]]
freeze = "none"
init = ["pretrained", "random"]
lr = {rates}
epochs = {epochs}
patience = {epochs}
"""


def measure_claim(setting: Setting) -> Findings:
    """Train the whole network from both starts for equal steps, each at the rate of best validation accuracy."""
    rates, epochs = ((0.001,), 1) if setting.quick else ((0.001, 0.003), 2)
    board, folder = run_plan(setting, "initialisation", _PLAN.format(size=SIZE, rates=list(rates), epochs=epochs))
    scores = board.at("all")
    pretrained, random = (_chosen(scores, init) for init in ("pretrained", "random"))
    figures = [
        lead_figure(
            "accuracy, pretrained minus random, points", pretrained, random, folder, "higher",
            "Yosinski et al. 2014; Kornblith et al. 2019", expected=1,
        ),
        LectureFigure("test accuracy, pretrained, %", 100 * pretrained.value, _points(pretrained.interval)),
        LectureFigure("test accuracy, random, %", 100 * random.value, _points(random.interval)),
    ]  # fmt: skip
    params = [one.first.result.params for one in (pretrained, random)]
    chosen = ", ".join(f"{one['init']} {one['lr']:g}" for one in params)
    notes = [
        f"{DEFAULT_BACKBONE} at {SIZE} pixels, all layers trained for {epochs} epochs; {len(pretrained.by_seed)} "
        f"seeds; learning rate of {', '.join(map(str, rates))} by mean validation accuracy: {chosen}."
    ]
    return Findings(figures, [], notes)


def _chosen(scores: Sequence[MethodScore], init: str) -> MethodScore:
    """Return the method of best validation accuracy among those of one start."""
    best = best_of([score for score in scores if score.first.result.params["init"] == init])
    if best is None:
        raise FitError(f"nothing was trained from {init} weights")
    return best


def _points(interval: tuple[float, float] | None) -> tuple[float, float] | None:
    return None if interval is None else (100 * interval[0], 100 * interval[1])
