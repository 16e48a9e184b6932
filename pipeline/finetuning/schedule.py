"""How the learning rates change over a run: warm-up, then a cosine to zero, or a cut at every plateau."""

from __future__ import annotations

from typing import Any

from skorch.callbacks import Callback
from timm.scheduler import CosineLRScheduler
from torch.optim import Optimizer
from torch.optim.lr_scheduler import ReduceLROnPlateau

from pipeline.finetuning.recipe import Recipe


class Schedule(Callback):  # type: ignore[misc]
    """Sets the rate of every parameter group before each step.

    Parameters
    ----------
    recipe : Recipe
    steps : int
        Steps an epoch.
    validated : bool
        Whether there is a validation loss; the training loss tells plateaus otherwise.
    """

    def __init__(self, recipe: Recipe, steps: int, *, validated: bool) -> None:
        self.recipe, self.steps = recipe, steps
        self.monitor = "valid_loss" if validated else "train_loss"

    def on_train_begin(self, net: Any, **kwargs: Any) -> None:
        """Make the scheduler for the net's optimizer, which may be in the middle of a run."""
        total = self.steps * self.recipe.epochs
        self.step_ = len(net.history) * self.steps
        self.warmup_ = min(self.steps * self.recipe.warmup, total // 2)
        optimizer: Optimizer = net.optimizer_
        if self.recipe.schedule == "cosine":  # of one step more than there are: a last step at 0 would be wasted
            self.cosine_ = CosineLRScheduler(optimizer, total + 1, warmup_t=self.warmup_, t_in_epochs=False)
        else:
            self.plateau_ = ReduceLROnPlateau(optimizer, factor=0.1, patience=max(self.recipe.patience // 2, 1) - 1)

    def on_batch_begin(self, net: Any, training: bool = False, **kwargs: Any) -> None:
        """Set the rates of the coming step."""
        if not training:
            return
        self.step_ += 1
        if self.recipe.schedule == "cosine":
            self.cosine_.step_update(self.step_)
        elif self.step_ <= self.warmup_:
            for group in net.optimizer_.param_groups:
                group["lr"] = group["initial_lr"] * group["lr_scale"] * self.step_ / self.warmup_

    def on_epoch_end(self, net: Any, **kwargs: Any) -> None:
        """Record the highest rate, and cut the rates where the loss stands still."""
        net.history.record("lr", max(group["lr"] for group in net.optimizer_.param_groups))
        if self.recipe.schedule == "plateau" and self.step_ > self.warmup_:
            self.plateau_.step(net.history[-1, self.monitor])

    def state_dict(self) -> dict[str, Any]:
        """Return what a checkpoint must keep: a cosine is a function of the step alone."""
        return {} if self.recipe.schedule == "cosine" else dict(self.plateau_.state_dict())

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from `state_dict`, after `on_train_begin`."""
        if state:
            self.plateau_.load_state_dict(state)
