from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from pipeline.backbones.graph import TappedNetwork, tap
from pipeline.backbones.registry import Backbone, load
from pipeline.backbones.weights import weights_digest
from pipeline.engines.fold import folded
from pipeline.engines.select import Resolved, has_bf16
from pipeline.engines.torch_engine import TorchEngine
from pipeline.spec import Preprocessing

FP32 = Resolved("torch", "cpu", "fp32")
SIDE = 64
LAYERS = ["blocks.1", "input", "penultimate", "logits"]


class Batch(NamedTuple):
    name: str
    pixels: np.ndarray


@pytest.fixture(scope="module")
def lite0() -> Backbone:
    return load("efficientnet_lite0", size=SIDE)


def batches(*sizes: int) -> list[Batch]:
    generator = np.random.default_rng(0)
    return [
        Batch(str(place), generator.integers(0, 256, (size, SIDE, SIDE, 3), dtype=np.uint8))
        for place, size in enumerate(sizes)
    ]


def test_batches_come_back_in_order_with_the_networks_features(lite0: Backbone) -> None:
    network = tap(lite0, LAYERS, "avg")
    asked = batches(3, 1, 0, 2)
    answers = list(TorchEngine(network, FP32).stream(iter(asked)))
    assert [batch for batch, _ in answers] == asked
    for batch, features in answers:
        assert [item.shape for item in features] == [(len(batch.pixels), dim) for dim in network.dims.values()]
        assert {item.dtype for item in features} == {np.dtype(np.float32)}
        if len(batch.pixels):
            with torch.inference_mode():
                wanted = network(torch.from_numpy(batch.pixels))
            for found, item in zip(features, wanted, strict=True):
                scale = item.abs().max().item()
                np.testing.assert_allclose(found / scale, item / scale, atol=1e-4)


def test_a_batch_is_computed_when_it_is_asked_for(lite0: Backbone) -> None:
    seen = []

    def source() -> Iterator[Batch]:
        for batch in batches(1, 1, 1):
            seen.append(batch.name)
            yield batch

    stream = TorchEngine(tap(lite0, ["input"]), FP32).stream(source())
    assert next(stream)[0].name == "0"
    assert seen == ["0"]


def test_the_backbone_stays_as_it_was(lite0: Backbone) -> None:
    strides = [item.stride() for item in lite0.module.parameters()]
    network = tap(lite0, ["logits"])
    code = network.body.code
    list(TorchEngine(network, FP32).stream(batches(1)))
    assert weights_digest(lite0.module) == lite0.weights_digest
    assert [item.stride() for item in lite0.module.parameters()] == strides
    assert network.body.code == code
    assert isinstance(network.body.get_submodule("bn1"), nn.BatchNorm2d)


def test_pixels_need_be_neither_writable_nor_contiguous(lite0: Backbone) -> None:
    pixels = batches(4)[0].pixels
    frozen = pixels[::2].copy()
    frozen.flags.writeable = False
    engine = TorchEngine(tap(lite0, ["blocks.0"]), FP32)
    answers = [features[0] for _, features in engine.stream([Batch("", pixels[::2]), Batch("", frozen)])]
    assert np.array_equal(*answers)


def test_autocast_is_near_and_leaves_the_input_layer_exact(lite0: Backbone) -> None:
    if not has_bf16("cpu"):
        pytest.skip("this CPU does not compute bf16")
    network = tap(lite0, ["input", "penultimate"])
    exact, near = (
        next(TorchEngine(network, Resolved("torch", "cpu", precision)).stream(batches(4)))[1]
        for precision in ("fp32", "bf16")
    )
    assert np.array_equal(exact[0], near[0])
    assert not np.array_equal(exact[1], near[1])
    norms = np.linalg.norm(exact[1], axis=1) * np.linalg.norm(near[1], axis=1)
    assert ((exact[1] * near[1]).sum(axis=1) / norms).min() > 0.98


class Norms(nn.Module):
    """Batch norms that may be folded and such that may not."""

    def __init__(self) -> None:
        super().__init__()
        self.plain = nn.Conv2d(3, 4, 3)
        self.plain_norm = nn.BatchNorm2d(4)
        self.twice = nn.Conv2d(4, 4, 1, bias=False)
        self.twice_norm = nn.BatchNorm2d(4)
        self.branched = nn.Conv2d(4, 4, 1)
        self.branched_norm = nn.BatchNorm2d(4)
        self.free = nn.Conv2d(4, 4, 1)
        self.free_norm = nn.BatchNorm2d(4, track_running_stats=False)

    def forward(self, x: Tensor) -> Tensor:
        x = self.plain_norm(self.plain(x))
        x = self.twice_norm(self.twice(self.twice_norm(self.twice(x))))
        branched = self.branched(x)
        x = self.branched_norm(branched) + branched
        return self.free_norm(self.free(x))


def test_only_what_may_be_folded_is_folded() -> None:
    torch.manual_seed(0)
    module = Norms()
    for part in module.modules():
        if isinstance(part, nn.BatchNorm2d) and part.running_mean is not None:
            nn.init.uniform_(part.running_mean)
            nn.init.uniform_(part.running_var, 0.5, 2)
            nn.init.uniform_(part.weight)
            nn.init.uniform_(part.bias)
    module = module.eval().requires_grad_(False)
    half = (0.5, 0.5, 0.5)
    backbone = Backbone("own/net", "net", "", "", module, Preprocessing((8, 8), 8, "bilinear", half, half), None)
    network: TappedNetwork = tap(backbone, ["free_norm"], "flatten")
    copy = folded(network.body)
    kept = [name for name, part in copy.named_modules() if isinstance(part, nn.BatchNorm2d)]
    assert kept == ["twice_norm", "branched_norm", "free_norm"]
    x = torch.randn(2, 3, 8, 8)
    torch.testing.assert_close(copy(x)[0], network.body(x)[0], rtol=1e-4, atol=1e-5)


def test_a_tapped_convolution_is_not_folded(lite0: Backbone) -> None:
    network = tap(lite0, ["conv_stem", "bn1", "blocks.0.0.bn1"], "avg")
    copy = folded(network.body)
    assert isinstance(copy.get_submodule("bn1"), nn.BatchNorm2d)
    assert not isinstance(copy.get_submodule("blocks.0.0.bn1"), nn.BatchNorm2d)
    x = torch.randn(1, 3, SIDE, SIDE)
    for one, other in zip(copy(x), network.body(x), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_cuda_gives_the_same_features(lite0: Backbone, precision: str) -> None:
    network = tap(lite0, LAYERS, "grid2")
    asked = batches(3, 0, 2)
    wanted = TorchEngine(network, FP32).stream(asked)
    found = TorchEngine(network, Resolved("torch", "cuda", precision)).stream(asked)
    for (batch, expected), (other, features) in zip(wanted, found, strict=True):
        assert batch is other
        for one, item in zip(features, expected, strict=True):
            scale = np.abs(item).max(initial=1e-12)
            np.testing.assert_allclose(one / scale, item / scale, atol=1e-3 if precision == "fp32" else 5e-2)
