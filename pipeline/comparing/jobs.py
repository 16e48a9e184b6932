"""From a plan to its jobs: every extraction, fit and fine-tune once."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from features_cache import nearest
from pipeline.comparing.plan import Plan, PlanTable
from pipeline.extraction.lookup import weights_file_digest
from pipeline.options import TABLES
from pipeline.spec import Request

Shots = int | str


@dataclass(frozen=True)
class Extraction:
    """Some layers of one backbone over one source, one of `Plan.sources`; `line` is the ``[[extract]]`` that asks."""

    source: str
    request: Request
    line: PlanTable = field(compare=False, hash=False)


class Fit(NamedTuple):
    """One head on one layer (or joined layers ``A+B``) with one seed and number of shots.

    `options` are further parameters of `pipeline.fit.fit`.
    """

    extraction: Extraction
    layer: str
    head: str
    seed: int
    shots: Shots
    options: tuple[tuple[str, Any], ...] = ()

    def __str__(self) -> str:
        source, backbone = self.extraction.source, self.extraction.request.backbone
        return f"fit {self.head} on {self.layer} of {backbone}, seed {self.seed}, shots {self.shots}, {source}"


class Finetune(NamedTuple):
    """One network trained on one source with one seed and number of shots.

    `options` are all options of ``[[finetune]]`` that may take a list of values, by their names in the plan.
    """

    source: str
    options: tuple[tuple[str, Any], ...]
    seed: int
    shots: Shots

    def __str__(self) -> str:
        known, options = TABLES["finetune"], dict(self.options)
        freeze, changed = options.pop("freeze"), [f"{options.pop('backbone')}"]
        changed += [f"{key} {value}" for key, value in options.items() if value != known[key].default]
        return f"finetune {', '.join(changed)}, freeze {freeze}, seed {self.seed}, shots {self.shots}, {self.source}"


def extractions(plan: Plan) -> list[Extraction]:
    """Return the plan's extractions, in its order; raises `PlanError` if two ask for the same layer."""
    found: list[Extraction] = []
    for line in plan.of("extract"):
        keys = ("backbone", "pool", "precision", "store", "size", "white")
        values = {key: line.values.get(key, (None,)) for key in keys}
        for source, backbone, *settings in itertools.product(plan.sources, *values.values()):
            pool, precision, store, size, white = settings
            digest = weights_file_digest(backbone)
            request = Request(backbone, line.values["layer"], pool, precision, store, size, digest, white=white)
            found.append(Extraction(source, request, line))
    seen: set[tuple[str, ...]] = set()
    for extraction in found:
        asked = extraction.request.to_json()
        for layer in asked.pop("layers"):
            key = (extraction.source, layer, *map(str, asked.values()))
            if key in seen:
                message = f"layer {layer} of {extraction.request.backbone} is asked for twice, by two [[extract]]"
                raise plan.error(message, "extract", extraction.line.place, layer)
            seen.add(key)
    return found


def one_pass(extraction: Extraction) -> str:
    """Return what extractions have in common that take one pass of a network: all but the pooling."""
    asked = extraction.request.to_json()
    del asked["pool"]
    return f"{extraction.source} {asked} {extraction.line.how()}"


def fits(plan: Plan, extraction: Extraction, aliases: Mapping[str, Sequence[str]]) -> Iterator[Fit]:
    """Yield the fits of every ``[[fit]]`` on one extraction; `aliases` has the layers that each name stands for.

    Raises `PlanError` if a layer is not extracted, or if two ``[[fit]]`` ask for the same fit.
    """
    seen = set()
    for line in plan.of("fit"):
        asked = line.values.get("layer", tuple(aliases))
        layers = dict.fromkeys(layer for name in asked for layer in _resolve(plan, line, extraction, name, aliases))
        crossed = (line.values[key] for key in ("head", "seed", "shots"))
        how = line.how()
        names = [option.parameter for option in TABLES["fit"].values() if not option.crossed]
        options = tuple((name, how[name]) for name in names if how.get(name) and name not in ("device", "jobs"))
        if how["device"] not in ("auto", "cpu"):
            options += (("device", how["device"]),)
        for layer, head, seed, shots in itertools.product(layers, *crossed):
            fit = Fit(extraction, layer, head, seed, shots, options)
            if fit in seen:
                message = f"{fit.head} on {fit.layer}, seed {fit.seed}, shots {fit.shots} is asked for by two [[fit]]"
                raise plan.error(message, "fit", line.place)
            seen.add(fit)
            yield fit


def _resolve(
    plan: Plan, line: PlanTable, extraction: Extraction, asked: str, aliases: Mapping[str, Sequence[str]]
) -> list[str]:
    """Return the layers, or joined layers, that a name in a ``[[fit]]`` stands for."""
    known = dict(aliases) | {name: [name] for names in aliases.values() for name in names}
    parts = asked.split("+")
    for part in parts:
        if part not in known:
            raise plan.error(
                f"[[fit]] asks for layer '{part}', which is not extracted from {extraction.request.backbone}; "
                f"its [[extract]] has {', '.join(aliases)}{nearest(part, known)}",
                "fit",
                line.place,
                asked,
            )
    return ["+".join(names) for names in itertools.product(*(known[part] for part in parts))]


def finetunes(plan: Plan) -> list[tuple[PlanTable, Finetune]]:
    """Return the plan's fine-tunes, each with its ``[[finetune]]``; raises `PlanError` if two ask for the same one."""
    found: dict[Finetune, PlanTable] = {}
    for line in plan.of("finetune"):
        crossed = {
            key: line.values[key]
            for key, option in TABLES["finetune"].items()
            if option.crossed and key not in ("seed", "shots") and key in line.values
        }
        jobs = itertools.product(
            plan.sources, itertools.product(*crossed.values()), line.values["seed"], line.values["shots"]
        )
        for source, chosen, seed, shots in jobs:
            job = Finetune(source, tuple(zip(crossed, chosen, strict=True)), seed, shots)
            if job in found:
                raise plan.error(f"{job} is asked for by two [[finetune]]", "finetune", line.place)
            found[job] = line
    return [(line, job) for job, line in found.items()]


def rectangles(fits: Sequence[Fit]) -> list[list[Fit]]:
    """Group fits of one extraction into calls of `fit`, each a full product of layers, heads, seeds and shots.

    The fits of a group are in the order in which `pipeline.fit.fit` returns its results.
    """
    blocks: dict[tuple[Any, ...], tuple[list[Any], ...]] = {
        tuple(job[1:]): tuple([value] for value in job[1:]) for job in fits
    }
    for axis in (3, 2, 1, 0):  # options stay apart
        merged: dict[tuple[Any, ...], tuple[list[Any], ...]] = {}
        for block in blocks.values():
            others = tuple(tuple(values) for index, values in enumerate(block) if index != axis)
            if others in merged:
                merged[others][axis].extend(block[axis])
            else:
                merged[others] = tuple(list(values) for values in block)
        blocks = merged
    return [[Fit(fits[0].extraction, *job) for job in itertools.product(*block)] for block in blocks.values()]
