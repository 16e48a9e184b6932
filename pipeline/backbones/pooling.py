"""From activations to features: every pooling, accumulated and returned in float32."""

from __future__ import annotations

from math import prod
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import adaptive_avg_pool2d

from features_cache.errors import nearest
from pipeline.errors import BackboneError
from pipeline.spec import POOLS

Layout = Literal["map", "map_last", "tokens", "vector"]
GEM_POWER = 3.0
GEM_FLOOR = 1e-6


def layout_of(shape: tuple[int, ...]) -> Layout | None:
    """Return how to read activations of `shape` (without the batch axis), or None for shapes that are not understood.

    ``(c, h, w)`` is a map, ``(h, w, c)`` a map with channels last (inputs are square, so the two equal axes are the
    spatial ones), ``(tokens, d)`` a sequence, ``(d,)`` a vector.
    """
    match shape:
        case (_,):
            return "vector"
        case (_, _):
            return "tokens"
        case (_, height, width) if height == width:
            return "map"
        case (height, width, _) if height == width:
            return "map_last"
    return None


def check_pool(pool: str) -> None:
    """Raise `BackboneError` unless `pool` is one of `pipeline.spec.POOLS`."""
    if pool not in POOLS:
        raise BackboneError(f"unknown pooling '{pool}'{nearest(pool, POOLS)}; expected one of {', '.join(POOLS)}")


def pooled_dim(shape: tuple[int, ...], layout: Layout, pool: str) -> int:
    """Return the length of the feature vector that `pool` makes of activations of `shape` (no batch axis)."""
    if layout == "vector":
        return shape[0]
    if layout == "tokens":
        return shape[1]
    channels = shape[0] if layout == "map" else shape[-1]
    factors = {"avg+max": 2, "grid2": 4, "flatten": prod(shape) // channels}
    return channels * factors.get(pool, 1)


class Pool(nn.Module):
    """Pool activations to features.

    Vectors pass and tokens are averaged whatever the pooling. Features are always new float32 memory: nothing that a
    network does in place afterwards can reach them.

    Parameters
    ----------
    pool : str
        ``avg`` (mean over space), ``max``, ``avg+max`` (joined, c + c), ``gem`` (generalised mean, power 3, values
        clamped at 1e-6; Radenović et al. 2019), ``grid2`` (means over a 2 x 2 grid, channel by channel) or ``flatten``
        (channel by channel).
    layout : str
        As `layout_of` returns it.
    """

    def __init__(self, pool: str, layout: Layout) -> None:
        super().__init__()
        check_pool(pool)
        self.pool = pool
        self.layout = layout

    def forward(self, x: Tensor) -> Tensor:
        """Map (n, ...) of any float dtype to (n, d) float32."""
        with torch.autocast(x.device.type, enabled=False):
            if self.layout == "vector":
                return x.to(torch.float32, copy=True)
            if self.layout == "tokens":
                return x.mean(1, dtype=torch.float32)
            return self._maps(x if self.layout == "map" else x.permute(0, 3, 1, 2))

    def _maps(self, x: Tensor) -> Tensor:  # (n, c, h, w)
        match self.pool:
            case "avg":
                return x.mean((2, 3), dtype=torch.float32)
            case "max":
                return x.amax((2, 3)).to(torch.float32, copy=True)
            case "avg+max":
                return torch.cat([x.mean((2, 3), dtype=torch.float32), x.amax((2, 3)).float()], 1)
            case "gem":
                return x.float().clamp(min=GEM_FLOOR).pow(GEM_POWER).mean((2, 3)).pow(1 / GEM_POWER)
            case "grid2":
                return adaptive_avg_pool2d(x.float(), 2).flatten(1)
            case _:  # flatten
                return x.to(torch.float32, memory_format=torch.contiguous_format, copy=True).flatten(1)
