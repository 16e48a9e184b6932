"""What do inception modules gain by reducing channels first: in cost as counted and as measured, and in accuracy?"""

from __future__ import annotations

import time

import numpy as np
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from pipeline.backbones.zoo_lecture import INCEPTIONS, NaiveInception, ReducedInception
from pipeline.lecturing.claim import Findings, Setting, seeds_figure
from pipeline.lecturing.training import RATES, error_figure, net_figures, train_nets
from pipeline.results import LectureFigure

_KINDS: dict[str, type[NaiveInception | ReducedInception]] = {"naive": NaiveInception, "reduced": ReducedInception}
_WIDTH, _SIDE = 8, 32
_SZEGEDY = "Szegedy et al. 2015"


def measure_claim(setting: Setting) -> Findings:
    """Count and time GoogLeNet's nine modules of both kinds, and train two small GoogLeNets for equal steps."""
    cost, size = {}, {}
    seconds: dict[str, list[float]] = {kind: [] for kind in _KINDS}
    for kind in _KINDS:
        with torch.device("meta"):
            counted, images = _modules(kind)
            with FlopCounterMode(display=False) as counter:
                _run(counted, images)
        cost[kind] = counter.get_total_flops() / 2e6
        size[kind] = sum(item.numel() for module in counted for item in module.parameters()) / 1e6
    built = {kind: _modules(kind) for kind in _KINDS}
    for _ in range(2 if setting.quick else 7):
        for kind, (modules, images) in built.items():
            began = time.perf_counter()
            _run(modules, images)
            seconds[kind].append(time.perf_counter() - began)
    ratios = np.array(seconds["naive"][1:]) / np.array(seconds["reduced"][1:])  # the first pass warms up
    epochs = 1 if setting.quick else 5
    names = {
        f"lecture/googlenet[width={_WIDTH}]": "reduced",
        f"lecture/googlenet[width={_WIDTH},modules=naive]": "naive",
    }
    nets = train_nets(setting, list(names), epochs, _SIDE)
    reduced, naive = nets.values()
    figures = [
        LectureFigure("multiply-adds of nine naive modules, millions", cost["naive"], None, "3,881", "by table 1"),
        LectureFigure("multiply-adds of nine reduced modules, millions", cost["reduced"], None, "1,104", "by table 1"),
        LectureFigure("parameters of nine naive modules, millions", size["naive"]),
        LectureFigure("parameters of nine reduced modules, millions", size["reduced"]),
        LectureFigure(
            "time of nine modules, naive over reduced", float(np.median(ratios)),
            (float(ratios.min()), float(ratios.max())) if len(ratios) > 1 else None,
        ),
        seeds_figure(
            "training error, reduced minus naive, points", reduced.training_errors - naive.training_errors,
            "no loss of accuracy", f"{_SZEGEDY}, section 3", expected=-1, tests=2,
        ),
        error_figure(
            "test error, reduced minus naive, points", reduced, naive, "no loss of accuracy", f"{_SZEGEDY}, section 3",
            expected=-1, tests=2,
        ),
        *net_figures(nets, names),
    ]  # fmt: skip
    rates = ", ".join(f"{names[key]} {net.rate:g}" for key, net in nets.items())
    weights = ", ".join(f"{names[key]} {net.results[0].trainable_parameters:,}" for key, net in nets.items())
    notes = [
        "Modules have the published widths and inputs; time is of one image, median and range of "
        f"{len(ratios)} passes in turn. Accuracy is that of two GoogLeNets of {_WIDTH} in place of 64 channels at "
        f"{_SIDE} pixels, {len(setting.seeds)} seeds, {epochs} epochs each; learning rate of "
        f"{', '.join(map(str, RATES))} by the first seed's validation accuracy: {rates}. Naive modules pass their "
        f"pooled input on, so that channels grow from module to module (weights: {weights}). That two errors do not "
        "differ is no proof that they are equal: see the interval."
    ]
    return Findings(figures, [], notes)


def _modules(kind: str) -> tuple[list[nn.Module], list[torch.Tensor]]:
    """Return the nine modules in evaluation mode, each with an input of its published shape."""
    modules: list[nn.Module] = []
    images = []
    inputs, side = 192, 28
    for channels in INCEPTIONS.values():
        if not channels:
            side //= 2
            continue
        modules.append(_KINDS[kind](inputs, *channels).eval())
        images.append(torch.zeros(1, inputs, side, side))
        c1, _, c3, _, c5, pooled = channels
        inputs = c1 + c3 + c5 + pooled
    return modules, images


@torch.no_grad()
def _run(modules: list[nn.Module], images: list[torch.Tensor]) -> None:
    for module, image in zip(modules, images, strict=True):
        module(image)
