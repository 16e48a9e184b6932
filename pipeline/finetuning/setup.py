"""What all runs of a call have in common: what is trained on which images, and how it is computed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from pipeline.finetuning.recipe import Recipe
from pipeline.results import ExtractResult, Progress

FOLDER = "finetune"
"""Folder inside the cache folder, for checkpoints and for cache files that only training reads. Other readers of the
cache folder do not look into it."""


@dataclass(frozen=True)
class TrainingSetup:
    """The arguments of `pipeline.finetune.finetune` that are the same for all seeds and shots.

    Parameters
    ----------
    source : str or Path
    backbone : str
        ``NAME`` or ``NAME@WEIGHTS``.
    freeze : str
    recipe : Recipe
    init : str
    head_first : bool
    watch : bool
        Whether to record and judge gradients.
    output : Path
        The user's cache folder; layers that it holds already are read from it.
    precision : str
        As asked for.
    store, engine, device : str
    size, workers : int, optional
        As for extraction.
    progress : callable
    say : callable
        Takes a sentence that the user should read now.
    extracted : list of list of ExtractResult
        Collects the results of each call of `pipeline.extract.extract`.
    """

    source: str | Path
    backbone: str
    freeze: str
    recipe: Recipe
    init: str
    head_first: bool
    watch: bool
    output: Path
    precision: str
    store: str
    size: int | None
    engine: str
    device: str
    workers: int | None
    progress: Progress
    say: Callable[[str], None]
    extracted: list[list[ExtractResult]] = field(default_factory=list)

    @property
    def folder(self) -> Path:
        """For checkpoints, and for cache files that only training reads."""
        return self.output / FOLDER

    @property
    def rate(self) -> float:
        """Learning rate of the new top and of the layers next to it."""
        return self.recipe.rate(new_only=self.freeze == "all" or self.init == "random")
