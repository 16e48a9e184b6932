"""Best weights, early stopping and checkpoints: what a run needs to end well, whenever it ends."""

from __future__ import annotations

import io
import math
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from skorch.callbacks import Callback
from skorch.history import History
from torch import Tensor

from features_cache import CacheError, atomic_write, explained
from pipeline.finetuning.net import DivergedError
from pipeline.finetuning.schedule import Schedule
from pipeline.results import Progress

SAVE_EVERY_S = 5.0
"""Least time between two checkpoints, so that short epochs are not spent on writing."""


class StopEarly(Exception):  # noqa: N818 - it is no error
    """The validation loss has not fallen for long."""


class Keeper(Callback):  # type: ignore[misc]
    """Keeps the best weights and writes checkpoints; stands last among the callbacks.

    Parameters
    ----------
    path : Path
        Of the checkpoint.
    patience : int or None
        Epochs without a lower validation loss after which to stop; None without validation images: every epoch is the
        best one then.
    schedule : Schedule
        Whose state belongs to the checkpoint.

    Attributes
    ----------
    best : dict of str to Tensor, or None
        Thawed weights of the best epoch so far.
    best_epoch : int
        Its number, from 1; 0 for none.
    problems : list of str
        What went wrong with checkpoints, without stopping the run.
    """

    def __init__(self, path: Path, patience: int | None, schedule: Schedule) -> None:
        self.path, self.patience, self.schedule = path, patience, schedule
        self.best: dict[str, Tensor] | None = None
        self.best_epoch = 0
        self.problems: list[str] = []
        self._saved = time.monotonic()

    def on_epoch_end(self, net: Any, **kwargs: Any) -> None:
        """Judge the epoch, stop if it is time, write a checkpoint if it is time."""
        epoch = net.history[-1]
        if not math.isfinite(epoch.get("valid_loss", 0.0)):
            raise DivergedError(f"the validation loss became {epoch['valid_loss']} in epoch {epoch['epoch']}")
        del epoch["batches"]  # every loss of every step: not worth its memory
        epoch.update({name: float(value) for name, value in epoch.items() if isinstance(value, np.floating)})
        losses = [earlier["valid_loss"] for earlier in net.history] if self.patience is not None else []
        if not losses or losses[-1] < min(losses[:-1], default=float("inf")):
            self.best_epoch = epoch["epoch"]
            self.best = {name: item.detach().cpu().clone() for name, item in net.module_.thawed_state().items()}
        if self.patience is not None and epoch["epoch"] - self.best_epoch >= self.patience:
            raise StopEarly  # before a checkpoint from which a run would go on to one epoch more
        if time.monotonic() - self._saved >= SAVE_EVERY_S:
            self.save(net)

    def save(self, net: Any, *, diverged: bool = False, finished: bool = False) -> None:
        """Write the checkpoint; a finished run keeps its best weights alone."""
        state: dict[str, Any] = {
            "history": [dict(epoch) for epoch in net.history if "batches" not in epoch],
            "best": self.best,
            "best_epoch": self.best_epoch,
            "diverged": diverged,
            "finished": finished,
        }
        if not finished:
            state |= {
                "weights": net.module_.thawed_state(),
                "optimizer": net.optimizer_.state_dict(),
                "schedule": self.schedule.state_dict(),
            }
        try:
            write_checkpoint(self.path, state)
        except CacheError as error:
            if not self.problems:
                self.problems.append(f"training went on without a checkpoint: {error}")
        self._saved = time.monotonic()

    def restore(self, net: Any, state: dict[str, Any]) -> None:
        """Put `net`, which is initialised and whose callbacks have begun, where the checkpoint was written."""
        self.best, self.best_epoch = state["best"], state["best_epoch"]
        if not state["finished"]:
            net.module_.load_thawed(state["weights"])
            net.optimizer_.load_state_dict(state["optimizer"])
            self.schedule.load_state_dict(state["schedule"])


def write_checkpoint(path: Path, state: dict[str, Any]) -> None:
    """Write `state` to `path` so that the file is always whole; raises `CacheError` where it cannot."""
    buffer = io.BytesIO()
    torch.save(state, buffer)
    with explained(path, "write the checkpoint"), atomic_write(path) as draft:
        draft.write_bytes(buffer.getbuffer())


def read_checkpoint(path: Path) -> dict[str, Any] | None:
    """Return what was written, or None where there is no checkpoint.

    Raises
    ------
    CacheError
        If the file is damaged.
    """
    if not path.exists():
        return None
    try:
        state: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # damaged bytes make torch's reader raise nearly anything
        raise CacheError(f"the checkpoint {path} is damaged; delete it and train again") from error
    return state


def as_history(epochs: list[dict[str, Any]]) -> History:
    """Return skorch's history of these epochs."""
    history = History()
    for epoch in epochs:
        history.new_epoch()
        history[-1].update(epoch)
        del history[-1]["batches"]
    return history


class Report(Callback):  # type: ignore[misc]
    """Tells a progress callable after every step how far the run is and how well it went so far.

    Parameters
    ----------
    progress : callable
        ``progress(steps done, steps in all, name, how it goes)``.
    name : str
        Of the run.
    epochs, steps : int
        Epochs at most, and steps in each.
    """

    def __init__(self, progress: Progress, name: str, epochs: int, steps: int) -> None:
        self.progress, self.name, self.epochs, self.steps = progress, name, epochs, steps

    def on_batch_end(self, net: Any, training: bool = False, **kwargs: Any) -> None:
        """Count a step."""
        if training:
            epoch = len(net.history)
            done = (epoch - 1) * self.steps + len(net.history[-1]["batches"])
            self.progress(done, self.epochs * self.steps, self.name, self._text(net.history, epoch))

    def on_train_end(self, net: Any, **kwargs: Any) -> None:
        """Fill the bar, also after an early stop."""
        total = self.epochs * self.steps
        self.progress(total, total, self.name, self._text(net.history, len(net.history)))

    def _text(self, history: History, epoch: int) -> str:
        last: dict[str, Any] = next((earlier for earlier in reversed(history) if "batches" not in earlier), {})
        named = (("train_loss", "train loss"), ("valid_loss", "val loss"), ("valid_acc", "val accuracy"))
        told = [f"{label} {last[key]:.3f}" for key, label in named if key in last]
        return ", ".join([f"epoch {epoch}/{self.epochs}", *told])
