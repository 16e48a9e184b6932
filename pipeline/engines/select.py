"""Which engine, device and precision this machine has, and which of them a run gets."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from features_cache import nearest
from pipeline.errors import EngineError

ENGINES = ("torch",)


@dataclass(frozen=True)
class Resolved:
    """What a run computes with; none of the three is ``"auto"`` any more."""

    engine: str
    device: str
    precision: str


def resolve(engine: str = "auto", device: str = "auto", precision: str = "auto") -> Resolved:
    """Choose what was left open and check what was not.

    Parameters
    ----------
    engine : {"auto", "torch"}
        What computes.
    device : str, default "auto"
        ``"cpu"``, ``"cuda"``, ``"cuda:N"``; auto takes CUDA where there is a device.
    precision : {"auto", "fp32", "bf16", "fp16"}
        auto takes bf16 where the hardware computes it, else fp32.

    Raises
    ------
    EngineError
        There is no such engine or device here, or it lacks the precision.
    """
    if engine not in ("auto", *ENGINES):
        raise EngineError(f"no engine named {engine!r}; there is {', '.join(ENGINES)}{nearest(engine, ENGINES)}")
    found = _device(device)
    has_bf16 = _has_bf16(found)
    if precision == "auto":
        precision = "bf16" if has_bf16 else "fp32"
    if precision == "bf16" and not has_bf16:
        raise EngineError(f"{found} does not compute bf16; use --precision fp32")
    if precision == "fp16" and found.type != "cuda":
        raise EngineError(f"fp16 needs a CUDA device and this run is on {found}; use --precision fp32 or bf16")
    return Resolved("torch", str(found), precision)


def _device(name: str) -> torch.device:
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise EngineError(f"no device named {name!r}; expected auto, cpu, cuda or cuda:N") from None
    count = torch.cuda.device_count()
    if device.type not in ("cpu", "cuda") or (device.type == "cuda" and (device.index or 0) >= count):
        raise EngineError(f"device {name} is not here; there is cpu{''.join(f', cuda:{i}' for i in range(count))}")
    return device


def _has_bf16(device: torch.device) -> bool:
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return bool(torch.cpu.get_capabilities().get("avx512_bf16") or torch.cpu.get_capabilities().get("amx_bf16"))
