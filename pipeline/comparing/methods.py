"""Results gathered by method: what was trained, at each number of labels, over all seeds."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import NormalDist, fmean, stdev

import numpy as np

from pipeline.comparing.folder import HEAD, JobResult, OptionValue
from pipeline.evaluation.comparisons import preference
from pipeline.evaluation.forecast import FEWEST_POINTS, LabelCurve
from pipeline.evaluation.intervals import CONFIDENCE, accuracy_interval
from pipeline.evaluation.metrics import mean_if_known
from pipeline.evaluation.wording import ACCURACY, Measure
from pipeline.options import CLASSIFICATION, NEAR, TABLES
from pipeline.results import FitResult, Tuning

_SETTINGS = ("size", "white", "precision", "store")
_EVALUATION = {"balanced": "balanced", "cv": "{}-fold", "drop_leaks": "leaks dropped"}
_WORDS = {"white": "white {}", **_EVALUATION}
_NEAR_WORDS = "near-duplicates dropped"


@dataclass(frozen=True)
class Method:
    """What was trained and how: two results are of one method if they differ in source, shots or seed alone.

    `head` is the name of the head, or of a fine-tune's top. `layer` is what a head was fitted on, ``""`` for a
    fine-tune; `freeze` is up to where a fine-tune was frozen, ``""`` for a head. `size`, `white`, `precision` and
    `store` are those of a head's features, None for a fine-tune and in old run folders; `options` are all other options
    of a fine-tune.

    Examples
    --------
    >>> method = Method("head", "resnet18", "logreg", layer="layer4")
    >>> method_names([method])[method]
    'logreg on layer4'
    """

    kind: str
    backbone: str
    head: str
    layer: str = ""
    freeze: str = ""
    pool: str = ""
    size: tuple[int, int] | None = None
    white: int | None = None
    precision: str | None = None
    store: str | None = None
    balanced: bool = False
    cv: int | None = None
    drop_leaks: bool | str = False
    options: tuple[tuple[str, OptionValue], ...] = ()

    @property
    def is_frozen(self) -> bool:
        """Whether a head was fitted on frozen features."""
        return self.kind == HEAD

    @property
    def group(self) -> str:
        """Backbone and head in words, without the layer."""
        return f"{self.backbone}, {self.head if self.is_frozen else 'fine-tuned'}"


def method_of(job: JobResult) -> Method:
    """Return the method of a result."""
    result = job.result
    freeze = result.freeze if isinstance(result, Tuning) else ""
    backbone = result.backbone
    if result.params.get("init") == "random":  # each seed draws its own weights, and its backbone is named after them
        backbone = re.sub(r"@random:\d+$", "@random", backbone)
    return Method(
        kind=result.kind,
        backbone=backbone,
        head=result.head,
        layer="" if freeze else result.layer,
        freeze=freeze,
        pool=result.pool,
        size=job.size,
        white=job.white,
        precision=job.precision,
        store=job.store,
        balanced=isinstance(result, FitResult) and result.balanced,
        cv=result.cv,
        drop_leaks=job.drop_leaks,
        options=tuple(sorted(job.options.items())),
    )


@dataclass(frozen=True, eq=False)
class MethodScore:
    """One method at one number of labels, over its seeds; its name is unique in a run."""

    method: Method
    name: str
    shots: int | str
    by_seed: Mapping[int, JobResult]

    @property
    def first(self) -> JobResult:
        """The result of the first seed."""
        return self.by_seed[min(self.by_seed)]

    @property
    def n_test(self) -> int:
        """Number of test images of the first seed."""
        return self.first.result.n_test

    @property
    def n_groups(self) -> int | None:
        """Number of groups of these, each image without a group being one; None in old run folders."""
        return self.first.result.n_groups

    @property
    def task(self) -> str:
        """What was predicted, one of `pipeline.options.TASKS`."""
        return self.first.task

    @property
    def measure(self) -> Measure:
        """What the method is compared by: accuracy, whatever chose its parameters, or a metric of labels or numbers."""
        return Measure(ACCURACY if self.task == CLASSIFICATION else self.first.result.metric)

    @property
    def value(self) -> float:
        """Mean of the measure over seeds, on test; NaN if it is not defined for a seed."""
        return fmean(self.values)

    @property
    def values(self) -> list[float]:
        """The measure of each seed."""
        found = [getattr(job.result, self.measure.metric) for job in self.by_seed.values()]
        return [math.nan if value is None else value for value in found]

    @property
    def score(self) -> float:
        """Mean over seeds of the metric that parameters were chosen by, on test; the measure if a seed lacks it."""
        found = self.mean(self.first.result.metric)
        return self.value if found is None else found

    @property
    def rank(self) -> float:
        """A sort key: the best `score` first, one that is not defined last."""
        return math.inf if math.isnan(self.score) else -self.measure.sign * self.score

    @property
    def interval(self) -> tuple[float, float] | None:
        """95 % interval of `value`, for the test images of one seed and their groups; None where there is none.

        It is Wilson's for accuracies, else the mean of the seeds' intervals.
        """
        result = self.first.result
        if isinstance(result, FitResult):
            return accuracy_interval(self.value, self.n_test, result.n_effective)
        ends = [getattr(job.result, f"{self.measure.metric}_ci95") for job in self.by_seed.values()]
        return None if None in ends else (fmean(low for low, _ in ends), fmean(high for _, high in ends))

    @property
    def error(self) -> float:
        """Standard error of the mean of two or more seeds, for other test images and other draws of training images."""
        low, high = self.interval or (self.value, self.value)
        drawn = stdev(self.values) / math.sqrt(len(self.by_seed))
        return math.hypot((high - low) / 2 / NormalDist().inv_cdf(0.5 + CONFIDENCE / 2), drawn)

    @property
    def labels_a_class(self) -> float:
        """Number of training and validation images of a class that it was trained on."""
        result = self.first.result
        if self.shots != "all":
            return float(self.shots)
        return (result.n_train + result.n_val) / max(1, self.first.n_classes)

    def mean(self, name: str) -> float | None:
        """Return the mean over seeds of a number of the results; None if a seed lacks it."""
        return mean_if_known([getattr(job.result, name, None) for job in self.by_seed.values()])


@dataclass(frozen=True, eq=False)
class Leaderboard:
    """All methods on one source; scores are by method and shots, in the order of the results."""

    source: str
    scores: Mapping[tuple[Method, int | str], MethodScore]

    @property
    def shots(self) -> list[int | str]:
        """Numbers of labels a class, ascending, ``"all"`` last."""
        return sorted({shots for _, shots in self.scores}, key=shots_order)

    def at(self, shots: int | str, kind: str | None = None) -> list[MethodScore]:
        """Return the scores with this number of labels, of one kind of method if `kind` is given."""
        found = [score for (_, count), score in self.scores.items() if count == shots]
        return [score for score in found if kind in (None, score.method.kind)]

    def curve(self, method: Method) -> LabelCurve | None:
        """Return a method's accuracies over numbers of labels, None if there are too few to draw the curve further.

        A number of labels needs two seeds, which tell how much the draw of the training images matters.
        """
        found = [score for (one, _), score in self.scores.items() if one == method and len(score.by_seed) > 1]
        if len(found) < FEWEST_POINTS or not all(score.first.n_classes for score in found):  # as in old run folders
            return None
        found.sort(key=lambda score: score.labels_a_class)
        columns = [(score.labels_a_class, score.value, score.error) for score in found]
        return LabelCurve(*map(np.array, zip(*columns, strict=True)))

    def best(self, kind: str, shots: int | str | None = None) -> MethodScore | None:
        """Return the best method of this kind, see `best_of`; by default at the largest number of labels."""
        return best_of(self.at(self.shots[-1] if shots is None else shots, kind))


def best_of(scores: Sequence[MethodScore]) -> MethodScore | None:
    """Return the score that is best on validation rows, on test rows if one was not validated; see `preference`."""
    validated = is_validated(scores)
    ranks = [
        preference(
            "all",
            score.mean("validated") if validated else score.measure.sign * score.value,
            index,
            score.mean("validation_log_loss"),
        )
        for index, score in enumerate(scores)
    ]
    return scores[ranks.index(max(ranks))] if scores else None


def is_validated(scores: Sequence[MethodScore]) -> bool:
    """Tell whether all scores have a metric on validation rows to choose by."""
    return all(score.mean("validated") is not None for score in scores)


def shots_order(shots: int | str) -> tuple[bool, int]:
    """Return a sort key: numbers ascending, then ``"all"``."""
    return (True, 0) if isinstance(shots, str) else (False, shots)


def leaderboards(results: Iterable[JobResult], beside: Iterable[JobResult] = ()) -> list[Leaderboard]:
    """Gather results by source, method and shots; names tell methods apart also from those of the results `beside`."""
    results = list(results)
    names = method_names(method_of(job) for job in (*results, *beside))
    grouped: dict[str, dict[tuple[Method, int | str], dict[int, JobResult]]] = {}
    for job in results:
        on_source = grouped.setdefault(job.source, {})
        on_source.setdefault((method_of(job), job.result.shots), {})[job.result.seed] = job
    return [
        Leaderboard(
            source, {key: MethodScore(key[0], names[key[0]], key[1], by_seed) for key, by_seed in found.items()}
        )
        for source, found in grouped.items()
    ]


def method_names(methods: Iterable[Method]) -> dict[Method, str]:
    """Return a name for each method, which says what was trained and what else tells it apart from the others."""
    methods = list(dict.fromkeys(methods))
    varying = {name for name in ("backbone", *_SETTINGS, *_EVALUATION, "pool") if _varies(name, methods)}
    tuned = [dict(method.options) for method in methods if not method.is_frozen]
    keys = dict.fromkeys(key for key in (*TABLES["finetune"], *sorted({key for one in tuned for key in one})))
    varying_options = [key for key in keys if len({options.get(key) for options in tuned}) > 1]
    return {method: _name(method, varying, varying_options) for method in methods}


def _name(method: Method, varying: set[str], varying_options: Sequence[str]) -> str:
    if method.is_frozen:
        parts = [f"{method.head} on {method.layer}"]
    else:
        words = {"all": "new top trained by backprop", "none": "whole network fine-tuned"}
        options = dict(method.options)
        parts = [words.get(method.freeze, f"fine-tuned above {method.freeze}")]
        parts += [f"{key} {options[key]}" for key in varying_options if key in options]
    shown = {name: getattr(method, name) for name in ("backbone", *_SETTINGS, *_EVALUATION) if name in varying}
    parts += [
        (_NEAR_WORDS if value == NEAR else _WORDS.get(name, "{}")).format(_text(value))
        for name, value in shown.items()
        if value
    ]
    if "pool" in varying and method.is_frozen:
        parts.append(method.pool)
    return ", ".join(parts)


def _varies(name: str, methods: Sequence[Method]) -> bool:
    """Tell whether a field tells methods apart.

    Settings follow from kind and backbone unless the user chose them, so they count only if they vary within these.
    """
    found: dict[tuple[str, ...], set[object]] = {}
    for method in methods:
        among = (method.kind, method.backbone) if name in _SETTINGS else ()
        found.setdefault(among, set()).add(getattr(method, name))
    return any(len(values) > 1 for values in found.values())


def _text(value: object) -> str:
    return value if isinstance(value, str) else json.dumps(value)
