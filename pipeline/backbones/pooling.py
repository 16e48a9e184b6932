"""From activations to features: every pooling, accumulated and returned in float32."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from math import sqrt
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import adaptive_avg_pool2d

from features_cache import nearest
from pipeline.errors import BackboneError
from pipeline.spec import NO_POOL, POOLS

GEM_POWER = 3.0
GEM_FLOOR = 1e-6


class TokenOrder(NamedTuple):
    """How the tokens of a network follow each other.

    `prefix` tokens come before the patches, the class token first if `has_class`. The patches come row by row if
    `by_row`.
    """

    prefix: int = 0
    has_class: bool = False
    by_row: bool = True


PATCHES_ONLY = TokenOrder()


@dataclass(frozen=True)
class Layout:
    """How to read activations.

    Parameters
    ----------
    kind : {"vector", "tokens", "map", "map_last"}
        Of shape (n, d), (n, tokens, d), (n, c, h, w) or (n, h, w, c).
    order : TokenOrder
        Of tokens.
    rows : int
        Of tokens: the patches are those of a grid of so many rows, row by row; 0 if they are not.
    """

    kind: Literal["vector", "tokens", "map", "map_last"]
    order: TokenOrder = PATCHES_ONLY
    rows: int = 0


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
    NO_POOL: _flatten,
}
"""By name: functions of maps (n, c, h, w) of any float dtype that return float32 features (n, d) in new memory."""
TOKEN_POOLINGS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "cls": lambda token, _: token.to(torch.float32, copy=True),
    "cls+avg": lambda token, patches: torch.cat([token.float(), _mean(patches)], 1),
}
"""By name: functions of the class token (n, d) and the patches as maps (n, d, h, w)."""


def layout_of(
    shape: tuple[int, ...], order: TokenOrder = PATCHES_ONLY, size: tuple[int, int] = (1, 1)
) -> Layout | None:
    """Return how to read activations of `shape` (without the batch axis); None for shapes that cannot be pooled.

    ``(c, h, w)`` is a map and ``(h, w, c)`` a map with channels last (height and width are the two axes with the
    proportions of the network's input, of `size`), ``(tokens, d)`` is a sequence, ``(d,)`` a vector. A sequence has the
    prefix of the network's `order` if the other tokens fill a grid of these proportions.

    Examples
    --------
    >>> layout_of((201, 384), TokenOrder(5, has_class=True))
    Layout(kind='tokens', order=TokenOrder(prefix=5, has_class=True, by_row=True), rows=14)
    """
    match shape:
        case (_,):
            return Layout("vector")
        case (tokens, _):
            for possible in (order, order._replace(prefix=0, has_class=False)):
                rows = _rows(tokens - possible.prefix, size)
                if rows:
                    return Layout("tokens", possible, rows if order.by_row else 0)
            return Layout("tokens")
        case (_, height, width) if _has_proportions(height, width, size):
            return Layout("map")
        case (height, width, _) if _has_proportions(height, width, size):
            return Layout("map_last")
    return None


def _rows(patches: int, size: tuple[int, int]) -> int:
    """Return the rows of the grid that so many patches of an image fill; 0 if they fill none."""
    rows = round(sqrt(max(0, patches) * size[0] / size[1]))
    columns = patches // max(1, rows)
    fills = rows * columns == patches and min(rows, columns) > 1
    return rows if fills and _has_proportions(rows, columns, size) else 0


def _has_proportions(height: int, width: int, size: tuple[int, int]) -> bool:
    """Tell whether a map may be one of an input of `size`: a square one of a square, else up to rounding at strides."""
    if size[0] == size[1]:
        return height == width
    return abs(height * size[1] - width * size[0]) <= 2 * max(size)


def check_pool(pool: str) -> None:
    """Raise `BackboneError` unless `pool` is one of `pipeline.spec.POOLS`."""
    if pool not in POOLS:
        raise BackboneError(f"unknown pooling '{pool}'{nearest(pool, POOLS)}; expected one of {', '.join(POOLS)}")


def misfit(pool: str, layout: Layout) -> str:
    """Return why activations of a layout cannot be pooled by `pool`; ``""`` if they can."""
    if pool in TOKEN_POOLINGS and layout.kind != "vector" and not layout.order.has_class:
        return "has no class token"
    if pool == "grid2" and layout.kind == "tokens" and not layout.rows:
        return "has tokens that lie on no grid"
    return ""


def kept_shape(shape: tuple[int, ...], layout: Layout, pool: str) -> tuple[int, ...]:
    """Return the shape of the array whose values, in C order, are a feature vector; () if it is just a vector.

    The pool ``none`` keeps maps as (c, h, w), also those with channels last, and sequences as (tokens, d).
    """
    if pool != NO_POOL or layout.kind == "vector":
        return ()
    return (shape[2], *shape[:2]) if layout.kind == "map_last" else shape


def pooled_dim(shape: tuple[int, ...], layout: Layout, pool: str) -> int:
    """Return the length of the feature vector that `pool` makes of activations of `shape` (no batch axis)."""
    return _pooled(torch.empty(1, *shape, device="meta"), layout, pool).shape[1]


def _pooled(x: Tensor, layout: Layout, pool: str) -> Tensor:
    if layout.kind == "vector":
        return x.to(torch.float32, copy=True)
    if layout.kind == "map":
        return POOLINGS[pool](x)
    if layout.kind == "map_last":
        return POOLINGS[pool](x.permute(0, 3, 1, 2))
    if pool == NO_POOL:
        return _flatten(x)
    patches = x[:, layout.order.prefix :].transpose(1, 2)
    columns = patches.shape[2] // max(1, layout.rows)
    patches = patches.unflatten(2, (layout.rows, columns)) if layout.rows else patches.unsqueeze(3)
    return TOKEN_POOLINGS[pool](x[:, 0], patches) if pool in TOKEN_POOLINGS else POOLINGS[pool](patches)


class Pool(nn.Module):
    """Pool activations of a layout to features by one of `pipeline.spec.POOLS`.

    Vectors are kept, whatever the pooling; ``none`` keeps all values of all activations. Of tokens, the patches are
    pooled like a map with one position for each; ``cls`` takes the class token instead, and ``cls+avg`` joins both.
    Features are always new float32 memory, so that nothing that a network does in place afterwards can change them.

    Examples
    --------
    >>> activations = torch.ones(2, 3, 4, 4)
    >>> Pool("avg+max", Layout("map"))(activations).shape
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
            return _pooled(x, self.layout, self.pool)
