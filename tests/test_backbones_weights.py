from __future__ import annotations

import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
import torchvision
from torch import Tensor, nn

from pipeline.backbones.registry import load_backbone
from pipeline.backbones.taps import tap
from pipeline.backbones.weights import check_finite, read_state_dict, weights_digest
from pipeline.errors import BackboneError


def state(seed: int = 3) -> dict[str, Tensor]:
    return {key: item.clone() for key, item in load_backbone(f"resnet18@random:{seed}").module.state_dict().items()}


def test_half_precision_weights_become_float32(tmp_path: Path) -> None:
    halves = {key: item.half() if item.is_floating_point() else item for key, item in state().items()}
    safetensors.torch.save_file(halves, path := tmp_path / "half.safetensors")
    module = load_backbone(f"resnet18@{path}").module
    assert {item.dtype for item in module.parameters()} == {torch.float32}
    assert torch.equal(module.conv1.weight, halves["conv1.weight"].float())


def renamed(prefix: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {prefix + name: item for name, item in tensors.items()}


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("ddp.pth", lambda own: renamed("module.", own)),
        ("compiled.pt", lambda own: renamed("_orig_mod.module.", own)),
        (
            "lightning.ckpt",
            lambda own: {"state_dict": renamed("model._orig_mod.", own), "epoch": 3, "loops": {"a": {}}},
        ),
        (
            "trainer.pth.tar",
            lambda own: {"state_dict": renamed("module.", own), "optimizer": {"state": {0: {"step": own["fc.bias"]}}}},
        ),
        ("pytorch_model.bin", lambda own: own),
        ("averaged.pth", lambda own: renamed("module.", own) | {"n_averaged": torch.tensor(5)}),
        (
            "lossy.pth",
            lambda own: renamed("encoder.", own) | {"loss.weight": torch.ones(5), "fc.weight": torch.ones(2)},
        ),
        ("ema.pth", lambda own: {"model": {name: item + 1 for name, item in own.items()}, "model_ema": own}),
        (
            "dino.pth",
            lambda own: {
                "student": renamed("module.backbone.", {name: item + 1 for name, item in own.items()}),
                "teacher": renamed("backbone.", own) | {"head.mlp.weight": torch.ones(2)},
            },
        ),
    ],
)
def test_checkpoints_of_trainers_load(
    tmp_path: Path, name: str, content: Callable[[dict[str, Tensor]], dict[str, Any]]
) -> None:
    own = state()
    torch.save(content(own), path := tmp_path / name)
    assert load_backbone(f"resnet18@{path}").weights_digest == weights_digest(own)


def test_a_checkpoint_of_two_equal_networks_is_refused(tmp_path: Path) -> None:
    own = state()
    torch.save(renamed("encoder_q.", own) | renamed("encoder_k.", own), path := tmp_path / "moco.pth")
    with pytest.raises(
        BackboneError, match=r"holds the weights of several networks \(encoder_q\., encoder_k\.\); save"
    ):
        load_backbone(f"resnet18@{path}")


def test_without_a_classifier_its_input_is_the_last_layer(tmp_path: Path) -> None:
    own = {name: item for name, item in state().items() if not name.startswith("fc.")}
    torch.save(own, path := tmp_path / "headless.pth")
    network = tap(load_backbone(f"resnet18@{path}"), ["penultimate", "logits"])
    plain = torchvision.models.resnet18()
    plain.fc = nn.Identity()
    plain.load_state_dict(own)
    pixels = torch.randint(0, 256, (2, 224, 224, 3), dtype=torch.uint8)
    images = pixels.permute(0, 3, 1, 2) * network.scale + network.shift
    with torch.inference_mode():
        wanted = plain.eval()(images)
        for features in network(pixels):
            torch.testing.assert_close(features, wanted)


def test_a_checkpoint_that_contains_itself_ends(tmp_path: Path) -> None:
    content: dict[str, Any] = {"epoch": 1}
    content["self"] = content
    torch.save(content, path := tmp_path / "loop.pth")
    with pytest.raises(BackboneError, match="holds no state dict"):
        read_state_dict(path)


def test_what_does_not_fit_is_named(tmp_path: Path) -> None:
    given = state()
    del given["layer1.0.conv1.weight"]
    given["layer9.weight"] = torch.ones(2)
    given["conv1.weight"] = torch.ones(64, 1, 7, 7)
    torch.save(given, path := tmp_path / "odd.pth")
    with pytest.raises(BackboneError) as caught:
        load_backbone(f"resnet18@{path}")
    message = str(caught.value)
    assert "odd.pth for resnet18 does not fit" in message
    assert "missing: layer1.0.conv1.weight" in message
    assert "unexpected: layer9.weight" in message
    assert "conv1.weight (64, 1, 7, 7) for (64, 3, 7, 7)" in message
    assert "\n" not in message


@pytest.mark.parametrize(
    ("name", "bad", "count"), [("layer1.0.conv1.weight", float("nan"), 9), ("bn1.running_var", float("inf"), 1)]
)
def test_weights_that_are_no_numbers_are_refused(tmp_path: Path, name: str, bad: float, count: int) -> None:
    given = state()
    given[name].view(-1)[:count] = bad
    given["fc.bias"][0] = -float("inf")
    torch.save(given, path := tmp_path / "diverged.pth")
    message = f"diverged.pth holds {count + 1} NaN or infinite weights, first in {name}, as training that diverged"
    with pytest.raises(BackboneError, match=message):
        load_backbone(f"resnet18@{path}")


def test_infinite_bounds_are_weights_like_others() -> None:
    module = nn.Linear(2, 3)
    module.register_buffer("upper", torch.tensor(float("inf")))
    check_finite(module, "bounds")
    module.upper.fill_(float("nan"))
    with pytest.raises(BackboneError, match="bounds holds 1 NaN or infinite weights, first in upper"):
        check_finite(module, "bounds")


class Attack:
    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.target),)


@pytest.mark.parametrize("saved_by", ["torch", "pickle"])
def test_a_file_that_would_run_code_is_refused_and_runs_none(tmp_path: Path, saved_by: str) -> None:
    path, trace = tmp_path / "evil.pth", tmp_path / "was-here"
    content = {"conv1.weight": Attack(trace)}
    if saved_by == "torch":
        torch.save(content, path)
    else:
        path.write_bytes(pickle.dumps(content))
    with pytest.raises(BackboneError, match=r"evil\.pth"):
        load_backbone(f"resnet18@{path}")
    assert not trace.exists()


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("empty.pth", b""),
        ("text.pth", b"hello, this is text"),
        ("zip.pth", b"PK\3\4 not a zip"),
        ("text.safetensors", b"hello, this is text and not a header"),
        ("empty.safetensors", b""),
    ],
)
def test_a_damaged_file_is_named(tmp_path: Path, name: str, content: bytes) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(BackboneError, match=name) as caught:
        read_state_dict(tmp_path / name)
    assert "\n" not in str(caught.value)


def test_a_truncated_file_is_named(tmp_path: Path) -> None:
    torch.save(state(), path := tmp_path / "cut.pth")
    path.write_bytes(path.read_bytes()[:100_000])
    with pytest.raises(BackboneError, match=r"cut\.pth"):
        read_state_dict(path)


@pytest.mark.parametrize("content", [[1, 2], {}, {"lr": 0.1}, torch.ones(3)])
def test_what_is_no_state_dict_is_refused(tmp_path: Path, content: Any) -> None:
    torch.save(content, path := tmp_path / "no.pth")
    with pytest.raises(BackboneError, match="state dict"):
        read_state_dict(path)


def test_the_digest_is_of_names_shapes_types_and_values() -> None:
    def digest(**tensors: Tensor) -> str:
        module = nn.Module()
        for name, tensor in tensors.items():
            module.register_buffer(name, tensor)
        return weights_digest(module.state_dict())

    base = digest(a=torch.zeros(2, 3), b=torch.ones(1))
    assert base == digest(b=torch.ones(1), a=torch.zeros(2, 3))
    different = [
        digest(a=torch.zeros(3, 2), b=torch.ones(1)),
        digest(a=torch.zeros(2, 3, dtype=torch.int32), b=torch.ones(1)),
        digest(a=torch.zeros(2, 3), c=torch.ones(1)),
        digest(a=torch.zeros(2, 3), b=torch.full((1,), 1.0000001)),
        digest(a=torch.zeros(2, 3)),
    ]
    assert len({base, *different}) == 6


def test_the_digest_leaves_out_counters() -> None:
    module = nn.Sequential(nn.Conv2d(2, 3, 1), nn.BatchNorm2d(3))
    digest = weights_digest(module.state_dict())
    module[1].num_batches_tracked += 1
    assert weights_digest(module.state_dict()) == digest
    module[1].running_var[0] += 1e-6
    assert weights_digest(module.state_dict()) != digest
