"""Images to frozen features as a scikit-learn transformer, for pipelines and cross-validation.

make_pipeline(ImageFeatures(), StandardScaler(), LogisticRegression()).fit(paths, labels)
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from PIL import Image
from sklearn.base import BaseEstimator, TransformerMixin

from pipeline.errors import SourceError, UnreadableImageError
from pipeline.images.decode import from_pillow
from pipeline.images.items import read_file
from pipeline.images.transform import prepare, resize_and_crop
from pipeline.spec import DEFAULT_BACKBONE, DEFAULT_LAYER, DEFAULT_POOL, Preprocessing

if TYPE_CHECKING:
    from pipeline.engines.torch_engine import TorchEngine

AnyImage = str | PathLike[str] | Image.Image | np.ndarray


class ImageFeatures(TransformerMixin, BaseEstimator):  # type: ignore[misc]
    """Turn images into the features of a frozen network.

    Nothing is learned: `fit` only checks, and `transform` works without it. The network is loaded on first use and
    shared by all transformers of the same parameters in a process, clones included.

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
    batch_size : int, optional
        Images at once; what suits the device by default.
    engine, device : str, default "auto"
        As for `pipeline.engines.select.resolve`.
    """

    def __init__(
        self,
        backbone: str = DEFAULT_BACKBONE,
        *,
        layer: str = DEFAULT_LAYER,
        pool: str = DEFAULT_POOL,
        precision: str = "auto",
        size: int | None = None,
        batch_size: int | None = None,
        engine: str = "auto",
        device: str = "auto",
    ) -> None:
        self.backbone = backbone
        self.layer = layer
        self.pool = pool
        self.precision = precision
        self.size = size
        self.batch_size = batch_size
        self.engine = engine
        self.device = device

    def fit(self, X: Sequence[AnyImage], y: Any = None) -> ImageFeatures:
        """Check the parameters, by loading the network, and the kinds of images in `X`; decode nothing.

        Parameters
        ----------
        X : sequence
            Paths, PIL images, or uint8 arrays of shape (h, w, 3) or (h, w), also mixed.
        y : ignored

        Raises
        ------
        ThawlineError
            If the network, a layer, the precision or the device cannot be had, or `X` holds something else or nothing.
        """
        _checked(X)
        self._extractor()
        return self

    def transform(self, X: Sequence[AnyImage]) -> np.ndarray:
        """Return the features, float32 (n, d), of the images in `X`, which are as in `fit`.

        Raises
        ------
        ThawlineError
            As in `fit`; also if an image cannot be decoded, naming it.
        """
        images = _checked(X)
        extractor = self._extractor()
        size = self.batch_size or extractor.batch_size
        with ThreadPoolExecutor() as threads:
            batches = _batches(images, size, extractor.preprocessing, threads)
            parts = [np.concatenate(features, axis=1) for _, features in extractor.engine.stream(batches)]
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
    engine: TorchEngine
    preprocessing: Preprocessing
    dims: dict[str, int]
    batch_size: int


def _stamp(backbone: str) -> int | None:
    """Return when the weights file in a backbone's name was written: the same name may hold other weights later."""
    path = Path(backbone.partition("@")[2])
    return path.stat().st_mtime_ns if path.is_file() else None


@lru_cache(maxsize=2)
def _load(
    name: str, stamp: int | None, layer: str, pool: str, precision: str, size: int | None, engine: str, device: str
) -> _Extractor:
    from pipeline.backbones.graph import tap
    from pipeline.backbones.registry import load
    from pipeline.engines.select import resolve
    from pipeline.engines.torch_engine import TorchEngine

    resolved = resolve(engine, device, precision)
    backbone = load(name, size)
    network = tap(backbone, layer.split("+"), pool)
    return _Extractor(TorchEngine(network, resolved), backbone.preprocessing, network.dims, resolved.batch_size)


class _Pixels(NamedTuple):
    pixels: np.ndarray


def _batches(
    images: list[AnyImage], size: int, preprocessing: Preprocessing, threads: ThreadPoolExecutor
) -> Iterator[_Pixels]:
    for start in range(0, len(images), size):
        chunk = images[start : start + size]
        yield _Pixels(np.stack(list(threads.map(lambda image: _pixels(image, preprocessing), chunk))))


def _checked(X: Sequence[AnyImage]) -> list[AnyImage]:
    expected = "paths, PIL images or uint8 arrays of shape (h, w, 3) or (h, w)"
    if isinstance(X, str | PathLike | Image.Image):
        raise SourceError(f"expected a list of {expected}, not a single {type(X).__name__}: put it in a list")
    images = list(X)
    if not images:
        raise SourceError(f"no images: expected a list of {expected}")
    for place, image in enumerate(images):
        if not (isinstance(image, str | PathLike | Image.Image) or _is_pixels(image)):
            what = (
                f"{image.dtype} array of shape {image.shape}" if isinstance(image, np.ndarray) else type(image).__name__
            )
            raise SourceError(f"expected {expected}; item {place} is a {what}")
    return images


def _is_pixels(image: Any) -> bool:
    if not isinstance(image, np.ndarray) or image.dtype != np.uint8 or image.size == 0:
        return False
    return image.ndim == 2 or (image.ndim == 3 and image.shape[2] == 3)


def _pixels(image: AnyImage, preprocessing: Preprocessing) -> np.ndarray:
    """Return the network's input, uint8 (h, w, 3), for one image."""
    if isinstance(image, np.ndarray):
        image = Image.fromarray(image)
    try:
        if isinstance(image, Image.Image):
            return resize_and_crop(from_pillow(image), preprocessing)
        return prepare(read_file(Path(image)), preprocessing)
    except (UnreadableImageError, OSError) as error:  # OSError: what Pillow raises for a damaged file that was opened
        raise UnreadableImageError(f"{image} cannot be used as an image: {error}") from error
