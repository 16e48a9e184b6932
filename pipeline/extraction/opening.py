"""What one backbone needs of a cache folder: files that lack rows, open for writing, and new files for the rest."""

from __future__ import annotations

import platform
import sys
from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from features_cache import CacheFile, CacheWriter, LayerInfo, Rows, file_name, grow, open_cache, same_rows
from pipeline.errors import EngineError, ModelFileError
from pipeline.extraction.filling import Clock, Filling
from pipeline.extraction.lookup import continued_precision, find_holder, is_complete
from pipeline.images.sources.registry import ImageSource
from pipeline.provenance import installed_version
from pipeline.spec import LayerSpec, Request, fingerprint_of

if TYPE_CHECKING:
    from pipeline.backbones.backbone import Backbone
    from pipeline.backbones.taps import TappedNetwork
    from pipeline.engines.engine import Engine
    from pipeline.engines.select import Resolved


@dataclass(frozen=True)
class Run:
    """How to run, as opposed to what to compute.

    Parameters
    ----------
    output : Path
        Folder of cache files.
    engine, device : str
    batch_size : int, optional
    on_error : {"skip", "stop"}
    rehash : bool
    clock : Clock
        Where fillings note their time.
    writers : ExitStack
        Closes what is opened.
    """

    output: Path
    engine: str
    device: str
    batch_size: int | None
    on_error: str
    rehash: bool
    clock: Clock
    writers: ExitStack


@dataclass(frozen=True, eq=False)
class Target:
    """The rows that files are to have.

    Parameters
    ----------
    images : ImageSource
    rows : Rows
        All of its images.
    asked : (n,) bool
        Which of them are to be computed; the others stay as they are.
    """

    images: ImageSource
    rows: Rows
    asked: np.ndarray

    def is_met(self, file: CacheFile) -> bool:
        """Tell whether `file` was made for exactly these rows and none that is asked for is pending."""
        return is_complete(file, self.rows, self.images.classes, self.asked)


class Network:
    """A backbone for some layers, and its engines by the layers that they give, each made once.

    Parameters
    ----------
    requests : sequence of Request
        Of one backbone; they differ in nothing but the view, so one engine serves all.
    files : sequence of CacheFile
        What there is of the source.
    run : Run

    Attributes
    ----------
    names : tuple of str
        The layers.
    aliases : dict of str to list of str
        What these names and all aliases stand for: later requests by any of them are looked up without the network.

    Raises
    ------
    BackboneError, EngineError
        The network, its weights, a layer, or the engine for it cannot be had.
    """

    def __init__(self, requests: Sequence[Request], files: Sequence[CacheFile], run: Run) -> None:
        from pipeline.backbones.registry import load
        from pipeline.backbones.taps import resolve_layers, resolved_aliases

        first = requests[0]
        self.requests = requests
        self.backbone: Backbone = load(first.backbone, first.size)
        self.names = resolve_layers(self.backbone, first.layers)
        self.aliases = {name: [name] for name in self.names} | resolved_aliases(self.backbone)
        self._resolved = _resolved(requests, files, run)
        self._pool, self._batch_size = first.pool, run.batch_size or self._resolved.batch_size
        self._tapped: dict[tuple[str, ...], TappedNetwork] = {}
        self._engines: dict[tuple[str, ...], Engine] = {}

    @property
    def identity(self) -> tuple[str, str]:
        """The same for all names of a network: its canonical name and the digest of its weights."""
        return self.backbone.name, self.backbone.weights_digest

    def spec(self, layer: str, request: Request) -> LayerSpec:
        """Return what exactly produces the features of one of `names`, for one of `requests`."""
        backbone = self.backbone
        preprocessing = backbone.preprocessing.viewed(request.augment, request.view)
        precision = self._resolved.precision
        return LayerSpec(
            backbone.name, backbone.weights_digest, layer, request.pool, preprocessing, precision, request.store
        )

    def tapped(self, layers: tuple[str, ...]) -> TappedNetwork:
        """Return the network from pixels to the features of `layers`."""
        from pipeline.backbones.taps import tap

        if layers not in self._tapped:
            self._tapped[layers] = tap(self.backbone, layers, self._pool)
        return self._tapped[layers]

    def engine(self, layers: tuple[str, ...]) -> Engine:
        """Return what computes the features of `layers`."""
        from pipeline.engines.engine import build_engine

        if layers not in self._engines:
            self._engines[layers] = build_engine(self.tapped(layers), self._resolved, self._batch_size)
        return self._engines[layers]


def _resolved(requests: Sequence[Request], files: Sequence[CacheFile], run: Run) -> Resolved:
    """Return how to compute; ``auto`` goes on in the precision in which a file of the same requests was begun."""
    from pipeline.engines.select import computes, resolve

    resolved = resolve(run.engine, run.device, requests[0].precision)
    begun = next(filter(None, (continued_precision(files, request) for request in requests)), resolved.precision)
    if not computes(resolved.device, begun):
        raise EngineError(
            f"the cache files of this request are {begun}, which {resolved.device} does not compute here; "
            "begin new ones with --precision fp32"
        )
    return replace(resolved, precision=begun)


def open_files(
    target: Target, network: Network, files: Sequence[CacheFile], run: Run, expect: Sequence[LayerSpec] | None
) -> list[Path | Filling]:
    """Return the files that hold parts of a network's requests, open for writing where they lack rows, and new ones.

    Parameters
    ----------
    target : Target
    network : Network
    files : sequence of CacheFile
        What there is of this source.
    run : Run
    expect : sequence of LayerSpec, optional
        Refuse to compute anything but these, precision aside.
    """
    found: list[Path | Filling] = []
    for request in network.requests:
        specs = {name: network.spec(name, request) for name in network.names}
        check_expected(specs.values(), expect)
        holders = {name: find_holder(files, spec) for name, spec in specs.items()}
        for file in dict.fromkeys(holder for holder in holders.values() if holder):
            found.append(file.path if target.is_met(file) and not run.rehash else _go_on(file, target, network, run))
        missing = {name: spec for name, spec in specs.items() if holders[name] is None}
        if missing:
            found.append(_begin(missing, request, target, network, run))
    return found


def _go_on(file: CacheFile, target: Target, network: Network, run: Run) -> Filling:
    """Open a file that lacks rows, or that was made for others."""
    network.engine(tuple(file.layers))  # before the file is touched: a network that cannot run costs nothing
    if same_rows(file, target.rows, target.images.classes) and not run.rehash:
        writer = CacheWriter.resume(file.path)
    else:
        old = list(file.layers.values()), file.handles, file.request
        writer = grow(file.path, target.rows, target.images.classes, *old, carry=not run.rehash)
    return _filling(writer, target, network, run)


def _begin(specs: dict[str, LayerSpec], request: Request, target: Target, network: Network, run: Run) -> Filling:
    """Make a new file."""
    images, backbone = target.images, network.backbone
    dims = network.tapped(tuple(specs)).dims
    layers = [LayerInfo(name, dims[name], spec.store, spec.to_json(), spec.fingerprint) for name, spec in specs.items()]
    key = fingerprint_of([images.location, *(layer.fingerprint for layer in layers)])
    path = run.output / file_name(images.name, backbone.handle, key)
    handles = {"source": images.name, "location": images.location, "backbone": backbone.handle, "pool": request.pool}
    if request.view is not None:
        handles["view"] = f"{request.augment} {request.view}"
    if path.exists():
        open_cache(path)  # a damaged file under this name is refused with its own reason
    network.engine(tuple(specs))
    asked = request.to_json() | {"aliases": network.aliases}
    writer = CacheWriter.create(path, target.rows, images.classes, layers, handles, asked)
    return _filling(writer, target, network, run)


def _filling(writer: CacheWriter, target: Target, network: Network, run: Run) -> Filling:
    run.writers.enter_context(writer)
    layers = writer.cache.layers
    engine = network.engine(tuple(layers))
    writer.begin_run(_provenance(engine.resolved))
    preprocessing = LayerSpec.from_json(next(iter(layers.values())).spec).preprocessing
    return Filling(writer, engine, preprocessing, target.asked, run.on_error, run.clock)


def check_expected(specs: Iterable[LayerSpec], expect: Sequence[LayerSpec] | None) -> None:
    """Raise `ModelFileError` where features are not the expected ones; another precision is no other feature."""
    for found, wanted in zip(specs, expect or (), strict=False):
        if replace(found, precision=wanted.precision) != wanted:
            old, new = wanted.to_json(), found.to_json()
            changed = ", ".join(key for key in old if old[key] != new[key] and key != "precision")
            raise ModelFileError(
                f"the model was trained on other features of {wanted.backbone} {wanted.layer}: {changed} differ here; "
                "use the weights and versions it was trained with, or train it again"
            )


def _provenance(resolved: Resolved) -> dict[str, Any]:
    names = ("thawline", "torch", "torchvision", "timm", "numpy", "pillow", "openvino")
    return {
        "engine": resolved.engine,
        "device": resolved.device,
        "precision": resolved.precision,
        "command": " ".join(sys.argv),
        "python": platform.python_version(),
        "versions": {name: installed_version(name) for name in names},
    }
