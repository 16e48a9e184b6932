"""Networks trained from random weights for equal numbers of steps, each at the learning rate that suits it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from pipeline.arrays import Float64Array
from pipeline.errors import FitError
from pipeline.evaluation.comparisons import best_validated
from pipeline.evaluation.intervals import CONFIDENCE, mcnemar, number_clusters, paired_interval
from pipeline.evaluation.predictions import Predictions
from pipeline.evaluation.seeds import pool_seeds
from pipeline.finetune import FinetuneReport, finetune
from pipeline.lecturing.claim import Setting, p_text, verdict
from pipeline.results import FinetuneResult, LectureFigure

RATES = (0.01, 0.03, 0.1)
"""Learning rates of SGD that each network has to choose from."""


@dataclass(frozen=True)
class TrainedNet:
    """What a network came to, one result and one set of predictions for each seed, all on the same test images."""

    rate: float
    results: list[FinetuneResult]
    predictions: list[Predictions]

    def curves(self, measure: Callable[[dict[str, float]], float]) -> Float64Array:
        """Return a number of each epoch's record (seeds, epochs)."""
        return np.array([[measure(epoch) for epoch in result.history] for result in self.results])

    @property
    def training_errors(self) -> Float64Array:
        """Training error of the last epoch, in points (seeds,)."""
        return self.curves(lambda epoch: 100 * (1 - epoch["train_acc"]))[:, -1]


def train_nets(setting: Setting, names: Sequence[str], epochs: int, size: int) -> dict[str, TrainedNet]:
    """Train each network with each seed for the same number of steps.

    Training errors are of the last epoch, test errors of the epoch of lowest validation loss. The learning rate is the
    one of best validation accuracy of the first seed, among those that do not diverge.
    """
    rates = RATES[1:2] if setting.quick else RATES

    def run(name: str, rate: float, seeds: Sequence[int]) -> FinetuneReport:
        return finetune(
            setting.split_source, name, freeze="none", init="random", seeds=seeds, output=setting.folder, size=size,
            precision="fp32", optimizer="sgd", lr=rate, epochs=epochs, patience=epochs, batch_size=64,
            progress=setting.progress,
        )  # fmt: skip

    nets = {}
    for name in names:
        tried = [run(name, rate, setting.seeds[:1]).results[0] for rate in rates]
        stable = [(rate, one) for rate, one in zip(rates, tried, strict=True) if one.converged]
        if not stable:
            raise FitError(f"{name} diverged at every learning rate of {', '.join(map(str, rates))}")
        rate = stable[best_validated([(one.validation_accuracy, one.validation_log_loss) for _, one in stable])][0]
        report = run(name, rate, setting.seeds)  # that of the first seed is in its checkpoint
        if not all(one.converged for one in report.results):
            raise FitError(f"{name} diverged at learning rate {rate:g}, so that seeds have unequal steps")
        nets[name] = TrainedNet(rate, report.results, report.predictions)
    return nets


def error_figure(
    name: str,
    one: TrainedNet,
    other: TrainedNet,
    published: str,
    origin: str,
    *,
    expected: int = 0,
    tests: int = 1,
) -> LectureFigure:
    """Return by how many points the test error of one network is above that of the other, with a paired interval.

    All seeds count. Test rows of one image (or group) count together, so that seeds add no test images.
    """
    (right_a, units), (right_b, _) = pool_seeds(other.predictions), pool_seeds(one.predictions)
    clusters = number_clusters(units)
    low, high = paired_interval(right_a, right_b, clusters, 1 - (1 - CONFIDENCE) / tests)
    p = mcnemar(right_a, right_b, clusters)
    interval = (100 * low, 100 * high)
    value = 100 * float(right_a.mean() - right_b.mean())
    return LectureFigure(
        f"{name} ({p_text(p)})", value, interval, published, origin, verdict(interval, expected) if expected else ""
    )


def net_figures(nets: dict[str, TrainedNet], names: dict[str, str]) -> list[LectureFigure]:
    """Return each network's training loss, training error and test error, as means over seeds."""
    figures = []
    for key, net in nets.items():
        loss = float(net.curves(lambda epoch: epoch["train_loss"])[:, -1].mean())
        error = 100 * (1 - float(np.mean([result.accuracy for result in net.results])))
        figures += [
            LectureFigure(f"{names[key]}: training loss of the last epoch", loss),
            LectureFigure(f"{names[key]}: training error of the last epoch, %", float(net.training_errors.mean())),
            LectureFigure(f"{names[key]}: test error, %", error),
        ]
    return figures
