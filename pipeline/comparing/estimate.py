"""What a plan will take and can show, guessed before it runs: time and disk space of its jobs, power of its tests."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from statistics import fmean

import numpy as np

from pipeline.comparing.answer import extraction_seconds
from pipeline.comparing.features import Features
from pipeline.comparing.folder import RunFolder
from pipeline.comparing.jobs import Extraction, Finetune, Fit
from pipeline.evaluation.intervals import smallest_difference
from pipeline.evaluation.splits import HELD_OUT
from pipeline.images.loader import default_workers
from pipeline.images.sources.registry import ImageSource
from pipeline.spec import DEFAULT_POOL, NO_AUGMENT, Size

CORE_SPEED = 75e9
"""Floating-point operations per second and core, as torch reached with lite0 and ResNet-50 on AVX-512 cores."""
CUDA_SPEED = 1e13  # floating-point operations per second on a GPU
DECODED = 250  # photos that one core decodes per second
START = 3.0  # seconds to load a network
TRAINED_SHARE = {"all": 0.01, "none": 1.0}
"""Share of a network's operations that each epoch repeats, by thaw line; 0.5 for any other line."""
BACKWARD = 3  # a training step takes this many times the operations of a forward pass
ACTIVATIONS = ("backbone", "freeze", "size", "store", "precision", "augment", "views")
"""Options that decide which activations a fine-tune caches."""


DISAGREEMENT = 0.1
"""Share of the test images on which one of two methods is right and the other is not, as assumed before fitting."""


@dataclass(frozen=True)
class Power:
    """The smallest differences that the tests on one source will find with 80 % power.

    `comparisons` are those of all methods at one number of labels with the one chosen on validation. `smallest` is the
    difference for a single one of them, `smallest_of_all` for all together, if two methods disagree on a share
    `disagreement` of the images. `groups` counts the groups of test images, an image without a group being one.
    """

    source: str
    test_images: int
    groups: int
    comparisons: int
    disagreement: float
    smallest: float
    smallest_of_all: float


def plan_power(images: ImageSource, jobs: Iterable[Fit | Finetune]) -> Power:
    """Return what the tests on a source will find that is to be compared by these jobs.

    Without a test split, 20 % of the labelled images will be drawn; with cross-validation all are test images.
    """
    asked = list(jobs)
    labelled = [item for item in images.items if item.label >= 0]
    test = [item for item in labelled if item.split == "test"]
    share = 1.0 if test or all("cv" in dict(job.options) for job in asked) else HELD_OUT
    counted = test or labelled
    n_images = max(1, round(share * len(counted)))
    n_groups = max(1, round(share * len({item.group or f"image {item.uri}" for item in counted})))
    comparisons = max(1, len({job._replace(seed=0, shots="all") for job in asked}) - 1)
    smallest = [smallest_difference(n_images, DISAGREEMENT, count) for count in (1, comparisons)]
    return Power(images.name, n_images, n_groups, comparisons, DISAGREEMENT, *smallest)


@dataclass(frozen=True)
class Planned:
    """A job in words, with a guess at the seconds it will take and at the bytes it will add to the cache."""

    job: str
    source: str
    done: bool
    seconds: float
    bytes: int


def plan_extraction(
    extraction: Extraction, found: Features, n_images: int, source: str, folder: RunFolder, *, shares: bool
) -> Planned:
    """Return an extraction with a guess at its time and disk space; `shares` if another one's pass gives its features.

    Then it takes no time of its own.
    """
    asked = extraction.request
    width = 2 if asked.store == "float16" else 4
    job = f"extract {', '.join(asked.layers)} of {asked.backbone}, {asked.pool}, {extraction.source}"
    if found.complete:
        return Planned(job, extraction.source, True, 0.0, 0)
    stored = n_images * sum(found.dims.values()) * width
    if shares:
        return Planned(job, extraction.source, False, 0.0, stored)
    measured = extraction_seconds(folder.read_info()).get((source, asked.backbone))
    flops, speed = operations(asked.backbone, asked.size), _speed(extraction.line.how()["device"])
    guess = START + n_images * (flops / speed + 1 / (DECODED * default_workers()))
    return Planned(job, extraction.source, False, measured or guess, stored)


def plan_fit(fit: Fit, found: Features, done: bool, images: ImageSource, folder: RunFolder, task: str) -> Planned:
    """Guess what a fit takes, from others with the same head and number of labels where there are some."""
    from pipeline.heads.registry import find_head

    head = find_head(fit.head, task)
    alike = [
        job.result.seconds
        for job in folder.results.values()
        if (job.result.head, job.result.shots) == (head.name, fit.shots)
    ]
    dim = sum(found.dims[name] for name in fit.layer.split("+"))
    guess = head.family.cost * _rows(images, fit.shots) * dim
    return Planned(str(fit), fit.extraction.source, done, 0.0 if done else fmean(alike) if alike else guess, 0)


def plan_finetune(job: Finetune, done: bool, images: ImageSource, device: str, *, stores: bool) -> Planned:
    """Return a fine-tune on this device of the plan with a guess at its time and disk space.

    `stores` says whether its activations must still be cached, rather than being those of another job.
    """
    options = dict(job.options)
    if done:
        return Planned(str(job), job.source, True, 0.0, 0)
    backbone, freeze, size = str(options["backbone"]), str(options["freeze"]), options.get("size")
    share = TRAINED_SHARE.get(freeze, 0.5)
    flops = operations(backbone, size)
    seconds = START + BACKWARD * share * flops * _rows(images, job.shots) * options["epochs"] / _speed(device)
    activations, weights = count_values(backbone, freeze, options["top"], size, max(1, len(images.classes)))
    views = options.get("views", 0 if options["augment"] == NO_AUGMENT else -1)  # -1: no activations are cached
    cached = len(images.items) * activations * (1 + views) * np.dtype(options["store"]).itemsize if stores else 0
    return Planned(str(job), job.source, False, seconds, cached + 4 * weights)


def _rows(images: ImageSource, shots: int | str) -> int:
    """Return the largest possible number of training images."""
    n_images = len(images.items)
    return n_images if shots == "all" else min(n_images, int(shots) * len(images.classes))


@cache
def count_values(backbone: str, freeze: str, top: str, size: Size | None, n_outputs: int) -> tuple[int, int]:
    """Return the number of activations of one image at a thaw line, and the number of thawed weights."""
    from pipeline.backbones.aliases import PENULTIMATE
    from pipeline.backbones.registry import sketch
    from pipeline.backbones.taps import tap
    from pipeline.finetuning.network import ALL, ThawedNetwork, line_of

    network = sketch(backbone, size)
    line = line_of(network, freeze)
    at_line = 0 if line is None else math.prod(line.shape)
    frozen = tap(network, [PENULTIMATE]).dims[DEFAULT_POOL][PENULTIMATE] if freeze == ALL else at_line
    return frozen, sum(item.numel() for item in ThawedNetwork(network, freeze, top, n_outputs).thawed_state().values())


@cache
def operations(backbone: str, size: Size | None) -> float:
    """Return the floating-point operations of a forward pass of one image, counted without loading weights."""
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    from pipeline.backbones.registry import sketch

    network = sketch(backbone, size)
    device = next(network.module.parameters()).device
    with FlopCounterMode(display=False) as counter, torch.inference_mode():
        network.module(torch.empty(1, 3, *network.preprocessing.size, device=device))
    return float(counter.get_total_flops())


def _speed(device: str) -> float:
    from pipeline.engines.select import find_device

    return CORE_SPEED * default_workers() if find_device(device) == "cpu" else CUDA_SPEED
