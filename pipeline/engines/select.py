"""Which engine, device and precision: what was asked against what this machine has."""

from __future__ import annotations

import os
from dataclasses import dataclass
from importlib.util import find_spec

import torch

from features_cache import nearest
from pipeline.errors import EngineError
from pipeline.spec import ENGINES, PRECISIONS

BATCH_SIZES = {"cpu": 8, "cuda": 128}
"""Images in a batch by default. On a CPU small batches stay in its cache (8 measured best); 128 on CUDA is not measured
yet."""


@dataclass(frozen=True)
class Resolved:
    """How features are computed: no part is ``auto``, and `device` is ``cpu``, ``cuda`` or ``cuda:INDEX``."""

    engine: str
    device: str
    precision: str

    @property
    def device_kind(self) -> str:
        """The device without its index: ``"cpu"`` or ``"cuda"``."""
        return self.device.partition(":")[0]

    @property
    def batch_size(self) -> int:
        """Images a batch that suit the device."""
        return BATCH_SIZES[self.device_kind]


def resolve(engine: str = "auto", device: str = "auto", precision: str = "auto") -> Resolved:
    """Choose what is ``auto``, and raise `EngineError` for what this machine does not have.

    The engine ``auto`` is OpenVINO on a CPU (torch, with a note, where it is not installed) and torch on CUDA. The
    device ``auto`` is CUDA where there is a device. The precision ``auto`` is bf16 where the hardware computes it, else
    fp32.
    """
    for kind, value, known in (("engine", engine, ENGINES), ("precision", precision, PRECISIONS)):
        if value not in known:
            raise EngineError(f"unknown {kind} '{value}'{nearest(value, known)}; expected one of {', '.join(known)}")
    found = find_device(device)
    if precision == "auto":
        precision = "bf16" if has_bf16(found) else "fp32"
    elif not computes(found, precision):
        raise EngineError(f"this machine's {found} does not compute {precision}; use fp32 (or auto)")
    if engine == "openvino" and found != "cpu":
        raise EngineError(f"engine 'openvino' runs on a CPU, not on {found}; use device 'cpu' or engine 'torch'")
    if engine == "openvino" and find_spec("openvino") is None:
        raise EngineError("engine 'openvino' needs the package openvino; install it, or use engine 'torch'")
    if engine == "auto":
        engine = "openvino" if found == "cpu" else "torch"
    return Resolved(engine, found, precision)


def find_device(device: str) -> str:
    """Return the device that is meant, or raise `EngineError`: ``auto`` is CUDA where there is one.

    ``cuda`` is the first device that this process sees, and ``cuda:INDEX`` counts among those: with
    ``CUDA_VISIBLE_DEVICES=3`` there is ``cuda:0`` alone.
    """
    if device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    kind, colon, index = device.partition(":")
    if device == "cpu":
        return device
    if kind != "cuda" or (colon and not index.isdecimal()):
        raise EngineError(f"unknown device '{device}'; expected cpu, cuda, cuda:INDEX or auto")
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if int(index or 0) >= count:
        visible = os.environ.get("CUDA_VISIBLE_DEVICES")
        among = "" if visible is None else f" (CUDA_VISIBLE_DEVICES is '{visible}', and they are counted from 0)"
        raise EngineError(f"no device {device}: CUDA devices that torch sees here: {count}{among}; use cpu (or auto)")
    return device


def computes(device: str, precision: str) -> bool:
    """Tell whether `device` computes in `precision`: fp16 is for CUDA devices only, bf16 for hardware that has it."""
    if precision == "bf16":
        return has_bf16(device)
    return precision == "fp32" or device != "cpu"


def has_bf16(device: str) -> bool:
    """Tell whether `device` computes bf16 in hardware, where it is faster than fp32 and not merely emulated."""
    if device == "cpu":
        # torch's own queries, the ones that its compiler relies on.
        return bool(torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())
    major, _ = torch.cuda.get_device_capability(device)  # torch.cuda.is_bf16_supported asks only the current device
    return major >= 8
