"""The OpenVINO engine: the tapped network, pooling and normalisation included, as one compiled model of fixed shape."""

from __future__ import annotations

import numpy as np
import openvino

from pipeline.backbones.taps import TappedNetwork
from pipeline.engines.openvino_model import converted
from pipeline.engines.padding import padded
from pipeline.engines.select import Resolved

_HINTS = {"fp32": "f32", "bf16": "bf16"}


class OpenVinoEngine:
    """Runs one tapped network over batches, several at a time; see `pipeline.engines.engine.Engine`.

    Parameters
    ----------
    network : TappedNetwork
        As `pipeline.backbones.taps.tap` returns it.
    resolved : Resolved
        A CPU, fp32 or bf16.
    batch_size : int
        The one batch size of the compiled model; smaller batches are filled up.
    """

    def __init__(self, network: TappedNetwork, resolved: Resolved, batch_size: int) -> None:
        self.resolved = resolved
        self._batch_size = batch_size
        self._dims = list(network.dims.values())
        hints = {"INFERENCE_PRECISION_HINT": _HINTS[resolved.precision], "PERFORMANCE_HINT": "THROUGHPUT"}
        source, self.notes = converted(network, batch_size)
        model = openvino.Core().compile_model(source, "CPU", hints)
        best = int(model.get_property("OPTIMAL_NUMBER_OF_INFER_REQUESTS"))
        self._model = model
        self._free: list[openvino.InferRequest] = []
        self.ahead = best  # and one more, so that none waits for the host between two batches

    def start(self, pixels: np.ndarray) -> _Running:
        """Begin with uint8 (k, h, w, 3)."""
        if not len(pixels):
            return _Running(None, 0, self)
        request = self._free.pop() if self._free else self._model.create_infer_request()
        request.start_async({0: padded(pixels, self._batch_size)}, share_inputs=True)
        return _Running(request, len(pixels), self)

    def finish(self, request: openvino.InferRequest | None, count: int) -> list[np.ndarray]:
        """Wait for a request, and give it free."""
        if request is None:
            return [np.empty((0, dim), np.float32) for dim in self._dims]
        request.wait()
        arrays = [np.array(request.get_output_tensor(place).data[:count]) for place in range(len(self._dims))]
        self._free.append(request)
        return arrays


class _Running:
    """A batch in an infer request (None for an empty one)."""

    def __init__(self, request: openvino.InferRequest | None, count: int, engine: OpenVinoEngine) -> None:
        self._request, self._count, self._engine = request, count, engine

    def arrays(self) -> list[np.ndarray]:
        """Return what the engine's protocol says."""
        return self._engine.finish(self._request, self._count)
