"""How the learning rates change over a run: warm-up, then a cosine to zero, or a cut at every plateau."""

from __future__ import annotations

from typing import Any

from timm.scheduler import CosineLRScheduler
from torch.optim import Optimizer
from torch.optim.lr_scheduler import ReduceLROnPlateau

from pipeline.finetuning.recipe import Recipe


class Schedule:
    """Sets the learning rate of every group of `pipeline.finetuning.groups.parameter_groups`; an epoch has `steps`."""

    def __init__(self, optimizer: Optimizer, recipe: Recipe, steps: int) -> None:
        self.optimizer, self.steps = optimizer, steps
        self.step = 0
        total = steps * recipe.epochs
        self.warmup = min(steps * recipe.warmup, total // 2)
        self.cosine: CosineLRScheduler | None = None
        self.plateau: ReduceLROnPlateau | None = None
        if recipe.schedule == "cosine":  # over one step more than there are: a last step at rate 0 would be wasted
            self.cosine = CosineLRScheduler(optimizer, total + 1, warmup_t=self.warmup, t_in_epochs=False)
        else:
            self.plateau = ReduceLROnPlateau(optimizer, factor=0.1, patience=max(recipe.patience // 2, 1) - 1)

    def before_step(self) -> None:
        """Set the rates for the coming step."""
        self.step += 1
        if self.cosine is not None:
            self.cosine.step_update(self.step)
        elif self.step <= self.warmup:
            for group in self.optimizer.param_groups:
                group["lr"] = group["initial_lr"] * group["lr_scale"] * self.step / self.warmup

    def after_epoch(self, loss: float) -> None:
        """Cut the rates if `loss`, the validation loss where there is one, has stopped falling."""
        if self.plateau is not None and self.step > self.warmup:
            self.plateau.step(loss)

    def state_dict(self) -> dict[str, Any]:
        """Return what a checkpoint must keep: nothing for a cosine, which depends on the step alone."""
        return {} if self.plateau is None else dict(self.plateau.state_dict())

    def resume(self, epochs: int, state: dict[str, Any]) -> None:
        """Go on after `epochs` epochs, from what `state_dict` returned then."""
        self.step = epochs * self.steps
        if self.plateau is not None:
            self.plateau.load_state_dict(state)
