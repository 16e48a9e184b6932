"""A map of the features in two dimensions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import NDArray
from sklearn.decomposition import PCA
from sklearn.manifold import TSNE
from sklearn.preprocessing import StandardScaler
from threadpoolctl import threadpool_limits

from pipeline.arrays import Float32Array, Float64Array, IntArray
from pipeline.reporting.charts.style import COLOURS, INK, MARKERS, QUIET, new_figure, short

MOST_COLOURED = 24
"""Classes that are told apart by colour and sign; of more, ten are."""
FEW = 10
_FEATURES = 50
_PERPLEXITY = 30.0


def embedding_figure(
    features: Float32Array, y_true: IntArray, y_pred: IntArray, classes: Sequence[str], title: str = ""
) -> Figure:
    """Return maps of test images by PCA and by t-SNE (van der Maaten & Hinton 2008), wrongly labelled ones ringed.

    Of more than 24 classes, the ten that are mixed up most have colours and rings, and the others are grey.

    Parameters
    ----------
    features : (n, d) float32
        At least 5 rows.
    y_true, y_pred : (n,) int64
        Class numbers; colours show the true ones.
    classes : sequence of str
        Names by number.
    title : str, default ""
    """
    shown = _shown(y_true, y_pred, len(classes))
    figure = new_figure(13, 5.6)
    components, share = principal_components(features)
    maps = {f"PCA ({share:.0%} of the variance)": components[:, :2], "t-SNE": neighbour_map(components)}
    for axes, (name, places) in zip(figure.subplots(1, 2), maps.items(), strict=True):
        _scatter(axes, places, y_true, y_pred != y_true, [(number, short(classes[number])) for number in shown])
        axes.set_title(name)
    handles, names = figure.axes[0].get_legend_handles_labels()
    columns = 1 if len(names) <= 26 else 2
    figure.legend(handles, names, loc="outside right center", frameon=False, fontsize=9, ncols=columns)
    if title:
        figure.suptitle(title)
    return figure


def principal_components(features: Float32Array) -> tuple[Float64Array, float]:
    """Return at most 50 principal components (n, k), k at least 2, and the share of variance of the first two."""
    scaled = StandardScaler().fit_transform(features.astype(np.float64))
    pca = PCA(min(_FEATURES, *scaled.shape), random_state=0).fit(scaled)
    reduced = pca.transform(scaled)
    padded = reduced if reduced.shape[1] > 1 else np.hstack([reduced, np.zeros_like(reduced)])
    return padded, float(pca.explained_variance_ratio_[:2].sum())


def neighbour_map(components: Float64Array) -> Float64Array:
    """Return places (n, 2) by t-SNE, which keeps neighbours together, begun at the first two of `components` (n, k)."""
    begin = components[:, :2] / max(components[:, 0].std(), 1e-12) * 1e-4
    perplexity = min(_PERPLEXITY, (len(components) - 1) / 3)
    with threadpool_limits(1):  # more threads wait for one another on rows this few
        return np.asarray(TSNE(perplexity=perplexity, init=begin, random_state=0).fit_transform(components))


def _shown(y_true: IntArray, y_pred: IntArray, n_classes: int) -> list[int]:
    if n_classes <= MOST_COLOURED:
        return list(range(n_classes))
    wrong = y_true != y_pred
    errors = np.bincount(y_true[wrong], minlength=n_classes) + np.bincount(y_pred[wrong], minlength=n_classes)
    return sorted(np.argsort(-errors, kind="stable")[:FEW].tolist())


def _scatter(
    axes: Axes, places: Float64Array, y: IntArray, wrong: NDArray[np.bool_], shown: Sequence[tuple[int, str]]
) -> None:
    rest = ~np.isin(y, [number for number, _ in shown])
    ringed = wrong & ~rest  # rings on everything would hide it all
    if rest.any():
        axes.scatter(
            places[rest, 0], places[rest, 1], s=10, color=QUIET, alpha=0.45, linewidths=0, label="other classes"
        )
    for place, (number, name) in enumerate(shown):
        marker, color = MARKERS[(place + place // len(COLOURS)) % len(MARKERS)], COLOURS[place % len(COLOURS)]
        axes.scatter(
            places[y == number, 0],
            places[y == number, 1],
            s=22,
            color=color,
            marker=marker,
            alpha=0.8,
            linewidths=0,
            label=name,
        )
    if ringed.any():
        ring: dict[str, Any] = {"s": 55, "facecolors": "none", "edgecolors": INK, "linewidths": 0.9}
        axes.scatter(places[ringed, 0], places[ringed, 1], label="labelled wrongly", **ring)
    axes.set(xticks=[], yticks=[])
    axes.spines[:].set_color(QUIET)
