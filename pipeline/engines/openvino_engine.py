"""The OpenVINO engine: a tapped network as one compiled model of fixed shape, which the user's cache folder keeps."""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import openvino
import torch
from openvino.frontend import FrontEndManager
from openvino.frontend.pytorch.fx_decoder import TorchFXPythonDecoder
from openvino.frontend.pytorch.torchdynamo.export_decompositions import ops_to_not_decompose
from torch.export.decomp_utils import CustomDecompTable

from features_cache import scratch_folder
from pipeline.backbones.taps import TappedNetwork
from pipeline.engines.select import Resolved
from pipeline.engines.torch_engine import padded
from pipeline.errors import EngineError, first_line
from pipeline.invalidation import stage_key
from pipeline.user_folder import user_folder


class OpenVinoEngine:
    """Runs one tapped network over batches, several at a time; see `pipeline.engines.engine.Engine`.

    The compiled model has one batch size; smaller batches are filled up.
    """

    def __init__(self, network: TappedNetwork, resolved: Resolved, batch_size: int) -> None:
        self.resolved, self._batch_size, self._dims = resolved, batch_size, network.widths
        precision = "f32" if resolved.precision == "fp32" else resolved.precision
        hints = {"INFERENCE_PRECISION_HINT": precision, "PERFORMANCE_HINT": "THROUGHPUT"}
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


MOST_OFF = 1e-3
"""How far features of a converted model may be off in float32, relative to the largest of their layer."""
_DIGEST = "digest"
KEPT = 16
"""Converted models that stay in the cache folder; the ones that were not used for longest go."""


def converted(network: TappedNetwork, batch_size: int) -> tuple[openvino.Model, list[str]]:
    """Return the model that maps uint8 (batch_size, h, w, 3) to what `network` gives, and notes for the user.

    torch's export and OpenVINO's frontend may raise anything for a network that they do not understand.
    """
    key = stage_key("converted model", network=network.identity, batch_size=batch_size, most_off=MOST_OFF)
    notes: list[str] = []
    model = _kept(key)
    if model is None:
        model = convert(network, batch_size)
        try:
            _keep(model, key)
        except (OSError, RuntimeError) as error:
            notes.append(
                f"the converted {network.name} cannot be kept, so the next run converts it again: {first_line(error)}"
            )
    return model, notes


def convert(network: TappedNetwork, batch_size: int) -> openvino.Model:
    """Return the model, converted afresh; raise `EngineError` if its features are more than `MOST_OFF` off torch's.

    The decoder and the frontend are called one by one, since ``openvino.convert_model`` around them reports its use.
    """
    example = torch.zeros((batch_size, *network.size, 3), dtype=torch.uint8)
    with torch.no_grad():
        program = torch.export.export(network, (example,), strict=False)
    table = CustomDecompTable()
    for operation in ops_to_not_decompose():
        if operation in table:
            table.pop(operation)
    decoder = TorchFXPythonDecoder(program.run_decompositions(table).module(), dynamic_shapes=False)
    frontend = FrontEndManager().load_by_framework("pytorch")
    model = frontend.convert(frontend.load(decoder))
    _compare(model, network, np.random.default_rng(0).integers(0, 256, example.shape, np.uint8))
    return model


def _compare(model: openvino.Model, network: TappedNetwork, pixels: np.ndarray) -> None:
    """Raise `EngineError` if the model is more than `MOST_OFF` off `network` on the first image of a batch."""
    compiled = openvino.Core().compile_model(model, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    found = compiled(pixels)
    with torch.inference_mode():
        wanted = [item.numpy()[0] for item in network(torch.from_numpy(pixels[:1]))]
    layers = [layer for dims in network.dims.values() for layer in dims]
    for index, (layer, one) in enumerate(zip(layers, wanted, strict=True)):
        off = np.abs(found[index][0] - one).max() / max(np.abs(one).max(), np.finfo(np.float32).tiny)
        if not off <= MOST_OFF:  # also where it is NaN
            raise EngineError(
                f"its features of {layer} would differ from torch's by {off:.1g} of the largest, more than {MOST_OFF:g}"
            )


def _kept(key: str) -> openvino.Model | None:
    """Return the model that is kept under `key`; None where there is none, or not the one that was saved."""
    try:
        path = user_folder("openvino") / key
        if (path / _DIGEST).read_text() != _digest(path):
            return None
        path.touch()
        return openvino.Core().read_model(path / "model.xml")
    except (OSError, ValueError, RuntimeError):
        return None


def _keep(model: openvino.Model, key: str) -> None:
    """Save under another name and rename: whoever reads or converts the same model meanwhile loses nothing."""
    path = user_folder("openvino") / key
    path.parent.mkdir(parents=True, exist_ok=True)
    with scratch_folder(path.parent) as name:
        draft = Path(name) / "model"
        openvino.save_model(model, draft / "model.xml", compress_to_fp16=False)
        (draft / _DIGEST).write_text(_digest(draft))
        shutil.rmtree(path, ignore_errors=True)
        try:
            draft.rename(path)
        except OSError:
            if not path.exists():  # else someone else has just put it there
                raise
    models = sorted((path for path in path.parent.iterdir() if not path.name.startswith(".")), key=_last_used)
    for old in models[:-KEPT]:
        shutil.rmtree(old, ignore_errors=True)  # someone else may clear up, too


def _digest(path: Path) -> str:
    """Return the digests of both files: a damaged model would compute other features without a word."""
    digests = []
    for name in ("model.xml", "model.bin"):
        with (path / name).open("rb") as file:
            digests.append(hashlib.file_digest(file, "blake2b").hexdigest())
    return "\n".join(digests)


def _last_used(path: Path) -> float:
    return path.stat().st_mtime if path.exists() else 0.0
