"""Forward hooks that are always removed."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import nn


@contextmanager
def hooked(module: nn.Module, hooks: Mapping[str, Callable[[nn.Module, Any, Any], Any]]) -> Iterator[None]:
    """Keep forward hooks on the named modules of `module` for the block, and remove them even after an error."""
    handles = [module.get_submodule(path).register_forward_hook(hook) for path, hook in hooks.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
