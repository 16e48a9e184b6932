from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch
from torch import Tensor, fx, nn

from pipeline.backbones.backbone import Backbone
from pipeline.backbones.registry import load_backbone
from pipeline.backbones.taps import TappedNetwork, tap
from pipeline.engines.engine import Engine, build_engine, stream
from pipeline.engines.select import Resolved, find_device, has_bf16, resolve
from pipeline.engines.torch_engine import TorchEngine, folded
from pipeline.errors import EngineError
from pipeline.spec import Preprocessing

if TYPE_CHECKING:
    import openvino

ROOT = Path(__file__).resolve().parents[1]
SIDE = 64
LAYERS = ["stages", "penultimate", "logits", "input"]
NO_OPENVINO = pytest.mark.skipif(find_spec("openvino") is None, reason="OpenVINO is not installed")
KINDS = ["torch", pytest.param("openvino", marks=NO_OPENVINO)]


def batches(sizes: list[int], side: int = SIDE) -> list[np.ndarray]:
    rng = np.random.default_rng(1)
    return [rng.integers(0, 256, (size, side, side, 3), dtype=np.uint8) for size in sizes]


@cache
def lively(name: str) -> Backbone:
    """A network whose batch norms do something: random statistics and weights."""
    backbone = load_backbone(f"{name}@random:0", SIDE)
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


def engine(backbone: Backbone, precision: str, device: str = "cpu", name: str = "torch") -> Engine:
    return build_engine(tap(backbone, LAYERS), resolve(name, device, precision), 4)


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
    backbone = Backbone("toy/net", "net", "", "", module.eval().requires_grad_(False), preprocessing, ("head",))
    network = tap(backbone, ["logits"])
    body = folded(network.body)
    kept = [name for name, part in body.named_modules() if isinstance(part, nn.BatchNorm2d)]
    assert kept == ["shared_norm", "branched_norm", "batchwise_norm"]
    x = torch.randn(2, 3, 8, 8)
    with torch.inference_mode():
        np.testing.assert_allclose(body(x)[0], network.body(x)[0], rtol=1e-3, atol=1e-4)


def test_a_tap_between_convolution_and_batch_norm_keeps_its_value() -> None:
    backbone = lively("resnet18")
    (pixels,) = batches([2])
    layers = ["conv1", "bn1", "layer1.0.conv1", "layer1.0.bn1"]
    network = tap(backbone, layers)
    with torch.inference_mode():
        expected = network(torch.from_numpy(pixels))
    (features,) = stream(TorchEngine(network, resolve("torch", "cpu", "fp32"), 2), [pixels])
    for mine, theirs in zip(features, expected, strict=True):
        np.testing.assert_allclose(mine, theirs, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["resnet18", "efficientnet_lite0"])
def test_fp32_is_eager_fp32(name: str, kind: str) -> None:
    (batch,) = batches([3])
    (features,) = stream(engine(lively(name), "fp32", name=kind), [batch])
    for mine, theirs in zip(features, plain_features(lively(name), batch), strict=True):
        assert mine.dtype == np.float32
        assert mine.shape == theirs.shape
        assert np.abs(mine - theirs).max() <= 1e-4 * np.abs(theirs).max()


def cosines(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    return (first * second).sum(1) / np.linalg.norm(first, axis=1) / np.linalg.norm(second, axis=1)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["resnet18", "efficientnet_lite0"])
def test_bf16_is_close(name: str, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if kind == "openvino" and not has_bf16("cpu"):
        pytest.skip("OpenVINO computes in fp32 where there is no bf16")
    monkeypatch.setattr("pipeline.engines.select.has_bf16", lambda _device: True)  # torch emulates it
    (batch,) = batches([2])
    (features,) = stream(engine(lively(name), "bf16", name=kind), [batch])
    pairs = list(zip(features, plain_features(lively(name), batch), strict=True))
    for mine, theirs in pairs:
        assert mine.dtype == np.float32
        assert cosines(mine, theirs).min() > 0.99
    assert any(not np.allclose(mine, theirs, rtol=1e-4) for mine, theirs in pairs[:-1])
    np.testing.assert_allclose(*pairs[-1], rtol=1e-6, atol=1e-6)  # the input is never rounded


def test_the_input_layer_is_exact() -> None:
    backbone = lively("resnet18")
    (batch,) = batches([2])
    ((*_, features),) = stream(engine(backbone, "fp32"), [batch])
    normalised = (batch / 255 - backbone.preprocessing.mean) / backbone.preprocessing.std
    blocks = normalised.reshape(2, 32, 2, 32, 2, 3).mean((2, 4)).transpose(0, 3, 1, 2).reshape(2, -1)
    np.testing.assert_allclose(features, blocks, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("sizes", [[], [0], [2, 0, 3, 1, 4, 4, 4, 1, 2], [0, 0, 2], [1, 0]])
def test_batches_come_back_in_order_and_whole(sizes: list[int], kind: str) -> None:
    given = batches(sizes)
    results = list(stream(engine(lively("resnet18"), "fp32", name=kind), iter(given)))
    for features, original in zip(results, given, strict=True):
        for mine, theirs in zip(features, plain_features(lively("resnet18"), original), strict=True):
            assert mine.shape == theirs.shape
            assert mine.dtype == np.float32
            np.testing.assert_allclose(mine, theirs, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("kind", KINDS)
def test_pixels_need_be_neither_writable_nor_contiguous(kind: str) -> None:
    pixels = batches([8])[0][::2]
    frozen = pixels.copy()
    frozen.flags.writeable = False
    first, second = stream(engine(lively("resnet18"), "fp32", name=kind), [pixels, frozen])
    assert all(np.array_equal(mine, theirs) for mine, theirs in zip(first, second, strict=True))


def test_an_error_of_the_source_reaches_the_reader_after_what_came_before() -> None:
    def source() -> Iterator[np.ndarray]:
        yield from batches([1])
        raise OSError("gone")

    features = stream(engine(lively("resnet18"), "fp32"), source())
    assert len(next(features)) == len(plain_features(lively("resnet18"), batches([1])[0]))
    with pytest.raises(OSError, match="gone"):
        next(features)


@pytest.mark.parametrize("kind", KINDS)
def test_an_engine_leaves_the_network_as_it_was(kind: str) -> None:
    network = tap(lively("timm/test_resnet"), LAYERS)
    before = {key: item.clone() for key, item in network.state_dict().items()}
    list(stream(build_engine(network, resolve(kind, "cpu", "fp32"), 1), batches([1])))
    after = network.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(item, after[key]) for key, item in before.items())


class Loud(nn.Module):
    """Stands for a network on a device whose memory holds two images."""

    def __init__(self, network: nn.Module, room: int) -> None:
        super().__init__()
        self.network, self.room = network, room

    def forward(self, pixels: Tensor) -> tuple[Tensor, ...]:
        if len(pixels) > self.room:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return self.network(pixels)


def test_a_batch_without_memory_is_halved_until_it_fits() -> None:
    (pixels,) = batches([7])
    small = TorchEngine(tap(lively("resnet18"), LAYERS), resolve("torch", "cpu", "fp32"), 7)
    small._call = Loud(small._network, room=2)
    (features,) = stream(small, [pixels])
    for mine, theirs in zip(features, plain_features(lively("resnet18"), pixels), strict=True):
        np.testing.assert_allclose(mine, theirs, rtol=1e-3, atol=1e-3)
    assert [note.rpartition(": ")[2] for note in small.notes] == ["3 from then on", "1 from then on"]
    small._call = Loud(small._network, room=0)
    with pytest.raises(EngineError, match="no memory for one image of resnet18"):
        list(stream(small, [pixels]))


def test_a_compiled_engine_meets_one_shape_only() -> None:
    compiled = TorchEngine(tap(lively("resnet18"), LAYERS), Resolved("compile", "cpu", "fp32"), 4)
    shapes = []

    def call(pixels: Tensor) -> tuple[Tensor, ...]:
        shapes.append(tuple(pixels.shape))
        return compiled._network(pixels)  # what the compiler would make of it takes a minute

    compiled._call = call
    given = batches([4, 1, 3])
    for features, pixels in zip(stream(compiled, given), given, strict=True):
        for mine, theirs in zip(features, plain_features(lively("resnet18"), pixels), strict=True):
            np.testing.assert_allclose(mine, theirs, rtol=1e-3, atol=1e-3)
    assert set(shapes) == {(4, SIDE, SIDE, 3)}


def test_a_compiler_that_fails_without_a_word_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(_: Tensor) -> tuple[Tensor, ...]:
        raise torch._dynamo.exc.TorchDynamoException

    compiled = TorchEngine(tap(lively("resnet18"), ["layer2"]), Resolved("compile", "cpu", "fp32"), 2)
    monkeypatch.setattr(compiled, "_call", fail)
    with pytest.raises(EngineError, match=r"cannot compile resnet18@random:0 \(TorchDynamoException\)"):
        compiled.start(*batches([2]))


@NO_OPENVINO
def test_a_network_that_openvino_cannot_convert_runs_on_torch_and_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise RuntimeError(
            "Check 'false' failed at report.cpp:151:\nModel wasn't converted:\n-- No rule for aten.eigh\n"
        )

    monkeypatch.setattr("pipeline.engines.openvino_engine.convert", fail)
    built = build_engine(tap(lively("resnet18"), ["layer2"]), resolve("openvino", "cpu", "fp32"), 2)
    assert built.resolved == Resolved("torch", "cpu", "fp32")
    whole = "Check 'false' failed at report.cpp:151: Model wasn't converted: -- No rule for aten.eigh"
    assert built.notes == [f"OpenVINO cannot run resnet18@random:0, so torch computes: {whole}"]
    (pixels,) = batches([2])
    ((features,),) = stream(built, [pixels])
    with torch.inference_mode():
        (expected,) = tap(lively("resnet18"), ["layer2"])(torch.from_numpy(pixels))
    np.testing.assert_allclose(features, expected, rtol=1e-3, atol=1e-3)


class Chaotic(nn.Module):
    """The logistic map, which doubles differences at each step: after 60, those of rounding are all that is left."""

    def __init__(self, steps: int) -> None:
        super().__init__()
        self.stem, self.head, self.steps = nn.Conv2d(3, 4, 3, bias=False), nn.Linear(4, 2), steps
        for part in (self.stem, self.head):
            nn.init.normal_(part.weight, generator=torch.Generator().manual_seed(0))

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x).sigmoid()
        for _ in range(self.steps):
            x = 3.99 * x * (1 - x)
        return self.head(x[:, :, 0, 0])


@NO_OPENVINO
@pytest.mark.parametrize(("steps", "runs_on"), [(1, "openvino"), (60, "torch")])
def test_a_network_whose_features_openvino_gives_otherwise_runs_on_torch_and_says_so(steps: int, runs_on: str) -> None:
    module = Chaotic(steps).eval().requires_grad_(requires_grad=False)
    preprocessing = Preprocessing((8, 8), 8, "bilinear", (0.5,) * 3, (0.5,) * 3)
    network = tap(Backbone("toy/chaos", "chaos", "", str(steps), module, preprocessing, ("head",)), ["logits"])
    built = build_engine(network, resolve("openvino", "cpu", "fp32"), 2)
    assert built.resolved.engine == runs_on
    assert all("features of head would differ from torch's by" in note for note in built.notes)
    assert len(built.notes) == (runs_on == "torch")


@pytest.fixture(scope="module")
def conv1() -> openvino.Model:
    """What OpenVINO makes of one layer: tests of what becomes of a converted model share it."""
    if find_spec("openvino") is None:
        pytest.skip("OpenVINO is not installed")
    from pipeline.engines.openvino_engine import convert

    return convert(tap(lively("resnet18"), ["conv1"]), 1)


@pytest.fixture
def conversions(conv1: openvino.Model, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[tuple[str, ...]]:
    """The layers of networks that were converted while `tmp_path` is the user's cache folder."""
    calls: list[tuple[str, ...]] = []

    def shared(network: TappedNetwork, batch_size: int) -> openvino.Model:
        calls.append(network.layers)
        return conv1.clone()

    monkeypatch.setattr("pipeline.engines.openvino_engine.convert", shared)
    monkeypatch.setattr("platformdirs.user_cache_path", lambda _name: tmp_path)
    return calls


@NO_OPENVINO
def test_only_our_own_cache_folder_is_written_in_the_home_directory(
    make_photos: Callable[..., Path], tmp_path: Path
) -> None:
    make_photos(each=1)
    run = (
        "import cli, sys\n"
        "sys.argv = 'thawline extract photos -b test_resnet@random:0 --size 32 -l layer1 --device cpu'.split()\n"
        "cli.main()\n"
        "import matplotlib.font_manager"
    )
    home = tmp_path / "home"
    environment = os.environ | {"PYTHONPATH": str(ROOT), "HOME": str(home), "XDG_CACHE_HOME": ""}
    environment.pop("MPLCONFIGDIR", None)
    home.mkdir()
    done = subprocess.run([sys.executable, "-c", run], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    folders = {path.relative_to(home).parts[:3] for path in home.rglob("*")}
    ours = (".cache", "thawline")
    assert folders == {ours[:1], ours, *((*ours, part) for part in ("openvino", "matplotlib", "weights"))}


@pytest.mark.parametrize("failing", [True, False], ids=["platformdirs fails", "older platformdirs"])
def test_without_a_home_directory_nothing_is_kept(
    conversions: list[tuple[str, ...]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, *, failing: bool
) -> None:
    from pipeline.engines.openvino_engine import converted

    def cache_path(_name: str) -> Path:
        if failing:
            raise RuntimeError("could not determine the home directory")
        return Path("~/.cache/thawline")

    monkeypatch.setattr("platformdirs.user_cache_path", cache_path)
    monkeypatch.chdir(tmp_path)
    _, notes = converted(tap(lively("resnet18"), ["conv1"]), 1)
    assert [note for note in notes if "cannot be kept" in note and "home directory" in note] == notes != []
    assert list(tmp_path.iterdir()) == []


def test_converted_models_are_kept_and_the_least_used_go(
    conversions: list[tuple[str, ...]], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from pipeline.engines.openvino_engine import converted

    monkeypatch.setattr("pipeline.engines.openvino_engine.KEPT", 2)

    def names() -> set[str]:
        return {path.name for path in (tmp_path / "openvino").iterdir()}

    converted(tap(lively("resnet18"), ["conv1"]), 1)
    (first,) = names()
    os.utime(tmp_path / "openvino" / first, (1, 1))
    converted(tap(lively("resnet18"), ["layer1"]), 1)
    (second,) = names() - {first}
    os.utime(tmp_path / "openvino" / second, (2, 2))
    converted(tap(lively("resnet18"), ["conv1"]), 1)
    assert conversions == [("conv1",), ("layer1",)]
    converted(tap(lively("resnet18"), ["layer2"], "max"), 1)
    assert conversions[2:] == [("layer2",)]
    assert first in names()
    assert second not in names()
    assert len(names()) == 2


def test_a_damaged_kept_model_is_converted_again(conversions: list[tuple[str, ...]], tmp_path: Path) -> None:
    import openvino

    from pipeline.engines.openvino_engine import converted

    network, (pixels,) = tap(lively("resnet18"), ["conv1"]), batches([1])

    def check(number: int) -> None:
        model, notes = converted(network, 1)
        assert notes == []
        assert len(conversions) == number
        with torch.inference_mode():
            (expected,) = network(torch.from_numpy(pixels))
        (features,) = openvino.compile_model(model, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})(pixels).values()
        np.testing.assert_allclose(features, expected, rtol=1e-3, atol=1e-3)

    check(1)
    (place,) = (tmp_path / "openvino").iterdir()
    weights = (place / "model.bin").read_bytes()
    (place / "model.bin").write_bytes(bytes(len(weights)))
    check(2)
    assert (place / "model.bin").read_bytes() == weights
    (place / "model.bin").write_bytes(weights[:100])
    (place / "digest").unlink()
    check(3)
    check(3)


def test_a_user_cache_that_cannot_be_written_costs_only_the_next_conversion(
    conversions: list[tuple[str, ...]], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setattr("platformdirs.user_cache_path", lambda _name: tmp_path / "file")
    built = build_engine(tap(lively("resnet18"), ["conv1"]), resolve("openvino", "cpu", "fp32"), 1)
    assert built.resolved.engine == "openvino"
    (note,) = built.notes
    assert "the next run converts it again" in note
    assert "Not a directory" in note


# What a run gets


def test_auto_is_what_the_machine_has(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for bf16, precision in ((True, "bf16"), (False, "fp32")):
        monkeypatch.setattr("pipeline.engines.select.has_bf16", lambda _device, bf16=bf16: bf16)
        resolved = resolve()
        assert (resolved.engine, resolved.device, resolved.precision) == ("openvino", "cpu", precision)
    assert resolve(precision="fp32").precision == "fp32"


def test_auto_takes_cuda_where_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr("pipeline.engines.select.has_bf16", lambda _device: True)
    assert (resolve().engine, resolve().device) == ("torch", "cuda")
    with pytest.raises(EngineError, match=r"openvino.*cuda"):
        resolve("openvino")
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


@pytest.mark.parametrize(("capability", "expected"), [((7, 5), False), ((8, 0), True), ((9, 0), True)])
def test_bf16_counts_from_the_gpus_that_compute_it(
    monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int], expected: bool
) -> None:
    other = {True: (7, 0), False: (9, 0)}[expected]
    devices = {"cuda:1": capability, "cuda:0": other}
    monkeypatch.setattr(torch.cuda, "get_device_capability", devices.__getitem__)
    assert has_bf16("cuda:1") is expected


def test_a_gpu_is_counted_among_those_that_the_process_sees(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3")
    assert [find_device(name) for name in ("auto", "cuda", "cuda:0")] == ["cuda", "cuda", "cuda:0"]
    with pytest.raises(EngineError, match=r"no device cuda:3: .* 1 \(CUDA_VISIBLE_DEVICES is '3'"):
        find_device("cuda:3")


def test_without_openvino_it_cannot_be_asked_for_and_auto_runs_on_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr("pipeline.engines.select.find_spec", lambda _name: None)
    monkeypatch.setitem(sys.modules, "pipeline.engines.openvino_engine", None)
    with pytest.raises(EngineError, match="needs the package openvino"):
        resolve("openvino", "cpu")
    built = build_engine(tap(lively("resnet18"), ["layer2"]), resolve(precision="fp32"), 2)
    assert built.resolved == Resolved("torch", "cpu", "fp32")
    (note,) = built.notes
    assert "torch computes" in note


def test_an_engine_computes_without_tf32_and_leaves_the_setting_as_it_was() -> None:
    convolutions = torch.backends.cudnn.conv
    before = convolutions.fp32_precision
    running = TorchEngine(tap(lively("resnet18"), ["layer2"]), Resolved("torch", "cpu", "fp32"), 2)
    during: list[str] = []

    def call(pixels: Tensor) -> tuple[Tensor, ...]:
        during.append(convolutions.fp32_precision)
        return running._network(pixels)

    running._call = call
    list(stream(running, batches([2])))
    assert (during, convolutions.fp32_precision) == (["ieee"], before)
    assert before != "ieee"


def test_batches_are_larger_on_a_gpu() -> None:
    assert Resolved("torch", "cpu", "fp32").batch_size < Resolved("torch", "cuda:3", "fp32").batch_size


# On a CUDA device


@pytest.mark.gpu
@pytest.mark.parametrize(("precision", "least"), [("bf16", 0.99), ("fp16", 0.99)])
def test_cuda_in_half_precision_is_close_to_the_cpu(precision: str, least: float) -> None:
    given = batches([3, 0, 2, 1])
    results = list(stream(engine(lively("resnet18"), precision, "cuda"), given))
    for features, pixels in zip(results, given, strict=True):
        for mine, theirs in zip(features, plain_features(lively("resnet18"), pixels), strict=True):
            assert mine.shape == theirs.shape
            assert not len(mine) or cosines(mine, theirs).min() > least


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["resnet18", "efficientnet_lite0"])
def test_cuda_in_fp32_is_the_cpu(name: str) -> None:
    given = batches([3, 0, 2, 1, 4, 4])
    results = list(stream(engine(lively(name), "fp32", "cuda"), given))
    for features, pixels in zip(results, given, strict=True):
        for mine, theirs in zip(features, plain_features(lively(name), pixels), strict=True):
            assert mine.shape == theirs.shape
            assert not len(mine) or np.abs(mine - theirs).max() <= 2e-4 * np.abs(theirs).max()  # TF32 is 1e-3 off


@pytest.mark.gpu
def test_a_batch_without_memory_on_a_gpu_is_halved() -> None:
    (pixels,) = batches([64], 224)
    network = tap(load_backbone("resnet18@random:0"), ["layer1"])
    few = TorchEngine(network, Resolved("torch", "cuda", "fp32"), 64)
    (expected,) = (np.concatenate(layer) for layer in zip(*stream(few, np.split(pixels, 16)), strict=True))
    room = torch.cuda.memory_allocated() + 200 * 2**20  # the first convolution alone gives 196 MiB for 64 images
    torch.cuda.empty_cache()
    torch.cuda.set_per_process_memory_fraction(room / torch.cuda.get_device_properties(0).total_memory)
    try:
        ((features,),) = stream(few, [pixels])
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert few.notes[0] == "batches of 64 images do not fit into cuda: 32 from then on"
    np.testing.assert_allclose(features, expected, rtol=1e-3, atol=1e-3 * np.abs(expected).max())
