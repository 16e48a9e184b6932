"""Freeze where labels are scarce, fine-tune where they are plentiful?"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from pipeline.comparing.methods import MethodScore
from pipeline.lecturing.claim import Findings, Setting, line_chart
from pipeline.lecturing.plans import lead_figure, run_plan
from pipeline.reporting.page.method_charts import Chart
from pipeline.spec import DEFAULT_BACKBONE

SIZE = 32
_SHOTS = (2, 20)
_PLAN = """\
shots = {shots}
size = {size}

[[finetune]]
freeze = ["all", "blocks.3", "none"]
epochs = {epochs}
batch-size = 16

[[finetune]]
freeze = "none"
layer-decay = 0.5
epochs = {epochs}
batch-size = 16

[[finetune]]
freeze = "all"
shots = "all"

[[finetune]]
freeze = "none"
shots = "all"
lr = 0.001
epochs = {most}
patience = {most}
"""
_KUMAR = "Kumar et al. 2022; Yosinski et al. 2014"


def measure_claim(setting: Setting) -> Findings:
    """Fine-tune above three thaw lines, and with rates that fall by layer, with few labels; with all, freeze or not."""
    shots, epochs, most = ((1, 2), 1, 1) if setting.quick else (_SHOTS, 8, 6)
    plan = _PLAN.format(shots=list(shots), size=SIZE, epochs=epochs, most=most)
    board, folder = run_plan(setting, "thaw", plan)
    figures = []
    levels: list[tuple[MethodScore, MethodScore]] = []
    for labels in shots:
        scores = {
            (score.method.freeze, dict(score.method.options).get("layer-decay", 1.0)): score
            for score in board.at(labels)
        }
        frozen, whole, decayed, middle = (
            scores[key] for key in (("all", 1.0), ("none", 1.0), ("none", 0.5), ("blocks.3", 1.0))
        )
        at = f"at {labels} labels a class, points"
        finding, origin, sign, tests = ("freeze", _KUMAR, -1, 2) if labels == shots[0] else ("", "", 0, 1)
        figures += [
            lead_figure(
                f"accuracy, fine-tuned minus frozen, {at}", whole, frozen, folder, finding, origin, expected=sign,
                tests=tests,
            ),
            lead_figure(f"accuracy, rates halved by layer minus frozen, {at}", decayed, frozen, folder),
            lead_figure(f"accuracy, thawed above blocks.3 minus frozen, {at}", middle, frozen, folder),
        ]  # fmt: skip
        levels.append((frozen, whole))
    plenty = {score.method.freeze: score for score in board.at("all")}
    levels.append((plenty["all"], plenty["none"]))
    figures.append(
        lead_figure(
            "accuracy, fine-tuned minus frozen, with all labels, points", plenty["none"], plenty["all"], folder,
            "fine-tune", _KUMAR, expected=1, tests=2,
        )
    )  # fmt: skip
    notes = [
        f"{DEFAULT_BACKBONE} at {SIZE} pixels. With few labels {epochs} epochs at the default learning rates, since "
        f"they leave no validation images; with all labels {most} epochs of the whole network at a rate of 0.001, and "
        "as many of the new top as lower the loss on validation images. "
        f"{len(plenty['all'].by_seed)} seeds draw labels and test images. The plan and the report of "
        "`compare` are in the folder of this page."
    ]
    return Findings(figures, [_chart(levels)], notes)


def _chart(levels: Sequence[tuple[MethodScore, MethodScore]]) -> Chart:
    """Draw the accuracies of the frozen and of the fine-tuned network at each number of labels."""
    frozen, whole = (100 * np.array([score.values for score in line]).T for line in zip(*levels, strict=True))
    return line_chart(
        "How many labels does fine-tuning take?",
        "Test accuracy by training images of a class: means over seeds, and bands from the lowest to the highest seed.",
        range(len(levels)),
        {"new top on the frozen network": frozen, "whole network fine-tuned": whole},
        ("training images of a class", "test accuracy, %"),
        ticks=[str(score.shots) for score, _ in levels],
    )
