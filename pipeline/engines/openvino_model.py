"""A tapped network as an OpenVINO model: exported by torch once, kept in the user's cache folder."""

from __future__ import annotations

import shutil
import tempfile
from importlib.metadata import version
from pathlib import Path

import openvino
import torch
from openvino.frontend import FrontEndManager
from openvino.frontend.pytorch.fx_decoder import TorchFXPythonDecoder
from openvino.frontend.pytorch.torchdynamo.export_decompositions import ops_to_not_decompose
from platformdirs import user_cache_path
from torch.export.decomp_utils import CustomDecompTable

from pipeline.backbones.graph import TappedNetwork
from pipeline.spec import fingerprint_of

KEPT = 16
"""Converted models that stay in the cache folder; the ones that were not used for longest go."""


def converted(network: TappedNetwork, batch_size: int) -> openvino.Model:
    """Return the model that maps uint8 (batch_size, h, w, 3) to what `network` gives.

    Raises
    ------
    Exception
        Whatever torch's export and OpenVINO's frontend raise for a network that they do not understand.
    """
    versions = [version(name) for name in ("thawline", "torch", "torchvision", "timm", "openvino")]
    folder = user_cache_path("thawline") / "openvino"
    place = folder / fingerprint_of([network.identity, batch_size, versions])
    if (place / "model.xml").is_file():
        place.touch()
        return openvino.Core().read_model(place / "model.xml")
    model = convert(network, batch_size)
    _keep(model, place)
    return model


def convert(network: TappedNetwork, batch_size: int) -> openvino.Model:
    """Return the model, converted afresh.

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
    return frontend.convert(frontend.load(decoder))


def _keep(model: openvino.Model, place: Path) -> None:
    """Save under another name and rename: whoever else converts the same model loses nothing."""
    place.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=place.parent, prefix=".") as name:
        draft = Path(name) / "model"
        openvino.save_model(model, draft / "model.xml", compress_to_fp16=False)
        if not place.exists():
            draft.rename(place)
    models = sorted((path for path in place.parent.iterdir() if not path.name.startswith(".")), key=_last_used)
    for old in models[:-KEPT]:
        shutil.rmtree(old, ignore_errors=True)  # someone else may clear up, too


def _last_used(path: Path) -> float:
    return path.stat().st_mtime if path.exists() else 0.0
