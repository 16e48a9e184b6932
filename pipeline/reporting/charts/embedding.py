"""Features in two dimensions."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from sklearn.decomposition import PCA
from sklearn.manifold import TSNE
from sklearn.preprocessing import StandardScaler
from threadpoolctl import threadpool_limits

from pipeline.arrays import Float32Array, Float64Array, IntArray
from pipeline.reporting.charts.theme import MARKERS, SCREEN, Theme, short

MOST_COLOURED = 30  # up to so many classes have a colour and mark each; of more, the ten that are confused most
MOST_CONFUSED = 10
_FEATURES = 50
_PERPLEXITY = 30.0


def principal_components(features: Float32Array) -> tuple[Float64Array, float]:
    """Return at most 50 principal components (n, k), k at least 2, and the share of variance of the first two."""
    scaled = StandardScaler().fit_transform(features.astype(np.float64))
    pca = PCA(min(_FEATURES, *scaled.shape), random_state=0).fit(scaled)
    reduced = pca.transform(scaled)
    padded = reduced if reduced.shape[1] > 1 else np.hstack([reduced, np.zeros_like(reduced)])
    return padded, float(pca.explained_variance_ratio_[:2].sum())


def neighbour_map(components: Float64Array) -> Float64Array:
    """Return positions (n, 2) by t-SNE, which keeps neighbours together; it starts at the first two components."""
    start = components[:, :2] / max(components[:, 0].std(), 1e-12) * 1e-4
    perplexity = min(_PERPLEXITY, (len(components) - 1) / 3)
    with threadpool_limits(1):  # with so few rows, more threads only wait for one another
        return np.asarray(TSNE(perplexity=perplexity, init=start, random_state=0).fit_transform(components))


def draw_embedding(
    axes: Axes, positions: Float64Array, y_true: IntArray, y_pred: IntArray, classes: Sequence[str], theme: Theme
) -> None:
    """Draw images at their positions (n, 2), coloured by true class, and ring the mistakes.

    With more than 30 classes, the ten that are confused most have colours and rings, and all others are grey. The
    legend is left to the caller.
    """
    shown = shown_classes(y_true, y_pred, len(classes))
    rest = ~np.isin(y_true, shown)
    x, y = positions.T
    if rest.any():
        axes.scatter(x[rest], y[rest], s=10, color=theme.quiet, alpha=0.45, linewidths=0, label="other classes")
    for index, number in enumerate(shown):
        turn, color = divmod(index, len(theme.series))
        marker = MARKERS[(index + turn) % len(MARKERS)]
        own, label = y_true == number, short(classes[number])
        axes.scatter(
            x[own], y[own], s=20, color=theme.series[color], marker=marker, alpha=0.8, linewidths=0, label=label
        )
    ringed = (y_true != y_pred) & ~rest  # rings on everything would hide the map
    if ringed.any():
        axes.scatter(
            x[ringed], y[ringed], s=55, facecolors="none", edgecolors=theme.ink, linewidths=0.9, label="mistakes"
        )
    axes.set(xticks=[], yticks=[])
    axes.grid(visible=False)
    axes.spines[:].set_visible(True)


def shown_classes(y_true: IntArray, y_pred: IntArray, n_classes: int) -> list[int]:
    """Return the numbers of the classes that have a colour."""
    if n_classes <= MOST_COLOURED:
        return list(range(n_classes))
    wrong = y_true != y_pred
    errors = np.bincount(y_true[wrong], minlength=n_classes) + np.bincount(y_pred[wrong], minlength=n_classes)
    return sorted(np.argsort(-errors, kind="stable")[:MOST_CONFUSED].tolist())


def embedding_figure(
    features: Float32Array, y_true: IntArray, y_pred: IntArray, classes: Sequence[str], title: str = ""
) -> Figure:
    """Return maps of test images by PCA and by t-SNE (van der Maaten & Hinton 2008).

    `features` (n, d) has at least 5 rows; the colours show the true classes.
    """
    components, share = principal_components(features)
    maps = {f"PCA ({share:.0%} of the variance)": components[:, :2], "t-SNE": neighbour_map(components)}
    with SCREEN.figure(13, 5.6) as figure:
        for axes, (name, positions) in zip(figure.subplots(1, 2), maps.items(), strict=True):
            draw_embedding(axes, positions, y_true, y_pred, classes, SCREEN)
            axes.set_title(name)
        handles, names = figure.axes[0].get_legend_handles_labels()
        columns = 1 if len(names) <= 26 else 2
        figure.legend(handles, names, loc="outside right center", fontsize=9, ncols=columns)
        figure.suptitle(title)
    return figure
