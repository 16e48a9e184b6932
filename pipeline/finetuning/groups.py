"""How fast each layer learns: layers are grouped by depth, and each group is slower than the one above it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn

from features_cache import nearest
from pipeline.backbones.backbone import Backbone
from pipeline.backbones.network_file import TOP_LAYER
from pipeline.errors import FitError
from pipeline.finetuning.network import ThawedNetwork, layer_name
from pipeline.options import TOPS

_WEIGHTS = (nn.Conv2d, nn.Linear)


def depth_groups(network: ThawedNetwork) -> dict[str, list[str]]:
    """Group the thawed parameters by depth, from the line upwards.

    A group is a block: a child of a sequence of blocks (``blocks.5``, ``layer4.1``), or an outermost module. A module
    without a convolution or a linear layer, such as a norm, belongs to the group before it. The result has the names of
    parameters by group. A group has the name of its first module; the last group is the new top.
    """
    modules = dict(network.body.named_modules())
    groups: dict[str, list[str]] = {}
    group_of: dict[str, str] = {}
    for name, _ in network.body.named_parameters():
        block = _block(name)
        if block not in group_of:
            module = modules.get(block, nn.Identity())  # a bare parameter of the network has no module
            has_weights = any(isinstance(part, _WEIGHTS) for part in module.modules())
            group_of[block] = block if has_weights or not groups else next(reversed(groups))
        groups.setdefault(group_of[block], []).append(f"body.{name}")
    groups[TOP_LAYER] = [f"{TOP_LAYER}.{name}" for name, _ in network.new_head.named_parameters()]
    return groups


def _block(parameter: str) -> str:
    """Return the outermost module of a parameter, or that module's child if the child has a number."""
    parts = parameter.split(".")
    numbered = len(parts) > 2 and parts[1].isdigit()
    return ".".join(parts[:2]) if numbered else parts[0]


def parameter_groups(
    network: ThawedNetwork, rate: float, layer_decay: float, rates_at: Sequence[tuple[str, float]], weight_decay: float
) -> list[dict[str, Any]]:
    """Return the optimizer's parameter groups; timm's schedulers read their ``lr_scale``.

    The new top learns at `rate`, and each group of layers `layer_decay` times as fast as the one above it; `rates_at`
    gives layers rates of their own, of which the last that matches counts. Biases and norms get no weight decay. Raises
    `FitError` if a layer of `rates_at` is frozen or does not exist.
    """
    parameters = dict(network.named_parameters())
    groups = depth_groups(network)
    names = [name for members in groups.values() for name in members]
    depths = {name: depth for depth, members in enumerate(reversed(groups.values())) for name in members}
    scales = {name: layer_decay ** depths[name] for name in names}
    for layer, own_rate in rates_at:
        inside = [name for name in names if f"{layer_name(name)}.".startswith(f"{layer}.")]
        if not inside:
            raise FitError(
                f"there is no thawed layer '{layer}' to give a learning rate to{nearest(layer, groups)}; "
                f"thawed are {', '.join(groups)}"
            )
        scales |= dict.fromkeys(inside, own_rate / rate)
    merged: dict[tuple[float, float], list[nn.Parameter]] = {}
    for name in names:
        decay = weight_decay if parameters[name].ndim > 1 else 0.0
        merged.setdefault((scales[name], decay), []).append(parameters[name])
    return [
        {"params": members, "lr": rate * scale, "initial_lr": rate, "lr_scale": scale, "weight_decay": decay}
        for (scale, decay), members in merged.items()
    ]


def check_rates(backbone: Backbone, freeze: str, rates_at: Sequence[tuple[str, float]]) -> None:
    """Raise `FitError` unless every layer of `rates_at` is thawed; a backbone without weights is enough."""
    parameter_groups(ThawedNetwork(backbone, freeze, TOPS[0], 2), 1.0, 1.0, rates_at, 0.0)
