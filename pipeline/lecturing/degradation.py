"""Are deeper plain nets worse in training already, and deeper residual nets not?"""

from __future__ import annotations

import numpy as np

from pipeline.lecturing.claim import Findings, Setting, line_chart, seeds_figure
from pipeline.lecturing.training import RATES, error_figure, net_figures, train_nets

_WIDTH, _SIDE = 8, 16
_HE = "He et al. 2016"
_TESTS = 4


def measure_claim(setting: Setting) -> Findings:
    """Train plain and residual nets of 20 and 56 layers, and compare their training and test errors."""
    epochs = 1 if setting.quick else 6
    names = {f"{kind}{depth}[width={_WIDTH}]": f"{kind}-{depth}" for kind in ("plain", "resnet") for depth in (20, 56)}
    nets = train_nets(setting, list(names), epochs, _SIDE)
    plain20, plain56, resnet20, resnet56 = nets.values()
    figures = [
        seeds_figure(
            "training error, plain-56 minus plain-20, points", plain56.training_errors - plain20.training_errors,
            "higher throughout training", f"{_HE}, fig. 1", expected=1, tests=_TESTS,
        ),
        seeds_figure(
            "training error, resnet-56 minus resnet-20, points", resnet56.training_errors - resnet20.training_errors,
            "lower in the end", f"{_HE}, fig. 6", expected=-1, tests=_TESTS,
        ),
        error_figure(
            "test error, plain-56 minus plain-20, points", plain56, plain20,
            "28.54 - 27.94 = 0.60 on ImageNet with 34 and 18 layers", f"{_HE}, table 2", expected=1, tests=_TESTS,
        ),
        error_figure(
            "test error, resnet-56 minus resnet-20, points", resnet56, resnet20,
            "25.03 - 27.88 = -2.85 on ImageNet with 34 and 18 layers", f"{_HE}, table 2", expected=-1, tests=_TESTS,
        ),
        *net_figures(nets, names),
    ]  # fmt: skip
    chart = line_chart(
        "Is the deeper net worse in training already?",
        "Training error in each epoch, each batch before its step: means over seeds, and bands from the lowest to the "
        "highest seed.",
        np.arange(1, epochs + 1).tolist(),
        {names[key]: net.curves(lambda epoch: 100 * (1 - epoch["train_acc"])) for key, net in nets.items()},
        ("epoch", "training error, %"),
    )
    rates = ", ".join(f"{names[key]} {net.rate:g}" for key, net in nets.items())
    notes = [
        f"{len(setting.seeds)} seeds of weights and batches on one split; {epochs} epochs for each; {_WIDTH}, "
        f"{2 * _WIDTH} and {4 * _WIDTH} channels at {_SIDE} pixels, batch norm, zero-padded shortcuts; SGD, learning "
        f"rate of {', '.join(map(str, RATES))} by the first seed's validation accuracy: {rates}."
    ]
    return Findings(figures, [chart], notes)
