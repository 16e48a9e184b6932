"""What the names of backbones stand for on this machine, noted when they are loaded; nothing here imports torch.

The file behind a tag may be replaced: in torch's hub folder, in the Hugging Face cache, in a package. So a request is
answered from a cache without its network only while the files that were behind its name are as they were.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

from features_cache import atomic_write
from pipeline.provenance import installed_version
from pipeline.spec import Size, fingerprint_of, parse_size
from pipeline.user_folder import user_folder

_LIBRARIES = ("thawline", "torch", "torchvision", "timm")
_PLACES = ("HOME", "XDG_CACHE_HOME", "TORCH_HOME", "HF_HOME", "HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE")
"""Environment variables that say where the libraries look for weights."""

Stamp = list[Any]
"""Path of a file, its size in bytes, its times of modification and change in ns; the path alone if it is missing."""


class Known(NamedTuple):
    """What `pipeline.backbones.registry.load_backbone` found.

    The digest of the weights, how many classifiers, and the fields of the preprocessing except `white`, which the
    caller chooses.
    """

    weights_digest: str
    heads: int
    preprocessing: dict[str, Any]


def take_stamps(paths: Iterable[Path]) -> list[Stamp]:
    """Return a stamp of each path, which differs once the file is another one."""
    return [_stamp(path) for path in paths]


def _stamp(path: Path) -> Stamp:
    try:
        status = path.stat()
    except OSError:
        return [str(path)]
    return [str(path), status.st_size, status.st_mtime_ns, status.st_ctime_ns]


def remember(name: str, size: Size | None, stamps: list[Stamp], known: Known) -> None:
    """Note what `name` stands for with the input size `size`, as long as `stamps` and the libraries stay the same.

    Without a folder to note it in, the next request loads the network again.
    """
    record = {"setting": _setting(), "stamps": stamps, **known._asdict()}
    if _read(name, size) != record:
        with suppress(OSError, RuntimeError):
            path = _path(name, size)
            path.parent.mkdir(parents=True, exist_ok=True)
            with atomic_write(path) as draft:
                draft.write_text(json.dumps(record))


def recall(name: str, size: Size | None) -> Known | None:
    """Return what `name` stands for; None if it must be loaded to find out."""
    record = _read(name, size)
    try:
        present = {"setting": _setting(), "stamps": [_stamp(Path(stamp[0])) for stamp in record["stamps"]]}
        known = Known(record["weights_digest"], record["heads"], record["preprocessing"])
        return known if present.items() <= record.items() else None
    except (AttributeError, KeyError, TypeError, IndexError):  # never written, or not by this version
        return None


def _read(name: str, size: Size | None) -> Any:
    try:
        return json.loads(_path(name, size).read_bytes())
    except (OSError, ValueError, RuntimeError):
        return {}


def _path(name: str, size: Size | None) -> Path:
    start = str(Path.cwd()) if name.startswith("local-dir:") else ""  # its path may be relative
    return user_folder("weights") / f"{fingerprint_of([name, parse_size(size), start])}.json"


def _setting() -> dict[str, str]:
    return {name: installed_version(name) for name in _LIBRARIES} | {name: os.environ.get(name, "") for name in _PLACES}
