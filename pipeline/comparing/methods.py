"""Results gathered by method: what was trained, at each number of labels, over all seeds."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean

from pipeline.comparing.folder import Record
from pipeline.evaluation.intervals import wilson

HEAD, FINETUNE = "head", "finetune"
_NAMES = ("backbone", "size", "precision", "store")
_WORDS = {"balanced": "balanced", "cv": "{}-fold", "drop_leaks": "leaks dropped"}
_SETTINGS = ("size", "precision", "store")


@dataclass(frozen=True, eq=False)
class Score:
    """One method at one number of labels, over its seeds.

    Parameters
    ----------
    method : str
        Its name, unique in a run.
    shots : int or "all"
    records : dict of int to dict
        Results by seed.
    """

    method: str
    shots: int | str
    records: Mapping[int, Record]

    @property
    def first(self) -> Record:
        """The record of the first seed."""
        return self.records[min(self.records)]

    @property
    def accuracy(self) -> float:
        """Mean over seeds."""
        return fmean(self.accuracies)

    @property
    def accuracies(self) -> list[float]:
        """Of each seed."""
        return [record["accuracy"] for record in self.records.values()]

    @property
    def interval(self) -> tuple[float, float]:
        """Wilson's 95 % interval of the mean, on the test images of one seed."""
        n = self.first["n_test"]
        return wilson(round(self.accuracy * n), n)

    @property
    def validation(self) -> float | None:
        """Mean validation accuracy; None where nothing was validated."""
        return self.mean("validation_accuracy")

    def mean(self, key: str) -> float | None:
        """Return the mean of a number over seeds; None if one lacks it."""
        values = [record.get(key) for record in self.records.values()]
        numbers = [value for value in values if value is not None]
        return fmean(numbers) if len(numbers) == len(values) else None


@dataclass(frozen=True, eq=False)
class Board:
    """All scores on one source.

    Parameters
    ----------
    source : str
    scores : dict of (str, int or "all") to Score
        By method and shots.
    """

    source: str
    scores: Mapping[tuple[str, int | str], Score]

    @property
    def shots(self) -> list[int | str]:
        """Numbers of labels a class, ascending, ``"all"`` last."""
        return sorted({shots for _, shots in self.scores}, key=shots_order)

    @property
    def methods(self) -> list[str]:
        """Names in the order of the results."""
        return list(dict.fromkeys(method for method, _ in self.scores))

    def at(self, shots: int | str, kind: str | None = None) -> list[Score]:
        """Return the scores with so many labels, perhaps of one kind of method alone."""
        found = [score for (_, count), score in self.scores.items() if count == shots]
        return [score for score in found if kind in (None, score.first["kind"])]

    def best(self, kind: str, shots: int | str | None = None) -> Score | None:
        """Return the method of this kind with the best validation accuracy, the first on a tie.

        Test accuracy decides only where some method has no validation accuracy.
        """
        return best_of(self.at(self.shots[-1] if shots is None else shots, kind))


def best_of(scores: Sequence[Score]) -> Score | None:
    """Return the best by validation accuracy (by test accuracy where one lacks it), the first on a tie."""
    if not scores:
        return None
    return max(scores, key=lambda s: s.validation if is_validated(scores) else s.accuracy)  # type: ignore[arg-type, return-value]


def is_validated(scores: Sequence[Score]) -> bool:
    """Tell whether all have a validation accuracy to choose by."""
    return all(score.validation is not None for score in scores)


def shots_order(shots: int | str) -> tuple[bool, int]:
    """Return a sort key: numbers ascending, then ``"all"``."""
    return (True, 0) if isinstance(shots, str) else (False, shots)


def boards(records: Iterable[Record], beside: Iterable[Record] = ()) -> list[Board]:
    """Gather records by source, method and shots; names say what differs among them and those of another run."""
    records = list(records)
    every = [*records, *beside]
    varying = [key for key in (*_NAMES, *_WORDS, "pool") if _varies(key, every)]
    options = _varying_options(every)
    grouped: dict[str, dict[tuple[str, int | str], dict[int, Record]]] = {}
    for record in records:
        method = name_of(record, varying, options)
        group = grouped.setdefault(record["source"], {}).setdefault((method, record["shots"]), {})
        group[record["seed"]] = record
    return [
        Board(source, {(method, shots): Score(method, shots, group) for (method, shots), group in scores.items()})
        for source, scores in grouped.items()
    ]


def name_of(record: Record, varying: Sequence[str] = ("backbone",), options: Sequence[str] = ()) -> str:
    """Return a method's name: what was trained, and what else tells it apart."""
    if record["kind"] == HEAD:
        parts = [f"{record['head']} on {record['layer']}"]
    else:
        freeze = record["freeze"]
        words = {"all": "new top trained by backprop", "none": "whole network fine-tuned"}
        parts = [words.get(freeze, f"fine-tuned above {freeze}")]
        parts += [f"{key} {record['options'][key]}" for key in options if key in record["options"]]
    parts += [_text(record[key]) for key in varying if key in _NAMES and record.get(key) is not None]
    parts += [word.format(record[key]) for key, word in _WORDS.items() if key in varying and record.get(key)]
    if "pool" in varying and record["kind"] == HEAD:
        parts.append(record["pool"])
    return ", ".join(parts)


def _varies(key: str, records: Sequence[Record]) -> bool:
    """Tell whether a key tells methods apart; what follows from kind and backbone does so only within one of them."""
    values: dict[tuple[str, ...], set[str]] = {}
    for record in records:
        among = (record["kind"], record["backbone"]) if key in _SETTINGS else ()
        values.setdefault(among, set()).add(_text(record.get(key)))
    return any(len(found) > 1 for found in values.values())


def _varying_options(records: Sequence[Record]) -> list[str]:
    tuned = [record["options"] for record in records if "options" in record]
    keys = dict.fromkeys(key for options in tuned for key in options)
    return [key for key in keys if len({_text(options.get(key)) for options in tuned}) > 1]


def _text(value: object) -> str:
    return value if isinstance(value, str) else json.dumps(value)
