"""A frozen backbone as a scikit-learn transformer, for pipelines and cross-validation: images in, features out.

make_pipeline(ImageFeatures(), StandardScaler(), LogisticRegression()).fit(paths, labels)
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import lru_cache
from os import PathLike
from pathlib import Path
from threading import Lock
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from PIL import Image
from sklearn.base import BaseEstimator, TransformerMixin

from pipeline.errors import SourceError, UnreadableImageError
from pipeline.images.decode import from_pillow
from pipeline.images.resize import prepare, resize_and_crop
from pipeline.images.sources.items import read_file
from pipeline.spec import DEFAULT_BACKBONE, DEFAULT_LAYER, DEFAULT_POOL, Preprocessing

if TYPE_CHECKING:
    from pipeline.engines.engine import Engine

AnyImage = str | PathLike[str] | Image.Image | np.ndarray
KEPT = 4
"""Networks that stay loaded in a process: those used last."""

_RUNNING = Lock()
"""Held while a network runs: threads share them, and those tapped by hooks bear only one pass at a time."""


class ImageFeatures(TransformerMixin, BaseEstimator):  # type: ignore[misc]
    """Turn images into the features of a frozen network.

    Nothing is learned: `fit` only checks, and `transform` works without it. The network is loaded on first use, is
    shared by all transformers of the same parameters in a process, clones included, and is no part of a pickle.

    Parameters
    ----------
    backbone : str, default "efficientnet_lite0"
        As for `pipeline.backbones.registry.load`.
    layer : str, default "penultimate"
        A layer or an alias; several joined by ``+`` and all of ``stages`` are put side by side.
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
        Features an image; set by `fit`.
    """

    def __init__(
        self,
        backbone: str = DEFAULT_BACKBONE,
        layer: str = DEFAULT_LAYER,
        pool: str = DEFAULT_POOL,
        precision: str = "auto",
        size: int | None = None,
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
        """Check the parameters, by loading the network, and the kinds of images in `X`; decode nothing.

        Parameters
        ----------
        X : sequence
            Paths, Pillow images of any mode, or uint8 arrays of shape (h, w, 3) or (h, w); mixed as you like.
        y : ignored
            Labels, which change nothing.

        Raises
        ------
        ThawlineError
            If the network, a layer, the precision or the device cannot be had, or `X` holds something else.
        """
        _checked(X)
        self.n_features_out_ = sum(self._extractor().dims.values())
        return self

    def transform(self, X: Sequence[AnyImage]) -> np.ndarray:
        """Return the features, float32 (n, d), of the images in `X`, which are as in `fit`.

        Raises
        ------
        UnreadableImageError
            Naming the first image that cannot be decoded.
        ThawlineError
            As in `fit`.
        """
        from pipeline.engines.engine import stream

        images = _checked(X)
        extractor = self._extractor()
        parts = [np.empty((0, sum(extractor.dims.values())), np.float32)]
        with _RUNNING:
            for features in stream(extractor.engine, _batches(images, extractor)):
                parts.append(np.concatenate(features, axis=1))
        return np.concatenate(parts)

    def get_feature_names_out(self, input_features: Any = None) -> np.ndarray:
        """Return ``LAYER_0``, ``LAYER_1``, … as an array of objects; `input_features` is ignored."""
        dims = self._extractor().dims
        return np.array([f"{layer}_{place}" for layer, dim in dims.items() for place in range(dim)], dtype=object)

    def _extractor(self) -> _Extractor:
        name = self.backbone
        return _load(name, _stamp(name), self.layer, self.pool, self.precision, self.size, self.engine, self.device)

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.input_tags.one_d_array = True
        tags.input_tags.two_d_array = False
        tags.input_tags.string = True
        tags.requires_fit = False
        tags.transformer_tags.preserves_dtype = []
        return tags


class _Extractor(NamedTuple):
    """A network ready to run, what its images must become, and the length of each layer's features."""

    engine: Engine
    preprocessing: Preprocessing
    dims: dict[str, int]


def _stamp(backbone: str) -> int | None:
    """Return when the weights file in a backbone's name was written: the same name may hold other weights later."""
    path = Path(backbone.partition("@")[2])
    return path.stat().st_mtime_ns if path.is_file() else None


@lru_cache(maxsize=KEPT)
def _load(
    name: str, stamp: int | None, layer: str, pool: str, precision: str, size: int | None, engine: str, device: str
) -> _Extractor:
    from pipeline.backbones.registry import load
    from pipeline.backbones.taps import tap
    from pipeline.engines.engine import build_engine
    from pipeline.engines.select import resolve

    resolved = resolve(engine, device, precision)
    backbone = load(name, size)
    network = tap(backbone, layer.split("+"), pool)
    built = build_engine(network, resolved, resolved.batch_size)
    return _Extractor(built, backbone.preprocessing, network.dims)


def _checked(X: Sequence[AnyImage]) -> list[AnyImage]:
    """Return `X` as a list whose items are of a kind that can be an image."""
    expected = "paths, Pillow images or uint8 arrays of shape (h, w, 3) or (h, w)"
    if isinstance(X, str | PathLike | Image.Image):
        raise SourceError(f"expected a list of {expected}, not a single {type(X).__name__}: put it in a list")
    images = list(X)
    for place, image in enumerate(images):
        if not (isinstance(image, str | PathLike | Image.Image) or _is_pixels(image)):
            is_array = isinstance(image, np.ndarray)
            kind = f"{image.dtype} array of shape {image.shape}" if is_array else type(image).__name__
            raise SourceError(f"expected {expected}, but item {place} is a {kind}")
    return images


def _is_pixels(image: Any) -> bool:
    if not isinstance(image, np.ndarray) or image.dtype != np.uint8 or image.size == 0:
        return False
    return image.ndim == 2 or (image.ndim == 3 and image.shape[2] == 3)


def _batches(images: list[AnyImage], extractor: _Extractor) -> Iterator[np.ndarray]:
    """Decode in threads, one batch ahead of the one that is being computed."""
    threads = ThreadPoolExecutor()
    ahead: list[Future[np.ndarray]] = []
    try:
        size = extractor.engine.resolved.batch_size
        for start in range(0, len(images), size):
            current = ahead
            chunk = enumerate(images[start : start + size], start)
            ahead = [threads.submit(_pixels, image, place, extractor.preprocessing) for place, image in chunk]
            if current:
                yield np.stack([future.result() for future in current])
        if ahead:
            yield np.stack([future.result() for future in ahead])
    finally:
        threads.shutdown(cancel_futures=True)


def _pixels(image: AnyImage, place: int, preprocessing: Preprocessing) -> np.ndarray:
    """Return the network's input, uint8 (h, w, 3), for item `place`."""
    try:
        if isinstance(image, str | PathLike):
            return prepare(read_file(Path(image)), preprocessing)
        picture = from_pillow(Image.fromarray(image) if isinstance(image, np.ndarray) else image)
        return resize_and_crop(picture, preprocessing)
    except Exception as error:  # a Pillow image from a file decodes here, and damaged ones raise nearly anything
        name = f" ({image})" if isinstance(image, str | PathLike) else ""
        reason = " ".join(str(error).split()) or type(error).__name__
        raise UnreadableImageError(f"item {place}{name} cannot be used as an image: {reason}") from error
