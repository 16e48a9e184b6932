"""Forward hooks that are always removed, and taps in networks that cannot be traced."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

from torch import Tensor, nn

from pipeline.backbones.pooling import Pool


@contextmanager
def hooked(module: nn.Module, hooks: Mapping[str, Callable[[nn.Module, Any, Any], Any]]) -> Iterator[None]:
    """Keep forward hooks on the named modules of `module` for the block, and remove them even after an error."""
    handles = [module.get_submodule(path).register_forward_hook(hook) for path, hook in hooks.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


class HookedBody(nn.Module):
    """Run a whole network and pool what some of its modules return or read on the way.

    Parameters
    ----------
    module : torch.nn.Module
        The network.
    taps : sequence of (str, bool)
        For each result: a module's name, and whether to take what it reads rather than what it returns.
    pools : sequence of Pool
        The pooling of each.
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
