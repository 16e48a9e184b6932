"""Which trials have room in memory, and which must read their rows from the cache in each pass."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from pathlib import Path

from pipeline.errors import FitError
from pipeline.heads.registry import FAMILIES_OF
from pipeline.heads.trial import MOST_FOLDS, Trial, has_statistics

_PROC, _CGROUP = Path("/proc"), Path("/sys/fs/cgroup")
_GROUPS = {
    "": ("", "memory.max", "memory.current"),
    "memory": ("memory", "memory.limit_in_bytes", "memory.usage_in_bytes"),
}
"""Folder and files of control groups, of versions 2 and 1, by what /proc/self/cgroup calls them."""
_OF_CLASS = 40
"""Bytes that scores and their derivatives take for each row and class."""


def find_streamed(trials: Sequence[Trial]) -> list[Trial]:
    """Return the trials whose rows do not fit into free memory.

    Raises
    ------
    FitError
        If one of these has a head that needs all rows in memory.
    """
    free, streamed = free_memory(), []
    for trial in trials:
        needed = memory_of_trial(trial, shared=False)
        if needed <= free:
            continue
        streamed.append(trial)
        if not trial.head.family.streams or is_wide(trial):
            layer, n = trial.data.layer, len(trial.data.splits.train) + len(trial.data.splits.val)
            others = [name for name, family in FAMILIES_OF[layer.table.task].items() if family.streams]
            hint = f", or {', '.join(others)}, which need not hold all rows" if others and not is_wide(trial) else ""
            raise FitError(
                f"{trial.head.name} on {n} x {layer.dim} features of {layer.name} would take {needed / 1e9:.3g} GB of "
                f"memory, and {free / 1e9:.3g} GB are free; use fewer shots, a smaller layer{hint}"
            )
    return streamed


def streamed_notes(trials: Sequence[Trial]) -> list[str]:
    """Return what a user should know about trials that `find_streamed` found."""
    heads: dict[str, dict[str, None]] = {}
    for trial in trials:
        heads.setdefault(trial.data.layer.name, {})[trial.head.name] = None
    return [
        f"{', '.join(names)}: the features of {layer} do not fit into free memory with all that a fit needs, so they "
        "are read from the cache in each pass, which takes longer"
        for layer, names in heads.items()
    ]


def is_wide(trial: Trial) -> bool:
    """Tell whether a head is trained on rows rotated onto their span."""
    return trial.head.family.linear and trial.data.layer.dim > len(trial.data.splits.train)


def memory_of_trial(trial: Trial, *, shared: bool) -> int:
    """Return about how many bytes a trial takes if all of its rows are in memory, and `shared` with several workers."""
    (data, head), splits = trial, trial.data.splits
    known, folds = len(splits.train) + len(splits.val), 1 if splits.val.size else MOST_FOLDS
    copies = 1 + (int(has_statistics(head.scaling, data.layer.joined)) if splits.val.size else MOST_FOLDS)
    copies = min(copies, 2) if is_wide(trial) else copies  # folds of wide rows keep them in their span
    scores = _OF_CLASS * len(data.layer.table.classes) if head.family.linear else 0
    row = 4 * data.layer.dim
    rows = (2 if shared else 1) * row * (copies * known + len(splits.test))
    return rows + known * round(row * head.family.memory + scores) + head.family.bytes_beside(known, folds)


def free_memory() -> int:
    """Return how many bytes this process may still take: what the system can free, within the limits of its groups."""
    table = _PROC / "meminfo"
    lines = table.read_text().splitlines() if table.is_file() else []
    available = next((int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:")), None)
    if available is None:  # macOS does not tell what it can free
        available = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2
    return min([available, *_left_in_groups()])


def _left_in_groups() -> Iterator[int]:
    """Yield what each control group of this process, as of a container or a batch job, leaves of its limit."""
    table = _PROC / "self/cgroup"
    for line in table.read_text().splitlines() if table.is_file() else ():
        _, kinds, path = line.split(":", 2)
        for kind in _GROUPS.keys() & kinds.split(","):
            folder, limit, usage = _GROUPS[kind]
            inside = _CGROUP / folder / path.lstrip("/")
            for group in (inside, *inside.parents):
                if group.is_relative_to(_CGROUP) and (most := _number(group / limit)) is not None:
                    yield most - (_number(group / usage) or 0) + _cached(group / "memory.stat")


def _cached(stat: Path) -> int:
    """Return how many bytes of a control group are pages of files, which the system can free."""
    try:
        told = dict(line.split() for line in stat.read_text().splitlines())
    except (OSError, ValueError):
        return 0
    return sum(int(told.get(f"total_{name}", told.get(name, "0"))) for name in ("inactive_file", "active_file"))


def _number(path: Path) -> int | None:
    try:
        return int(path.read_text())
    except (OSError, ValueError):  # there is none, or it is "max"
        return None
