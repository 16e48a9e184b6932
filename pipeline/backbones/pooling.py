"""From activations to features: every pooling, accumulated and returned in float32."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import adaptive_avg_pool2d

from features_cache import nearest
from pipeline.errors import BackboneError

Layout = Literal["map", "map_last", "tokens", "vector"]
GEM_POWER = 3.0
GEM_FLOOR = 1e-6


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


POOLINGS: dict[str, Callable[[Tensor], Tensor]] = {
    "avg": _mean,
    "max": _max,
    "avg+max": _mean_and_max,
    "gem": _generalised_mean,
    "grid2": _grid_of_means,
    "flatten": _flatten,
}
"""By name: functions of maps (n, c, h, w) of any float dtype that return float32 features (n, d) in new memory.
`pipeline.spec.POOLS` lists the same names for code that must not import torch."""


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
    maps = torch.empty(1, *shape, device="meta")
    return POOLINGS[pool](maps if layout == "map" else maps.permute(0, 3, 1, 2)).shape[1]


class Pool(nn.Module):
    """Pool activations of a layout to features by one of the `POOLINGS`.

    Vectors are kept and tokens are averaged, whatever the pooling. Features are always new float32 memory, so that
    nothing that a network does in place afterwards can change them.

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
            return POOLINGS[self.pool](x if self.layout == "map" else x.permute(0, 3, 1, 2))
