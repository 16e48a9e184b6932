"""With what a run was computed."""

from __future__ import annotations

import os
import platform
import sys
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

PACKAGES = (
    "thawline", "torch", "torchvision", "timm", "openvino", "scikit-learn", "numpy", "pillow", "h5py",
)  # fmt: skip


def installed_version(package: str) -> str:
    """Return the version of an installed package, ``"none"`` for one that is not installed.

    thawline itself has none where it runs from a checkout.
    """
    try:
        return version(package)
    except PackageNotFoundError:
        return "none"


def versions() -> dict[str, str]:
    """Return the versions of all packages that have a part in the results."""
    return {name: installed_version(name) for name in PACKAGES}


def machine() -> dict[str, Any]:
    """Return what a reader needs to repeat a run: time, command, hardware, system and versions."""
    return {
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": " ".join(sys.argv),
        "cpu": _cpu(),
        "cores": os.cpu_count(),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "system": platform.platform(),
        "python": platform.python_version(),
        "versions": versions(),
    }


def _cpu() -> str:
    """Return the processor's name as Linux knows it, else as Python does."""
    listing = Path("/proc/cpuinfo")
    lines = listing.read_text().splitlines() if listing.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()
