"""Frozen records of what each stage found; their JSON keys are a contract with users' scripts."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import MISSING, asdict, dataclass, field, fields, is_dataclass
from functools import cache
from types import UnionType
from typing import Any, Protocol, TypeVar, get_args, get_origin, get_type_hints

LOWER_IS_BETTER = ("rmse", "mae")
"""Metrics of which less is better."""

R = TypeVar("R")


class Progress(Protocol):
    """How the stages tell how far they are: items done and in all, on what, and how it goes where there is more."""

    def __call__(self, done: int, total: int, text: str, state: str = "", /) -> None:
        """Show it."""


def silent(done: int, total: int, text: str, state: str = "", /) -> None:
    """Be a `Progress` that shows nothing."""


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


def from_json(kind: type[R], document: object, where: str = "") -> R:
    """Return the record that `to_json` wrote; fields whose key is absent take their default, unknown keys are ignored.

    `where` names the key that holds the document, for messages. A `ValueError` tells that a key without a default is
    absent, or that a value is not of its field's type.

    Examples
    --------
    >>> from_json(Agreement, {"score": "logme", "layers": 3, "kendall_tau": 1, "spearman_rho": "high"})
    Traceback (most recent call last):
    ValueError: expected 'spearman_rho' to be float, got 'high'
    """
    if not isinstance(document, Mapping):
        raise ValueError(f"expected {f'{where!r} to be ' if where else ''}a JSON object, got {document!r:.40}")
    types, values = _types(kind), {}  # type: ignore[arg-type]
    for one in fields(kind):  # type: ignore[arg-type]
        if one.name in document:
            values[one.name] = _checked(types[one.name], document[one.name], one.name)
        elif one.default is MISSING and one.default_factory is MISSING:
            raise ValueError(f"the key '{one.name}' is missing")
    return kind(**values)


@cache
def _types(kind: type) -> dict[str, Any]:
    return get_type_hints(kind)


def _checked(kind: Any, value: Any, where: str) -> Any:
    """Return a JSON value as a field's type holds it: lists as tuples and objects as records where it says so."""
    origin, inner = get_origin(kind), get_args(kind)
    if kind is Any or (kind is float and type(value) is int):
        return value
    if is_dataclass(kind):
        return value if isinstance(value, kind) else from_json(kind, value, where)  # type: ignore[arg-type]
    if origin is dict and isinstance(value, dict):
        return {key: _checked(inner[1], one, f"{where}.{key}") for key, one in value.items()}
    if origin is list and isinstance(value, list):
        return [_checked(inner[0], one, where) for one in value]
    if origin is tuple and isinstance(value, list) and len(value) == len(inner):
        return tuple(_checked(one, item, where) for one, item in zip(inner, value, strict=True))
    if origin is UnionType:
        for choice in inner:
            try:
                return _checked(choice, value, where)
            except ValueError:
                continue
    elif type(value) is kind:
        return value
    name = kind.__name__ if isinstance(kind, type) and origin is None else kind
    raise ValueError(f"expected '{where}' to be {name}, got {value!r:.40}")


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
class NearnessBin:
    """Test images whose nearest training image has a similarity of `low` to `high`, and the accuracy on them."""

    low: float
    high: float
    images: int
    accuracy: float
    accuracy_ci95: tuple[float, float]


@dataclass(frozen=True)
class LeakPrice:
    """How accuracy depends on how near the nearest training image is: what near-duplicates add to it.

    Attributes
    ----------
    layer : str
        On which images were compared.
    bins : list of NearnessBin
        About a quarter of the test images each, the farthest first.
    threshold : float or None
        From which similarity on images count as near-duplicates; None if it was not measured for this layer.
    near : int or None
        How many of the compared test images (those in `bins`) are at least so near to a training image.
    accuracy_far : float or None
        Accuracy on the others; None if there are none.
    """

    layer: str
    bins: list[NearnessBin]
    threshold: float | None = None
    near: int | None = None
    accuracy_far: float | None = None


@dataclass(frozen=True, kw_only=True)
class HeadResult:
    """What was trained on one layer with one seed, whatever it predicts.

    Attributes
    ----------
    cv : int or None
        Number of folds. With cross-validation every row is tested once, `params` are those chosen most often, and
        `n_train` and `n_val` are those of one fold.
    n_pool : int
        Labelled rows outside test (in a fold), from which few shots draw their training rows.
    n_groups : int or None
        Number of groups of test rows; a row without a group counts as one. None in old run folders.
    target : str or None
        The column of a table that the labels came from; None for the labels of the source.
    metric : str
        What parameters were chosen by on validation rows, one of `pipeline.options.METRICS_OF`.
    validation_score : float or None
        That metric on validation rows. None if there was nothing to choose by, and in results of older versions. The F1
        of several labels is too high there, because the same rows choose the thresholds.
    p_vs_best : float or None
        P-value, with Holm's correction, against the result that is best by `metric` on validation rows, among those of
        the same test rows and shots; None for that result. If test rows come in groups, whole groups are compared.
    in_best_set : bool or None
        Whether this may be the best of the results with the same test rows and shots, with 95 % confidence, see
        `pipeline.evaluation.comparisons.may_be_best`; None if there is no other.
    columns : list of str or None
        Columns of the table that stand beside the features; None without them.
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
    seconds: float
    converged: bool
    cv: int | None = None
    n_pool: int = 0
    n_groups: int | None = None
    target: str | None = None
    metric: str = "accuracy"
    validation_score: float | None = None
    p_vs_best: float | None = None
    in_best_set: bool | None = None
    columns: list[str] | None = None

    @property
    def validated(self) -> float | None:
        """What the parameters were chosen by, on validation rows: larger is better."""
        score = self.validation_score
        return -score if score is not None and self.metric in LOWER_IS_BETTER else score


@dataclass(frozen=True, kw_only=True)
class FitResult(HeadResult):
    """A head that predicts a class: how it was trained, and how good it is on test.

    The p-value is that of McNemar's exact test.

    Attributes
    ----------
    accuracy_ci95 : (float, float)
        Wilson's 95 % interval, for `n_effective` rows.
    log_loss, ece : float or None
        None for heads without probabilities.
    balanced : bool
        Whether classes had equal weight in training.
    temperature, log_loss_calibrated, ece_calibrated : float or None
        The calibration (over folds the median, in which a fold without one counts as 1) and the two scores after it.
        None without probabilities, without rows to fit it on, or if it would not help on validation rows.
    validation_accuracy : float or None
        What the parameters were chosen by if that is accuracy; None if there was nothing to choose by.
    validation_log_loss : float or None
        What broke ties of it, before calibration; None without probabilities, and in results of older versions.
    leak_price : LeakPrice or None
        How accuracy depends on the distance of test images from training images; None in results of older versions.
    n_effective : float or None
        How many independent test rows would tell the accuracy as precisely as these groups do; `n_test` without groups.
    kappa, top5_accuracy, auroc, average_precision : float or None
        See `pipeline.evaluation.metrics.Metrics`; None in results of older versions.
    """

    accuracy: float
    accuracy_ci95: tuple[float, float]
    mean_per_class_accuracy: float
    macro_f1: float
    log_loss: float | None
    ece: float | None
    balanced: bool = False
    temperature: float | None = None
    log_loss_calibrated: float | None = None
    ece_calibrated: float | None = None
    validation_accuracy: float | None = None
    n_effective: float | None = None
    validation_log_loss: float | None = None
    leak_price: LeakPrice | None = None
    kappa: float | None = None
    top5_accuracy: float | None = None
    auroc: float | None = None
    average_precision: float | None = None

    @property
    def validated(self) -> float | None:
        """What the parameters were chosen by, on validation rows; also in results of older versions."""
        return self.validation_score if self.validation_score is not None else self.validation_accuracy


@dataclass(frozen=True, kw_only=True)
class RegressionResult(HeadResult):
    """A head that predicts a number, and how good it is on test.

    The p-value and the intervals are those of a bootstrap of test rows; None where all rows are of one group.

    Attributes
    ----------
    r2 : float or None
        Share of the variance of the test rows' numbers that is explained; None if these are all the same.
    rmse, mae : float or None
        Root of the mean squared error, and mean absolute error, in the units of the target; None if a prediction is
        not finite.
    """

    r2: float | None
    r2_ci95: tuple[float, float] | None
    rmse: float | None
    rmse_ci95: tuple[float, float] | None
    mae: float | None
    mae_ci95: tuple[float, float] | None


@dataclass(frozen=True)
class LabelScore:
    """How well one of several labels is predicted.

    Attributes
    ----------
    positives : int
        Test rows that have the label.
    average_precision : float or None
        None if all test rows have it, or none.
    f1 : float or None
        None if no test row has it or is predicted to.
    threshold : float
        The probability, or the distance from the hyperplane, from which on the label is predicted; after
        cross-validation the mean over folds.
    """

    label: str
    positives: int
    average_precision: float | None
    average_precision_ci95: tuple[float, float] | None
    f1: float | None
    threshold: float


@dataclass(frozen=True, kw_only=True)
class MultilabelResult(HeadResult):
    """A head that predicts any number of labels, and how good it is on test.

    The p-value and the intervals are those of a bootstrap of test rows; an interval is None where all rows are of one
    group, or nothing is predicted wrong. `average_precision` and `auroc` are means over
    the labels that some test rows have and others lack (None if there are none), `macro_f1` is a mean over the labels
    that some test row has or is predicted to have, and `micro_f1` counts all labels of all rows together.
    """

    average_precision: float | None
    average_precision_ci95: tuple[float, float] | None
    macro_f1: float | None
    macro_f1_ci95: tuple[float, float] | None
    micro_f1: float | None
    micro_f1_ci95: tuple[float, float] | None
    auroc: float | None
    labels: list[LabelScore]


@dataclass(frozen=True)
class ColumnsGain:
    """What columns of a table add to the features of a layer: one head without them and with them, on the same rows.

    Attributes
    ----------
    layer : str
        Without the columns.
    metric : str
        Accuracy if classes are predicted, else what parameters were chosen by.
    value_without, value_with : float
        The metric on test, mean over seeds.
    gain : float
        How much better the head is with the columns; for errors, by how much they are smaller.
    gain_ci95 : (float, float) or None
        Interval of the gain for other test rows, of heads as trained here; None where these rows do not tell it.
    """

    backbone: str
    layer: str
    pool: str
    columns: list[str]
    head: str
    shots: int | str
    metric: str
    seeds: int
    value_without: float
    value_with: float
    gain: float
    gain_ci95: tuple[float, float] | None


@dataclass(frozen=True)
class MetricSummary:
    """One head that predicts labels or numbers, over several seeds: the metric that its parameters were chosen by.

    `ci95` is an interval around the mean for other test rows; `sd`, `lowest` and `highest` are what another draw gives:
    of the training rows alone if `shared_test`, else of training and test rows. `p_vs_best` and `in_best_set` are as in
    `HeadResult`, about the mean over seeds.
    """

    backbone: str
    layer: str
    pool: str
    head: str
    shots: int | str
    metric: str
    seeds: int
    mean: float
    ci95: tuple[float, float] | None
    sd: float
    lowest: float
    highest: float
    p_vs_best: float | None = None
    in_best_set: bool | None = None
    shared_test: bool = False


@dataclass(frozen=True)
class SeedSummary:
    """One head on one layer over several seeds.

    `accuracy_ci95` is Wilson's interval around the mean accuracy for the test rows of one seed: what another test set
    might give. `accuracy_sd`, `accuracy_min` and `accuracy_max` are what another draw gives: of the training rows alone
    if `shared_test`, so that all seeds have the same test rows, else of training and test rows.

    `p_vs_best` compares with the head of best mean `metric` on validation rows at the same shots, with Holm's
    correction: by the corrected resampled t-test where five or more splits have test rows of their own, else by
    McNemar's exact test
    on all test rows of all seeds, those of one image (or group) together. It is None for that head, and where the lead
    is the same on every split. `in_best_set` tells whether this head, as trained here, may be the best; it is None
    if there is no other on the same rows.
    """

    backbone: str
    layer: str
    pool: str
    head: str
    shots: int | str
    seeds: int
    accuracy_mean: float
    accuracy_ci95: tuple[float, float]
    accuracy_sd: float
    accuracy_min: float
    accuracy_max: float
    p_vs_best: float | None
    in_best_set: bool | None = None
    shared_test: bool = False


@dataclass(frozen=True, kw_only=True)
class Tuning:
    """How a fine-tuned network was trained, beside its result, whose head was trained with what is above the line.

    `layer` is what the head reads, `head` the kind of new top. `freeze` is ``"all"``, ``"none"`` or the layer up to
    which everything was frozen; `epochs` how many were trained. `history` has for each epoch its number,
    ``train_loss``, ``train_acc`` (of each batch before its step), ``valid_loss`` and ``valid_acc`` (where there were
    validation images; accuracies only of classes), the highest learning rate, the seconds, and, where they were
    watched, ``gradients``: ``{LAYER: {gradient, weight, update, dead}}``.
    """

    freeze: str = ""
    epochs: int = 0
    trainable_parameters: int = 0
    history: list[dict[str, Any]] = field(default_factory=list)


@dataclass(frozen=True, kw_only=True)
class FinetuneResult(FitResult, Tuning):
    """A fine-tuned network that predicts a class, one seed."""


@dataclass(frozen=True, kw_only=True)
class FinetuneRegressionResult(RegressionResult, Tuning):
    """A fine-tuned network that predicts a number, one seed."""


@dataclass(frozen=True, kw_only=True)
class FinetuneMultilabelResult(MultilabelResult, Tuning):
    """A fine-tuned network that predicts any number of labels, one seed."""


TunedResult = FinetuneResult | FinetuneRegressionResult | FinetuneMultilabelResult


@dataclass(frozen=True)
class PretrainResult:
    """A backbone that was trained on a pretext task, without labels.

    Attributes
    ----------
    backbone, saved_as : str
        What training began with, and the name of the trained backbone.
    shown : str
        What the task shows of the images.
    inputs_per_image : int
        How many inputs of the network an image becomes in a step.
    chance : float or None
        Accuracy of guessing; None if the task classifies nothing.
    steps : int
        Optimizer steps up to the weights that are kept.
    valid_loss, valid_accuracy : float or None
        Of the weights that are kept; None without validation images, the accuracy also if the task classifies nothing.
    history : list of dict
        As in `FinetuneResult`.
    """

    kind: str
    backbone: str
    saved_as: str
    path: str
    task: str
    shown: str
    init: str
    params: dict[str, Any]
    seed: int
    n_train: int
    n_val: int
    inputs_per_image: int
    chance: float | None
    epochs: int
    best_epoch: int
    steps: int
    train_loss: float
    valid_loss: float | None
    valid_accuracy: float | None
    seconds: float
    converged: bool
    history: list[dict[str, Any]] = field(default_factory=list)


@dataclass(frozen=True)
class Prediction:
    """What a model says of one image.

    `probability` is that of `label`, None where the head has none. Of a model for several labels, `label` names those
    that are predicted, with bars between them (a bar alone for none), and `scores` holds the probability, or the
    distance from the hyperplane, of all. A model for numbers gives a `value`, and no label. `state` is ``"done"``,
    ``"unreadable"`` for an image that cannot be read, or ``"incomplete"`` for one that lacks columns of a table that
    the model reads; `reason` says why.
    """

    uri: str
    label: str | None
    probability: float | None
    state: str
    reason: str = ""
    value: float | None = None
    scores: dict[str, float] | None = None


@dataclass(frozen=True)
class ExportResult:
    """A model as one ONNX file; `inputs` maps names to shapes, whose free axis is ``None``."""

    path: str
    backbone: str
    layer: str
    head: str
    classes: int
    inputs: dict[str, list[int | None]]
    outputs: list[str]
    bytes: int


@dataclass(frozen=True)
class LayerScore:
    """How one layer promises to suit the target; of its training rows, more is better.

    `h_score` and `leep` are about classes, and `leep` is that of the logits; elsewhere they are None. `test_score` is
    the `metric` of a fitted head on test, and `accuracy` the same if that is accuracy; None where nothing was fitted.
    """

    backbone: str
    pool: str
    layer: str
    dim: int
    n_train: int
    logme: float
    h_score: float | None
    leep: float | None
    accuracy: float | None = None
    metric: str = "accuracy"
    test_score: float | None = None


@dataclass(frozen=True)
class Agreement:
    """How the order by one score agrees with the order on test, over so many layers: 1 is the same order."""

    score: str
    layers: int
    kendall_tau: float
    spearman_rho: float


@dataclass(frozen=True)
class UnitExample:
    """An image that excites a unit: its greatest activation, and the box around the place that excites it.

    `box` is left, top, right and bottom in pixels of the network's input; see `pipeline.backbones.receptive_field`.
    """

    uri: str
    label: str | None
    activation: float
    box: tuple[int, int, int, int]


@dataclass(frozen=True)
class UnitResult:
    """A channel of a layer, and what excites it most.

    `prefers` is the class whose images excite it most; `auc` is how often one of them does so more than an image of
    another class, and `statistic` the same in standard deviations. `p_value` is adjusted for all units and classes of a
    call (see `pipeline.diagnostics.selectivity`). All four are None without classes.
    """

    layer: str
    channel: int
    prefers: str | None
    auc: float | None
    statistic: float | None
    p_value: float | None
    examples: list[UnitExample]


@dataclass(frozen=True)
class ForeignImage:
    """An image and how far the domain classifier puts it towards its own set: above 0 is right, 1 is typical."""

    uri: str
    score: float


@dataclass(frozen=True)
class DriftResult:
    """How well a held-out classifier tells two sets of images apart.

    `images` counts the different ones of each set, `shared` those of both, which are left out, and `compared` how many
    of each set the classifier saw, so that an accuracy of a half is a guess. The foreign ones of each set look least
    like the other set, the most foreign first. `notes` say what is missing of a cache in parts.
    """

    first: str
    second: str
    layer: str
    images: list[int]
    shared: int
    compared: int
    accuracy: float
    p_value: float
    foreign_in_first: list[ForeignImage]
    foreign_in_second: list[ForeignImage]
    notes: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class LectureFigure:
    """A measured number of one of the lecture's claims, beside the published one.

    Parameters
    ----------
    name : str
        What was measured, with its unit.
    value : float
    interval : (float, float) or None
        95 % interval, for all figures of the claim that have a verdict together; None for what was counted.
    published : str
        The published value or finding, ``""`` for none.
    origin : str
        Where it was published.
    verdict : str
        What the interval says about the sign that the claim expects: ``agrees``, ``contradicts`` or ``open``; ``""``
        for a figure that the claim expects nothing of.
    """

    name: str
    value: float
    interval: tuple[float, float] | None = None
    published: str = ""
    origin: str = ""
    verdict: str = ""


@dataclass(frozen=True)
class LectureResult:
    """One of the lecture's claims as measured, in a short form if `quick`; `machine` says on what."""

    claim: str
    statement: str
    source: str
    quick: bool
    figures: list[LectureFigure]
    notes: list[str]
    seconds: float
    started: str
    machine: str


@dataclass(frozen=True)
class Neighbour:
    """An image of a cache that is like another: `similarity` is the cosine of the angle between their features."""

    uri: str
    similarity: float
    label: str


@dataclass(frozen=True)
class SimilarImages:
    """The images of a cache that are most like one image, the most similar first.

    An image that cannot be read has none, and a `reason`.
    """

    uri: str
    neighbours: list[Neighbour]
    reason: str = ""


@dataclass(frozen=True)
class NearThreshold:
    """From which similarity on two images are called near-duplicates, and how far that can be trusted.

    Attributes
    ----------
    layer : str
        On which images were compared.
    threshold : float
        Least similarity, the cosine of the angle between features.
    copies : int
        How many images were edited to plant copies of them; 0 if the threshold was given.
    recall : dict of str to float
        Share of the planted copies at least so near to their original, by edit.
    recall_all : float or None
        The same over all edits.
    apart : str
        What tells that two images are no copies: ``"groups"`` or ``"classes"``; ``""`` if there are neither.
    compared : int
        How many images were compared with all images of other groups (or classes).
    false_alarms : float or None
        Share of these that are at least so near to one of another group (or class).
    """

    layer: str
    threshold: float
    copies: int = 0
    recall: dict[str, float] = field(default_factory=dict)
    recall_all: float | None = None
    apart: str = ""
    compared: int = 0
    false_alarms: float | None = None


@dataclass(frozen=True)
class GroupedImage:
    """An image of a group of near-duplicates; `similarity` is to the first image of the group."""

    uri: str
    similarity: float
    label: str
    split: str


@dataclass(frozen=True)
class FoundCopy:
    """An image of a second cache, and the image of the first that is most like it."""

    uri: str
    label: str
    original: Neighbour


@dataclass(frozen=True)
class Conflict:
    """Images of equal bytes with different labels, and which of these labels fits best."""

    uris: list[str]
    labels: list[str]
    suggested: str


@dataclass(frozen=True)
class Suspect:
    """An image whose label is probably wrong, and the images most like it.

    `probability` is that of its label, `suggested_probability` that of the label that fits better, both by heads that
    have not seen the image.
    """

    uri: str
    label: str
    suggested: str
    probability: float
    suggested_probability: float
    split: str
    neighbours: list[Neighbour]


@dataclass(frozen=True)
class PlantedLabels:
    """How well labels are found that were changed on purpose, an estimate for labels that are really wrong.

    Attributes
    ----------
    share : float
        Of the labels that was changed, each to one of the other classes at random.
    planted, found : int
        How many were changed, and how many of these were flagged.
    recall : float
        ``found / planted``.
    flagged : int
        All labels that were flagged then.
    precision : float
        ``found / flagged``: at least so many flags were right, as some labels were really wrong.
    precision_new : float
        The same without the labels that were flagged before any was changed.
    """

    share: float
    planted: int
    found: int
    recall: float
    flagged: int
    precision: float
    precision_new: float
