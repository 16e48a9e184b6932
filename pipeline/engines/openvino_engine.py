"""The OpenVINO engine: the tapped network, pooling and normalisation included, as one compiled model of fixed shape."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import openvino

from pipeline.backbones.taps import TappedNetwork
from pipeline.engines.openvino_model import converted
from pipeline.engines.select import Resolved
from pipeline.engines.torch_engine import padded

_HINTS = {"fp32": "f32", "bf16": "bf16"}


class OpenVinoEngine:
    """Runs one tapped network over batches, several at a time; see `pipeline.engines.engine.Engine`.

    The compiled model has one batch size; smaller batches are filled up.
    """

    def __init__(self, network: TappedNetwork, resolved: Resolved, batch_size: int) -> None:
        self.resolved, self._batch_size, self._dims = resolved, batch_size, list(network.dims.values())
        hints = {"INFERENCE_PRECISION_HINT": _HINTS[resolved.precision], "PERFORMANCE_HINT": "THROUGHPUT"}
        source, self.notes = converted(network, batch_size)
        self._model = openvino.Core().compile_model(source, "CPU", hints)
        self._free: list[openvino.InferRequest] = []
        # one more batch than that is under way, so that no request waits for the host between two batches
        self.ahead = int(self._model.get_property("OPTIMAL_NUMBER_OF_INFER_REQUESTS"))

    def start(self, pixels: np.ndarray) -> Callable[[], list[np.ndarray]]:
        """Begin with uint8 (k, h, w, 3)."""
        images = len(pixels)
        if not images:
            return lambda: [np.empty((0, dim), np.float32) for dim in self._dims]
        request = self._free.pop() if self._free else self._model.create_infer_request()
        request.start_async({0: padded(pixels, self._batch_size)}, share_inputs=True)

        def arrays() -> list[np.ndarray]:
            request.wait()
            outputs = [np.array(request.get_output_tensor(index).data[:images]) for index in range(len(self._dims))]
            self._free.append(request)
            return outputs

        return arrays
