"""A frozen backbone as a scikit-learn transformer, for pipelines and cross-validation: images in, features out."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import closing
from functools import lru_cache, partial
from itertools import islice
from os import PathLike
from pathlib import Path
from threading import Lock
from typing import Any

import numpy as np
from PIL import Image
from sklearn.base import BaseEstimator, TransformerMixin

from pipeline.errors import SourceError, UnreadableImageError
from pipeline.extraction.extractor import FeatureExtractor
from pipeline.images.ahead import map_ahead
from pipeline.images.decode import from_pillow
from pipeline.images.loader import MIN_READERS, default_workers
from pipeline.images.resize import prepare, resize_and_crop
from pipeline.images.sources.items import read_file
from pipeline.spec import DEFAULT_BACKBONE, DEFAULT_LAYER, DEFAULT_POOL, Preprocessing, Request, Size

AnyImage = str | PathLike[str] | Image.Image | np.ndarray
KEPT = 4
"""Networks that stay loaded in a process: those used most recently."""

_RUNNING = Lock()
"""Held while a network runs: threads share networks, and one that is tapped by hooks runs one pass at a time."""


class ImageFeatures(TransformerMixin, BaseEstimator):  # type: ignore[misc]
    """Turn images into the features of a frozen network.

    Nothing is learned: `fit` only checks, and `transform` works without it. The network is loaded on first use. All
    transformers with the same parameters in a process share it, clones included, and a pickle does not contain it.

    Parameters
    ----------
    backbone : str, default "efficientnet_lite0"
        As for `pipeline.backbones.registry.load_backbone`.
    layer : str, default "penultimate"
        A layer or an alias. The features of several, joined by ``+``, and of all ``stages`` are put side by side.
    pool : str, default "avg"
        One of `pipeline.spec.POOLS`.
    precision : str, default "auto"
        One of `pipeline.spec.PRECISIONS`.
    size : int, optional
        Input height and width in pixels instead of the network's own.
    engine, device : str, default "auto"
        As for `pipeline.engines.select.resolve`.

    Attributes
    ----------
    n_features_out_ : int
        Features of an image; set by `fit`.

    Examples
    --------
    >>> import numpy as np
    >>> images = [np.zeros((40, 60, 3), np.uint8), np.full((40, 60), 255, np.uint8)]
    >>> ImageFeatures(layer="blocks.1", size=32).fit_transform(images).shape
    (2, 24)

    In a pipeline, with `paths` of photos and their `labels`::

        make_pipeline(ImageFeatures(), StandardScaler(), LogisticRegression()).fit(paths, labels)
    """

    def __init__(
        self,
        backbone: str = DEFAULT_BACKBONE,
        layer: str = DEFAULT_LAYER,
        pool: str = DEFAULT_POOL,
        precision: str = "auto",
        size: Size | None = None,
        engine: str = "auto",
        device: str = "auto",
    ) -> None:
        self.backbone = backbone
        self.layer = layer
        self.pool = pool
        self.precision = precision
        self.size = size
        self.engine = engine
        self.device = device

    def fit(self, X: Sequence[AnyImage], y: Any = None) -> ImageFeatures:
        """Check the parameters by loading the network, and the types of the images in `X`; decode nothing.

        Parameters
        ----------
        X : sequence
            Paths, Pillow images of any mode, and uint8 arrays of shape (h, w, 3) or (h, w), in any mixture; or one
            column of these: a data frame, an array (n, 1), or a list of lists.
        y : ignored
            For pipelines, which pass labels.

        Raises
        ------
        ThawlineError
            The network, a layer, the precision or the device is not available, or `X` holds something else.
        """
        _checked(X)
        self.n_features_out_ = sum(self._dims(self._extractor()).values())
        return self

    def transform(self, X: Sequence[AnyImage]) -> np.ndarray:
        """Return the features, float32 (n, d), of the images in `X`, which are as in `fit`.

        Raises
        ------
        UnreadableImageError
            An image cannot be decoded; the message names the first one.
        ThawlineError
            As in `fit`.
        """
        from pipeline.engines.engine import stream

        images = _checked(X)
        extractor = self._extractor()
        parts = [np.empty((0, sum(self._dims(extractor).values())), np.float32)]
        decode = partial(_pixels, preprocessing=extractor.backbone.preprocessing)
        with _RUNNING:
            engine = extractor.engine(extractor.layers, (self.pool,))
            size = engine.resolved.batch_size
            ahead = map_ahead(decode, enumerate(images), default_workers() + MIN_READERS, depth=size)
            with closing(ahead) as pixels:
                for features in stream(engine, _batches(pixels, size)):
                    parts.append(np.concatenate(features, axis=1))
        return np.concatenate(parts)

    def get_feature_names_out(self, input_features: Any = None) -> np.ndarray:
        """Return ``LAYER_0``, ``LAYER_1``, … as an object array; `input_features` is ignored."""
        return np.array(
            [f"{layer}_{index}" for layer, dim in self._dims(self._extractor()).items() for index in range(dim)],
            dtype=object,
        )

    def _extractor(self) -> FeatureExtractor:
        from pipeline.engines.engine import claim_process

        claim_process()
        request = Request(self.backbone, tuple(self.layer.split("+")), self.pool, self.precision, size=self.size)
        return _load(request, self.engine, self.device, _stamp(self.backbone))

    def _dims(self, extractor: FeatureExtractor) -> dict[str, int]:
        return extractor.tapped(extractor.layers, (self.pool,)).dims[self.pool]

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.input_tags.one_d_array = True
        tags.input_tags.two_d_array = False
        tags.input_tags.string = True
        tags.requires_fit = False
        tags.transformer_tags.preserves_dtype = []
        return tags


def _stamp(backbone: str) -> int | None:
    """Return when the weights file in ``NAME@FILE`` was last written: the same name may hold other weights later."""
    path = Path(backbone.partition("@")[2])
    return path.stat().st_mtime_ns if path.is_file() else None


@lru_cache(maxsize=KEPT)
def _load(request: Request, engine: str, device: str, stamp: int | None) -> FeatureExtractor:
    return FeatureExtractor([request], engine, device)


def _checked(X: Any) -> list[AnyImage]:
    """Return `X` as a list, after checking the types of its items; a table of one column is that column."""
    expected = "paths, Pillow images or uint8 arrays of shape (h, w, 3) or (h, w)"
    if isinstance(X, str | PathLike | Image.Image):
        raise SourceError(f"expected a list of {expected}, not a single {type(X).__name__}: put it in a list")
    if isinstance(X, np.ndarray) and X.ndim == 3 and X.shape[2] == 3:
        raise SourceError(
            f"expected a list of {expected}; an array of shape {X.shape} may be one colour image, or grey ones that "
            "are 3 wide: put it in a list"
        )
    columns = getattr(X, "columns", None)  # a data frame, which would give the names of its columns
    if columns is not None and len(columns) != 1:
        raise SourceError(f"expected one column of paths, got {len(columns)}: {', '.join(map(str, columns))}")
    images = [_only_cell(row) for row in (X if columns is None else X.to_numpy())]
    for index, image in enumerate(images):
        if not (isinstance(image, str | PathLike | Image.Image) or _is_pixels(image)):
            is_array = isinstance(image, np.ndarray)
            kind = f"{image.dtype} array of shape {image.shape}" if is_array else type(image).__name__
            raise SourceError(f"expected {expected}, but item {index} is a {kind}")
    return images


def _only_cell(row: Any) -> Any:
    """Return what is in a row of one cell, such as ``["a.png"]``; anything else is an image, or nothing of ours."""
    is_row = isinstance(row, list | tuple) or (isinstance(row, np.ndarray) and row.dtype.kind in "OU")
    return row[0] if is_row and len(row) == 1 and not isinstance(row[0], list | tuple) else row


def _is_pixels(image: Any) -> bool:
    if not isinstance(image, np.ndarray) or image.dtype != np.uint8 or image.size == 0:
        return False
    return image.ndim == 2 or (image.ndim == 3 and image.shape[2] == 3)


def _batches(pixels: Iterator[np.ndarray], size: int) -> Iterator[np.ndarray]:
    while batch := list(islice(pixels, size)):
        yield np.stack(batch)


def _pixels(numbered: tuple[int, AnyImage], preprocessing: Preprocessing) -> np.ndarray:
    """Return the network's input, uint8 (h, w, 3), for an item and its index."""
    index, image = numbered
    try:
        if isinstance(image, str | PathLike):
            return prepare(read_file(Path(image)), preprocessing)
        picture = from_pillow(Image.fromarray(image) if isinstance(image, np.ndarray) else image)
        return resize_and_crop(picture, preprocessing)
    except Exception as error:  # Pillow images decode here, and damaged ones raise nearly anything
        name = f" ({image})" if isinstance(image, str | PathLike) else ""
        reason = " ".join(str(error).split()) or type(error).__name__
        raise UnreadableImageError(f"item {index}{name} cannot be used as an image: {reason}") from error
