"""What exactly produced a layer's features: requests, specs and fingerprints.

A `Request` is what the user asked for, and a `LayerSpec` is what it resolved to. Features may be mixed or compared if
and only if their fingerprints are equal.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any, TypeVar

from pipeline.errors import BackboneError
from pipeline.results import from_json

if TYPE_CHECKING:
    from features_cache import CacheFile

R = TypeVar("R")
Size = int | tuple[int, int]
"""Of a network's input in pixels: the side of a square, or height and width."""

DEFAULT_BACKBONE = "efficientnet_lite0"
DEFAULT_LAYER = "penultimate"
DEFAULT_POOL = "avg"
DEFAULT_CACHE = "thawline-cache"
NO_POOL = "none"
"""The pool that keeps activations whole."""
POOLS = ("avg", "max", "avg+max", "gem", "grid2", "flatten", "cls", "cls+avg", NO_POOL)
PRECISIONS = ("auto", "fp32", "bf16", "fp16")
ENGINES = ("auto", "openvino", "torch", "compile")
STORES = ("float32", "float16")
INTERPOLATIONS = ("nearest", "bilinear", "bicubic", "lanczos")
NO_AUGMENT = "none"
LONGEST_SIDE = 4096
"""Longest side of a network's input, in pixels: a forged size must not take all memory."""
DECODE_POLICY = 2
"""Version of how `pipeline.images` decodes; raised whenever the same file could give other pixels.

2 differs from 1 in TIFFs alone: grey ones whose samples are wider than 8 bits follow their tags. Features that were
made by 1 are kept for all other images (`pipeline.extraction.fill`).
"""
REDECODED = (".tif", ".tiff")
"""How images are called, in lower case, that this `DECODE_POLICY` may decode differently from older ones."""
TRAINING_RULES = 8
"""Version of what `fit` and `finetune` compute; raised whenever the same job could give other numbers."""
NEAR_RULES = 2
"""Version of how the threshold for near-duplicates is measured."""
PRETEXT_RULES = 1
"""Version of the tasks of `pretrain`; raised whenever the same task could give other numbers."""
_UNSAID = {"white": None, "heads": 1, "prefix_tokens": None}
"""Fields that are newer than files without them, and their values there."""


def parse_size(value: Any) -> Size | None:
    """Return the size that a number, a pair or a text ``HEIGHTxWIDTH`` stands for; raises `BackboneError` if none.

    Examples
    --------
    >>> parse_size("192x256"), parse_size([224, 224]), parse_size(None)
    ((192, 256), 224, None)
    """
    if value is None:
        return None
    try:
        sides = [int(str(side)) for side in (value if isinstance(value, tuple | list) else str(value).split("x"))]
    except ValueError:
        sides = []
    if len(sides) not in (1, 2) or min(sides) < 1:
        raise BackboneError(
            f"the input size must be a number of pixels from 1 to {LONGEST_SIDE}, or HEIGHTxWIDTH, not {value}"
        )
    return sides[0] if sides[0] == sides[-1] else (sides[0], sides[1])


def size_name(size: Size | tuple[int, int]) -> str:
    """Return a size as `parse_size` reads it: ``"224"`` or ``"192x256"``."""
    return str(size) if isinstance(size, int) else str(size[0]) if size[0] == size[1] else f"{size[0]}x{size[1]}"


def is_outdated(file: CacheFile) -> bool:
    """Tell whether the images of a cache file were decoded by other rules than today's."""
    return any(info.spec.get("decode") != DECODE_POLICY for info in file.layers.values())


def canonical_json(value: Any) -> str:
    """Return `value` as JSON with sorted keys, no spaces, and tuples as lists: equal values give equal texts.

    Examples
    --------
    >>> canonical_json({"b": (1, 2), "a": None})
    '{"a":null,"b":[1,2]}'
    """
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)


def json_fields(record: Any) -> dict[str, Any]:
    """Return the fields of a dataclass as JSON would read them back, with lists for tuples.

    Newer fields are left out where they say what older files mean, so that fingerprints stay the same.
    """
    said = asdict(
        record, dict_factory=lambda pairs: {key: one for key, one in pairs if key not in _UNSAID or _UNSAID[key] != one}
    )
    fields: dict[str, Any] = json.loads(canonical_json(said))
    return fields


def fingerprint_of(value: Any) -> str:
    """Return the blake2b-128 hex digest (32 characters) of the canonical JSON of `value`."""
    return hashlib.blake2b(canonical_json(value).encode(), digest_size=16).hexdigest()


def _read(kind: type[R], value: Any) -> R:
    """Return a record of JSON; a key that this version does not know, which would change values, is a `ValueError`."""
    found = from_json(kind, value)
    if unknown := set(value) - set(vars(found)):
        raise ValueError(f"the key {min(unknown)!r} is not known")
    return found


@dataclass(frozen=True)
class Preprocessing:
    """How a decoded image becomes the network's input.

    Parameters
    ----------
    size : tuple of int
        Height and width of the network's input, in pixels.
    resize : int or tuple of int
        Length of the shorter side before the centre crop, or a fixed ``(height, width)``. Where `size` is no square, it
        is the shorter side of a box of the same proportions, which the image just covers before the crop.
    interpolation : str
        ``"bilinear"``, ``"bicubic"``, ``"lanczos"`` or ``"nearest"``; all but the last are antialiased.
    mean, std : tuple of float
        Of each channel (RGB), on a scale where white is 1.
    white : int, optional
        The level that is white in grey images wider than 8 bits, see `pipeline.images.decode.decode`.
    """

    size: tuple[int, int]
    resize: int | tuple[int, int]
    interpolation: str
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    white: int | None = field(default=None, kw_only=True)

    @property
    def geometry(self) -> tuple[Any, ...]:
        """Everything that decides about the pixels; networks of equal geometry can share them."""
        return self.size, self.resize, self.interpolation, self.white

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Preprocessing:
        """Rebuild from the fields that were read back from JSON, or raise `ValueError` if one makes no sense."""
        found: Preprocessing = _read(View if isinstance(value, Mapping) and "view" in value else cls, value)
        before_crop = found.resize if isinstance(found.resize, tuple) else (found.resize,)
        if not all(1 <= side <= LONGEST_SIDE for side in found.size):
            raise ValueError(f"expected an input of 1 to {LONGEST_SIDE} pixels, got {max(found.size)}")
        if not all(1 <= side <= 2 * LONGEST_SIDE for side in before_crop):
            raise ValueError(f"expected a resize to 1 to {2 * LONGEST_SIDE} pixels, got {max(before_crop)}")
        if found.interpolation not in INTERPOLATIONS or not all(std > 0 for std in found.std):
            raise ValueError("expected a known interpolation, and standard deviations above 0")
        return found

    def viewed(self, augment: str, view: int | None) -> Preprocessing:
        """Return the preprocessing of one augmented view; of the plain image if `view` is None."""
        return self if view is None else View(**vars(self), augment=augment, view=view)


@dataclass(frozen=True)
class View(Preprocessing):
    """Preprocessing that gives one augmented view of every image, drawn from the view's number and the image's bytes.

    Parameters
    ----------
    size, resize, interpolation, mean, std, white
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
        blake2b-128 of the loaded state dict, as `pipeline.backbones.backbone.Backbone` has it.
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
    heads : int
        For the layer ``penultimate``, the number of classifiers that read it; 1 for any other. Before there was this
        field, features were those that the first of several reads.
    prefix_tokens : int, optional
        For a layer that gives tokens: how many of them are not patches. Before there was this field, features were the
        means of all tokens, whatever the pooling.
    """

    backbone: str
    weights_digest: str
    layer: str
    pool: str
    preprocessing: Preprocessing
    precision: str
    store: str = "float32"
    decode: int = DECODE_POLICY
    heads: int = 1
    prefix_tokens: int | None = None

    @property
    def fingerprint(self) -> str:
        """Digest of all fields, 32 hex characters."""
        return fingerprint_of(self.to_json())

    def to_json(self) -> dict[str, Any]:
        """Return a JSON-ready dictionary; `from_json` is its inverse."""
        return json_fields(self)

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> LayerSpec:
        """Rebuild a spec from `to_json`'s dictionary, or raise `ValueError` if it is none."""
        fields = dict(value) if isinstance(value, Mapping) else {}
        found = _read(cls, fields | {"preprocessing": Preprocessing.from_json(fields.get("preprocessing", {}))})
        if found.pool not in POOLS or found.precision not in PRECISIONS or found.store not in STORES:
            raise ValueError("expected a known pooling, precision and dtype")
        return found


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
    size : int or tuple of int, optional
        Side, or height and width, of the network's input, in pixels, instead of the backbone's own.
    weights_file : str, optional
        Digest of the weights file that `backbone` names, if it names one: the file may change under the same name.
    augment : str, default "none"
        What the augmented view is made of, as in `View`.
    view : int, optional
        Number of the augmented view; None for plain images.
    white : int, optional
        As in `Preprocessing`.
    """

    backbone: str
    layers: tuple[str, ...]
    pool: str = DEFAULT_POOL
    precision: str = "auto"
    store: str = "float32"
    size: Size | None = None
    weights_file: str | None = None
    augment: str = NO_AUGMENT
    view: int | None = None
    white: int | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "size", parse_size(self.size))

    def to_json(self) -> dict[str, Any]:
        """Return a JSON-ready dictionary."""
        return json_fields(self)


def aliases_of(request: Mapping[str, Any]) -> dict[str, list[str]]:
    """Return the layers that each name stands for, as the request of a cache file says; none if it makes no sense."""
    aliases = request.get("aliases")
    layers = aliases.values() if isinstance(aliases, dict) else [None]
    if not all(isinstance(one, list) and one and all(isinstance(name, str) for name in one) for one in layers):
        return {}
    known: dict[str, list[str]] = dict(aliases or {})
    if "squeezenet" in str(request.get("backbone")) and known.get("logits") == ["classifier.1"]:
        del known["logits"]  # by an older version, which left out the last ReLU and the pooling
    return known
