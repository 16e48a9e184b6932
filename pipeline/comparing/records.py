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
    """The result of one job, as `fit` or `finetune` returned it, and what the comparison adds.

    `key` says what the result depends on, see `pipeline.invalidation`; `n_classes` is 0 in run folders made before it
    was kept. `precision`, `store`, `size` and `drop_leaks` are those of a head, see `pipeline.spec.LayerSpec`, and
    `depth` is the index of its layer in the order of computation, None for joined layers. `options` are those of a
    fine-tune, as the plan names them, without backbone and freeze.
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

    `computed` images took `seconds`; `rows` are the images of the file, of which `unreadable` cannot be read.
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
    """What `run.json` holds: the plan's path (``""`` in a new folder) and content, and how it was run.

    `extractions` are by name of the cache file, `runs` are all calls so far with the latest last, `notes` tell what the
    user should know, and `failures` are those of the latest call.
    """

    plan_file: str = ""
    plan: dict[str, Any] = field(default_factory=dict)
    extractions: dict[str, ExtractionCost] = field(default_factory=dict)
    runs: list[Invocation] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    failures: list[Failure] = field(default_factory=list)
