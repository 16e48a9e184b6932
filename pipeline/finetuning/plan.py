"""What all runs of a call share: what is trained on what, and how it is computed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from pipeline.finetuning.recipe import Recipe
from pipeline.results import ExtractResult, Progress

FOLDER = "finetune"
"""Of checkpoints and of what only training reads, within the folder of cache files, whose other readers pass it by."""


@dataclass(frozen=True)
class Plan:
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
        Folder of cache files, for what it holds already.
    precision : str
        As asked for.
    store, engine, device : str
    size, workers : int, optional
        As for extraction.
    progress : callable
    say : callable
        Takes a sentence that the user should read now.
    extracted : list of list of ExtractResult
        Takes what each extraction came to.
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
        """Of checkpoints, and of cache files that are made here."""
        return self.output / FOLDER

    @property
    def rate(self) -> float:
        """Learning rate of the uppermost layers."""
        return self.recipe.rate(new_only=self.freeze == "all" or self.init == "random")
