"""The heads there are, by the names users write."""

from __future__ import annotations

from dataclasses import dataclass, replace

from features_cache import nearest
from pipeline.errors import FitError
from pipeline.heads.family import Family
from pipeline.heads.instance import Centroid, Knn, RbfSvm
from pipeline.heads.linear_svm import LinearSvm
from pipeline.heads.logreg import Logreg
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
        As in results: ``"logreg"``, or ``"logreg/l2"`` where the scaling is not the standard one.
    family : Family
        How candidates are searched and the final one is trained.
    scaling : str
        ``"standard"`` (each feature to mean 0 and variance 1), ``"l2"`` (each row to length 1) or ``"none"``.
    """

    name: str
    family: Family
    scaling: str


def find_head(name: str) -> Head:
    """Return the head that `name` stands for: ``FAMILY`` or ``FAMILY/SCALING``.

    Raises
    ------
    FitError
        If there is no such family or scaling.
    """
    family, slash, scaling = name.partition("/")
    if family not in FAMILIES:
        raise FitError(f"no head named {family!r}; there are {', '.join(FAMILIES)}{nearest(family, FAMILIES)}")
    if slash and scaling not in SCALINGS:
        raise FitError(f"no scaling named {scaling!r}; there are {', '.join(SCALINGS)}{nearest(scaling, SCALINGS)}")
    plain = scaling in ("", "standard")
    return Head(family if plain else name, FAMILIES[family], "standard" if plain else scaling)


def on_device(head: Head, device: str) -> Head:
    """Return `head` trained on torch tensors on `device`, or as it is where its family knows numpy arrays alone."""
    return replace(head, family=Logreg(device)) if isinstance(head.family, Logreg) else head
