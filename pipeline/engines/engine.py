"""What an engine is, and which one runs a network."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from typing import Protocol

import numpy as np

from pipeline.backbones.taps import TappedNetwork
from pipeline.engines.memory import keep_freed_memory
from pipeline.engines.select import Resolved
from pipeline.engines.torch_engine import TorchEngine
from pipeline.errors import EngineError, one_line

Running = Callable[[], list[np.ndarray]]
"""A batch that is being computed: call it once to wait for a float32 (k, d) of each result of the network."""


class Engine(Protocol):
    """Runs one tapped network.

    `resolved` says what it really runs on, and `notes` what the user should know. `ahead` batches may be started before
    the oldest one's arrays are asked for.
    """

    resolved: Resolved
    ahead: int
    notes: list[str]

    def start(self, pixels: np.ndarray) -> Running:
        """Begin with uint8 (k, h, w, 3); k is at most the batch size that the engine was built for, perhaps 0."""


_process: int | None = None
"""The process that runs networks here; a copy of its memory is not enough to go on in another."""


def claim_process() -> None:
    """Raise `EngineError` in a process that was forked after its parent used a network.

    The threads of torch and OpenVINO do not live in such a process, which would wait for them for ever.
    """
    global _process
    _process = _process or os.getpid()
    if _process != os.getpid():
        raise EngineError(
            "this process was forked after its parent had loaded a network, which cannot run in both; start processes "
            "afresh, with multiprocessing.get_context('spawn') or joblib's 'loky', or fork before a network is used"
        )


def build_engine(network: TappedNetwork, resolved: Resolved, batch_size: int) -> Engine:
    """Return the engine that `resolved` names, for batches of at most `batch_size` images; `network` is not changed.

    Where OpenVINO is not installed, or cannot convert the network, torch runs it, and the engine's `notes` say so.
    """
    keep_freed_memory()
    if resolved.engine != "openvino":
        return TorchEngine(network, resolved, batch_size)
    try:
        from pipeline.engines.openvino_engine import OpenVinoEngine  # late, since a machine with a GPU may not have it

        return OpenVinoEngine(network, resolved, batch_size)
    except Exception as error:  # conversion fails in as many ways as there are networks
        engine = TorchEngine(network, replace(resolved, engine="torch"), batch_size)
        engine.notes.append(f"OpenVINO cannot run {network.name}, so torch computes: {one_line(error)}")
        return engine


def stream(engine: Engine, batches: Iterable[np.ndarray]) -> Iterator[list[np.ndarray]]:
    """Yield the features of each batch of pixels, in order; `Engine.ahead` batches are computed ahead."""
    running: deque[Running] = deque()
    for pixels in batches:
        running.append(engine.start(pixels))
        if len(running) > engine.ahead:
            yield running.popleft()()
    while running:
        yield running.popleft()()
