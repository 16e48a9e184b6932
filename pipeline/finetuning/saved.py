"""The file of a fine-tuned network, which `predict` and every backbone option take."""

from __future__ import annotations

from pathlib import Path

from pipeline.backbones.backbone import Backbone
from pipeline.backbones.network_file import TOP_LAYER, TunedModel, save_network
from pipeline.backbones.weights import weights_digest
from pipeline.finetuning.network import ThawedNetwork
from pipeline.results import FinetuneResult, to_json
from pipeline.spec import DEFAULT_POOL, LayerSpec


def save_finetuned(
    path: Path, network: ThawedNetwork, backbone: Backbone, classes: tuple[str, ...], result: FinetuneResult
) -> None:
    """Write `network`, trained from `backbone`, with its classes, its result and its calibration."""
    state = network.cpu().whole_state()
    spec = LayerSpec(
        backbone.name, weights_digest(state), TOP_LAYER, DEFAULT_POOL, backbone.preprocessing, scores_precision(network)
    )
    model = TunedModel(spec, result.head, classes, result.temperature, to_json(result), {})
    save_network(path, model, {name: item.contiguous().numpy() for name, item in state.items()})


def scores_precision(network: ThawedNetwork) -> str:
    """Return the precision in which the trained network is used: bf16 if both its parts were computed in bf16.

    If only one part was, float32 is used for both, because what was trained in float32 stays in it.
    """
    trunk = network.trunk_precision if network.trunk is not None else network.precision
    body = network.precision if any(True for _ in network.body.parameters()) else trunk
    return "bf16" if trunk == body == "bf16" else "fp32"
