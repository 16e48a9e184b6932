"""A large source in parts: cache files that each hold a range of its uris, and the plan that says which.

The plan is a JSON file, ``STEM.plan``; the part of number 3 is ``STEM.p00003.h5`` beside it. The first process to write
the plan decides how the source is divided and how features are computed; all others follow it.
"""

from __future__ import annotations

import hashlib
import json
import re
import uuid
from bisect import bisect_left
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

from features_cache.atomic import atomic_write
from features_cache.convert import parse_json
from features_cache.errors import CacheError, DamagedCacheError, explained
from features_cache.header import is_name, layer_of
from features_cache.layout import LayerInfo
from features_cache.publish import etag_of, link_new, store_of
from features_cache.rowfile import sync_folder

PLAN_SUFFIX = ".plan"
FORMAT = "thawline-parts 1"
TRY = ".try-"
"""Between the name of a part and what is random in the name of a try at it."""
_PART = re.compile(r"(.+)\.p\d{5,}\.h5", re.DOTALL)


class UriRange(NamedTuple):
    """The uris from `first` up to `end`, which is not among them; no end if it is None."""

    first: str
    end: str | None

    def overlaps(self, other: UriRange) -> bool:
        """Tell whether a uri can be in both ranges."""
        return all(end is None or first < end for first, end in ((self.first, other.end), (other.first, self.end)))

    def covers(self, other: UriRange) -> bool:
        """Tell whether all uris of `other` are in this range."""
        return self.first <= other.first and (self.end is None or (other.end is not None and other.end <= self.end))


@dataclass(frozen=True)
class Part:
    """One part of a plan.

    Parameters
    ----------
    number : int
        Names its file; it says nothing about the order.
    first : str
        The part holds the uris from this one up to the `first` of the next part; ``""`` for the first part.
    rows : int
        Count of images when the plan was written.
    origin : int, optional
        Number of the part whose range it was cut from, after that part had grown.
    """

    number: int
    first: str
    rows: int
    origin: int | None = None


@dataclass(frozen=True)
class PartPlan:
    """How a source is divided into parts, and what every part holds.

    Parameters
    ----------
    path : Path
        The plan's file.
    layers : tuple of LayerInfo
    handles, request : mapping
        As for `features_cache.CacheWriter.create`.
    pinned : mapping of str to str
        Settings that every writer of a part follows, such as the engine; opaque here.
    most_rows : int
        Rows that a part holds at most when the plan is made. A part of more than twice as many is split.
    parts : tuple of Part
        In the order of their uris.
    etag : str, optional
        Of the object in a store that this was read from; no part of what the plan says.
    """

    path: Path
    layers: tuple[LayerInfo, ...]
    handles: Mapping[str, str]
    request: Mapping[str, Any]
    pinned: Mapping[str, str]
    most_rows: int
    parts: tuple[Part, ...]
    etag: str | None = field(default=None, compare=False)

    def path_of(self, number: int) -> Path:
        """Return the file of a part, by its number."""
        return self.path.with_name(f"{self.path.stem}.p{number:05d}.h5")

    @property
    def paths(self) -> list[Path]:
        """The files of all parts, in the order of their uris."""
        return [self.path_of(part.number) for part in self.parts]

    def range_of(self, number: int) -> UriRange:
        """Return the uris that a part holds, by its number; raises `CacheError` if there is no such part."""
        ends: list[str | None] = [*(part.first for part in self.parts[1:]), None]
        for part, end in zip(self.parts, ends, strict=True):
            if part.number == number:
                return UriRange(part.first, end)
        raise CacheError(f"{self.path} has no part {number}; extract again")

    def ranges(self, uris: Sequence[str]) -> Iterator[tuple[Part, slice]]:
        """Yield each part with the slice of `uris`, which are sorted, that it holds."""
        starts = [bisect_left(uris, part.first) for part in self.parts]
        for part, (start, stop) in zip(self.parts, pairwise([*starts, len(uris)]), strict=True):
            yield part, slice(start, stop)

    def fitted(self, uris: Sequence[str]) -> PartPlan:
        """Return the plan for a changed source: parts that have doubled are split, and empty ones are left out.

        All other parts keep their ranges, so that an image that is added or removed touches one part.
        """
        numbers: Iterator[int] | None = None
        parts: list[Part] = []
        for part, where in self.ranges(uris):
            count = where.stop - where.start
            if not count:
                continue
            own = replace(part, first=part.first if parts else "", rows=count)
            if count <= 2 * self.most_rows:
                parts.append(own)
                continue
            first, *others = divide(uris[where], self.most_rows)
            parts.append(replace(own, rows=first.rows))
            numbers = numbers or self._new_numbers()
            parts += [replace(one, number=next(numbers), origin=part.number) for one in others]
        return replace(self, parts=tuple(parts))

    def _new_numbers(self) -> Iterator[int]:
        """Return numbers above those of all parts, also of parts in the folder that `prune` may be about to delete."""
        left = [path for path in self.path.parent.glob("*.h5") if plan_of(path) == self.path]
        taken = [*(part.number for part in self.parts), *(int(path.stem.rpartition(".p")[2]) for path in left)]
        return iter(range(max(taken) + 1, 1 << 60))

    def publish(self) -> PartPlan:
        """Write the plan unless there is one under its name, which no process overwrites here; return what is there."""
        with explained(self.path, "write"), self._drafted() as draft:
            link_new(draft, self.path)
            sync_folder(self.path.parent)
        return open_plan(self.path)

    def rewrite(self) -> bool:
        """Replace the plan's file; return False if its object is no longer the one that was read."""
        store = store_of(self.path.parent)
        if store is not None:
            with explained(self.path, "write"), self._drafted() as draft:
                return store.put(draft, self.path, self.etag)
        with explained(self.path, "write"), atomic_write(self.path) as draft:
            draft.write_text(self._text(), encoding="utf-8")
        return True

    @contextmanager
    def _drafted(self) -> Iterator[Path]:
        draft = self.path.with_name(f"{self.path.name}.tmp-{uuid.uuid4().hex}")
        try:
            draft.write_text(self._text(), encoding="utf-8")
            yield draft
        finally:
            draft.unlink(missing_ok=True)

    def _text(self) -> str:
        table = {
            "format": FORMAT,
            "most_rows": self.most_rows,
            "handles": dict(self.handles),
            "request": dict(self.request),
            "pinned": dict(self.pinned),
            "layers": [layer.to_json() for layer in self.layers],
            "parts": [asdict(part) for part in self.parts],
        }
        return json.dumps(table | {"digest": table_digest(table)}, indent=1) + "\n"


def divide(uris: Sequence[str], most_rows: int) -> tuple[Part, ...]:
    """Return parts of about equal size, each of at most `most_rows` of the sorted `uris`, numbered from 0."""
    count = -(-len(uris) // most_rows)
    bounds = [number * len(uris) // count for number in range(count + 1)]
    return tuple(
        Part(number, uris[start] if number else "", stop - start)
        for number, (start, stop) in enumerate(pairwise(bounds))
    )


def open_plan(path: Path) -> PartPlan:
    """Read and check a plan.

    Raises
    ------
    CacheError
        It does not exist or cannot be read.
    DamagedCacheError
        It is no plan of this version, or was changed.
    """
    etag = etag_of(path)
    with explained(path, "open"):
        content = path.read_bytes()
    try:
        table = parse_json(content)
        if table["format"] != FORMAT:
            raise ValueError(f"expected {FORMAT}, got {table['format']!r:.40}")
        if table.pop("digest") != table_digest(table):
            raise ValueError("it does not match its own digest")
        plan = PartPlan(
            path,
            tuple(map(layer_of, table["layers"])),
            dict(table["handles"].items()),
            dict(table["request"].items()),
            dict(table["pinned"].items()),
            int(table["most_rows"]),
            tuple(Part(**part) for part in table["parts"]),
            etag,
        )
        _check(plan)
    except (ValueError, TypeError, LookupError, AttributeError) as error:
        raise DamagedCacheError(
            f"{path} is not usable as the plan of a cache in parts: {ascii(str(error))[1:-1]:.120}; "
            "restore it from a copy, or delete it and its parts and extract again"
        ) from error
    return plan


def _check(plan: PartPlan) -> None:
    """Raise `ValueError` for a plan that its digest fits, but that makes no sense."""
    firsts = [part.first for part in plan.parts]
    if not plan.layers or not plan.parts or plan.most_rows < 1:
        raise ValueError("it has no layers or no parts")
    if len({layer.name for layer in plan.layers}) != len(plan.layers):
        raise ValueError("two layers have one name")
    if not all(map(is_name, [*plan.handles.values(), *plan.pinned.values()])):
        raise ValueError("a handle is not text, or has control characters")
    if not all(isinstance(first, str) and first.encode() for first in firsts[1:]):
        raise ValueError("a part does not say where it begins")
    if firsts[0] != "" or any(one >= other for one, other in pairwise(firsts)):
        raise ValueError("its parts are not in order")
    numbers = [*(part.number for part in plan.parts), *(part.origin for part in plan.parts if part.origin is not None)]
    counts = [*numbers, *(part.rows for part in plan.parts)]
    if not all(type(count) is int and 0 <= count < 1 << 56 for count in counts):
        raise ValueError("a number or count is not a whole number in range")
    if len({part.number for part in plan.parts}) != len(plan.parts):
        raise ValueError("two parts have one number")


def plan_of(path: Path) -> Path | None:
    """Return the plan to which a file belongs by its name, whether it exists or not; None if it is no part."""
    found = _PART.fullmatch(path.name)
    return path.with_name(found[1] + PLAN_SUFFIX) if found else None


def is_try(path: Path) -> bool:
    """Return whether the name marks a try at a part, or a lock or temporary file of one."""
    return f".h5{TRY}" in path.name


def new_try(path: Path) -> Path:
    """Return a new name for a try at the part `path`."""
    return path.with_name(f"{path.name}{TRY}{uuid.uuid4().hex}")


def published_path(path: Path) -> Path:
    """Return the part that a try is to become; any other path is returned as it is."""
    return path.with_name(path.name.partition(TRY)[0]) if is_try(path) else path


def table_digest(table: Mapping[str, Any]) -> str:
    """Return the digest that stands in a plan beside its other members."""
    return hashlib.blake2b(json.dumps(table, sort_keys=True).encode(), digest_size=16).hexdigest()
