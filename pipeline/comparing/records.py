"""What a run folder's two JSON files hold, as records: `results.jsonl` a result a line, `run.json` how it was made."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from pipeline.results import FinetuneResult, FitResult, from_json, to_json

HEAD, FINETUNE = "head", "finetune"
KINDS = {HEAD: FitResult, FINETUNE: FinetuneResult}

OptionValue = str | int | float | bool | None


@dataclass(frozen=True)
class JobResult:
    """The result of one job.

    Parameters
    ----------
    key : str
        What the result depends on, see `pipeline.invalidation`.
    source : str
        Name of the source.
    result : FitResult or FinetuneResult
        As `fit` or `finetune` returned it.
    n_classes : int
        0 in run folders made before this was kept.
    precision, store, size : str, str, (int, int) or None
        Of a head's features, see `pipeline.spec.LayerSpec`; None for a fine-tune.
    drop_leaks : bool
        Whether leaked images were dropped from training.
    depth : int or None
        Index of a head's layer in the order of computation; None for a fine-tune and for joined layers.
    options : dict
        Options of a fine-tune, as the plan names them, without backbone and freeze.
    """

    key: str
    source: str
    result: FitResult
    n_classes: int = 0
    precision: str | None = None
    store: str | None = None
    size: tuple[int, int] | None = None
    drop_leaks: bool = False
    depth: int | None = None
    options: dict[str, OptionValue] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """Return the line of `results.jsonl`: the result's own keys, and what a comparison adds."""
        own = to_json(self)
        result = own.pop("result")
        kept = ("options",) if self.result.kind == FINETUNE else ("precision", "store", "size", "drop_leaks", "depth")
        return {**{name: own[name] for name in ("key", "source", "n_classes")}, **result, **{k: own[k] for k in kept}}

    @classmethod
    def from_json(cls, document: Any) -> JobResult:
        """Return the result of a line; raises `ValueError` if a key is missing or holds something impossible."""
        kind = document.get("kind") if isinstance(document, dict) else None
        if kind not in list(KINDS):
            raise ValueError(f"expected 'kind' to be one of {', '.join(KINDS)}, got {kind!r:.40}")
        result = from_json(KINDS[kind], document)
        if not (0 <= result.accuracy <= 1 and result.n_test > 0):
            raise ValueError(
                f"expected 'accuracy' from 0 to 1 and 'n_test' above 0, got {result.accuracy} and {result.n_test}"
            )
        return from_json(cls, document | {"result": result})


@dataclass(frozen=True)
class Failure:
    """A job that could not be done, and why in one line."""

    job: str
    reason: str


@dataclass(frozen=True)
class ExtractionCost:
    """What extracting one cache file took, all runs into the folder together.

    Parameters
    ----------
    computed : int
        Images computed.
    seconds : float
        Seconds spent on them.
    source, backbone : str
    rows, unreadable : int
        Images of the file, and how many of them cannot be read.
    """

    computed: int = 0
    seconds: float = 0.0
    source: str = ""
    backbone: str = ""
    rows: int = 0
    unreadable: int = 0


@dataclass(frozen=True)
class Invocation:
    """One call of `compare` that computed something, with the keys of `pipeline.provenance.machine`.

    `seconds`, `computed` and `failed` are None if the process was killed.
    """

    started: str = ""
    command: str = ""
    cpu: str = ""
    cores: int | None = None
    memory_gib: float | None = None
    system: str = ""
    python: str = ""
    versions: dict[str, str] = field(default_factory=dict)
    seconds: float | None = None
    computed: int | None = None
    failed: int | None = None


@dataclass(frozen=True)
class RunInfo:
    """What `run.json` holds.

    Parameters
    ----------
    plan_file : str
        Path of the plan; ``""`` in a new folder.
    plan : dict
        Its content.
    extractions : dict of str to ExtractionCost
        By name of the cache file.
    runs : list of Invocation
        All calls so far, the latest last.
    notes : list of str
        What the user should know.
    failures : list of Failure
        Of the latest call.
    """

    plan_file: str = ""
    plan: dict[str, Any] = field(default_factory=dict)
    extractions: dict[str, ExtractionCost] = field(default_factory=dict)
    runs: list[Invocation] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    failures: list[Failure] = field(default_factory=list)
