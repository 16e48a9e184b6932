"""All heads, by the names that users write."""

from __future__ import annotations

from dataclasses import dataclass

from features_cache import nearest
from pipeline.errors import FitError
from pipeline.heads.centroid import Centroid
from pipeline.heads.family import Family, Params
from pipeline.heads.knn import Knn
from pipeline.heads.linear_svm import LinearSvm
from pipeline.heads.logreg import Logreg
from pipeline.heads.multilabel import LabelsKnn, LabelsLogreg, LabelsRidge, LabelsSvm
from pipeline.heads.rbf_svm import RbfSvm
from pipeline.heads.regression import KernelSvr, KnnRegression, RidgeRegression
from pipeline.heads.ridge import Ridge
from pipeline.options import CLASSIFICATION, MULTILABEL, REGRESSION, head_name

FAMILIES: dict[str, Family] = {
    "logreg": Logreg(),
    "linear_svm": LinearSvm(),
    "rbf_svm": RbfSvm(),
    "knn": Knn(),
    "centroid": Centroid(),
    "ridge": Ridge(),
}
"""Those that predict a class."""
FAMILIES_OF: dict[str, dict[str, Family]] = {
    CLASSIFICATION: FAMILIES,
    MULTILABEL: {"logreg": LabelsLogreg(), "linear_svm": LabelsSvm(), "ridge": LabelsRidge(), "knn": LabelsKnn()},
    REGRESSION: {"ridge": RidgeRegression(), "svr": KernelSvr(), "knn": KnnRegression()},
}
"""Those of each task; families of one name do the same for another kind of target."""
SCALINGS = ("standard", "l2", "none")
_FIXED: dict[str, Params] = {"logreg/l2": {"C": 300.0}}
"""Instead of `Family.fixed`: rows of length 1 need less regularisation than standardised ones."""


@dataclass(frozen=True)
class Head:
    """A family of classifiers and how its features are scaled.

    Parameters
    ----------
    name : str
        Family and scaling, as in results: ``"logreg/l2"``.
    family : Family
        How candidates are searched and the final classifier is trained.
    scaling : str
        ``"l2"`` (each row to length 1; each of joined layers by itself), ``"standard"`` (each feature to mean 0 and
        variance 1) or ``"none"``.
    """

    name: str
    family: Family
    scaling: str

    @property
    def fixed(self) -> Params:
        """Parameters to use if nothing can be validated, as with one row per class."""
        return _FIXED.get(self.name, self.family.fixed)


def find_head(name: str, task: str = CLASSIFICATION) -> Head:
    """Return the head called `name`: ``FAMILY/SCALING``, or ``FAMILY`` with the default scaling.

    Raises
    ------
    FitError
        If there is no such family for the task, or no such scaling.

    Examples
    --------
    >>> find_head("knn/standard").scaling
    'standard'
    >>> find_head("logreg").name
    'logreg/l2'
    """
    family, _, scaling = head_name(name).partition("/")
    families = FAMILIES_OF[task]
    if family not in families:
        of_task = "" if task == CLASSIFICATION else f" for {task}"
        raise FitError(f"no head named {family!r}{of_task}; there are {', '.join(families)}{nearest(family, families)}")
    if scaling not in SCALINGS:
        raise FitError(f"no scaling named {scaling!r}; there are {', '.join(SCALINGS)}{nearest(scaling, SCALINGS)}")
    return Head(f"{family}/{scaling}", families[family], scaling)
