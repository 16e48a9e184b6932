"""Pretext tasks: labels that cost nothing, because they are made from the images themselves.

A task says what it shows of an image, what is to be predicted of that, by which new top, and how wrong a prediction is.
The loop, its checkpoints and its early stopping are those of fine-tuning.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, mse_loss

from pipeline.arrays import IntArray
from pipeline.finetuning.inputs import DecodedImages, Inputs, Subset
from pipeline.finetuning.objective import Classification, Objective
from pipeline.pretraining.windows import PAN, PAN_TURN, SHIFTS, TURNS, Pose, first_pose, window

HIDDEN = 256
"""Units of the hidden layer in the tops of ego-motion and slow features."""
EMBEDDED = 128
"""Outputs of the top of slow features."""
SLOW, SPREAD, APART = 25.0, 25.0, 1.0
"""Weights of the three terms of `Slowness`, those of Bardes et al. (2022)."""
_FLOOR = 1e-4
"""Added to a variance before its root is taken, as by Bardes et al."""


class Task(Protocol):
    """A pretext task on images that it can read.

    `objective` judges the outputs of the top, `copies` is how many inputs an image becomes, and `chance` is the
    accuracy of guessing (None where nothing is classified).
    """

    objective: Objective
    copies: int
    chance: float | None

    def read(self, rows: IntArray, view: int) -> tuple[Inputs, Tensor]:
        """Return the inputs of the images in `rows` (k,) and their targets, drawn by the number `view`."""

    def top(self, features: int) -> nn.Module:
        """Return a new top, from `features` numbers of each input to what the objective judges."""


class TaskRows(Subset):
    """Rows of images that a task is trained or validated on, in batches of inputs and targets.

    An epoch is shuffled, and its views are drawn, by `seed` and its number.
    """

    def __init__(self, task: Task, images: DecodedImages, rows: IntArray, batch_size: int, seed: int) -> None:
        super().__init__(images, rows, np.zeros(len(rows), np.int64), batch_size, seed, augmented=True)
        self.task = task

    def read_batch(self, index: IntArray, view: int | None) -> tuple[Inputs, Tensor]:
        """Return the inputs and targets of the rows at `index` (k,) of this subset."""
        return self.task.read(self.rows[index], view or 0)


class Rotation:
    """By which multiple of 90 degrees is an image turned? All four are in the same batch (Gidaris et al. 2018)."""

    copies = 4
    chance: float | None = 1 / 4

    def __init__(self, images: DecodedImages, *, augmented: bool) -> None:
        self.images, self.augmented = images, augmented
        self.objective: Objective = Classification()

    def read(self, rows: IntArray, view: int) -> tuple[Inputs, Tensor]:
        """Return the images turned by 0, 90, 180 and 270 degrees (4k, h, w, 3), and the numbers of turns (4k,)."""
        (pixels,) = self.images.read(rows, view if self.augmented else None)
        turned = torch.cat([torch.rot90(pixels, turns, (1, 2)) for turns in range(4)])
        return (turned,), torch.arange(4).repeat_interleave(len(rows))

    def top(self, features: int) -> nn.Module:
        """Return a linear layer with an output for each turn."""
        return nn.Linear(features, 4)


class PseudoClasses:
    """Which image is this an augmented view of? Every image is a class of its own (Dosovitskiy et al. 2014)."""

    copies = 1

    def __init__(self, images: DecodedImages, rows: IntArray) -> None:
        self.images, self.rows = images, rows
        self.objective: Objective = Classification()
        self.chance: float | None = 1 / len(rows)

    def read(self, rows: IntArray, view: int) -> tuple[Inputs, Tensor]:
        """Return a view of each image (k, h, w, 3), and the positions of the images among all classes (k,)."""
        return self.images.read(rows, view), torch.from_numpy(np.searchsorted(self.rows, rows))

    def top(self, features: int) -> nn.Module:
        """Return a linear layer with an output for each image."""
        return nn.Linear(features, len(self.rows))


Move = Callable[[Pose, np.random.Generator], Pose]
"""Draws the second window's pose from the first's."""


class Canvases:
    """Pairs of windows that move over the images; `images` gives canvases, `size` is that of a window.

    What is drawn for an image depends on the number of the view and on its digest alone; `digests` (n, 16) has a row
    for each image of the source.
    """

    def __init__(self, images: DecodedImages, size: tuple[int, int], digests: NDArray[np.uint8]) -> None:
        self.images, self.size, self.digests = images, size, digests

    def pairs(self, rows: IntArray, view: int, move: Move) -> Inputs:
        """Return the first windows of all images, and then the second ones: uint8 pixels (2k, h, w, 3)."""
        (canvases,) = self.images.read(rows, None)
        first, second = [], []
        for row, canvas in zip(rows.tolist(), canvases.numpy(), strict=True):
            generator = np.random.default_rng([view, int.from_bytes(self.digests[row].tobytes(), "big")])
            pose = first_pose(generator)
            first.append(window(canvas, pose, self.size))
            second.append(window(canvas, move(pose, generator), self.size))
        return (torch.from_numpy(np.stack([*first, *second])),)


class EgoMotion:
    """How did the camera move and turn between two windows of an image (Agrawal et al. 2015)?

    Both windows go through the same network. The top reads the features of both, and says which of `SHIFTS` was made
    along each axis, and which of `TURNS`.
    """

    copies = 2

    def __init__(self, canvases: Canvases) -> None:
        self.canvases = canvases
        self.objective: Objective = MotionClasses()
        self.chance: float | None = 1 / len(SHIFTS)

    def read(self, rows: IntArray, view: int) -> tuple[Inputs, Tensor]:
        """Return all first and then all second windows (2k, h, w, 3), and shifts and turns as numbers (k, 3)."""
        motions = []

        def second(first: Pose, generator: np.random.Generator) -> Pose:
            x, y, turn = generator.integers(len(SHIFTS), size=3).tolist()
            motions.append((x, y, turn))
            return first.moved(SHIFTS[x], SHIFTS[y], TURNS[turn])

        return self.canvases.pairs(rows, view, second), torch.tensor(motions)

    def top(self, features: int) -> nn.Module:
        """Return a hidden layer on the features of both windows, and outputs for both shifts and the turn."""
        outputs = 2 * len(SHIFTS) + len(TURNS)
        return nn.Sequential(_Joined(), nn.Linear(2 * features, HIDDEN), nn.ReLU(), nn.Linear(HIDDEN, outputs))


class MotionClasses(Objective):
    """The mean of three cross-entropies: of both shifts and the turn, which share the outputs (k, 15)."""

    def forward(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Return the loss of motions (k, 3)."""
        losses = [cross_entropy(scores, target) for scores, target in _by_motion(outputs, targets)]
        return torch.stack(losses).mean()

    def right(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Return the share of the three that is right, of each pair (k,)."""
        hits = [scores.argmax(1) == target for scores, target in _by_motion(outputs, targets)]
        return torch.stack(hits).float().mean(0)


def _by_motion(outputs: Tensor, targets: Tensor) -> list[tuple[Tensor, Tensor]]:
    parts = torch.split(outputs, [len(SHIFTS), len(SHIFTS), len(TURNS)], 1)
    return list(zip(parts, targets.unbind(1), strict=True))


class _Joined(nn.Module):
    """Join the features of the first and the second half of a batch (2k, d) to (k, 2d)."""

    def forward(self, features: Tensor) -> Tensor:
        return torch.cat(features.chunk(2), 1)


class SlowFeatures:
    """Features that change little from a frame to the next, and yet differ from image to image.

    Frames follow each other in the source (`following`: the row of the next frame, by row) or, where that is None, are
    two windows of an image, as a camera sees them that pans over it.
    """

    copies = 2
    chance: float | None = None

    def __init__(self, images: DecodedImages, canvases: Canvases, following: Mapping[int, int] | None) -> None:
        self.images, self.canvases, self.following = images, canvases, following
        self.objective: Objective = Slowness()

    def read(self, rows: IntArray, view: int) -> tuple[Inputs, Tensor]:
        """Return all first and then all second frames (2k, h, w, 3); the targets (k,) mean nothing."""
        targets = torch.zeros(len(rows))
        if self.following is None:
            return self.canvases.pairs(rows, view, _panned), targets
        after = np.array([self.following[row] for row in rows.tolist()], np.int64)
        return self.images.read(np.concatenate([rows, after]), None), targets

    def top(self, features: int) -> nn.Module:
        """Return a hidden layer, and an embedding on which slowness is measured."""
        return nn.Sequential(nn.Linear(features, HIDDEN), nn.ReLU(), nn.Linear(HIDDEN, EMBEDDED))


class Slowness(Objective):
    """Slow, spread and uncorrelated: the three demands of slow feature analysis, softened as in VICReg.

    Slow feature analysis (Wiskott & Sejnowski 2002) asks for outputs that change least from frame to frame among all
    that have unit variance and are uncorrelated; without the last two, a constant would be best. VICReg (Bardes et al.
    2022) has the same three as terms of a loss, so that a network can be trained in batches.
    """

    def forward(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Return the loss of the embeddings of first and second frames (2k, d)."""
        first, second = outputs.float().chunk(2)
        spread = apart = outputs.new_zeros(())
        for frames in (first, second):
            centred = frames - frames.mean(0)
            covariance = centred.T @ centred / max(1, len(frames) - 1)
            deviation = (covariance.diagonal() + _FLOOR).sqrt()
            spread = spread + (1 - deviation).clamp(min=0).mean() / 2
            apart = apart + (covariance - covariance.diagonal().diag()).square().sum() / frames.shape[1]
        return SLOW * mse_loss(first, second) + SPREAD * spread + APART * apart


def _panned(first: Pose, generator: np.random.Generator) -> Pose:
    angle, length = generator.uniform(0, 2 * np.pi), generator.uniform(0, PAN)
    turn = float(generator.uniform(-PAN_TURN, PAN_TURN))
    return first.moved(float(length * np.cos(angle)), float(length * np.sin(angle)), turn)


def next_frames(uris: Sequence[str], groups: Sequence[str], rows: IntArray) -> dict[int, int]:
    """Return the row of the next frame, for each of `rows` that has one among them.

    A group is a sequence, in the order of its names; numbers in names count as numbers.

    Examples
    --------
    >>> next_frames(["a/10", "a/9", "b/1", "c"], ["a", "a", "b", ""], np.arange(4))
    {1: 0}
    """
    sequences: dict[str, list[int]] = {}
    for row in sorted(rows.tolist(), key=lambda row: _natural(uris[row])):
        if groups[row]:
            sequences.setdefault(groups[row], []).append(row)
    return {row: after for frames in sequences.values() for row, after in pairwise(frames)}


def _natural(name: str) -> list[tuple[int, str]]:
    return [(int(part), "") if part.isdecimal() else (-1, part) for part in re.split(r"(\d+)", name)]
