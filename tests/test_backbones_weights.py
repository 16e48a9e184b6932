from __future__ import annotations

import os
import pickle
from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import Tensor, nn

from pipeline.backbones.registry import load
from pipeline.backbones.weights import read_state_dict, weights_digest
from pipeline.errors import BackboneError


def state(seed: int = 3) -> dict[str, Tensor]:
    return {key: item.clone() for key, item in load(f"resnet18@random:{seed}").module.state_dict().items()}


def assert_same(first: dict[str, Tensor], second: dict[str, Tensor]) -> None:
    assert first.keys() == second.keys()
    assert all(torch.equal(first[key], second[key]) for key in first)


def test_a_seed_makes_the_weights_and_disturbs_nobody() -> None:
    torch.manual_seed(11)
    expected = torch.rand(4)
    torch.manual_seed(11)
    first, again, other = (load(f"resnet18@random:{seed}") for seed in (0, 0, 1))
    assert torch.equal(torch.rand(4), expected)
    assert_same(first.module.state_dict(), again.module.state_dict())
    assert first.weights_digest == again.weights_digest != other.weights_digest
    assert first.weights == "random:0"
    assert first.handle == "resnet18@random:0"


@pytest.mark.parametrize("weights", ["random", "random:", "random:-1", "random:x", "random:1234567890"])
def test_a_seed_must_be_a_number(weights: str) -> None:
    with pytest.raises(BackboneError, match=r"seed.*random:0"):
        load(f"resnet18@{weights}")


@pytest.mark.parametrize("suffix", [".safetensors", ".pth", ".pt"])
@pytest.mark.parametrize("wrapping", ["plain", "module.", "state_dict", "model"])
def test_weights_come_from_a_file(tmp_path: Path, suffix: str, wrapping: str) -> None:
    given = expected = state()
    path = tmp_path / f"mine{suffix}"
    if wrapping == "module.":
        given = {f"module.{key}": item for key, item in expected.items()}
    if suffix == ".safetensors":
        if wrapping in ("state_dict", "model"):
            pytest.skip("a .safetensors file nests nothing")
        safetensors.torch.save_file(given, path)
    else:
        torch.save({wrapping: given, "epoch": 7} if wrapping in ("state_dict", "model") else given, path)
    backbone = load(f"resnet18@{path}")
    assert_same(backbone.module.state_dict(), expected)
    assert backbone.weights == path.name
    assert backbone.weights_digest == load("resnet18@random:3").weights_digest
    assert not backbone.module.training
    assert not any(item.requires_grad for item in backbone.module.parameters())


def test_another_number_of_classes_is_understood(tmp_path: Path) -> None:
    given = state()
    given["fc.weight"], given["fc.bias"] = torch.ones(7, 512), torch.ones(7)
    safetensors.torch.save_file(given, path := tmp_path / "seven.safetensors")
    assert load(f"resnet18@{path}").module.fc.out_features == 7


def test_batch_counters_and_auxiliary_heads_may_differ(tmp_path: Path) -> None:
    given = {key: item for key, item in state().items() if "num_batches" not in key}
    torch.save(given | {"aux1.fc.weight": torch.ones(2)}, path := tmp_path / "old.pth")
    assert load(f"resnet18@{path}").weights_digest == load("resnet18@random:3").weights_digest


def test_half_precision_weights_become_float32(tmp_path: Path) -> None:
    halves = {key: item.half() if item.is_floating_point() else item for key, item in state().items()}
    safetensors.torch.save_file(halves, path := tmp_path / "half.safetensors")
    module = load(f"resnet18@{path}").module
    assert {item.dtype for item in module.parameters()} == {torch.float32}
    assert torch.equal(module.conv1.weight, halves["conv1.weight"].float())


def test_what_does_not_fit_is_named(tmp_path: Path) -> None:
    given = state()
    del given["layer1.0.conv1.weight"]
    given["layer9.weight"] = torch.ones(2)
    given["conv1.weight"] = torch.ones(64, 1, 7, 7)
    torch.save(given, path := tmp_path / "odd.pth")
    with pytest.raises(BackboneError) as caught:
        load(f"resnet18@{path}")
    message = str(caught.value)
    assert "odd.pth for resnet18 does not fit" in message
    assert "missing: layer1.0.conv1.weight" in message
    assert "unexpected: layer9.weight" in message
    assert "conv1.weight (64, 1, 7, 7) for (64, 3, 7, 7)" in message
    assert "\n" not in message


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
        load(f"resnet18@{path}")
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


def test_a_missing_file_says_what_was_expected(tmp_path: Path) -> None:
    with pytest.raises(BackboneError, match=r"gone\.pth.*expected a \.safetensors"):
        load(f"resnet18@{tmp_path / 'gone.pth'}")


def test_the_digest_is_of_names_shapes_types_and_values() -> None:
    def digest(**tensors: Tensor) -> str:
        module = nn.Module()
        for name, tensor in tensors.items():
            module.register_buffer(name, tensor)
        return weights_digest(module)

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


def test_the_digest_leaves_out_batch_counters() -> None:
    norm = nn.Sequential(OrderedDict(norm=nn.BatchNorm2d(2)))
    before = weights_digest(norm)
    norm.norm.num_batches_tracked += 5
    assert weights_digest(norm) == before
