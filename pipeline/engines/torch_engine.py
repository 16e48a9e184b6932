"""The torch engine: channels last, batch norms folded, autocast; on CUDA, copies that never make the host wait."""

from __future__ import annotations

import copy
from collections import deque
from collections.abc import Iterable, Iterator
from typing import NamedTuple, Protocol, TypeVar

import numpy as np
import torch
from torch import Tensor, fx

from pipeline.backbones.graph import TappedNetwork
from pipeline.engines.fold import folded
from pipeline.engines.select import Resolved

_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


class HasPixels(Protocol):
    """What the engine needs of a batch: `pixels`, uint8 (k, h, w, 3), k perhaps 0."""

    @property
    def pixels(self) -> np.ndarray:
        """The images."""


BatchT = TypeVar("BatchT", bound=HasPixels)


class _Running(NamedTuple):
    """Features on their way to the host, complete when `done` has happened (None: at once)."""

    features: list[Tensor]
    done: torch.cuda.Event | None

    def arrays(self) -> list[np.ndarray]:
        if self.done is not None:
            self.done.synchronize()
        return [item.numpy() for item in self.features]


class TorchEngine:
    """Runs one tapped network over batches.

    Parameters
    ----------
    network : TappedNetwork
        As `pipeline.backbones.graph.tap` returns it; it is not changed.
    resolved : Resolved
        Device and precision, as `pipeline.engines.select.resolve` returns them.
    """

    def __init__(self, network: TappedNetwork, resolved: Resolved) -> None:
        self._resolved = resolved
        own = copy.deepcopy(network)
        if isinstance(own.body, fx.GraphModule):
            own.body = folded(own.body)
        self._network = own.eval().to(memory_format=torch.channels_last).to(resolved.device)

    def stream(self, batches: Iterable[BatchT]) -> Iterator[tuple[BatchT, list[np.ndarray]]]:
        """Yield each batch with its features: one float32 (k, d) array for each layer, in order.

        On CUDA a batch is handed out when the next one has been sent to the device.
        """
        ahead = 0 if self._resolved.device_kind == "cpu" else 1
        running: deque[tuple[BatchT, _Running]] = deque()
        for batch in batches:
            running.append((batch, self._start(batch.pixels)))
            if len(running) > ahead:
                earlier, features = running.popleft()
                yield earlier, features.arrays()
        for earlier, features in running:
            yield earlier, features.arrays()

    def _start(self, pixels: np.ndarray) -> _Running:
        if not len(pixels):
            return _Running([torch.empty(0, dim) for dim in self._network.dims.values()], None)
        images = torch.from_numpy(np.require(pixels, requirements=["C", "W"]))
        kind, dtype = self._resolved.device_kind, _DTYPES.get(self._resolved.precision)
        with torch.inference_mode(), torch.autocast(kind, dtype or torch.bfloat16, enabled=dtype is not None):
            if kind == "cpu":
                return _Running(list(self._network(images)), None)
            features = self._network(images.pin_memory().to(self._resolved.device, non_blocking=True))
            hosts = [torch.empty(item.shape, dtype=item.dtype, pin_memory=True) for item in features]
            for host, item in zip(hosts, features, strict=True):
                host.copy_(item, non_blocking=True)
            done = torch.cuda.Event()
            done.record(torch.cuda.current_stream(self._resolved.device))
            return _Running(hosts, done)
