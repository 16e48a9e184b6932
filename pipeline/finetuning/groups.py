"""Which weights learn how fast: layers grouped by depth, each group a constant factor slower than the one above."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn

from features_cache import nearest
from pipeline.backbones.backbone import Backbone
from pipeline.backbones.network_file import TOP_LAYER
from pipeline.errors import FitError
from pipeline.finetuning.network import Network, layer_name
from pipeline.options import TOPS

_WEIGHTS = (nn.Conv2d, nn.Linear)


def depth_groups(network: Network) -> dict[str, list[str]]:
    """Group the thawed parameters by depth, from the line upwards.

    A group is a block: a child of a sequence of blocks (``blocks.5``, ``layer4.1``), or an outermost module. What has
    no convolution and no linear layer of its own, such as a norm, belongs to what comes before it.

    Returns
    -------
    dict of str to list of str
        Name of the group, that of its first module, to parameter names; the last is the new head.
    """
    modules = dict(network.body.named_modules())
    groups: dict[str, list[str]] = {}
    home: dict[str, str] = {}
    for name, _ in network.body.named_parameters():
        block = _block(name, modules)
        if block not in home:
            heavy = any(isinstance(part, _WEIGHTS) for part in _module(modules, block).modules())
            home[block] = block if heavy or not groups else next(reversed(groups))
        groups.setdefault(home[block], []).append(f"body.{name}")
    groups[TOP_LAYER] = [f"{TOP_LAYER}.{name}" for name, _ in network.new_head.named_parameters()]
    return groups


def _block(parameter: str, modules: dict[str, nn.Module]) -> str:
    """Return the outermost module of a parameter, or that module's numbered child."""
    parts = parameter.split(".")
    numbered = len(parts) > 2 and parts[1].isdigit()
    return ".".join(parts[:2]) if numbered else parts[0]


def _module(modules: dict[str, nn.Module], name: str) -> nn.Module:
    return modules.get(name, nn.Identity())  # a bare parameter of the network has no module


def parameter_groups(
    network: Network, rate: float, layer_decay: float, rates_at: Sequence[tuple[str, float]], weight_decay: float
) -> list[dict[str, Any]]:
    """Return groups for an optimizer, and for timm's schedulers, which read ``lr_scale``.

    Parameters
    ----------
    network : Network
    rate : float
        Of the head.
    layer_decay : float
        Factor from one group of layers to the one below it.
    rates_at : sequence of (str, float)
        Layer and learning rate, instead of what the decay gives; the last that fits counts.
    weight_decay : float
        Not for biases and norms.

    Raises
    ------
    FitError
        If a layer of `rates_at` is frozen or does not exist.
    """
    parameters = dict(network.named_parameters())
    groups = depth_groups(network)
    names = [name for members in groups.values() for name in members]
    depths = {name: depth for depth, members in enumerate(reversed(groups.values())) for name in members}
    scales = {name: layer_decay ** depths[name] for name in names}
    for layer, own in rates_at:
        inside = [name for name in names if _is_inside(layer_name(name), layer)]
        if not inside:
            raise FitError(
                f"no thawed layer '{layer}' to give a learning rate{nearest(layer, groups)}; "
                f"thawed are {', '.join(groups)}"
            )
        scales |= dict.fromkeys(inside, own / rate)
    merged: dict[tuple[float, float], list[nn.Parameter]] = {}
    for name in names:
        decay = weight_decay if parameters[name].ndim > 1 else 0.0
        merged.setdefault((scales[name], decay), []).append(parameters[name])
    return [
        {"params": members, "lr": rate * scale, "initial_lr": rate, "lr_scale": scale, "weight_decay": decay}
        for (scale, decay), members in merged.items()
    ]


def check_rates(backbone: Backbone, freeze: str, rates_at: Sequence[tuple[str, float]]) -> None:
    """Raise `FitError` unless every layer of `rates_at` is thawed; a sketch of the backbone will do."""
    parameter_groups(Network(backbone, freeze, TOPS[0], 2), 1.0, 1.0, rates_at, 0.0)


def _is_inside(layer: str, around: str) -> bool:
    return layer == around or layer.startswith(f"{around}.")
