"""Run a tapped network with PyTorch over a stream of batches."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import NamedTuple, Protocol, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, fx

from pipeline.backbones.graph import TappedNetwork
from pipeline.engines.fold import fold_batch_norms
from pipeline.engines.select import Resolved

CPU_BATCH = 8
"""Images in one pass on a CPU: larger activations leave its caches and cost page faults."""
CUDA_BATCH = 128

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


class Pixels(Protocol):
    """What a batch must have: uint8 ``pixels`` of shape (n, h, w, 3); n may be 0."""

    @property
    def pixels(self) -> NDArray[np.uint8]: ...


B = TypeVar("B", bound=Pixels)


class _Running(NamedTuple):
    """Features of a batch on their way back to the host; `ready` is set on CUDA."""

    features: list[Tensor]
    ready: torch.cuda.Event | None


class TorchEngine:
    """A network on a device, in a precision.

    Parameters
    ----------
    network : TappedNetwork
        From uint8 pixels to float32 features.
    resolved : Resolved
        Device and precision.

    Attributes
    ----------
    batch_size : int
        How many images to give at a time.
    """

    def __init__(self, network: TappedNetwork, resolved: Resolved) -> None:
        self.resolved = resolved
        self.dims = network.dims
        self._device = torch.device(resolved.device)
        self.batch_size = CUDA_BATCH if self._device.type == "cuda" else CPU_BATCH
        if isinstance(network.body, fx.GraphModule):
            network.body = fold_batch_norms(network.body)
        self._network = network.to(self._device, memory_format=torch.channels_last)

    def stream(self, batches: Iterable[B]) -> Iterator[tuple[B, list[NDArray[np.float32]]]]:
        """Yield every batch with its features, in order.

        On CUDA a batch is handed to the device before the features of the one before are waited for.

        Parameters
        ----------
        batches : iterable
            See `Pixels`.

        Yields
        ------
        batch, features : tuple
            Features are one float32 array (n, dim) for each layer of the network.
        """
        before: tuple[B, _Running] | None = None
        for batch in batches:
            running = self._start(batch.pixels)
            if before:
                yield before[0], _finish(before[1])
            before = batch, running
            if running.ready is None:
                yield batch, _finish(running)
                before = None
        if before:
            yield before[0], _finish(before[1])

    def _start(self, pixels: NDArray[np.uint8]) -> _Running:
        if not len(pixels):
            return _Running([torch.empty(0, dim) for dim in self.dims.values()], None)
        on_cuda = self._device.type == "cuda"
        images = torch.from_numpy(pixels)
        if on_cuda:
            images = images.pin_memory().to(self._device, non_blocking=True)
        with torch.inference_mode(), self._autocast():
            features = [output.float() for output in self._network(images)]
            if not on_cuda:
                return _Running(features, None)
            features = [_to_host(output) for output in features]
        ready = torch.cuda.Event()
        ready.record(torch.cuda.current_stream(self._device))
        return _Running(features, ready)

    def _autocast(self) -> AbstractContextManager[object]:
        dtype = DTYPES.get(self.resolved.precision)
        return torch.autocast(self._device.type, dtype) if dtype else nullcontext()


def _to_host(features: Tensor) -> Tensor:
    return torch.empty(features.shape, dtype=features.dtype, pin_memory=True).copy_(features, non_blocking=True)


def _finish(running: _Running) -> list[NDArray[np.float32]]:
    if running.ready is not None:
        running.ready.synchronize()
    return [features.numpy() for features in running.features]
