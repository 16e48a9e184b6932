"""All heads, by the names that users write."""

from __future__ import annotations

from dataclasses import dataclass

from features_cache import nearest
from pipeline.errors import FitError
from pipeline.heads.centroid import Centroid
from pipeline.heads.family import Family
from pipeline.heads.knn import Knn
from pipeline.heads.linear_svm import LinearSvm
from pipeline.heads.logreg import Logreg
from pipeline.heads.rbf_svm import RbfSvm
from pipeline.heads.ridge import Ridge

FAMILIES: dict[str, Family] = {
    "logreg": Logreg(),
    "linear_svm": LinearSvm(),
    "rbf_svm": RbfSvm(),
    "knn": Knn(),
    "centroid": Centroid(),
    "ridge": Ridge(),
}
SCALINGS = ("standard", "l2", "none")


@dataclass(frozen=True)
class Head:
    """A family of classifiers and how its features are scaled.

    Parameters
    ----------
    name : str
        As in results: ``"logreg"``, or ``"logreg/l2"`` if the scaling is not the standard one.
    family : Family
        How candidates are searched and the final classifier is trained.
    scaling : str
        ``"standard"`` (each feature to mean 0 and variance 1), ``"l2"`` (each row to length 1) or ``"none"``.
    """

    name: str
    family: Family
    scaling: str


def find_head(name: str) -> Head:
    """Return the head called `name`: ``FAMILY`` or ``FAMILY/SCALING``.

    Raises
    ------
    FitError
        If there is no such family or scaling.

    Examples
    --------
    >>> find_head("knn/l2").scaling
    'l2'
    >>> find_head("logreg/standard").name
    'logreg'
    """
    family, slash, scaling = name.partition("/")
    if family not in FAMILIES:
        raise FitError(f"no head named {family!r}; there are {', '.join(FAMILIES)}{nearest(family, FAMILIES)}")
    if slash and scaling not in SCALINGS:
        raise FitError(f"no scaling named {scaling!r}; there are {', '.join(SCALINGS)}{nearest(scaling, SCALINGS)}")
    plain = scaling in ("", "standard")
    return Head(family if plain else name, FAMILIES[family], "standard" if plain else scaling)
