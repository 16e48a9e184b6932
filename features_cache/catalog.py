"""Find the right file in a folder of cache files."""

from __future__ import annotations

import copy
import hashlib
import re
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from features_cache.errors import AmbiguousCacheError, CacheError, explained, nearest
from features_cache.parts import PLAN_SUFFIX, plan_of
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
        Sorted by name, without superseded files. A cache in parts is one of them.
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
        self._agreeing: set[tuple[str, ...]] = set()  # sources whose files agree
        self.problems: list[CacheError] = []
        with explained(self.path, "read"):
            is_folder = self.path.is_dir()
        if not is_folder:
            self.files = [open_cache(self.path)]
            return
        files = [path for path in self.path.glob("*.h5") if not is_superseded(path)]
        for file in sorted([*files, *self.path.glob(f"*{PLAN_SUFFIX}")]):
            plan = plan_of(file)
            try:
                if plan is None:
                    self.files.append(open_cache(file))
                elif not plan.exists():
                    raise CacheError(f"{file} is a part of {plan.name}, which is missing; restore it, or extract again")
            except CacheError as error:
                self.problems.append(error)
        if not self.files:
            why = str(self.problems[0]) if self.problems else "it holds no cache file (.h5)"
            raise CacheError(f"no cache in {self.path}: {why}; run the extraction with this folder as its output")

    def only(self, files: Iterable[CacheFile]) -> Catalog:
        """Return a catalog of some of the files."""
        catalog = copy.copy(self)
        catalog.files, catalog._agreeing = list(files), set()
        return catalog

    def find(
        self, layer: str | None = None, source: str | None = None, backbone: str | None = None, pool: str | None = None
    ) -> CacheFile:
        """Return the one file that matches every argument that is not ``None``.

        Parameters
        ----------
        layer : str, optional
            Name of a layer that the file must hold.
        source, backbone, pool : str, optional
            As for `fitting`.

        Raises
        ------
        CacheError
            No file matches; the message lists what exists. Or `check_source` refuses the file.
        AmbiguousCacheError
            Several match; the message lists them.
        """
        fitting = self.fitting(source, backbone, pool)
        if layer is not None:
            fitting = self._narrow(fitting, "layer", layer, [set(file.layers) for file in fitting])
            check_twins(fitting, layer)
        if len(fitting) > 1:
            raise self.ambiguous(fitting)
        self.check_source(fitting[0])
        return fitting[0]

    def check_source(self, file: CacheFile) -> None:
        """Check that the files of one source hold the same images with the same labels, splits and groups.

        Parameters
        ----------
        file : CacheFile
            One of `files`; those of the same source are compared with it.

        Raises
        ------
        AmbiguousCacheError
            Two of them hold the same features, see `check_twins`.
        CacheError
            They differ, because the source changed between the extractions.
        """
        if _source_of(file) in self._agreeing:
            return
        files = [other for other in self.files if _source_of(other) == _source_of(file)]
        check_twins(files)
        for other in files:
            if differing := _differing_rows(file, other):
                raise CacheError(
                    f"{file.path.name} and {other.path.name} in {self.path} show one source at different times, they "
                    f"differ in {differing}; extract {_location(file)} into this folder again, which brings all of its "
                    "files up to date, or name one file instead of the folder"
                )
        self._agreeing.add(_source_of(file))

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


def check_twins(files: Sequence[CacheFile], layer: str | None = None) -> None:
    """Refuse files that hold the same features of one source: it is not clear which of them to read or to continue.

    Parameters
    ----------
    files : sequence of CacheFile
    layer : str, optional
        Compare only the features of this layer, by default those of all layers.

    Raises
    ------
    AmbiguousCacheError
        A file is a copy of another, or two processes extracted one layer at the same time.
    """
    holders: dict[tuple[Any, ...], CacheFile] = {}
    for file in files:
        for name, info in file.layers.items() if layer is None else [(layer, file.layers[layer])]:
            first = holders.setdefault((info.fingerprint, *sorted(file.handles.items())), file)
            if first is not file:
                raise AmbiguousCacheError(
                    f"{first.path.name} and {file.path.name} in {file.path.parent} both hold {name} of "
                    f"{_location(file)}; delete one of them, or move it to another folder"
                )


def same_listing(one: CacheFile, other: CacheFile) -> bool:
    """Return whether two files have the same images in the same order, with the same labels, splits and groups.

    Checksums are compared instead of the columns that they cover, but not where a cache in parts has one for each part.
    """
    names = ["/rows/source_crc"]
    if (one.parts, other.parts) != ((one,), (other,)):
        names = [f"/rows/{name}" for name in ("uri", "label", "split", "group")]
    same = all(np.array_equal(one.array(name), other.array(name)) for name in names)
    return one.classes == other.classes and same


def _source_of(file: CacheFile) -> tuple[str, ...]:
    return file.handles.get("source", ""), file.handles.get("location", "")


def _location(file: CacheFile) -> str:
    return file.handles.get("location") or file.handles.get("source", "")


def _differing_rows(one: CacheFile, other: CacheFile) -> str:
    """Count the images that only one file has, and the labels, splits and groups that differ: ``"2 labels, 1 split"``.

    The result is empty if the files agree; the order of rows does not matter. Raises `DamagedCacheError` if they differ
    because one is damaged.
    """
    if same_listing(one, other):
        return ""
    one.check_columns()
    other.check_columns()
    _, *rows = np.intersect1d(one.array("/rows/uri"), other.array("/rows/uri"), return_indices=True)
    columns = [
        {"label": np.array([*file.classes, ""])[file.labels], "split": file.splits, "group": file.groups}
        for file in (one, other)
    ]
    only_in = [
        0 if another.missing_rows else file.n_rows - len(rows[0]) for file, another in ((one, other), (other, one))
    ]
    counts = {"image": sum(only_in)}
    for name in columns[0]:
        counts[name] = int((columns[0][name][rows[0]] != columns[1][name][rows[1]]).sum())
    return ", ".join(f"{count} {name}{'s' * (count > 1)}" for name, count in counts.items() if count)


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
