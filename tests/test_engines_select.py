from __future__ import annotations

import pytest
import torch

from pipeline.engines import select
from pipeline.engines.select import Resolved, resolve
from pipeline.errors import EngineError


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """A machine with one CUDA device and no bf16 anywhere; tests change it."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: including_emulation)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False)
    return monkeypatch


@pytest.mark.parametrize(
    ("asked", "resolved"),
    [
        (("auto", "auto", "auto"), Resolved("torch", "cuda", "fp32")),
        (("torch", "cpu", "auto"), Resolved("torch", "cpu", "fp32")),
        (("torch", "cpu", "fp32"), Resolved("torch", "cpu", "fp32")),
        (("auto", "cuda:0", "fp16"), Resolved("torch", "cuda:0", "fp16")),
    ],
)
def test_what_is_auto_is_chosen(machine: pytest.MonkeyPatch, asked: tuple[str, str, str], resolved: Resolved) -> None:
    assert resolve(*asked) == resolved


@pytest.mark.parametrize("query", ["_is_avx512_bf16_supported", "_is_amx_tile_supported"])
def test_bf16_is_chosen_where_the_cpu_has_it(machine: pytest.MonkeyPatch, query: str) -> None:
    machine.setattr(torch.cpu, query, lambda: True)
    assert resolve(device="cpu").precision == "bf16"
    assert resolve(device="cpu", precision="bf16").precision == "bf16"
    assert resolve(device="cuda").precision == "fp32"


def test_bf16_is_chosen_where_the_gpu_has_it_and_the_cpu_where_there_is_no_gpu(machine: pytest.MonkeyPatch) -> None:
    machine.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: True)
    assert resolve() == Resolved("torch", "cuda", "bf16")
    machine.setattr(torch.cuda, "is_available", lambda: False)
    assert resolve() == Resolved("torch", "cpu", "fp32")


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        (("tensorflow", "auto", "auto"), "unknown engine 'tensorflow'; expected one of auto, torch"),
        (("torhc", "auto", "auto"), r"unknown engine 'torhc'; did you mean torch\?"),
        (("auto", "gpu", "auto"), "unknown device 'gpu'; expected cpu, cuda, cuda:INDEX or auto"),
        (("auto", "cuda:x", "auto"), "unknown device 'cuda:x'"),
        (("auto", "cuda:1", "auto"), "no device cuda:1: torch sees 1 CUDA devices here; use cpu"),
        (("auto", "auto", "bf61"), r"unknown precision 'bf61'; did you mean bf16.*; expected one of auto, fp32"),
        (("auto", "cpu", "bf16"), "this machine's cpu does not compute bf16; use fp32"),
        (("auto", "cuda", "bf16"), "this machine's cuda does not compute bf16; use fp32"),
        (("auto", "cpu", "fp16"), "fp16 is for CUDA devices only; on a CPU use fp32 or bf16"),
    ],
)
def test_what_the_machine_lacks_is_refused(
    machine: pytest.MonkeyPatch, asked: tuple[str, str, str], message: str
) -> None:
    with pytest.raises(EngineError, match=message) as caught:
        resolve(*asked)
    assert "\n" not in str(caught.value)


def test_cuda_is_refused_without_a_device(machine: pytest.MonkeyPatch) -> None:
    machine.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(EngineError, match="no device cuda: torch sees 0 CUDA devices here"):
        resolve(device="cuda")


def test_every_device_has_a_batch_size() -> None:
    assert {Resolved("torch", device, "fp32").batch_size for device in ("cpu", "cuda", "cuda:3")} == set(
        select.BATCH_SIZES.values()
    )
