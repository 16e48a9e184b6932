from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from typing import NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor, fx, nn

from pipeline.backbones.graph import tap
from pipeline.backbones.registry import Backbone, load
from pipeline.engines.fold import folded
from pipeline.engines.select import Resolved, has_bf16, resolve
from pipeline.engines.torch_engine import TorchEngine
from pipeline.errors import EngineError
from pipeline.spec import Preprocessing

SIDE = 64
LAYERS = ["stages", "penultimate", "logits", "input"]
CUDA = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")


class Batch(NamedTuple):
    pixels: np.ndarray
    number: int


def batches(sizes: list[int], side: int = SIDE) -> list[Batch]:
    rng = np.random.default_rng(1)
    return [
        Batch(rng.integers(0, 256, (size, side, side, 3), dtype=np.uint8), number) for number, size in enumerate(sizes)
    ]


@cache
def lively(name: str) -> Backbone:
    """A network whose batch norms do something: random statistics and weights."""
    backbone = load(f"{name}@random:0", SIDE)
    generator = torch.Generator().manual_seed(1)
    for part in backbone.module.modules():
        if isinstance(part, nn.BatchNorm2d):
            for tensor in (part.running_mean, part.bias):
                tensor.data.copy_(torch.randn(tensor.shape, generator=generator) * 0.1)
            for tensor in (part.running_var, part.weight):
                tensor.data.copy_(torch.rand(tensor.shape, generator=generator) + 0.5)
    return backbone


def plain_features(backbone: Backbone, pixels: np.ndarray) -> list[np.ndarray]:
    """The same taps by eager PyTorch in float32."""
    with torch.inference_mode():
        return [item.numpy() for item in tap(backbone, LAYERS)(torch.from_numpy(pixels))]


def engine(backbone: Backbone, precision: str, device: str = "cpu") -> TorchEngine:
    return TorchEngine(tap(backbone, LAYERS), resolve("torch", device, precision))


def count(body: nn.Module, kind: type[nn.Module]) -> int:
    return sum(isinstance(part, kind) for part in body.modules())


@pytest.mark.parametrize("name", ["resnet18", "efficientnet_lite0", "googlenet"])
def test_folding_changes_nothing_but_the_number_of_layers(name: str) -> None:
    backbone = lively(name)
    network = tap(backbone, ["penultimate", "logits"])
    assert isinstance(network.body, fx.GraphModule)
    body = folded(network.body)
    x = torch.randn(2, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(0))
    before = {key: item.clone() for key, item in network.body.state_dict().items()}
    with torch.inference_mode():
        for mine, theirs in zip(body(x), network.body(x), strict=True):
            assert float((mine - theirs).abs().max()) <= 1e-4 * float(theirs.abs().max())
    assert count(network.body, nn.BatchNorm2d) > 0
    assert count(body, nn.BatchNorm2d) == 0
    assert all(torch.equal(item, before[key]) for key, item in network.body.state_dict().items())


class Norms(nn.Module):
    """One batch norm that can be folded, and three that cannot."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.plain, self.shared, self.branched, self.batchwise = (nn.Conv2d(3, 3, 1) for _ in range(4))
        self.plain_norm, self.shared_norm, self.branched_norm = (nn.BatchNorm2d(3) for _ in range(3))
        self.batchwise_norm = nn.BatchNorm2d(3, track_running_stats=False)
        self.head = nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.plain_norm(self.plain(x))
        x = self.shared_norm(self.shared(self.shared_norm(self.shared(x))))
        branched = self.branched(x)
        x = self.branched_norm(branched) + branched
        return self.head(self.batchwise_norm(self.batchwise(x)).square().mean((2, 3)))


def test_what_cannot_be_folded_is_left() -> None:
    module = Norms()
    for part in module.modules():
        if isinstance(part, nn.BatchNorm2d) and part.running_mean is not None:
            part.running_mean.uniform_(-1, 1)
            part.running_var.uniform_(0.5, 2)
    preprocessing = Preprocessing((8, 8), 8, "bilinear", (0.5,) * 3, (0.5,) * 3)
    backbone = Backbone("toy/net", "net", "", "", module.eval().requires_grad_(False), preprocessing, "head")
    network = tap(backbone, ["logits"])
    body = folded(network.body)
    kept = [name for name, part in body.named_modules() if isinstance(part, nn.BatchNorm2d)]
    assert kept == ["shared_norm", "branched_norm", "batchwise_norm"]
    x = torch.randn(2, 3, 8, 8)
    with torch.inference_mode():
        np.testing.assert_allclose(body(x)[0], network.body(x)[0], rtol=1e-3, atol=1e-4)


def test_a_tap_between_convolution_and_batch_norm_keeps_its_value() -> None:
    backbone = lively("resnet18")
    pixels = batches([2])[0].pixels
    layers = ["conv1", "bn1", "layer1.0.conv1", "layer1.0.bn1"]
    network = tap(backbone, layers)
    with torch.inference_mode():
        expected = network(torch.from_numpy(pixels))
    ((_, features),) = TorchEngine(network, resolve("torch", "cpu", "fp32")).stream([Batch(pixels, 0)])
    for mine, theirs in zip(features, expected, strict=True):
        np.testing.assert_allclose(mine, theirs, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["resnet18", "efficientnet_lite0"])
def test_fp32_is_eager_fp32(name: str) -> None:
    (batch,) = batches([3])
    ((_, features),) = engine(lively(name), "fp32").stream([batch])
    for mine, theirs in zip(features, plain_features(lively(name), batch.pixels), strict=True):
        assert mine.dtype == np.float32
        assert mine.shape == theirs.shape
        assert np.abs(mine - theirs).max() <= 1e-4 * np.abs(theirs).max()


def cosines(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    return (first * second).sum(1) / np.linalg.norm(first, axis=1) / np.linalg.norm(second, axis=1)


@pytest.mark.parametrize("name", ["resnet18", "efficientnet_lite0"])
def test_bf16_is_close(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipeline.engines.select.has_bf16", lambda _device: True)  # emulated where there is none
    (batch,) = batches([2])
    ((_, features),) = engine(lively(name), "bf16").stream([batch])
    pairs = list(zip(features, plain_features(lively(name), batch.pixels), strict=True))
    for mine, theirs in pairs:
        assert mine.dtype == np.float32
        assert cosines(mine, theirs).min() > 0.99
    assert any(not np.allclose(mine, theirs, rtol=1e-4) for mine, theirs in pairs[:-1])
    np.testing.assert_allclose(*pairs[-1], rtol=1e-6, atol=1e-7)  # the input is never rounded


def test_the_input_layer_is_exact() -> None:
    backbone = lively("resnet18")
    (batch,) = batches([2])
    ((_, (*_, features)),) = engine(backbone, "fp32").stream([batch])
    normalised = (batch.pixels / 255 - backbone.preprocessing.mean) / backbone.preprocessing.std
    blocks = normalised.reshape(2, 32, 2, 32, 2, 3).mean((2, 4)).transpose(0, 3, 1, 2).reshape(2, -1)
    np.testing.assert_allclose(features, blocks, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("sizes", [[], [0], [2, 0, 3, 1], [0, 0, 2], [1, 0]])
def test_batches_come_back_in_order_and_whole(sizes: list[int]) -> None:
    given = batches(sizes)
    results = list(engine(lively("resnet18"), "fp32").stream(iter(given)))
    assert [batch.number for batch, _ in results] == list(range(len(sizes)))
    for (batch, features), original in zip(results, given, strict=True):
        assert batch is original
        for mine, theirs in zip(features, plain_features(lively("resnet18"), original.pixels), strict=True):
            assert mine.shape == theirs.shape
            assert mine.dtype == np.float32
            np.testing.assert_allclose(mine, theirs, rtol=1e-3, atol=1e-3)


def test_pixels_need_be_neither_writable_nor_contiguous() -> None:
    pixels = batches([4])[0].pixels[::2]
    frozen = pixels.copy()
    frozen.flags.writeable = False
    results = engine(lively("resnet18"), "fp32").stream([Batch(pixels, 0), Batch(frozen, 1)])
    (_, first), (_, second) = results
    assert all(np.array_equal(mine, theirs) for mine, theirs in zip(first, second, strict=True))


def test_on_a_cpu_no_batch_is_asked_for_ahead_of_the_reader() -> None:
    given = iter(batches([1, 1]))
    stream = engine(lively("resnet18"), "fp32").stream(given)
    assert next(stream)[0].number == 0
    assert next(given).number == 1


def test_an_error_of_the_source_reaches_the_reader_after_what_came_before() -> None:
    def source() -> Iterator[Batch]:
        yield from batches([1])
        raise OSError("gone")

    stream = engine(lively("resnet18"), "fp32").stream(source())
    assert next(stream)[0].number == 0
    with pytest.raises(OSError, match="gone"):
        next(stream)


def test_an_engine_leaves_the_network_as_it_was() -> None:
    network = tap(lively("resnet18"), LAYERS)
    before = {key: item.clone() for key, item in network.state_dict().items()}
    engine_of = TorchEngine(network, resolve("torch", "cpu", "fp32"))
    list(engine_of.stream(batches([1])))
    after = network.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(item, after[key]) for key, item in before.items())


# What a run gets


def test_auto_is_what_the_machine_has(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for bf16, precision in ((True, "bf16"), (False, "fp32")):
        monkeypatch.setattr("pipeline.engines.select.has_bf16", lambda _device, bf16=bf16: bf16)
        resolved = resolve()
        assert (resolved.engine, resolved.device, resolved.precision) == ("torch", "cpu", precision)
    assert resolve(precision="fp32").precision == "fp32"


def test_auto_takes_cuda_where_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr("pipeline.engines.select.has_bf16", lambda _device: True)
    assert resolve().device == "cuda"
    assert resolve(device="cuda:1", precision="fp16").precision == "fp16"
    with pytest.raises(EngineError, match="cuda:2"):
        resolve(device="cuda:2")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"engine": "jax"}, "engine.*jax.*torch"),
        ({"engine": "Torch"}, "did you mean torch"),
        ({"device": "gpu"}, "device.*gpu.*cpu, cuda"),
        ({"device": "mps"}, "mps.*cpu"),
        ({"device": "cuda:x"}, "cuda:x"),
        ({"device": "cpu:0x"}, "cpu:0x"),
        ({"device": "cuda"}, "cuda.*cpu"),
        ({"device": "cpu", "precision": "fp8"}, "fp8.*fp32"),
        ({"device": "cpu", "precision": "fp16"}, "fp16.*fp32"),
        ({"device": "cpu", "precision": "bf16"}, "bf16.*fp32"),
    ],
)
def test_what_this_machine_lacks_is_one_line(
    options: dict[str, str], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    monkeypatch.setattr("pipeline.engines.select.has_bf16", lambda _device: False)
    with pytest.raises(EngineError, match=message) as caught:
        resolve(**options)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("bf16", "amx"), [(False, False), (True, False), (False, True)])
def test_bf16_of_the_cpu_is_what_torch_says(monkeypatch: pytest.MonkeyPatch, bf16: bool, amx: bool) -> None:
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: bf16)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: amx)
    assert has_bf16("cpu") is (bf16 or amx)


def test_bf16_that_a_gpu_only_emulates_does_not_count(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: including_emulation)
    assert has_bf16("cuda:0") is False


def test_batches_are_larger_on_a_gpu() -> None:
    assert Resolved("torch", "cpu", "fp32").batch_size < Resolved("torch", "cuda:3", "fp32").batch_size


# On a CUDA device


@pytest.mark.gpu
@CUDA
@pytest.mark.parametrize(("precision", "least"), [("fp32", 0.9999), ("bf16", 0.99), ("fp16", 0.99)])
def test_cuda_agrees_with_the_cpu(precision: str, least: float) -> None:
    given = batches([3, 0, 2, 1])
    results = list(engine(lively("resnet18"), precision, "cuda").stream(given))
    assert [batch.number for batch, _ in results] == [0, 1, 2, 3]
    for (_, features), batch in zip(results, given, strict=True):
        for mine, theirs in zip(features, plain_features(lively("resnet18"), batch.pixels), strict=True):
            assert mine.shape == theirs.shape
            assert not len(mine) or cosines(mine, theirs).min() > least
