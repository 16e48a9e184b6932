"""The tap: a network that runs from pixels to the features of some layers, and no further."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn.functional import adaptive_avg_pool2d

from pipeline.backbones.aliases import INPUT, PENULTIMATE
from pipeline.backbones.backbone import Backbone
from pipeline.backbones.layers import Tap, pooled_tap, resolve_layers
from pipeline.backbones.pooling import Pool, check_pool, kept_shape, pooled_dim
from pipeline.backbones.subgraph import build_module, copy_between
from pipeline.backbones.trace import Traced, hooked
from pipeline.spec import Preprocessing, fingerprint_of, json_fields

INPUT_SIDE = 32
INPUT_DIM = 3 * INPUT_SIDE**2


def tap(backbone: Backbone, layers: Sequence[str], pool: str = "avg") -> TappedNetwork:
    """Return the network from uint8 pixels to the pooled features of `layers`; it computes nothing past the last one.

    It shares its weights with `backbone`, a loaded network. Layers are named as for `resolve_layers`, and `pool` is one
    of `pipeline.spec.POOLS`; raises `BackboneError` if one does not exist. See `TappedNetwork` for several poolings.

    Examples
    --------
    >>> from pipeline.backbones.registry import load_backbone
    >>> network = tap(load_backbone("resnet18@random:0"), ["layer2", "penultimate"])
    >>> network.dims["avg"]
    {'layer2': 128, 'penultimate': 512}
    >>> layer2, penultimate = network(torch.zeros(4, 224, 224, 3, dtype=torch.uint8))
    >>> penultimate.shape
    torch.Size([4, 512])
    """
    return TappedNetwork(backbone, resolve_layers(backbone, layers), (pool,))


class TappedNetwork(nn.Module):
    """A frozen network from pixels to features, each of `layers` pooled in each way of `pools`; always in eval mode.

    The results are those of all layers with the first pooling, then with the next. `identity` is a digest of
    everything that changes what the network computes. `dims` has for each pooling the length of each layer's features,
    in the order of the results, and `shapes` what `kept_shape` says of each. `body` maps normalised images to features;
    it is None where only ``input`` is tapped.
    """

    scale: Tensor
    shift: Tensor

    def __init__(self, backbone: Backbone, layers: tuple[str, ...], pools: tuple[str, ...]) -> None:
        super().__init__()
        for pool in pools:
            check_pool(pool)
        taps = {
            (pool, layer): pooled_tap(backbone, layer, pool) for pool in pools for layer in layers if layer != INPUT
        }
        self.name, self.size, self.layers = backbone.handle, backbone.preprocessing.size, layers
        computed = [backbone.name, backbone.weights_digest, layers, pools, json_fields(backbone.preprocessing)]
        self.identity = fingerprint_of([*computed, *map(repr, taps.values())])  # with where and how each layer is read
        self.dims = {pool: dict.fromkeys(layers, INPUT_DIM) for pool in pools}
        self.shapes: dict[str, dict[str, tuple[int, ...]]] = {pool: dict.fromkeys(layers, ()) for pool in pools}
        for (pool, layer), item in taps.items():
            self.dims[pool][layer] = pooled_dim(item.shape, item.layout, pool)
            self.shapes[pool][layer] = kept_shape(item.shape, item.layout, pool)
        self.body = _body(backbone.traced, taps) if taps else None
        scale, shift = normalisation(backbone.preprocessing)
        self.register_buffer("scale", scale, persistent=False)
        self.register_buffer("shift", shift, persistent=False)
        self.eval()

    @property
    def widths(self) -> list[int]:
        """The length of each result's features."""
        return [dim for dims in self.dims.values() for dim in dims.values()]

    def train(self, mode: bool = True) -> TappedNetwork:
        """Stay in eval mode, the only mode of a frozen network."""
        return super().train(False)

    def forward(self, pixels: Tensor) -> tuple[Tensor, ...]:
        """Map uint8 (n, h, w, 3) to a float32 (n, d) for each pooling and layer, in order."""
        x = pixels.permute(0, 3, 1, 2).float() * self.scale + self.shift  # (n, 3, h, w), channels last in memory
        features = iter(self.body(x) if self.body is not None else ())
        return tuple(
            small_image(x) if layer == INPUT else next(features) for dims in self.dims.values() for layer in dims
        )


def normalisation(preprocessing: Preprocessing) -> tuple[Tensor, Tensor]:
    """Return scale and shift, float32 (1, 3, 1, 1), that turn pixels from 0 to 255 into a network's input."""
    mean, std = (
        torch.tensor(values, dtype=torch.float64).view(1, 3, 1, 1) for values in (preprocessing.mean, preprocessing.std)
    )
    return (1 / (255 * std)).float(), (-mean / std).float()


def small_image(x: Tensor) -> Tensor:
    """Return the layer `INPUT`: normalised images (n, 3, h, w), averaged to 32 x 32 and flattened to (n, 3072)."""
    with torch.autocast(x.device.type, enabled=False):
        return adaptive_avg_pool2d(x, INPUT_SIDE).flatten(1)


def _body(traced: Traced, taps: Mapping[tuple[str, str], Tap]) -> nn.Module:
    pools = [Pool(pool, item.layout) for (pool, _), item in taps.items()]
    nodes = [item.source for item in taps.values() if isinstance(item.source, fx.Node)]
    if not nodes:
        sources = [(str(item.source), layer == PENULTIMATE) for (_, layer), item in taps.items()]
        return _HookedBody(traced.module, sources, pools)
    graph, copies = copy_between(None, nodes)
    added = {f"tap_{index}": pool for index, pool in enumerate(pools)}
    results = []
    for name, node in zip(added, nodes, strict=True):
        with graph.inserting_after(copies[node]):  # so that nothing done in place later on changes what the pool reads
            results.append(graph.call_module(name, (copies[node],)))
    graph.output(tuple(results))
    return build_module(graph, traced, added)


class _HookedBody(nn.Module):
    """Run a whole network that cannot be traced, and pool what some of its modules give on the way.

    Each of the `taps` is a module's name, and whether to take what it reads rather than what it returns.
    """

    def __init__(self, module: nn.Module, taps: Sequence[tuple[str, bool]], pools: Sequence[Pool]) -> None:
        super().__init__()
        self.module = module
        self.pools = nn.ModuleList(pools)
        self._taps = list(taps)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        """Map normalised images (n, 3, h, w) to features in the order of the taps."""
        found: dict[int, Tensor] = {}

        def keep(path: str, _module: nn.Module, args: tuple[Tensor, ...], value: Any) -> None:
            for index, (tapped, reads) in enumerate(self._taps):
                if tapped == path and index not in found:
                    found[index] = self.pools[index](args[0] if reads else value)

        with hooked(self.module, {path: partial(keep, path) for path, _ in self._taps}):
            self.module(x)
        return tuple(found[index] for index in range(len(self._taps)))
