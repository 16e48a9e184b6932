"""A backbone made ready to give the features of some layers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import cached_property
from typing import TYPE_CHECKING

from features_cache import CacheFile
from pipeline.errors import EngineError
from pipeline.extraction.lookup import begun_precision
from pipeline.spec import LayerSpec, Preprocessing, Request

if TYPE_CHECKING:
    from pipeline.backbones.backbone import Backbone
    from pipeline.backbones.taps import TappedNetwork
    from pipeline.engines.engine import Engine
    from pipeline.engines.select import Resolved


_Asked = tuple[tuple[str, ...], tuple[str, ...]]  # layers, and the poolings that each of them gets


class FeatureExtractor:
    """A backbone for the layers of a request, and its engines by the features that they give, each made once.

    Parameters
    ----------
    requests : sequence of Request
        Of one backbone; they differ only in the pooling and the view, so that one engine serves all.
    engine, device : str, default "auto"
        As for `pipeline.engines.select.resolve`.
    batch_size : int, optional
        Images in the largest batch that will come; by default what suits the device.
    files : sequence of CacheFile
        The cache files of the source: precision ``auto`` continues with that of a file of the same pooling.

    Attributes
    ----------
    layers : tuple of str
        The names that the requested layers and aliases stand for.

    Raises
    ------
    BackboneError, EngineError
        The network, its weights, a layer or the engine is not available, or `claim_process` refuses this process.
    """

    def __init__(
        self,
        requests: Sequence[Request],
        engine: str = "auto",
        device: str = "auto",
        batch_size: int | None = None,
        files: Sequence[CacheFile] = (),
    ) -> None:
        from pipeline.backbones.layers import resolve_layers
        from pipeline.backbones.registry import load_backbone
        from pipeline.engines.engine import claim_process

        claim_process()
        first = requests[0]
        self.requests = requests
        self.backbone: Backbone = load_backbone(first.backbone, first.size, first.white)
        self.layers = resolve_layers(self.backbone, first.layers)
        self._batch_size = batch_size
        self._resolved: dict[str, Resolved] = {}
        for pool in dict.fromkeys(request.pool for request in requests):
            alike = [request for request in requests if request.pool == pool]
            self._resolved[pool] = _resolved(alike, files, engine, device)
        self._tapped: dict[_Asked, TappedNetwork] = {}
        self._engines: dict[_Asked, Engine] = {}

    @property
    def identity(self) -> tuple[str, str, Preprocessing]:
        """The same for all names of a network: its canonical name, the digest of its weights and its preprocessing."""
        return self.backbone.name, self.backbone.weights_digest, self.backbone.preprocessing

    def engine_name(self, pool: str) -> str:
        """Return the name of the engine that was chosen for a pooling, never ``auto``."""
        return self._resolved[pool].engine

    @cached_property
    def aliases(self) -> dict[str, list[str]]:
        """What `layers` and all aliases stand for, so that later requests are looked up without the network."""
        from pipeline.backbones.layers import resolved_aliases

        return {name: [name] for name in self.layers} | resolved_aliases(self.backbone)

    def spec(self, layer: str, request: Request) -> LayerSpec:
        """Return what exactly produces the features of one of `layers`, for one of `requests`.

        Raises `BackboneError` if the pooling does not suit the layer.
        """
        from pipeline.backbones.aliases import INPUT
        from pipeline.backbones.layers import pooled_tap

        backbone = self.backbone
        layout = None if layer == INPUT else pooled_tap(backbone, layer, request.pool).layout
        preprocessing = backbone.preprocessing.viewed(request.augment, request.view)
        return LayerSpec(
            backbone.name,
            backbone.weights_digest,
            layer,
            request.pool,
            preprocessing,
            self._resolved[request.pool].precision,
            request.store,
            prefix_tokens=layout.order.prefix if layout is not None and layout.kind == "tokens" else None,
            heads=backbone.heads(layer),
        )

    def tapped(self, layers: tuple[str, ...], pools: tuple[str, ...]) -> TappedNetwork:
        """Return the network from pixels to the features of `layers` with each of `pools`."""
        from pipeline.backbones.taps import TappedNetwork

        if (layers, pools) not in self._tapped:
            self._tapped[layers, pools] = TappedNetwork(self.backbone, layers, pools)
        return self._tapped[layers, pools]

    def engine(self, layers: tuple[str, ...], pools: tuple[str, ...]) -> Engine:
        """Return what computes the features of `layers` with each of `pools`, all of one precision, in one pass."""
        from pipeline.engines.engine import build_engine

        if (layers, pools) not in self._engines:
            resolved = self._resolved[pools[0]]
            batch_size = self._batch_size or resolved.batch_size
            self._engines[layers, pools] = build_engine(self.tapped(layers, pools), resolved, batch_size)
        return self._engines[layers, pools]


def _resolved(requests: Sequence[Request], files: Sequence[CacheFile], engine: str, device: str) -> Resolved:
    """Return how to compute; ``auto`` continues with the precision of a file of the same requests."""
    from pipeline.engines.select import computes, resolve

    resolved = resolve(engine, device, requests[0].precision)
    begun = next(filter(None, (begun_precision(files, request) for request in requests)), resolved.precision)
    if not computes(resolved.device, begun):
        raise EngineError(
            f"the cache files of this request are {begun}, which {resolved.device} does not compute here; "
            "begin new ones with precision fp32"
        )
    return replace(resolved, precision=begun)
