"""How long and how large a plan will be, to an order of magnitude: from what was measured before, else from counts."""

from __future__ import annotations

import math
import os
from dataclasses import dataclass
from functools import cache
from statistics import fmean

import numpy as np

from pipeline.comparing.answer import extraction_seconds
from pipeline.comparing.features import Features
from pipeline.comparing.folder import RunFolder
from pipeline.comparing.jobs import Extraction, Finetune, Fit
from pipeline.images.sources.registry import ImageSource
from pipeline.spec import NO_AUGMENT

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
BACKWARD = 3
ACTIVATIONS = ("backbone", "freeze", "size", "store", "precision", "augment", "views")
"""Options of a fine-tune on which the activations that it caches depend."""


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


def plan_extraction(extraction: Extraction, found: Features, images: ImageSource, folder: RunFolder) -> Planned:
    """Guess what an extraction takes."""
    asked = extraction.request
    width = 2 if asked.store == "float16" else 4
    job = f"extract {', '.join(asked.layers)} of {asked.backbone}, {asked.pool}, {extraction.source}"
    if found.complete:
        return Planned(job, True, 0.0, 0)
    measured = extraction_seconds(folder.read_json("run.json")).get((images.name, asked.backbone))
    flops, speed = operations(asked.backbone, asked.size), _speed()
    n_images, cores = len(images.items), os.cpu_count() or 1
    guess = START + n_images * (flops / speed + 1 / (DECODED * cores))
    return Planned(job, False, measured or guess, n_images * sum(found.dims.values()) * width)


def plan_fit(fit: Fit, found: Features, done: bool, images: ImageSource, folder: RunFolder) -> Planned:
    """Guess what a fit takes, from others with the same head and number of labels where there are some."""
    family = fit.head.partition("/")[0]
    alike = [
        record["seconds"]
        for record in folder.records.values()
        if (record["head"], record["shots"]) == (fit.head, fit.shots)
    ]
    dim = sum(found.dims[name] for name in fit.layer.split("+"))
    guess = SECONDS_A_VALUE[family] * _rows(images, fit.shots) * dim
    return Planned(str(fit), done, 0.0 if done else fmean(alike) if alike else guess, 0)


def plan_finetune(job: Finetune, done: bool, images: ImageSource, *, stores: bool) -> Planned:
    """Guess what a fine-tune takes; `stores` tells whether the activations at its line are yet to be cached."""
    options = dict(job.options)
    if done:
        return Planned(str(job), True, 0.0, 0)
    backbone, freeze, size = str(options["backbone"]), str(options["freeze"]), options.get("size")
    share = TRAINED_SHARE.get(freeze, 0.5)
    flops = operations(backbone, size)
    seconds = START + BACKWARD * share * flops * _rows(images, job.shots) * options["epochs"] / _speed()
    frozen, thawed = values(backbone, freeze, options["top"], size, len(images.classes))
    views = options.get("views", 0 if options["augment"] == NO_AUGMENT else -1)  # of none are activations cached
    cached = len(images.items) * frozen * (1 + views) * np.dtype(options["store"]).itemsize if stores else 0
    return Planned(str(job), False, seconds, cached + 4 * thawed)


def _rows(images: ImageSource, shots: int | str) -> int:
    """Return how many images train, at most."""
    n_images = len(images.items)
    return n_images if shots == "all" else min(n_images, int(shots) * len(images.classes))


@cache
def values(backbone: str, freeze: str, top: str, size: int | None, n_classes: int) -> tuple[int, int]:
    """Return how many numbers an image has at a thaw line, and how many weights are thawed."""
    from pipeline.backbones.registry import sketch
    from pipeline.backbones.taps import PENULTIMATE, tap
    from pipeline.finetuning.network import ALL, ThawedNetwork, line_of

    network = sketch(backbone, size)
    line = line_of(network, freeze)
    at_line = 0 if line is None else math.prod(line.shape)
    frozen = tap(network, [PENULTIMATE]).dims[PENULTIMATE] if freeze == ALL else at_line
    return frozen, sum(item.numel() for item in ThawedNetwork(network, freeze, top, n_classes).thawed_state().values())


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
