"""The training loop of one run: from a network and its rows to the network with its best weights."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.utils import clip_grad_norm_
from torch.optim import SGD, AdamW, Optimizer

from features_cache import CacheError, ThawlineError
from pipeline.arrays import Float64Array
from pipeline.backbones.trace import hooked
from pipeline.engines.memory import keep_freed_memory
from pipeline.errors import FitError
from pipeline.finetuning.checkpoint import read_checkpoint, write_checkpoint
from pipeline.finetuning.groups import parameter_groups
from pipeline.finetuning.inputs import Inputs, Subset
from pipeline.finetuning.network import ThawedNetwork, layer_name
from pipeline.finetuning.objective import Objective
from pipeline.finetuning.recipe import Recipe
from pipeline.finetuning.schedule import Schedule
from pipeline.finetuning.watch import GradientWatch, judge
from pipeline.results import Progress

MOMENTUM = 0.9
SCALED_BY = 512
"""The new top's standardisation is measured on this many training images at most."""
SAVE_EVERY_S = 5.0
"""Least time between two checkpoints, so that short epochs do not spend their time on writing."""

Epoch = dict[str, Any]
"""What is recorded of an epoch: ``epoch`` (from 1), ``train_loss``, ``train_acc`` (of each batch before its step),
``valid_loss``, ``valid_acc`` (accuracies only where the objective has classes), ``lr``, ``seconds``, and ``gradients``
(see `pipeline.finetuning.watch.GradientWatch`) where they are watched."""


class DivergedError(ThawlineError):
    """The loss is no longer a finite number."""


@dataclass(frozen=True, eq=False)
class Trained:
    """The outcome of `train`; the network has the weights of the best epoch, counted from 1.

    `diverged` says that training ended because the loss was not finite. `resumed_seconds` are those of the epochs that
    came from a checkpoint.
    """

    history: list[Epoch]
    best_epoch: int
    diverged: bool
    resumed_seconds: float
    notes: list[str]


def train(
    network: ThawedNetwork,
    recipe: Recipe,
    rate: float,
    rows: Subset,
    val: Subset | None,
    objective: Objective,
    checkpoint: Path,
    seed: int,
    device: str,
    progress: Progress,
    name: str,
    *,
    watch: bool = False,
) -> Trained:
    """Train what is thawed, and leave `network` with its best weights; go on from `checkpoint` if the file exists.

    `rate` is that of the new top, and `seed` draws dropout. Without `val` there is no early stopping, and the last
    weights are the best. `name` is what progress and notes call this run. With `watch`, gradients are recorded and
    judged. Raises `FitError` if the loss is not finite before the first epoch is over.
    """
    keep_freed_memory()
    norms = [name for name, part in network.body.named_modules() if isinstance(part, nn.modules.batchnorm._BatchNorm)]
    if norms and len(rows.rows) // rows.n_batches == 1:
        raise FitError(
            f"batch norms, such as {norms[0]}, cannot learn from batches of one image; use a batch size of 2 or more, "
            "or freeze everything"
        )
    trainer = _Trainer(network, recipe, rate, rows, val, objective, seed, device, watch=watch)
    trainer.restore(read_checkpoint(checkpoint))
    resumed_seconds = sum(epoch["seconds"] for epoch in trainer.history)
    total = recipe.epochs * rows.n_batches
    notes: list[str] = []

    def tell(epoch: int, step: int) -> None:
        done = (epoch - 1) * rows.n_batches + step
        progress(done, total, name, _progress_text(epoch, recipe.epochs, trainer.history))

    saved_at = time.monotonic()
    while not trainer.finished:
        try:
            trainer.add(trainer.next_epoch(tell))
        except DivergedError as error:
            advice = "use a lower learning rate, or clip the gradient to norm 1"
            if trainer.best is None:
                raise FitError(f"{error}, before there were any weights to keep; {advice}") from error
            notes.append(f"{error}: the weights of epoch {trainer.best_epoch} are kept; {advice}")
            trainer.diverged = trainer.finished = True
        if trainer.finished or time.monotonic() - saved_at >= SAVE_EVERY_S:
            try:
                write_checkpoint(checkpoint, trainer.state())
            except CacheError as error:  # training goes on: only a kill would lose something
                notes.append(f"training went on without a checkpoint: {error}")
            saved_at = time.monotonic()
    network.load_thawed(trainer.best or {})
    progress(total, total, name, _progress_text(len(trainer.history), recipe.epochs, trainer.history))
    if watch:
        notes += [f"{name}: {warning}" for warning in judge(trainer.history)]
    return Trained(trainer.history, trainer.best_epoch, trainer.diverged, resumed_seconds, list(dict.fromkeys(notes)))


class _Trainer:
    """A network in training, and all that a checkpoint must hold to go on with it.

    `best` are the thawed weights of the best epoch so far, on the CPU, and `best_epoch` is its number, from 1.
    """

    def __init__(
        self,
        network: ThawedNetwork,
        recipe: Recipe,
        rate: float,
        rows: Subset,
        val: Subset | None,
        objective: Objective,
        seed: int,
        device: str,
        *,
        watch: bool,
    ) -> None:
        self.network = network.to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.recipe, self.rows, self.val, self.seed, self.device = recipe, rows, val, seed, device
        self.optimizer = make_optimizer(network, recipe, rate)
        self.objective = objective.to(device)
        self.schedule = Schedule(self.optimizer, recipe, rows.n_batches)
        self.watch = GradientWatch(network) if watch else None
        self.history: list[Epoch] = []
        self.best: dict[str, Tensor] | None = None
        self.best_epoch = 0
        self.diverged = self.finished = False

    def next_epoch(self, tell: Callable[[int, int], None]) -> Epoch:
        """Train on all rows once, validate, and return the record; ``tell(epoch, step)`` is called after each step."""
        began = time.perf_counter()
        number = len(self.history) + 1
        torch.manual_seed(self.seed * 100_003 + number)  # dropout is the same if a run goes on from a checkpoint
        losses, sizes, right = [], [], []
        self.network.train()
        for step, (inputs, targets) in enumerate(self.rows.batches(number - 1), start=1):
            self.schedule.before_step()
            inputs, targets = _on(self.device, inputs), targets.to(self.device)
            clip = self.recipe.clip
            loss, outputs = take_step(self.network, inputs, targets, self.objective, self.optimizer, clip, self.watch)
            if not math.isfinite(loss):
                layer = first_bad_layer(self.network, inputs)
                raise DivergedError(f"the loss became {loss} at step {step} of epoch {number}, first in {layer}")
            losses.append(loss)
            sizes.append(len(targets))
            if (hits := self.objective.right(outputs, targets)) is not None:
                right.append(float(hits.sum()))
            tell(number, step)
        record: Epoch = {"epoch": number, "train_loss": float(np.average(losses, weights=sizes))}
        if right:
            record["train_acc"] = sum(right) / sum(sizes)
        if self.val is not None:
            record |= self._validate(self.val, number)
        record["lr"] = max(float(group["lr"]) for group in self.optimizer.param_groups)
        if self.watch is not None:
            record["gradients"] = self.watch.end_epoch()
        self.schedule.after_epoch(record["train_loss" if self.val is None else "valid_loss"])
        return record | {"seconds": time.perf_counter() - began}

    @torch.no_grad()
    def _validate(self, val: Subset, epoch: int) -> Epoch:
        self.network.eval()
        losses, sizes, right = [], [], []
        for inputs, targets in val.batches():
            targets = targets.to(self.device)
            outputs = self.network(*_on(self.device, inputs))
            losses.append(self.objective(outputs, targets).item())
            sizes.append(len(targets))
            if (hits := self.objective.right(outputs, targets)) is not None:
                right.append(float(hits.sum()))
        loss = float(np.average(losses, weights=sizes))
        if not math.isfinite(loss):
            raise DivergedError(f"the validation loss became {loss} in epoch {epoch}")
        return {"valid_loss": loss, **({"valid_acc": sum(right) / sum(sizes)} if right else {})}

    def add(self, epoch: Epoch) -> None:
        """Record an epoch that is over, keep its weights if they are the best, and decide whether it was the last."""
        earlier = [past["valid_loss"] for past in self.history if self.val is not None]
        self.history.append(epoch)
        if self.val is None or epoch["valid_loss"] < min(earlier, default=math.inf):
            self.best_epoch = epoch["epoch"]
            self.best = {name: item.detach().cpu().clone() for name, item in self.network.thawed_state().items()}
        out_of_patience = self.val is not None and epoch["epoch"] - self.best_epoch >= self.recipe.patience
        self.finished = out_of_patience or epoch["epoch"] == self.recipe.epochs

    def state(self) -> dict[str, Any]:
        """Return the checkpoint's content; that of a finished run has no weights but the best."""
        state = {name: getattr(self, name) for name in ("history", "best", "best_epoch", "diverged", "finished")}
        if not self.finished:
            state["weights"] = self.network.thawed_state()
            state |= {"optimizer": self.optimizer.state_dict(), "schedule": self.schedule.state_dict()}
        return state

    def restore(self, state: dict[str, Any] | None) -> None:
        """Go on from a checkpoint's content, if there is any."""
        if state is None:
            return
        self.history, self.best, self.best_epoch = state["history"], state["best"], state["best_epoch"]
        self.diverged = state["diverged"]
        self.finished = state["finished"] or len(self.history) == self.recipe.epochs
        if not self.finished:
            self.network.load_thawed(state["weights"])
            self.optimizer.load_state_dict(state["optimizer"])
            self.schedule.resume(len(self.history), state["schedule"])


def take_step(
    network: nn.Module,
    inputs: Inputs,
    targets: Tensor,
    objective: nn.Module,
    optimizer: Optimizer,
    clip: float | None = None,
    watch: GradientWatch | None = None,
) -> tuple[float, Tensor]:
    """Make one optimizer step on a batch; return the loss and the outputs before it.

    If the loss is not finite, no step is made.
    """
    optimizer.zero_grad()
    outputs = network(*inputs)
    loss = objective(outputs, targets)
    value = float(loss.item())
    if not math.isfinite(value):
        return value, outputs
    loss.backward()
    if watch is not None:
        watch.before_step()
    if clip is not None:
        clip_grad_norm_(network.parameters(), clip)
    optimizer.step()
    if watch is not None:
        watch.after_step()
    return value, outputs.detach()


def predict_scores(network: ThawedNetwork, rows: Subset, device: str) -> Float64Array:
    """Return the outputs of the network for `rows` (n, k)."""
    network.eval()
    with torch.no_grad():
        scores = torch.cat([network(*_on(device, inputs)).cpu() for inputs, _ in rows.batches()])
    return scores.double().numpy()


def standardise(network: ThawedNetwork, rows: Subset, device: str, *, training: bool = False) -> None:
    """Give the features of some training images mean 0 and variance 1, as the new top reads them before training.

    With random weights, this has to be in `training` mode: batch norms have not seen any images yet, so that features
    in evaluation mode can be many powers of ten larger or smaller than those that the top will read.
    """
    network.to(device).train(training)
    with torch.no_grad():
        read = [network.features(*_on(device, inputs)) for inputs, _ in rows.sample(SCALED_BY).batches()]
    frozen = next(network.body.parameters(), None) is None
    network.new_head.standardise.set_from(torch.cat([features for features, _ in read]), frozen=frozen)
    if network.new_head.standardise_image is not None:
        images = torch.cat([image for _, image in read if image is not None])
        network.new_head.standardise_image.set_from(images, frozen=True)


def make_optimizer(network: ThawedNetwork, recipe: Recipe, rate: float) -> Optimizer:
    """Return the optimizer over the thawed weights; raises `FitError` if a layer of `Recipe.lr_at` is frozen."""
    groups = parameter_groups(network, rate, recipe.layer_decay, recipe.lr_at, recipe.weight_decay)
    if recipe.optimizer == "sgd":
        return SGD(groups, rate, momentum=MOMENTUM, nesterov=True, fused=True)
    return AdamW(groups, rate, fused=True)


def first_bad_layer(network: nn.Module, inputs: Inputs) -> str:
    """Return the first thawed layer whose weights are not all finite, else the first whose output is not."""
    for name, item in network.named_parameters():
        if item.requires_grad and not item.isfinite().all():
            return layer_name(name)
    found: list[str] = []

    def look(name: str, module: nn.Module, args: object, value: Any) -> None:
        if not found and isinstance(value, Tensor) and not value.isfinite().all():
            found.append(layer_name(f"{name}."))

    leaves = [name for name, module in network.named_modules() if not list(module.children())]
    with hooked(network, {name: partial(look, name) for name in leaves}), torch.no_grad():
        network(*inputs)
    return found[0] if found else "the loss itself"


def _on(device: str, inputs: Inputs) -> Inputs:
    return tuple(item.to(device) for item in inputs)


def _progress_text(epoch: int, epochs: int, history: list[Epoch]) -> str:
    """Say which epoch runs, and what the last one that is over came to."""
    last = history[-1] if history else {}
    named = (("train_loss", "train loss"), ("valid_loss", "val loss"), ("valid_acc", "val accuracy"))
    return ", ".join([f"epoch {epoch}/{epochs}", *(f"{label} {last[key]:.3f}" for key, label in named if key in last)])
