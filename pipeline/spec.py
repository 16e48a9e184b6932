"""What exactly produced a layer's features: requests, specs and fingerprints.

A `Request` is what the user asked for, and a `LayerSpec` is what it resolved to. Features may be mixed or compared if
and only if their fingerprints are equal.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

DEFAULT_BACKBONE = "efficientnet_lite0"
DEFAULT_LAYER = "penultimate"
DEFAULT_POOL = "avg"
DEFAULT_CACHE = "thawline-cache"
POOLS = ("avg", "max", "avg+max", "gem", "grid2", "flatten")
PRECISIONS = ("auto", "fp32", "bf16", "fp16")
ENGINES = ("auto", "openvino", "torch", "compile")
STORES = ("float32", "float16")
NO_AUGMENT = "none"
DECODE_POLICY = 1
"""Version of how `pipeline.images` decodes; raised whenever the same file could give other pixels."""
TRAINING_RULES = 3
"""Version of what `fit` and `finetune` compute; raised whenever the same job could give other numbers."""


def canonical_json(value: Any) -> str:
    """Return `value` as JSON with sorted keys, no spaces, and tuples as lists: equal values give equal texts.

    Examples
    --------
    >>> canonical_json({"b": (1, 2), "a": None})
    '{"a":null,"b":[1,2]}'
    """
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)


def json_fields(record: Any) -> dict[str, Any]:
    """Return the fields of a dataclass as JSON would read them back, with lists for tuples."""
    fields: dict[str, Any] = json.loads(canonical_json(asdict(record)))
    return fields


def fingerprint_of(value: Any) -> str:
    """Return the blake2b-128 hex digest (32 characters) of the canonical JSON of `value`."""
    return hashlib.blake2b(canonical_json(value).encode(), digest_size=16).hexdigest()


@dataclass(frozen=True)
class Preprocessing:
    """How a decoded image becomes the network's input.

    Parameters
    ----------
    size : tuple of int
        Height and width of the network's input, in pixels.
    resize : int or tuple of int
        Length of the shorter side before the centre crop, or a fixed ``(height, width)``.
    interpolation : str
        ``"bilinear"``, ``"bicubic"``, ``"lanczos"`` or ``"nearest"``; all but the last are antialiased.
    mean, std : tuple of float
        Of each channel (RGB), on a scale where white is 1.
    """

    size: tuple[int, int]
    resize: int | tuple[int, int]
    interpolation: str
    mean: tuple[float, float, float]
    std: tuple[float, float, float]

    @property
    def geometry(self) -> tuple[Any, ...]:
        """Everything that decides about the pixels; networks of equal geometry can share them."""
        return self.size, self.resize, self.interpolation

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Preprocessing:
        """Rebuild from the fields that were read back from JSON; lists become tuples."""
        fields: dict[str, Any] = {key: tuple(item) if isinstance(item, list) else item for key, item in value.items()}
        return View(**fields) if "view" in fields else cls(**fields)

    def viewed(self, augment: str, view: int | None) -> Preprocessing:
        """Return the preprocessing of one augmented view; of the plain image if `view` is None."""
        return self if view is None else View(**vars(self), augment=augment, view=view)


@dataclass(frozen=True)
class View(Preprocessing):
    """Preprocessing that gives one augmented view of every image, drawn from the view's number and the image's bytes.

    Parameters
    ----------
    size, resize, interpolation, mean, std
        As in `Preprocessing`.
    augment : str
        ``"crop"``, ``"flip"`` and ``"colour"``, joined by ``+``.
    view : int
        Number of the view.
    """

    augment: str
    view: int

    @property
    def geometry(self) -> tuple[Any, ...]:
        """Everything that decides about the pixels; each view has its own."""
        return *super().geometry, self.augment, self.view


@dataclass(frozen=True)
class LayerSpec:
    """Everything that can change a value of one layer's features.

    Parameters
    ----------
    backbone : str
        Canonical name with its zoo, such as ``"torchvision/resnet50"``.
    weights_digest : str
        blake2b-128 of the loaded state dict.
    layer : str
        Name of the layer, never an alias.
    pool : str
        One of `POOLS`.
    preprocessing : Preprocessing
        How images become the network's input.
    precision : str
        ``"fp32"``, ``"bf16"`` or ``"fp16"``, never ``"auto"``.
    store : str
        One of `STORES`: the dtype on disk.
    decode : int
        The `DECODE_POLICY` that the images were decoded with.
    """

    backbone: str
    weights_digest: str
    layer: str
    pool: str
    preprocessing: Preprocessing
    precision: str
    store: str = "float32"
    decode: int = DECODE_POLICY

    @property
    def fingerprint(self) -> str:
        """Digest of all fields, 32 hex characters."""
        return fingerprint_of(asdict(self))

    def to_json(self) -> dict[str, Any]:
        """Return a JSON-ready dictionary; `from_json` is its inverse."""
        return json_fields(self)

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> LayerSpec:
        """Rebuild a spec from `to_json`'s dictionary."""
        fields = dict(value)
        return cls(preprocessing=Preprocessing.from_json(fields.pop("preprocessing")), **fields)


@dataclass(frozen=True)
class Request:
    """What the user asked of one backbone; a cache file keeps it beside the specs that it resolved to.

    Parameters
    ----------
    backbone : str
        Name as the user wrote it, with its weights.
    layers : tuple of str
        Layers or aliases, in the order in which they were asked for.
    pool, precision, store : str
        As in `LayerSpec`; precision may also be ``"auto"``.
    size : int, optional
        Height and width of the network's input, in pixels, instead of the backbone's own.
    weights_file : str, optional
        Digest of the weights file that `backbone` names, if it names one: the file may change under the same name.
    augment : str, default "none"
        What the augmented view is made of, as in `View`.
    view : int, optional
        Number of the augmented view; None for plain images.
    """

    backbone: str
    layers: tuple[str, ...]
    pool: str = DEFAULT_POOL
    precision: str = "auto"
    store: str = "float32"
    size: int | None = None
    weights_file: str | None = None
    augment: str = NO_AUGMENT
    view: int | None = None

    def to_json(self) -> dict[str, Any]:
        """Return a JSON-ready dictionary."""
        return json_fields(self)
