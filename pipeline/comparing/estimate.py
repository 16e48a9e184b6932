"""How long and how large a plan will be, to an order of magnitude: from what was measured before, else from counts."""

from __future__ import annotations

import os
from dataclasses import dataclass
from functools import cache
from statistics import fmean

from pipeline.comparing.answer import extraction_seconds
from pipeline.comparing.features import Features
from pipeline.comparing.folder import RunFolder
from pipeline.comparing.jobs import Extraction, Finetune, Fit

CORE_SPEED = 75e9
"""Floating-point operations a second and core that torch reached with lite0 and ResNet-50 on AVX-512 cores."""
CUDA_SPEED = 1e13
DECODED = 250
"""Photos a second and core."""
START = 3.0
"""Seconds to load a network."""
SECONDS_A_VALUE = {
    "logreg": 1.2e-6,
    "linear_svm": 1.5e-5,
    "rbf_svm": 3e-6,
    "knn": 2e-8,
    "centroid": 1e-8,
    "ridge": 1e-7,
}
"""Seconds of a fit, its search included, by training rows times features."""
TRAINED_SHARE = {"all": 0.01, "none": 1.0}
"""Share of a network's operations that training repeats every epoch; about half of it above a line."""
EPOCHS = 15
BACKWARD = 3


@dataclass(frozen=True)
class Planned:
    """One job: what it is, whether it is done already, and what it will take.

    Parameters
    ----------
    job : str
    done : bool
    seconds : float
        A guess.
    bytes : int
        What it adds to the cache.
    """

    job: str
    done: bool
    seconds: float
    bytes: int


def plan_extraction(extraction: Extraction, found: Features, n_images: int, folder: RunFolder) -> Planned:
    """Guess what an extraction takes."""
    asked = extraction.request
    width = 2 if asked.store == "float16" else 4
    job = f"extract {', '.join(asked.layers)} of {asked.backbone}, {asked.pool}, {extraction.source}"
    if found.complete:
        return Planned(job, True, 0.0, 0)
    measured = extraction_seconds(folder.read_json("run.json")).get(asked.backbone)
    flops, speed = operations(asked.backbone, asked.size), _speed()
    cores = os.cpu_count() or 1
    guess = START + n_images * (flops / speed + 1 / (DECODED * cores))
    return Planned(job, False, measured or guess, n_images * sum(found.dims.values()) * width)


def plan_fit(fit: Fit, found: Features, done: bool, n_images: int, folder: RunFolder) -> Planned:
    """Guess what a fit takes, from others with the same head and number of labels where there are some."""
    family = fit.head.partition("/")[0]
    alike = [
        record["seconds"]
        for record in folder.records.values()
        if (record["head"], record["shots"]) == (fit.head, fit.shots)
    ]
    rows = n_images if fit.shots == "all" else min(n_images, int(fit.shots) * 20)
    dim = sum(found.dims[name] for name in fit.layer.split("+"))
    guess = SECONDS_A_VALUE[family] * rows * dim
    return Planned(str(fit), done, 0.0 if done else fmean(alike) if alike else guess, 0)


def plan_finetune(job: Finetune, done: bool, n_images: int) -> Planned:
    """Guess what a fine-tune takes."""
    options = dict(job.options)
    share = TRAINED_SHARE.get(str(options["freeze"]), 0.5)
    flops = operations(str(options["backbone"]), options.get("size"))
    epochs = options.get("epochs", EPOCHS)
    rows = n_images if job.shots == "all" else min(n_images, int(job.shots) * 20)
    seconds = START + BACKWARD * share * flops * rows * epochs / _speed()
    return Planned(str(job), done, 0.0 if done else seconds, 0)


@cache
def operations(backbone: str, size: int | None) -> float:
    """Return the floating-point operations of one image, counted on a network without weights."""
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    from pipeline.backbones.registry import sketch

    network = sketch(backbone, size)
    place = next(network.module.parameters()).device
    with FlopCounterMode(display=False) as counter, torch.inference_mode():
        network.module(torch.empty(1, 3, *network.preprocessing.size, device=place))
    return float(counter.get_total_flops())


def _speed() -> float:
    import torch

    return CUDA_SPEED if torch.cuda.is_available() else CORE_SPEED * (os.cpu_count() or 1)
