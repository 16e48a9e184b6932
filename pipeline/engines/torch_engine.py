"""The torch engine: channels last, batch norms folded, autocast; on CUDA, copies that never make the host wait."""

from __future__ import annotations

import copy
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, fx

from pipeline.backbones.taps import TappedNetwork
from pipeline.engines.fold import folded
from pipeline.engines.padding import padded
from pipeline.engines.select import Resolved
from pipeline.errors import EngineError, first_line

_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


class _Running(NamedTuple):
    """Parts of a batch, their features on the way to the host; each complete when `done` has happened."""

    parts: list[tuple[list[Tensor], torch.cuda.Event | None]]
    images: int

    def arrays(self) -> list[np.ndarray]:
        for _, done in self.parts:
            if done is not None:
                done.synchronize()
        layers = zip(*(features for features, _ in self.parts), strict=True)
        return [np.concatenate([item.numpy() for item in layer])[: self.images] for layer in layers]


class TorchEngine:
    """Runs one tapped network over batches; see `pipeline.engines.engine.Engine`.

    Parameters
    ----------
    network : TappedNetwork
        As `pipeline.backbones.taps.tap` returns it; it is not changed.
    resolved : Resolved
        Engine, device and precision. With the engine ``"compile"``, the first batch waits for the compiler.
    batch_size : int
        Images in the largest batch. A GPU without memory for it gets smaller ones from then on.
    """

    def __init__(self, network: TappedNetwork, resolved: Resolved, batch_size: int) -> None:
        self.resolved = resolved
        self.ahead = 0 if resolved.device_kind == "cpu" else 1
        self.notes: list[str] = []
        self._batch_size = self._limit = batch_size
        own = copy.deepcopy(network)
        if isinstance(own.body, fx.GraphModule):
            own.body = folded(own.body)
        self._dims = list(own.dims.values())
        self._network = own.eval().to(memory_format=torch.channels_last).to(resolved.device)
        self._call = torch.compile(self._network, dynamic=False) if resolved.engine == "compile" else self._network

    def start(self, pixels: np.ndarray) -> _Running:
        """Begin with uint8 (k, h, w, 3); on a CPU, compute them."""
        if not len(pixels):
            return _Running([([torch.empty(0, dim) for dim in self._dims], None)], 0)
        parts = []
        place = 0
        while place < len(pixels):
            part = pixels[place : place + self._limit]
            try:
                parts.append(self._compute(part))
                place += len(part)
            except torch.OutOfMemoryError as error:
                self._shrink(len(part), error)
        return _Running(parts, len(pixels))

    def _compute(self, pixels: np.ndarray) -> tuple[list[Tensor], torch.cuda.Event | None]:
        if self.resolved.engine == "compile":
            pixels = padded(pixels, self._limit)  # another shape would be compiled again
        images = torch.from_numpy(np.require(pixels, requirements=["C", "W"]))
        kind, dtype = self.resolved.device_kind, _DTYPES.get(self.resolved.precision)
        with torch.inference_mode(), torch.autocast(kind, dtype or torch.bfloat16, enabled=dtype is not None):
            if kind == "cpu":
                return self._features(images), None
            features = self._features(images.pin_memory().to(self.resolved.device, non_blocking=True))
            hosts = [torch.empty(item.shape, dtype=item.dtype, pin_memory=True) for item in features]
            for host, item in zip(hosts, features, strict=True):
                host.copy_(item, non_blocking=True)
            done = torch.cuda.Event()
            done.record(torch.cuda.current_stream(self.resolved.device))
            return hosts, done

    def _features(self, images: Tensor) -> list[Tensor]:
        try:
            return list(self._call(images))
        except torch._dynamo.exc.TorchDynamoException as error:
            raise EngineError(
                f"torch cannot compile {self._network.name} ({first_line(error)}): is there a C++ compiler? "
                "Use --engine torch"
            ) from error

    def _shrink(self, count: int, error: torch.OutOfMemoryError) -> None:
        """Halve the batches after one of `count` images did not fit."""
        if count == 1:
            device = self.resolved.device
            raise EngineError(
                f"{device} has no memory for one image of {self._network.name}; use --device cpu"
            ) from error
        self._limit = count // 2
        self.notes.append(
            f"batches of {count} images do not fit into {self.resolved.device}: {self._limit} from then on"
        )
        torch.cuda.empty_cache()
