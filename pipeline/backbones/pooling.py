"""From activations to features: every pooling, accumulated and returned in float32."""

from __future__ import annotations

from collections.abc import Callable
from math import prod
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import adaptive_avg_pool2d

from features_cache import nearest
from pipeline.errors import BackboneError

Layout = Literal["map", "map_last", "tokens", "vector"]
GEM_POWER = 3.0
GEM_FLOOR = 1e-6


class Pooling(NamedTuple):
    """A way to make features of maps.

    Parameters
    ----------
    per_channel : callable
        Maps the number of positions (height times width) to the number of features of each channel.
    pool : callable
        Maps (n, c, h, w) of any float dtype to float32 (n, c * per_channel(h * w)), in new memory.
    """

    per_channel: Callable[[int], int]
    pool: Callable[[Tensor], Tensor]


def _mean(x: Tensor) -> Tensor:
    return x.mean((2, 3), dtype=torch.float32)


def _max(x: Tensor) -> Tensor:
    return x.amax((2, 3)).to(torch.float32, copy=True)


def _mean_and_max(x: Tensor) -> Tensor:
    """Join both, (n, 2c)."""
    return torch.cat([_mean(x), x.amax((2, 3)).float()], 1)


def _generalised_mean(x: Tensor) -> Tensor:
    """Radenović et al. 2019, with the power 3 and values clamped at 1e-6."""
    return x.float().clamp(min=GEM_FLOOR).pow(GEM_POWER).mean((2, 3)).pow(1 / GEM_POWER)


def _grid_of_means(x: Tensor) -> Tensor:
    """Average over a 2 x 2 grid, channel by channel."""
    return adaptive_avg_pool2d(x.float(), 2).flatten(1)


def _flatten(x: Tensor) -> Tensor:
    """Keep every position, channel by channel."""
    return x.to(torch.float32, memory_format=torch.contiguous_format, copy=True).flatten(1)


POOLINGS: dict[str, Pooling] = {
    "avg": Pooling(lambda positions: 1, _mean),
    "max": Pooling(lambda positions: 1, _max),
    "avg+max": Pooling(lambda positions: 2, _mean_and_max),
    "gem": Pooling(lambda positions: 1, _generalised_mean),
    "grid2": Pooling(lambda positions: 4, _grid_of_means),
    "flatten": Pooling(lambda positions: positions, _flatten),
}
"""By name; `pipeline.spec.POOLS` lists the same names for code that must not import torch."""


def layout_of(shape: tuple[int, ...]) -> Layout | None:
    """Return how to read activations of `shape` (without the batch axis); None for shapes that cannot be pooled.

    ``(c, h, w)`` is a map and ``(h, w, c)`` a map with channels last (inputs are square, so the two equal axes are
    height and width), ``(tokens, d)`` is a sequence, ``(d,)`` a vector.
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
    """Raise `BackboneError` unless `pool` is one of `POOLINGS`."""
    if pool not in POOLINGS:
        raise BackboneError(f"unknown pooling '{pool}'{nearest(pool, POOLINGS)}; expected one of {', '.join(POOLINGS)}")


def pooled_dim(shape: tuple[int, ...], layout: Layout, pool: str) -> int:
    """Return the length of the feature vector that `pool` makes of activations of `shape` (no batch axis)."""
    if layout in ("vector", "tokens"):
        return shape[-1]
    channels = shape[0] if layout == "map" else shape[-1]
    return channels * POOLINGS[pool].per_channel(prod(shape) // channels)


class Pool(nn.Module):
    """Pool activations to features.

    Vectors are kept and tokens are averaged, whatever the pooling. Features are always new float32 memory, so that
    nothing that a network does in place afterwards can change them.

    Parameters
    ----------
    pool : str
        One of `POOLINGS`.
    layout : str
        As `layout_of` returns it.

    Examples
    --------
    >>> activations = torch.ones(2, 3, 4, 4)
    >>> Pool("avg+max", "map")(activations).shape
    torch.Size([2, 6])
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
            return POOLINGS[self.pool].pool(x if self.layout == "map" else x.permute(0, 3, 1, 2))
