"""How metrics, and differences of them, are written."""

from __future__ import annotations

from dataclasses import dataclass

from pipeline.results import LOWER_IS_BETTER

ACCURACY = "accuracy"
METRIC_TITLES = {
    ACCURACY: "accuracy",
    "mean_per_class_accuracy": "per class",
    "macro_f1": "macro F1",
    "kappa": "kappa",
    "auroc": "AUROC",
    "average_precision": "average precision",
    "top5_accuracy": "top 5",
    "micro_f1": "micro F1",
    "r2": "R²",
    "rmse": "RMSE",
    "mae": "MAE",
}
"""What tables and charts call the metrics."""


def metric_text(metric: str, value: float | None) -> str:
    """Return a metric as text: errors with four digits, all others with three decimals; ``-`` where it is not known."""
    return three_decimals(value) if value is None or metric not in LOWER_IS_BETTER else four_digits(value)


def three_decimals(value: float | None) -> str:
    """Return a share or the like as text, ``-`` where it is not known; what is far off has four digits.

    Examples
    --------
    >>> three_decimals(0.9612), three_decimals(-8.1e31), three_decimals(None)
    ('0.961', '-8.100e+31', '-')
    """
    if value is None or value != value:
        return "-"
    return f"{value:.3f}" if abs(value) < 100 else four_digits(value)


def four_digits(value: float) -> str:
    """Return a number in the unit of a target as text, with four significant digits; ``-`` where it is not known."""
    return f"{value:#.4g}".rstrip(".") if value == value else "-"


def percent(share: float) -> str:
    """Return a share as text: 0.953 is ``95.3 %``."""
    return f"{100 * share:.1f} %"


@dataclass(frozen=True)
class Measure:
    """The metric that methods are compared by: its values and differences in words.

    Accuracies are written in percent, and their differences in percentage points. A difference above 0 is one for the
    better, also where less is better.

    Parameters
    ----------
    metric : str
        A key of `METRIC_TITLES`.

    Examples
    --------
    >>> accuracy, error = Measure("accuracy"), Measure("rmse")
    >>> accuracy.text(0.953), accuracy.interval_text((0.93, 0.97)), accuracy.difference_text(0.021)
    ('95.3 %', '93.0–97.0 %', '+2.1')
    >>> accuracy.range_text(-0.003, 0.021), error.range_text(0.25, 0.5)
    ('between 0.3 points worse and 2.1 points better', '0.2500 to 0.5000 better')
    """

    metric: str

    @property
    def title(self) -> str:
        """What it is called."""
        return METRIC_TITLES[self.metric]

    @property
    def unit(self) -> str:
        """What its differences are counted in, ``""`` for nothing."""
        return "points" if self.metric == ACCURACY else ""

    @property
    def sign(self) -> int:
        """-1 if less is better."""
        return -1 if self.metric in LOWER_IS_BETTER else 1

    def text(self, value: float) -> str:
        """Return a value as text."""
        return percent(value) if self.metric == ACCURACY else metric_text(self.metric, value)

    def interval_text(self, interval: tuple[float, float] | None) -> str:
        """Return an interval of values as text, ``-`` for none."""
        if interval is None:
            return "-"
        low, high = (self.text(end) for end in interval)
        return f"{low.removesuffix(' %')}–{high}"

    def difference_text(self, difference: float) -> str:
        """Return a difference with its sign."""
        text = self._size(abs(difference))
        if not float(text):
            return text
        return f"{'−' if difference < 0 else '+'}{text}"

    def range_text(self, low: float, high: float) -> str:
        """Return an interval of a difference in words."""
        below, above = self._size(abs(low)), self._size(abs(high))
        unit = f" {self.unit}" if self.unit else ""
        if low > 0:
            return f"{below} to {above}{unit} better"
        if high < 0:
            return f"{above} to {below}{unit} worse"
        return f"between {below}{unit} worse and {above}{unit} better"

    def _size(self, difference: float) -> str:
        return f"{100 * difference:.1f}" if self.metric == ACCURACY else metric_text(self.metric, difference)
