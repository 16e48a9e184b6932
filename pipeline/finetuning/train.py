"""One run: from a network and its rows to its best weights."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from pipeline.engines.memory import keep_freed_memory
from pipeline.errors import FitError
from pipeline.finetuning.health import judge
from pipeline.finetuning.inputs import Part
from pipeline.finetuning.keeper import Keeper, Report, StopEarly, as_history, read_checkpoint
from pipeline.finetuning.net import DivergedError, Net, make_net
from pipeline.finetuning.network import Network
from pipeline.finetuning.recipe import Recipe
from pipeline.finetuning.schedule import Schedule
from pipeline.finetuning.watch import Watch
from pipeline.results import Progress

SCALED_BY = 512
"""Training images that the new head's standardisation is taken from, at most."""


@dataclass(frozen=True, eq=False)
class Trained:
    """What came of a run.

    Parameters
    ----------
    net : Net
        With the best weights.
    history : list of dict
        An entry for each epoch: ``epoch``, ``train_loss``, ``valid_loss``, ``valid_acc``, ``lr``, ``seconds``, and the
        ``gradients`` of `pipeline.finetuning.watch.Watch` where they were watched.
    best_epoch : int
        The epoch whose weights were kept, from 1.
    diverged : bool
        Whether training ended because the loss was not finite.
    earlier : float
        Seconds of the epochs that came from a checkpoint.
    notes : list of str
        What a user should know, a sentence each.
    """

    net: Net
    history: list[dict[str, Any]]
    best_epoch: int
    diverged: bool
    earlier: float
    notes: list[str]

    @property
    def valid_accuracy(self) -> float | None:
        """Accuracy on validation images at the best epoch; None without any."""
        return self.history[self.best_epoch - 1].get("valid_acc")


def train(
    network: Network,
    recipe: Recipe,
    rate: float,
    part: Part,
    valid: Part | None,
    classes: int,
    checkpoint: Path,
    seed: int,
    device: str,
    progress: Progress,
    name: str,
    *,
    watch: bool = False,
) -> Trained:
    """Train what is thawed, going on from `checkpoint` if it exists.

    Parameters
    ----------
    network : Network
        Its weights change.
    recipe : Recipe
    rate : float
        Learning rate of the new head.
    part, valid : Part
        Training and validation rows; None for none of the latter.
    classes : int
        Number of classes.
    checkpoint : Path
        Written while training and when it is done.
    seed : int
        Draws dropout.
    device : str
    progress : callable
        ``progress(steps done, steps in all, name, how it goes)``.
    name : str
        How the progress and the notes call this run.
    watch : bool, default False
        Whether to record and judge gradients.

    Raises
    ------
    FitError
        If the loss is not finite before the first epoch is over, or batches of one meet a batch norm.
    CacheError
        If the checkpoint is damaged.
    """
    keep_freed_memory()
    network.to(memory_format=torch.channels_last)
    if part.smallest == 1:
        _refuse_batches_of_one(network)
    schedule = Schedule(recipe, part.count, validated=valid is not None)
    keeper = Keeper(checkpoint, recipe.patience if valid is not None else None, schedule)
    report = Report(progress, name, recipe.epochs, part.count)
    counts = np.bincount(part.labels, minlength=classes)
    callbacks = [schedule, *([Watch()] if watch else []), report, keeper]
    net = make_net(network, recipe, rate, counts, valid, callbacks, seed, device).initialize()
    state = read_checkpoint(checkpoint)
    net.history = as_history(state["history"] if state else [])
    net.notify("on_train_begin", X=part, y=None)
    if state:
        keeper.restore(net, state)
    earlier = sum(epoch["dur"] for epoch in net.history)
    diverged = state is not None and state["diverged"]
    notes: list[str] = []
    if not (state and state["finished"]):
        part.epoch = len(net.history)
        diverged = _run(net, part, recipe, keeper, notes)
    network.load_thawed(keeper.best or {})
    net.notify("on_train_end", X=part, y=None)
    history = [_entry(epoch) for epoch in net.history]
    notes += keeper.problems + [f"{name}: {warning}" for warning in (judge(history) if watch else [])]
    return Trained(net, history, keeper.best_epoch, diverged, earlier, notes)


def _run(net: Net, part: Part, recipe: Recipe, keeper: Keeper, notes: list[str]) -> bool:
    """Run the epochs that are left; return whether the loss went astray."""
    diverged = False
    try:
        net.fit_loop(part, epochs=recipe.epochs - len(net.history))
    except StopEarly:  # the patience is over; the keeper has the best weights
        pass
    except DivergedError as error:
        net.history = as_history([epoch for epoch in net.history if "batches" not in epoch])
        advice = "take a lower --lr, or --clip 1"
        if keeper.best is None:
            raise FitError(f"{error}, before any weights were worth keeping; {advice}") from error
        notes.append(f"{error}: the weights of epoch {keeper.best_epoch} are kept; {advice}")
        diverged = True
    keeper.save(net, diverged=diverged, finished=True)
    return diverged


def _refuse_batches_of_one(network: Network) -> None:
    norms = [
        name for name, module in network.body.named_modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)
    ]
    if norms:
        raise FitError(
            f"batch norms, such as {norms[0]}, cannot learn from batches of one image; take --batch-size 2 or more, "
            "or freeze everything"
        )


def standardise(network: Network, part: Part, device: str) -> None:
    """Make the features of some training images, as they are before training, have mean 0 and variance 1."""
    network.to(device)
    with torch.no_grad():
        read = [network.features(*(item.to(device) for item in inputs)) for inputs, _ in part.take(SCALED_BY)]
    images = [image for _, image in read if image is not None]
    network.new_head.set_scales(torch.cat([features for features, _ in read]), torch.cat(images) if images else None)


def _entry(epoch: dict[str, Any]) -> dict[str, Any]:
    """Return what of skorch's history entry is worth keeping."""
    keys = ("epoch", "train_loss", "valid_loss", "valid_acc", "lr", "gradients")
    return {key: epoch[key] for key in keys if key in epoch} | {"seconds": epoch["dur"]}
