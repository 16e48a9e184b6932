"""Taps in networks that cannot be traced: forward hooks, taken off whatever happens."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

from torch import Tensor, nn

from pipeline.backbones.pooling import Pool
from pipeline.backbones.trace import hooked


class HookedBody(nn.Module):
    """Run a whole network and pool what some of its modules read or return on the way.

    Parameters
    ----------
    module : torch.nn.Module
        The network.
    places : sequence of (str, bool)
        For each result: a module's name, and whether to take what it reads rather than what it returns.
    pools : sequence of Pool
        The pooling of each.
    """

    def __init__(self, module: nn.Module, places: Sequence[tuple[str, bool]], pools: Sequence[Pool]) -> None:
        super().__init__()
        self.module = module
        self.pools = nn.ModuleList(pools)
        self._places = list(places)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        """Map normalised images (n, 3, h, w) to features in the order of the places."""
        found: dict[int, Tensor] = {}

        def keep(path: str, _module: nn.Module, args: tuple[Tensor, ...], value: Any) -> None:
            for place, (tapped, reads) in enumerate(self._places):
                if tapped == path and place not in found:
                    found[place] = self.pools[place](args[0] if reads else value)

        with hooked(self.module, {path: partial(keep, path) for path, _ in self._places}):
            self.module(x)
        return tuple(found[place] for place in range(len(self._places)))
