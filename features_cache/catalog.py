"""Find the right file in a folder of cache files."""

from __future__ import annotations

import copy
import hashlib
import re
import unicodedata
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from features_cache.errors import AmbiguousCacheError, CacheError, nearest
from features_cache.layout import DONE
from features_cache.reader import CacheFile, open_cache

_SUPERSEDED = re.compile(r"(.+)\.superseded-(\d+)\.h5", re.DOTALL)


class Catalog:
    """The cache files of a folder, or a single one.

    Parameters
    ----------
    path : str or Path
        A folder, or one file of it.

    Attributes
    ----------
    files : list of CacheFile
        Sorted by name, without superseded files.
    problems : list of CacheError
        One for each unusable ``.h5`` file of a folder. A single unusable file raises instead.

    Raises
    ------
    CacheError
        There is nothing at `path`, or no usable cache file in it.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.files: list[CacheFile] = []
        self.problems: list[CacheError] = []
        if not self.path.is_dir():
            self.files = [open_cache(self.path)]
            return
        for file in sorted(path for path in self.path.glob("*.h5") if not is_superseded(path)):
            try:
                self.files.append(open_cache(file))
            except CacheError as error:
                self.problems.append(error)
        if not self.files:
            why = str(self.problems[0]) if self.problems else "it holds no cache file (.h5)"
            raise CacheError(f"no cache in {self.path}: {why}; run the extraction with this folder as its output")

    def only(self, files: Sequence[CacheFile]) -> Catalog:
        """Return a catalog of some of the files."""
        catalog = copy.copy(self)
        catalog.files = list(files)
        return catalog

    def find(
        self, layer: str | None = None, source: str | None = None, backbone: str | None = None, pool: str | None = None
    ) -> CacheFile:
        """Return the one file that matches every argument that is not ``None``.

        Files with equal handles and an equal fingerprint for `layer` are equivalent; the one with the most finished
        rows is returned.

        Parameters
        ----------
        layer : str, optional
            Name of a layer that the file must hold.
        source, backbone, pool : str, optional
            As for `fitting`.

        Raises
        ------
        CacheError
            No file matches; the message lists what exists.
        AmbiguousCacheError
            Several match; the message lists them.
        """
        fitting = self.fitting(source, backbone, pool)
        if layer is not None:
            fitting = self._narrow(fitting, "layer", layer, [set(file.layers) for file in fitting])
            if self.is_one_cache(fitting) and len({file.layers[layer].fingerprint for file in fitting}) == 1:
                return max(fitting, key=lambda file: np.count_nonzero(file.states == DONE))
        if len(fitting) > 1:
            raise self.ambiguous(fitting)
        return fitting[0]

    def fitting(
        self, source: str | None = None, backbone: str | None = None, pool: str | None = None
    ) -> list[CacheFile]:
        """Return all files that match every argument that is not ``None``; at least one.

        Parameters
        ----------
        source : str, optional
            Name or location of the source.
        backbone, pool : str, optional
            Handles of the file.

        Raises
        ------
        CacheError
            No file matches; the message lists what exists.
        """
        fitting = self.files
        for key, wanted in {"source": source, "backbone": backbone, "pool": pool}.items():
            if wanted is not None:
                keys = (key, "location") if key == "source" else (key,)
                offered = [{file.handles.get(key, "") for key in keys} for file in fitting]
                fitting = self._narrow(fitting, key, wanted, offered)
        return fitting

    def is_one_cache(self, files: Sequence[CacheFile]) -> bool:
        """Return whether `files` share source, backbone and pooling, so that they can be read as one cache."""
        return len({tuple(sorted(file.handles.items())) for file in files}) == 1

    def ambiguous(self, files: Sequence[CacheFile]) -> AmbiguousCacheError:
        """Return the error for several matching `files`: it lists them and says how to choose."""
        shared = sorted(set.intersection(*(set(file.layers) for file in files)))
        choices = {tuple(file.handles.get(key) for key in ("source", "location", "backbone", "pool")) for file in files}
        told, way = [file.handles for file in files], "name the source, backbone, layer or pooling"
        if shared and len(choices) == 1:
            told = _differences([file.layers[shared[0]].spec for file in files])
            way = "name one of them instead of the folder"
        listed = "; ".join(_described(file, what) for file, what in zip(files, told, strict=True))
        return AmbiguousCacheError(f"{len(files)} files of {self.path} match where one was expected; {way}: {listed}")

    def _narrow(
        self, files: Sequence[CacheFile], key: str, wanted: str, offered: Sequence[set[str]]
    ) -> list[CacheFile]:
        fitting = [file for file, names in zip(files, offered, strict=True) if wanted in names]
        if not fitting:
            known = list(dict.fromkeys(name for names in offered for name in sorted(names)))
            raise CacheError(f"{self.path} has no {key} {wanted}; it has {', '.join(known)}{nearest(wanted, known)}")
        return fitting


def is_superseded(path: Path) -> bool:
    """Return whether the name marks a file that a newer one, made for a changed source, has replaced."""
    return _SUPERSEDED.fullmatch(path.name) is not None


def superseded_files(path: Path) -> dict[int, Path]:
    """Return the superseded versions of `path` by number, oldest first; `path` itself need not exist."""
    matches = [(other, _SUPERSEDED.fullmatch(other.name)) for other in path.parent.glob("*.superseded-*.h5")]
    return dict(sorted((int(match[2]), other) for other, match in matches if match and match[1] == path.stem))


def _described(file: CacheFile, what: Mapping[str, Any]) -> str:
    facts = {**what, "layers": ", ".join(file.layers)}
    return f"{file.path.name} ({', '.join(f'{key} {value}' for key, value in facts.items())})"


def _differences(specs: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return, for each spec, the fields in which the specs differ: ``{"precision": "bf16", ...}``."""
    flat = []
    for spec in specs:
        parts = [(key, value if isinstance(value, dict) else {"": value}) for key, value in spec.items()]
        flat.append({f"{key}.{name}".rstrip("."): item for key, inner in parts for name, item in inner.items()})
    keys = dict.fromkeys(key for one in flat for key in one)
    differing = [key for key in keys if any(one.get(key) != flat[0].get(key) for one in flat)]
    return [{key: one.get(key) for key in differing} for one in flat]


def file_name(source: str, backbone: str, key: str) -> str:
    """Return ``SOURCE-BACKBONE-HASH8.h5``, using only characters that every file system accepts.

    Parameters
    ----------
    source, backbone : str
        Handles. Characters other than letters, digits, ``.``, ``_``, ``+`` and ``@`` become ``_``; long names are cut.
    key : str
        Identifies the file; HASH8 is its digest.
    """
    digest = hashlib.blake2b(key.encode(), digest_size=4).hexdigest()
    return f"{_safe(source)}-{_safe(backbone)}-{digest}.h5"


def _safe(name: str) -> str:
    text = re.sub(r"[^\w.+@-]", "_", unicodedata.normalize("NFC", name))
    return text.encode()[:80].decode("utf-8", "ignore").strip(".-") or "_"
