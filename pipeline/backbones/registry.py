"""The backbones of all zoos by name: ``[ZOO/]NAME[@WEIGHTS]`` in, a loaded `Backbone` out."""

from __future__ import annotations

import fnmatch
import math
import re
from dataclasses import replace
from functools import cache, lru_cache
from pathlib import Path
from typing import Any, Literal, NamedTuple, Protocol, cast

import torch
from torch import Tensor, nn

from features_cache import nearest
from pipeline.backbones import zoo_embedded as embedded
from pipeline.backbones import zoo_lecture as lecture_zoo
from pipeline.backbones import zoo_timm as timm_zoo
from pipeline.backbones import zoo_torchvision as torchvision_zoo
from pipeline.backbones.backbone import Backbone
from pipeline.backbones.known import Known, remember, take_stamps
from pipeline.backbones.network_file import describe_network, is_network_file
from pipeline.backbones.top import tuned_backbone
from pipeline.backbones.weights import (
    SUFFIXES,
    build_untouched,
    check_finite,
    fill_weights,
    read_state_dict,
    weights_digest,
    weights_of,
)
from pipeline.errors import BackboneError, first_line
from pipeline.spec import LONGEST_SIDE, Preprocessing, Size, fingerprint_of, json_fields, parse_size, size_name


class Zoo(Protocol):
    """The functions that a module must have to be a zoo; it becomes one by an entry in `ZOOS`.

    A `size` of None stands for the network's own input size.
    """

    def names(self) -> list[str]:
        """Return the names of all networks."""

    def tags(self, name: str) -> tuple[str, ...]:
        """Return the tags of the pretrained weights, the default first."""

    def cached(self, name: str, tag: str) -> bool:
        """Tell whether these weights are on this machine."""

    def weights_paths(self, name: str, tag: str) -> list[Path]:
        """Return the files that decide what the tag stands for on this machine, whether they exist or not."""

    def build(self, name: str, size: Size | None, classes: int | None) -> nn.Module:
        """Return the network without pretrained weights; it has its own number of classes if `classes` is None."""

    def pretrained(self, name: str, tag: str, size: Size | None) -> nn.Module:
        """Return the network with these weights, or raise `BackboneError`."""

    def preprocessing(self, name: str, tag: str | None) -> Preprocessing:
        """Return how these weights expect images to be prepared; None stands for the default tag."""

    def classifiers(self, name: str, module: nn.Module) -> tuple[str, ...]:
        """Return the dotted names of the classifiers of a network that this zoo built; most have one, some none."""


ZOOS: dict[str, Zoo] = {
    "embedded": embedded,
    "torchvision": torchvision_zoo,
    "timm": timm_zoo,
    "lecture": lecture_zoo,
}
"""In the order in which a name without a zoo is looked for."""
RANDOM = "random"


class BackboneRow(NamedTuple):
    """One line of `list_backbones`; `local` are those of the `weights` that are on this machine."""

    name: str
    zoo: str
    weights: tuple[str, ...]
    local: tuple[str, ...]


def list_backbones(pattern: str = "") -> list[BackboneRow]:
    """Return the networks whose names match `pattern`, in the order of the zoos, then by name.

    `pattern` is a part of the name, or a shell pattern such as ``"resnet*"``; it may start with the zoo
    (``"timm/vit*"``). Raises `BackboneError` if no name matches.
    """
    shell = pattern if any(sign in pattern for sign in "*?[") else f"*{pattern}*"
    rows = []
    for zoo_name, zoo in ZOOS.items():
        for name in zoo.names():
            if fnmatch.fnmatchcase(name, shell) or fnmatch.fnmatchcase(f"{zoo_name}/{name}", shell):
                tags = zoo.tags(name)
                local = tuple(tag for tag in tags if zoo.cached(name, tag))
                rows.append(BackboneRow(_short(zoo_name, name), zoo_name, tags, local))
    if not rows:
        raise BackboneError(f"no backbone matches '{pattern}'{nearest(pattern, _owners())}")
    return rows


def load_backbone(name: str, size: Size | None = None, white: int | None = None) -> Backbone:
    """Load a network by name.

    Parameters
    ----------
    name : str
        ``NAME``, ``ZOO/NAME``, or either with ``@WEIGHTS``: a tag, ``random:SEED``, or a weights file. Also timm's
        ``NAME.TAG``, ``hf-hub:ORG/NAME`` and ``local-dir:PATH``, and the lecture's ``NAME[OPTION=VALUE,...]``. If the
        file is a saved fine-tuned network, the result has the classes that it was fine-tuned to. If it is a checkpoint
        without a classifier, the layer ``logits`` is what the classifier would read.
    size : int or tuple of int, optional
        Input side, or height and width, in pixels instead of the network's own; the resize before the crop is scaled
        with it.
    white : int, optional
        As in `pipeline.spec.Preprocessing`; a fine-tuned network brings its own, and takes no other.

    Raises
    ------
    BackboneError
        If the name, the weights or the size do not exist, or a fine-tuned network has another white level.
    ModelFileError
        If a fine-tuned network's file is damaged or does not fit the libraries here.

    Examples
    --------
    >>> backbone = load_backbone("resnet18@random:0", size=128)
    >>> backbone.name, backbone.classifiers
    ('torchvision/resnet18', ('fc',))
    >>> backbone.preprocessing.size, backbone.preprocessing.resize
    ((128, 128), 146)
    """
    size = parse_size(size)
    stamps = take_stamps(_weights_paths(name))
    backbone = _load(name, size, white)
    _check_size(backbone, size)
    if not any(stamp[1:] for stamp in stamps):  # nothing was here, so the weights were downloaded
        stamps = take_stamps(_weights_paths(name))
    preprocessing = json_fields(replace(backbone.preprocessing, white=None))
    remember(name, size, stamps, Known(backbone.weights_digest, len(backbone.classifiers), preprocessing))
    return backbone


def _load(name: str, size: Size | None, white: int | None) -> Backbone:
    zoo_name, bare, weights = _parse(name)
    if is_network_file(weights):
        own = describe_network(weights).scores.preprocessing
        if white not in (None, own.white):
            trained = "without a white level" if own.white is None else f"with the white level {own.white}"
            raise BackboneError(
                f"{weights} was trained {trained}, and keeps to it; leave out white, or train it again with {white}"
            )
        return tuned_backbone(_load(f"{zoo_name}/{bare}@random:0", size or parse_size(own.size), white), Path(weights))
    zoo = ZOOS[zoo_name]
    tags = zoo.tags(bare)
    kind = _kind(weights)
    tag = _tag(bare, weights, tags) if kind == "tag" else None
    label = tag or weights
    preprocessing = replace(_resized(zoo.preprocessing(bare, tag), size), white=white)
    if tag is not None:
        module = build_untouched(lambda: zoo.pretrained(bare, tag, size))
        classifiers = zoo.classifiers(bare, module)
    elif kind == "random":
        module = _build(zoo, bare, size, seed=_seed(weights))
        classifiers = zoo.classifiers(bare, module)
    else:
        module, classifiers = _from_file(zoo, bare, Path(weights), size)
        label = Path(weights).name
    module = module.eval().requires_grad_(False).float()
    check_finite(module, name)
    handle = _short(zoo_name, bare) + ("" if tags and label == tags[0] else f"@{label}")
    if tag is not None and tag not in tags:  # from elsewhere: it names the network, too
        handle = tag
    digest = weights_digest(module.state_dict())
    arguments = "" if tag is None else timm_zoo.arguments(tag)
    if arguments:
        digest = fingerprint_of([digest, arguments])  # networks of equal weights may compute different things
    return Backbone(f"{zoo_name}/{bare}", handle, label, digest, module, preprocessing, classifiers, arguments)


def _weights_paths(name: str) -> list[Path]:
    zoo_name, bare, weights = _parse(name)
    kind, zoo = _kind(weights), ZOOS[zoo_name]
    if kind == "tag":
        return zoo.weights_paths(bare, _tag(bare, weights, zoo.tags(bare)))
    return [Path(weights).absolute()] if kind == "file" else []


def check_weights(name: str) -> None:
    """Raise `BackboneError` unless the network and the weights of `name` exist; nothing is loaded."""
    zoo_name, bare, weights = _parse(name)
    kind = _kind(weights)
    if kind == "tag":
        _tag(bare, weights, ZOOS[zoo_name].tags(bare))
    elif kind == "random":
        _seed(weights)
    elif not Path(weights).is_file():
        raise BackboneError(f"{name}: expected a weights file, found nothing at {weights}")


def sketch(name: str, size: Size | None = None) -> Backbone:
    """Return a network whose weights mean nothing, enough to list its layers and shapes; most take no memory.

    The weights in `name` are ignored, except those of a saved fine-tuned network, because its last layer differs.
    """
    size = parse_size(size)
    zoo_name, bare, weights = _parse(name)
    if is_network_file(weights) or weights.startswith(timm_zoo.ELSEWHERE):
        return load_backbone(name, size)
    sketched = _sketch(zoo_name, bare, size)
    _check_size(sketched, size)
    return sketched


@lru_cache(maxsize=8)  # the parts of `compare` ask for the same networks again and again
def _sketch(zoo_name: str, bare: str, size: Size | None) -> Backbone:
    zoo = ZOOS[zoo_name]
    preprocessing = _resized(zoo.preprocessing(bare, None), size)

    def build() -> Backbone:
        module = _build(zoo, bare, size).eval().requires_grad_(False)
        classifiers = zoo.classifiers(bare, module)
        return Backbone(f"{zoo_name}/{bare}", _short(zoo_name, bare), "", "", module, preprocessing, classifiers)

    try:
        with torch.device("meta"):
            sketched = build()
        _ = sketched.traced
    except (NotImplementedError, RuntimeError, BackboneError):  # a few networks look at values, which meta has none of
        return build()
    return sketched


def _build(zoo: Zoo, name: str, size: Size | None, classes: int | None = None, seed: int | None = None) -> nn.Module:
    """Return a network without pretrained weights; raise `BackboneError` if it cannot be built for a size."""
    try:
        return build_untouched(lambda: zoo.build(name, size, classes), seed)
    except (AssertionError, RuntimeError, ValueError) as error:  # from the network's own code
        if size is None:
            raise
        height, width = _sides(size)
        raise BackboneError(f"{name} cannot be built for {height}x{width} images ({first_line(error)})") from error


def _check_size(backbone: Backbone, size: Size | None) -> None:
    """Raise `BackboneError`, with sizes that work, unless a network runs on images of the size that was asked for."""
    if size is None:
        return
    try:
        patch = _patch(backbone.module)
        if any(side % patch for side in _sides(size)):  # timm would leave out the last pixels
            raise BackboneError(f"{backbone.handle} takes multiples of {patch} pixels, not {size_name(size)}")
        _ = backbone.traced
        if _takes_for_square(backbone, _sides(size), patch):
            raise BackboneError(f"{backbone.handle} takes squares only, not {size_name(size)}")
    except BackboneError as error:
        step = math.lcm(patch, 32)
        below = [side // step * step for side in _sides(size)]
        candidates = [below, [side + step for side in below], [below[0]] * 2, [below[-1]] * 2]
        tried = dict.fromkeys(found for sides in candidates if min(sides) and (found := parse_size(sides)))
        working = [size_name(other) for other in tried if _runs(backbone, other, patch)]
        way = f"sizes that work: {', '.join(working[:2])}" if working else "leave out the size or give another"
        raise BackboneError(f"{error}; {way}") from error


def _patch(module: nn.Module) -> int:
    """Return the side of the patches that a transformer cuts an image into; 1 if it cuts none, or they overlap."""
    embedding = getattr(module, "patch_embed", None)
    patch = getattr(embedding, "patch_size", None) or 1
    stride = getattr(getattr(embedding, "proj", None), "stride", patch)
    (side, *_), (step, *_) = (one if isinstance(one, tuple | list) else (one,) for one in (patch, stride))
    return int(side) if side == step else 1


def _takes_for_square(backbone: Backbone, sides: tuple[int, int], patch: int) -> bool:
    """Tell whether a network would lay out the patches of a rectangle as a square.

    A network that takes the square root of their number for a side, as ConViT does, runs on 4 x 16 patches as if they
    were 8 x 8. It does not run on 8 x 16, which are no square number.
    """
    (low, high), patches = sorted(sides), math.prod(sides) // patch**2
    return (
        low < high and math.isqrt(patches) ** 2 == patches and patch > 1 and not _runs(backbone, (2 * low, high), patch)
    )


def _sides(size: Size) -> tuple[int, int]:
    return (size, size) if isinstance(size, int) else size


def _runs(backbone: Backbone, size: Size, patch: int) -> bool:
    zoo_name, _, bare = backbone.name.partition("/")
    try:
        shapes = _sketch(zoo_name, bare, size).traced.shapes
        return bool(shapes) and not _takes_for_square(backbone, _sides(size), patch)
    except BackboneError:
        return False


def _parse(text: str) -> tuple[str, str, str]:
    """Return the zoo, the name within it, and the weights ('' for the default)."""
    if text.startswith(timm_zoo.ELSEWHERE):
        published = text.partition(":")[2].removeprefix("timm/")
        if text.endswith(f":timm/{published}") and _is_tagged(published):
            return _parse(f"timm/{published}")  # timm knows it, so that both names share their features
        return "timm", timm_zoo.architecture(text), text
    name, _, weights = text.partition("@")
    zoo_name, slash, bare = name.rpartition("/")
    if zoo_name in ("", "timm") and not weights and _is_tagged(bare):
        bare, _, weights = bare.partition(".")
        return "timm", bare, weights
    if slash and zoo_name not in ZOOS:
        raise BackboneError(f"unknown zoo '{zoo_name}' in '{text}': expected one of {', '.join(ZOOS)}")
    base, options, _ = bare.partition("[")
    owner = zoo_name if slash else _owners().get(base, "")
    if not owner or base not in ZOOS[owner].names():
        raise BackboneError(f"unknown backbone '{name}'{nearest(base, _owners())}; `thawline backbones` lists them all")
    if options and ZOOS[owner] is not lecture_zoo:
        raise BackboneError(f"{owner}/{base} takes no options in brackets; only networks of the zoo 'lecture' do")
    return owner, lecture_zoo.canonical(bare) if options else bare, weights


def _is_tagged(name: str) -> bool:
    """Tell whether a name is ``NAME.TAG`` of timm."""
    bare, dot, _ = name.partition(".")
    return bool(dot) and bare in timm_zoo.names()


@cache
def _owners() -> dict[str, str]:
    """Return for each name the zoo that it stands for when none is given."""
    return {name: zoo_name for zoo_name, zoo in reversed(ZOOS.items()) for name in zoo.names()}


def _short(zoo_name: str, bare: str) -> str:
    return bare if _owners()[bare.partition("[")[0]] == zoo_name else f"{zoo_name}/{bare}"


def _kind(weights: str) -> Literal["random", "file", "tag"]:
    if weights.startswith(RANDOM):
        return "random"
    if weights.startswith(timm_zoo.ELSEWHERE):
        return "tag"
    return "file" if weights.endswith(SUFFIXES) or is_network_file(weights) else "tag"


def _seed(weights: str) -> int:
    if not re.fullmatch(r"random:\d{1,9}", weights):
        raise BackboneError(f"random weights need a seed of at most nine digits, such as random:0, not '{weights}'")
    return int(weights.removeprefix("random:"))


def _tag(name: str, weights: str, tags: tuple[str, ...]) -> str:
    if weights in tags or weights.startswith(timm_zoo.ELSEWHERE):  # whose description was found
        return weights
    if weights in ("", "DEFAULT") and tags:
        return tags[0]
    ways_out = f"{name}@FILE.safetensors or {name}@random:0"
    if not tags:
        raise BackboneError(f"there are no pretrained weights for {name}; use {ways_out}")
    raise BackboneError(
        f"unknown weights '{weights}' for {name}{nearest(weights, tags)}; it has {', '.join(tags)}; or use {ways_out}"
    )


def _from_file(zoo: Zoo, name: str, path: Path, size: Size | None) -> tuple[nn.Module, tuple[str, ...]]:
    """Return the network with the weights in `path`, and the names of its classifiers.

    It has as many classes as the weights. Where these have no classifier, there are identities in its place. Position
    embeddings are resampled to another size where timm's network knows how; else the weights must be of that size.
    """
    module = _build(zoo, name, None)
    resized = size is not None and hasattr(module, "set_input_size")
    if size is not None and not resized:
        module = _build(zoo, name, size)
    source = f"{path.name} for {name}"
    state = weights_of(module, read_state_dict(path), source)
    classifiers = zoo.classifiers(name, module)
    prefixes = tuple(f"{one}." for one in classifiers)
    known = {key: item for key, item in module.state_dict().items() if key.startswith(prefixes)}
    if classifiers and not known.keys() & state.keys():
        for one in classifiers:
            module.set_submodule(one, nn.Identity())
    else:
        key = next((f"{one}.weight" for one in classifiers), "")
        classes = _rows(state.get(key))
        if classes and classes != _rows(known.get(key)):
            module = _build(zoo, name, None if resized else size, classes)
    fill_weights(module, state, source)
    if resized:
        cast("Any", module).set_input_size(img_size=_sides(cast("Size", size)))
    return module, classifiers


def _rows(tensor: Tensor | None) -> int:
    return tensor.shape[0] if tensor is not None and tensor.ndim else 0


def _resized(own: Preprocessing, size: Size | None) -> Preprocessing:
    """Return `own` for another input size, with resize and crop in the same proportion."""
    if size is None:
        return own
    sides = height, width = _sides(size)
    if max(sides) > LONGEST_SIDE:
        raise BackboneError(f"the sides of the input have 1 to {LONGEST_SIDE} pixels, not {size_name(size)}")

    def scaled(edge: int, side: int, before: int) -> int:
        return max(side, round(edge * side / before))

    if isinstance(own.resize, int):
        return replace(own, size=sides, resize=scaled(own.resize, min(sides), min(own.size)))
    rows, columns = own.resize
    return replace(own, size=sides, resize=(scaled(rows, height, own.size[0]), scaled(columns, width, own.size[1])))
