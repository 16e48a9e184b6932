"""A tapped network as an OpenVINO model: exported by torch once, kept in the user's cache folder."""

from __future__ import annotations

import hashlib
import shutil
import tempfile
from pathlib import Path

import openvino
import torch
from openvino.frontend import FrontEndManager
from openvino.frontend.pytorch.fx_decoder import TorchFXPythonDecoder
from openvino.frontend.pytorch.torchdynamo.export_decompositions import ops_to_not_decompose
from platformdirs import user_cache_path
from torch.export.decomp_utils import CustomDecompTable

from pipeline.backbones.taps import TappedNetwork
from pipeline.invalidation import stage_key

_DIGEST = "digest"

KEPT = 16
"""Converted models that stay in the cache folder; the ones that were not used for longest go."""


def converted(network: TappedNetwork, batch_size: int) -> tuple[openvino.Model, list[str]]:
    """Return the model that maps uint8 (batch_size, h, w, 3) to what `network` gives, and notes for the user.

    Raises
    ------
    Exception
        Whatever torch's export and OpenVINO's frontend raise for a network that they do not understand.
    """
    folder = user_cache_path("thawline") / "openvino"
    place = folder / stage_key("converted model", network=network.identity, batch_size=batch_size)
    model = _kept(place)
    if model is not None:
        return model, []
    model = convert(network, batch_size)
    try:
        _keep(model, place)
    except (OSError, RuntimeError) as error:
        reason = str(error).partition("\n")[0]
        return model, [f"the converted {network.name} cannot be kept, so the next run converts it again: {reason}"]
    return model, []


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


def _kept(place: Path) -> openvino.Model | None:
    """Return the model that is kept at `place`; None where there is none, or not the one that was saved."""
    try:
        if (place / _DIGEST).read_text() != _digest(place):
            return None
        place.touch()
        return openvino.Core().read_model(place / "model.xml")
    except (OSError, ValueError, RuntimeError):
        return None


def _keep(model: openvino.Model, place: Path) -> None:
    """Save under another name and rename: whoever reads or converts the same model meanwhile loses nothing."""
    place.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=place.parent, prefix=".") as name:
        draft = Path(name) / "model"
        openvino.save_model(model, draft / "model.xml", compress_to_fp16=False)
        (draft / _DIGEST).write_text(_digest(draft))
        shutil.rmtree(place, ignore_errors=True)
        try:
            draft.rename(place)
        except OSError:
            if not place.exists():  # else someone else has just put it there
                raise
    models = sorted((path for path in place.parent.iterdir() if not path.name.startswith(".")), key=_last_used)
    for old in models[:-KEPT]:
        shutil.rmtree(old, ignore_errors=True)  # someone else may clear up, too


def _digest(place: Path) -> str:
    """Return the digests of both files: a damaged model would compute other features without a word."""
    digests = []
    for name in ("model.xml", "model.bin"):
        with (place / name).open("rb") as file:
            digests.append(hashlib.file_digest(file, "blake2b").hexdigest())
    return "\n".join(digests)


def _last_used(path: Path) -> float:
    return path.stat().st_mtime if path.exists() else 0.0
