"""Zoo of the networks that the lecture compares: plain and residual nets, and GoogLeNet with two kinds of modules.

They have no pretrained weights. A name may have options: ``resnet20[width=8,shortcut=projection]``.

========== ============================================ =====================================================
option     values                                       meaning
========== ============================================ =====================================================
width      a number                                     channels of the first convolution
shortcut   zero-padded, identity, projection, none      what residual nets add to F(x); ``none`` is a plain net
layers     1, 2, 3                                      convolutions in F
activation relu, tanh, logistic
norm       batch, none
modules    reduced, naive                               GoogLeNet with or without 1x1 convolutions before larger ones
========== ============================================ =====================================================
"""

from __future__ import annotations

import re
from pathlib import Path

from torch import Tensor, nn
from torchvision.models.googlenet import BasicConv2d, Inception

from features_cache import nearest
from pipeline.errors import BackboneError
from pipeline.spec import Preprocessing, Size

_CLASSES = 1000
_STAGES = {
    18: (4, 4, 4, 4),
    34: (6, 8, 12, 6),
    **{depth: ((depth - 2) // 3,) * 3 for depth in (20, 32, 44, 56)},
}
"""Convolutions in each stage by depth (He et al. 2016): four stages are the form for ImageNet, three that for CIFAR."""
_CHOICES = {
    "shortcut": ("zero-padded", "identity", "projection", "none"),
    "layers": ("1", "2", "3"),
    "activation": ("relu", "tanh", "logistic"),
    "norm": ("batch", "none"),
    "modules": ("reduced", "naive"),
}
_ACTIVATIONS = {"relu": nn.ReLU, "tanh": nn.Tanh, "logistic": nn.Sigmoid}
INCEPTIONS = {
    "inception3a": (64, 96, 128, 16, 32, 32),
    "inception3b": (128, 128, 192, 32, 96, 64),
    "maxpool3": (),
    "inception4a": (192, 96, 208, 16, 48, 64),
    "inception4b": (160, 112, 224, 24, 64, 64),
    "inception4c": (128, 128, 256, 24, 64, 64),
    "inception4d": (112, 144, 288, 32, 64, 64),
    "inception4e": (256, 160, 320, 32, 128, 128),
    "maxpool4": (),
    "inception5a": (256, 160, 320, 32, 128, 128),
    "inception5b": (384, 192, 384, 48, 128, 128),
}
"""Channels of GoogLeNet's modules (Szegedy et al. 2015, table 1): 1x1, 3x3 reduced, 3x3, 5x5 reduced, 5x5, pooled."""


class ResidualBlock(nn.Module):
    """Maps x to act(F(x) + shortcut(x)), where F is some 3x3 convolutions; names of layers are torchvision's.

    The shortcut ``identity`` is a projection where shapes differ, ``zero-padded`` adds channels of zeros there, and
    ``projection`` is one everywhere (He et al. call the three B, A and C).
    """

    def __init__(
        self, inputs: int, width: int, stride: int, shortcut: str, layers: int, activation: str, norm: str
    ) -> None:
        super().__init__()
        self.layers, self.stride, self.added, self.plain = layers, stride, width - inputs, shortcut == "none"
        for number in range(1, layers + 1):
            read = inputs if number == 1 else width
            self.add_module(f"conv{number}", _conv(read, width, 3, stride if number == 1 else 1, norm))
            self.add_module(f"bn{number}", _norm(width, norm))
        self.relu = _ACTIVATIONS[activation]()
        self.downsample: nn.Module | None = None
        if shortcut == "projection" or (shortcut == "identity" and (stride > 1 or self.added)):
            self.downsample = nn.Sequential(_conv(inputs, width, 1, 1, norm), _norm(width, norm))

    def forward(self, x: Tensor) -> Tensor:
        """Map (n, c, h, w) to (n, width, h / stride, w / stride)."""
        out: Tensor = x
        for number in range(1, self.layers + 1):
            out = self.get_submodule(f"bn{number}")(self.get_submodule(f"conv{number}")(out))
            if number < self.layers:
                out = self.relu(out)
        if not self.plain:
            out = out + self._shortcut(x)
        activated: Tensor = self.relu(out)
        return activated

    def _shortcut(self, x: Tensor) -> Tensor:
        if self.stride > 1:  # not in the projection: oneDNN crashes in strided 1x1 convolutions of few channels
            x = x[:, :, :: self.stride, :: self.stride]
        if self.downsample is not None:
            x = self.downsample(x)
        elif self.added:
            x = nn.functional.pad(x, (0, 0, 0, 0, 0, self.added))
        return x


class ResidualNet(nn.Module):
    """A plain or residual net; `stages` has the number of convolutions in each stage.

    Four stages follow a 7x7 convolution and a pooling, as for ImageNet; fewer follow a 3x3 convolution, as for CIFAR.
    """

    def __init__(
        self,
        stages: tuple[int, ...],
        classes: int,
        width: int,
        shortcut: str = "none",
        layers: int = 2,
        activation: str = "relu",
        norm: str = "batch",
    ) -> None:
        super().__init__()
        large = len(stages) == 4
        self.conv1 = _conv(3, width, 7 if large else 3, 2 if large else 1, norm)
        self.bn1, self.relu = _norm(width, norm), _ACTIVATIONS[activation]()
        self.maxpool = nn.MaxPool2d(3, 2, 1) if large else nn.Identity()
        inputs = width
        for number, convolutions in enumerate(stages):
            outputs = width << number
            blocks = nn.Sequential()
            for index in range(convolutions // layers):
                stride = 2 if number and not index else 1
                blocks.append(ResidualBlock(inputs, outputs, stride, shortcut, layers, activation, norm))
                inputs = outputs
            self.add_module(f"layer{number + 1}", blocks)
        self.stages = len(stages)
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(inputs, classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d) and activation == "relu":
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            elif isinstance(module, nn.Conv2d):
                nn.init.xavier_normal_(module.weight)
            if isinstance(module, nn.Conv2d) and module.bias is not None:
                nn.init.zeros_(module.bias)

    def forward(self, x: Tensor) -> Tensor:
        """Map images (n, 3, h, w) to class scores (n, k)."""
        x = self.maxpool(self.relu(self.bn1(self.conv1(x))))
        for number in range(self.stages):
            x = self.get_submodule(f"layer{number + 1}")(x)
        scores: Tensor = self.fc(self.avgpool(x).flatten(1))
        return scores


class ReducedInception(Inception):  # type: ignore[misc]
    """GoogLeNet's module: 1x1 convolutions reduce the channels before the 3x3 and the 5x5 one.

    That of torchvision has another 3x3 one in place of the 5x5 one.
    """

    def __init__(self, inputs: int, c1: int, r3: int, c3: int, r5: int, c5: int, pooled: int) -> None:
        super().__init__(inputs, c1, r3, c3, r5, c5, pooled)
        self.branch3[1] = BasicConv2d(r5, c5, kernel_size=5, padding=2)
        self.outputs = c1 + c3 + c5 + pooled


class NaiveInception(Inception):  # type: ignore[misc]
    """The same module without reduction: all convolutions read the input, and its pooled channels are passed on."""

    def __init__(self, inputs: int, c1: int, _r3: int, c3: int, _r5: int, c5: int, _pooled: int) -> None:
        nn.Module.__init__(self)
        self.branch1 = BasicConv2d(inputs, c1, kernel_size=1)
        self.branch2 = BasicConv2d(inputs, c3, kernel_size=3, padding=1)
        self.branch3 = BasicConv2d(inputs, c5, kernel_size=5, padding=2)
        self.branch4 = nn.MaxPool2d(3, 1, 1)
        self.outputs = c1 + c3 + c5 + inputs


def _googlenet(classes: int, width: int, modules: str) -> nn.Module:
    def scaled(channels: int) -> int:
        return max(1, round(channels * width / 64))

    net = nn.Sequential()
    net.add_module("conv1", BasicConv2d(3, width, kernel_size=7, stride=2, padding=3))
    net.add_module("maxpool1", nn.MaxPool2d(3, 2, ceil_mode=True))
    net.add_module("conv2", BasicConv2d(width, width, kernel_size=1))
    net.add_module("conv3", BasicConv2d(width, scaled(192), kernel_size=3, padding=1))
    net.add_module("maxpool2", nn.MaxPool2d(3, 2, ceil_mode=True))
    inputs, kind = scaled(192), NaiveInception if modules == "naive" else ReducedInception
    for name, channels in INCEPTIONS.items():
        if channels:
            net.add_module(name, kind(inputs, *map(scaled, channels)))
            inputs = int(net.get_submodule(name).outputs)  # type: ignore[arg-type]
        else:
            net.add_module(name, nn.MaxPool2d(2 if name == "maxpool4" else 3, 2, ceil_mode=True))
    net.add_module("avgpool", nn.AdaptiveAvgPool2d(1))
    net.add_module("flatten", nn.Flatten())
    net.add_module("dropout", nn.Dropout(0.2))
    net.add_module("fc", nn.Linear(inputs, classes))
    return net


def _conv(inputs: int, outputs: int, kernel: int, stride: int, norm: str) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, bias=norm == "none")


def _norm(channels: int, norm: str) -> nn.Module:
    return nn.BatchNorm2d(channels) if norm == "batch" else nn.Identity()


def names() -> list[str]:
    """Return the names of all networks of this zoo, without options."""
    return [f"{kind}{depth}" for kind in ("plain", "resnet") for depth in sorted(_STAGES)] + ["googlenet"]


def canonical(name: str) -> str:
    """Return a name with its options in a fixed order and without defaults, so that a network has one name.

    Raises
    ------
    BackboneError
        If an option does not exist, or has an impossible value.

    Examples
    --------
    >>> canonical("resnet20[layers=2,width=8]"), canonical("resnet20[shortcut=none]")
    ('resnet20[width=8]', 'plain20')
    """
    base, options = _read(name)
    if options.get("shortcut") == "none":
        base = base.replace("resnet", "plain")
        del options["shortcut"]
    _, defaults = _read(base)
    given = ",".join(f"{key}={value}" for key, value in options.items() if value != defaults[key])
    return f"{base}[{given}]" if given else base


def _read(name: str) -> tuple[str, dict[str, str]]:
    """Return the name without options, and all its options, given and default."""
    base, bracket, text = name.partition("[")
    options = _defaults(base)
    if bracket and not text.endswith("]"):
        raise BackboneError(f"{name}: expected ] after the options")
    given: set[str] = set()
    for item in text.removesuffix("]").split(",") if bracket else ():
        key, _, value = (part.strip() for part in item.partition("="))
        if key not in options:
            raise BackboneError(
                f"lecture/{base} has no option '{key}'{nearest(key, options)}; it has {', '.join(options)}, "
                f"as in {base}[width=8]"
            )
        choices = _CHOICES.get(key, ())
        if not (value in choices if choices else re.fullmatch(r"[1-9]\d{0,3}", value)):
            expected = f"one of {', '.join(choices)}" if choices else "a number from 1 to 9999"
            raise BackboneError(f"{name}: expected {key} to be {expected}, got '{value}'{nearest(value, choices)}")
        if key in given:
            raise BackboneError(f"{name}: {key} is given twice")
        given.add(key)
        options[key] = value
    layers = int(options.get("layers", 1))
    if any(count % layers for count in _stages(base)):
        fitting = [str(depth) for depth, counts in _STAGES.items() if not any(count % layers for count in counts)]
        raise BackboneError(
            f"{name}: the layers of its stages cannot be grouped by {layers}; "
            f"those of {' and '.join(fitting)} layers can"
        )
    return base, options


def _defaults(base: str) -> dict[str, str]:
    if base == "googlenet":
        return {"width": "64", "modules": "reduced"}
    large = len(_stages(base)) == 4
    shortcut = {} if base.startswith("plain") else {"shortcut": "identity" if large else "zero-padded"}
    return {"width": "64" if large else "16", **shortcut, "layers": "2", "activation": "relu", "norm": "batch"}


def _stages(base: str) -> tuple[int, ...]:
    """Return the convolutions in each stage; () for GoogLeNet."""
    return _STAGES.get(int(re.sub(r"\D", "", base) or 0), ())


def tags(name: str) -> tuple[str, ...]:
    """Return (): there are no pretrained weights."""
    return ()


def cached(name: str, tag: str) -> bool:
    """Return False: there are no pretrained weights."""
    return False


def weights_paths(name: str, tag: str) -> list[Path]:
    """Return []: there are no pretrained weights."""
    return []


def build(name: str, size: Size | None, classes: int | None) -> nn.Module:
    """Return the network with random weights."""
    base, options = _read(name)
    width = int(options.pop("width"))
    if base == "googlenet":
        return _googlenet(classes or _CLASSES, width, options["modules"])
    layers = int(options.pop("layers"))
    return ResidualNet(_stages(base), classes or _CLASSES, width, layers=layers, **options)


def pretrained(name: str, tag: str, size: Size | None) -> nn.Module:
    """Raise `BackboneError`: there are no pretrained weights."""
    raise BackboneError(f"there are no pretrained weights for {name}; use {name}@random:0")


def preprocessing(name: str, tag: str | None) -> Preprocessing:
    """Return ImageNet's preprocessing, or the same without a crop for images of 32 pixels."""
    small = len(_stages(name.partition("[")[0])) == 3
    side, resize = (32, 32) if small else (224, 256)
    return Preprocessing((side, side), resize, "bilinear", (0.485, 0.456, 0.406), (0.229, 0.224, 0.225))


def classifiers(name: str, module: nn.Module) -> tuple[str, ...]:
    """Return the dotted name of the classifier."""
    return ("fc",)
