"""Freeze where labels are scarce, fine-tune where they are plentiful?"""

from __future__ import annotations

from pipeline.lecturing.claim import Findings, Setting
from pipeline.lecturing.plans import lead_figure, run_plan
from pipeline.reporting.page.method_charts import labels_chart
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
"""
_KUMAR = "Kumar et al. 2022; Yosinski et al. 2014"


def measure_claim(setting: Setting) -> Findings:
    """Fine-tune above three thaw lines, and with rates that fall by layer, with few and with more labels."""
    shots, epochs = ((1, 2), 1) if setting.quick else (_SHOTS, 8)
    board, folder = run_plan(setting, "thaw", _PLAN.format(shots=list(shots), size=SIZE, epochs=epochs))
    figures = []
    for labels, expected, finding in zip(shots, (-1, 1), ("freeze", "fine-tune"), strict=True):
        scores = {
            (score.method.freeze, dict(score.method.options).get("layer-decay", 1.0)): score
            for score in board.at(labels)
        }
        frozen, whole, decayed, middle = (
            scores[key] for key in (("all", 1.0), ("none", 1.0), ("none", 0.5), ("blocks.3", 1.0))
        )
        at = f"at {labels} labels a class, points"
        figures += [
            lead_figure(
                f"accuracy, fine-tuned minus frozen, {at}", whole, frozen, folder, finding, _KUMAR, expected=expected,
                tests=len(shots),
            ),
            lead_figure(f"accuracy, rates halved by layer minus frozen, {at}", decayed, frozen, folder),
            lead_figure(f"accuracy, thawed above blocks.3 minus frozen, {at}", middle, frozen, folder),
        ]  # fmt: skip
    chart = labels_chart(board)
    notes = [
        f"{DEFAULT_BACKBONE} at {SIZE} pixels, {epochs} epochs at the default learning rates, since so few labels "
        f"leave no validation images; {len(board.at(shots[0])[0].by_seed)} seeds draw labels and test images. "
        "The plan and the report of `compare` are in the folder of this page."
    ]
    return Findings(figures, [] if chart is None else [chart], notes)
