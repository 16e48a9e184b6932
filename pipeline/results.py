"""Frozen records of what each stage found; their JSON keys are a contract with users' scripts."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field
from typing import Any, Protocol


class Progress(Protocol):
    """How the stages tell how far they are: items done and in all, on what, and what bounds the speed if known."""

    def __call__(self, done: int, total: int, text: str, bound: str = "", /) -> None:
        """Show it."""


def to_json(record: Any) -> dict[str, Any]:
    """Return `record` (a dataclass below) as JSON-ready keys; absent and non-finite numbers become ``None``."""
    keys: dict[str, Any] = _finite(asdict(record))
    return keys


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


@dataclass(frozen=True)
class ExtractResult:
    """One cache file after an extraction: ``rows = done + unreadable + pending``; done includes reused.

    `seconds` are those of the whole run, which several backbones share; `bound` is what it waited for most (``decode``,
    ``model`` or ``disk``; ``None`` where nothing was computed), and `notes` what the user should know.
    """

    path: str
    backbone: str
    layers: dict[str, int]
    rows: int
    done: int
    unreadable: int
    reused: int
    computed: int
    precision: str
    engine: str
    seconds: float
    images_per_second: float
    bound: str | None
    notes: list[str]


@dataclass(frozen=True)
class FitResult:
    """One head on one layer, one seed: what was trained on what, and how it did on test.

    `validation_accuracy` is what the parameters were chosen by, ``None`` where one row a class left nothing to choose by;
    `accuracy_ci95` is Wilson's interval; `log_loss` and `ece` are ``None`` for heads without probabilities.
    """

    kind: str
    backbone: str
    layer: str
    pool: str
    head: str
    params: dict[str, Any]
    seed: int
    shots: int | str
    n_train: int
    n_val: int
    n_test: int
    validation_accuracy: float | None
    accuracy: float
    accuracy_ci95: tuple[float, float]
    mean_per_class_accuracy: float
    macro_f1: float
    log_loss: float | None
    ece: float | None
    seconds: float
    converged: bool


@dataclass(frozen=True)
class Prediction:
    """One image's label; `probability` is that of `label`, ``None`` where the head has none."""

    uri: str
    label: str | None
    probability: float | None
    state: str
    reason: str = field(default="")
