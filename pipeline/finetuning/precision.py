"""In which precision what is thawed trains: bf16 where that is faster."""

from __future__ import annotations

from torch import nn

from pipeline.engines.select import Resolved, has_bf16
from pipeline.finetuning.network import Network


def train_precision(network: Network, resolved: Resolved, asked: str) -> str:
    """Return ``"fp32"`` or ``"bf16"``.

    ``auto`` is bf16 where the hardware computes it and it pays: on a CPU depthwise convolutions train slower in bf16
    (20 images/s against 25 with all of EfficientNet-Lite0), others faster (twice and more with ResNet-18).
    """
    if asked != "auto":
        return resolved.precision
    convolutions = [part for part in network.body.modules() if isinstance(part, nn.Conv2d)]
    depthwise = any(part.groups == part.in_channels > 1 for part in convolutions)
    pays = resolved.device_kind != "cpu" or (bool(convolutions) and not depthwise)
    return "bf16" if pays and has_bf16(resolved.device) else "fp32"


def scores_precision(network: Network) -> str:
    """Return the precision in which the trained network is used: bf16 where all of it was computed so in training.

    Of a network that was trained in both, what learnt in float32 stays in it.
    """
    trunk = network.trunk_precision if network.trunk is not None else network.precision
    body = network.precision if any(True for _ in network.body.parameters()) else trunk
    return "bf16" if trunk == body == "bf16" else "fp32"
