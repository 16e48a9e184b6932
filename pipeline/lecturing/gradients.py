"""Do gradients vanish? Norms by depth at initialisation, for units, batch norm, shortcuts and too large weights."""

from __future__ import annotations

from functools import partial
from itertools import product

import numpy as np
import torch
from torch import Tensor, nn
from torch.linalg import vector_norm

from pipeline.backbones.trace import hooked
from pipeline.backbones.zoo_lecture import ResidualNet
from pipeline.images.resize import prepare
from pipeline.lecturing.claim import Findings, Setting, line_chart, seeds_figure, use_image
from pipeline.spec import Preprocessing

_DEPTHS = (6, 14, 26, 50)
_IMAGES, _SIDE, _WIDTH = 32, 16, 8
_TOO_LARGE = 1.5
_BENGIO = "Bengio et al. 1994; Glorot and Bengio 2010"
_EXPECTED = {
    ("logistic", "none", "none", 1.0): (-1, "vanish", _BENGIO),
    ("tanh", "none", "none", 1.0): (-1, "vanish, more slowly than with logistic units", _BENGIO),
    ("relu", "none", "none", _TOO_LARGE): (1, "explode", "Pascanu et al. 2013"),
}
"""What the claim expects, by activation, norm, shortcut and factor of the weights: the sign of the slope."""


def measure_claim(setting: Setting) -> Findings:
    """Measure the loss's gradient at the lowest convolution's output over that at the highest's.

    Gradients of weights would not do: they grow with the activations, too, which explode in the other direction.
    """
    seeds = range(3 if setting.quick else 20)
    depths = _DEPTHS[:3] if setting.quick else _DEPTHS
    images, labels = _batch(setting)
    kinds = [*product(("logistic", "tanh", "relu"), ("none", "batch"), ("none", "identity"), (1.0,))]
    kinds.append(("relu", "none", "none", _TOO_LARGE))
    ratios = {}
    for done, kind in enumerate(kinds):
        setting.progress(done, len(kinds), "gradients", _name(kind))
        ratios[kind] = np.array([[_ratio(kind, depth, seed, images, labels) for depth in depths] for seed in seeds])
    figures = []
    for kind, found in ratios.items():
        slopes = np.polyfit(depths, found.T, 1)[0] * 10
        sign, published, origin = _EXPECTED.get(kind, (0, "", ""))
        name = f"{_name(kind)}: powers of ten for 10 layers"
        figures.append(seeds_figure(name, slopes, published, origin, expected=sign, tests=len(_EXPECTED)))
    chart = line_chart(
        "How much of the gradient reaches the first layer?",
        "Powers of ten by which the gradient before the lowest unit differs from that before the highest, over the "
        "depth of the network; bands reach from the lowest to the highest seed.",
        depths,
        {_name(kind): found for kind, found in ratios.items()},
        ("layers", "powers of ten, lowest against highest layer"),
    )
    notes = [
        f"{len(seeds)} seeds draw the weights (He et al. 2015 for relu, Glorot and Bengio 2010 for the others); "
        f"{len(labels)} training images at {_SIDE} pixels, {_WIDTH} channels in every layer, float64, before any step. "
        "He et al. (2016) rule out vanishing gradients as the cause of degradation: their plain nets have batch norm."
    ]
    return Findings(figures, [chart], notes)


def _name(kind: tuple[str, str, str, float]) -> str:
    activation, norm, shortcut, factor = kind
    parts = [activation, *(["batch norm"] if norm == "batch" else []), *(["shortcuts"] if shortcut != "none" else [])]
    return " + ".join(parts) + (f", weights x {factor:g}" if factor != 1 else "")


def _batch(setting: Setting) -> tuple[Tensor, Tensor]:
    """Return some training images (n, 3, side, side), scaled to mean 0 and variance 1, and their labels."""
    source = setting.split_source
    training = [item for item in source.items if item.split == "train"]
    chosen = np.random.default_rng(0).permutation(len(training))[:_IMAGES].tolist()
    geometry = Preprocessing((_SIDE, _SIDE), _SIDE, "bilinear", (0.0, 0.0, 0.0), (1.0, 1.0, 1.0))
    read = partial(prepare, preprocessing=geometry)
    pixels = np.stack([use_image(source, training[index], read) for index in chosen])
    images = torch.from_numpy(pixels).permute(0, 3, 1, 2).double()
    return (images - images.mean()) / images.std(), torch.tensor([training[index].label for index in chosen])


def _ratio(kind: tuple[str, str, str, float], depth: int, seed: int, images: Tensor, labels: Tensor) -> float:
    """Return log10 of the norm of the loss's gradient before the first unit, over that before the last."""
    activation, norm, shortcut, factor = kind
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        classes = int(labels.max()) + 1
        net = ResidualNet((depth - 2,), classes, _WIDTH, shortcut, activation=activation, norm=norm).double().train()
    convolutions = [name for name, module in net.named_modules() if isinstance(module, nn.Conv2d) and "." in name]
    outputs: dict[str, Tensor] = {}

    def keep(name: str, _module: nn.Module, _args: object, value: Tensor) -> None:
        outputs[name] = value
        value.retain_grad()

    with torch.no_grad():
        for name in convolutions:
            net.get_submodule(name).weight.mul_(factor)  # type: ignore[operator]
    with hooked(net, {name: partial(keep, name) for name in (convolutions[0], convolutions[-1])}):
        nn.functional.cross_entropy(net(images), labels).backward()
    tiny = torch.finfo(torch.float64).tiny
    first, last = (vector_norm(value.grad).clamp(min=tiny).log10().item() for value in outputs.values())
    return float(first - last)
