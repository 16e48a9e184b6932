"""A comparison in progress: what its plan asks for, and what of that is done."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from pipeline.backbones.known import recall
from pipeline.comparing.features import Features, find_features, finetune_key, fit_key, listing_digest, question
from pipeline.comparing.folder import Failure, JobResult, RunFolder
from pipeline.comparing.jobs import Extraction, Finetune, Fit, finetunes, fits
from pipeline.comparing.plan import Plan, PlanTable
from pipeline.evaluation.labels import LabelsTable
from pipeline.images.sources.registry import ImageSource
from pipeline.results import Progress
from pipeline.spec import fingerprint_of

if TYPE_CHECKING:
    from pipeline.evaluation.predictions import Predictions


@dataclass
class Comparison:
    """What a plan asks for, and what of that is done.

    `images` has each source of the plan, listed once for the whole run, and `labelled` the same with the labels of the
    table `labels`, if the plan names one. `features` are None for an extraction of which
    nothing is known yet. `computed` counts the jobs done in this run; `total` those to do in all, including those that
    fail.
    """

    plan: Plan
    folder: RunFolder
    images: Mapping[str, ImageSource]
    labels: LabelsTable | None
    labelled: Mapping[str, ImageSource]
    features: dict[Extraction, Features | None]
    progress: Progress
    failures: list[Failure] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    computed: int = 0
    total: int = 0

    @cached_property
    def names(self) -> dict[str, str]:
        """How results name each source: by its name, or by its location if another has the same name."""
        counts = Counter(images.name for images in self.images.values())
        return {
            source: images.name if counts[images.name] == 1 else images.location
            for source, images in self.images.items()
        }

    @cached_property
    def question(self) -> dict[str, str]:
        """What the keys of all jobs cover: labels, task and metric."""
        return question(self.plan, self.labels)

    def look_up(self, extraction: Extraction) -> Features | None:
        """Look up in the cache what is extracted."""
        return find_features(extraction, self.images[extraction.source], self.cache(extraction.line))

    def cache(self, line: PlanTable) -> Path:
        """Return the cache folder of a line of the plan."""
        return Path(line.values.get("output", (self.folder.cache,))[0])

    def fits(self, extraction: Extraction, found: Features) -> dict[Fit, str]:
        """Return the fits on the features of an extraction, each with its key."""
        source = self.names[extraction.source]
        return {job: fit_key(job, found, source, self.question) for job in fits(self.plan, extraction, found.aliases)}

    def finetunes(self) -> dict[Finetune, tuple[PlanTable, str]]:
        """Return the fine-tunes, each with its line of the plan and its key."""
        asked = finetunes(self.plan)
        listings = {source: listing_digest(self.images[source]) for source in {job.source for _, job in asked}}
        keys = (finetune_key(job, self.names[job.source], listings[job.source], self.question) for _, job in asked)
        return {job: (line, key) for (line, job), key in zip(asked, keys, strict=True)}

    def weights_of(self, job: Finetune) -> str | None:
        """Return a digest of the pretrained weights that a fine-tune begins with, and of how these see images.

        None if they are not known.
        """
        options = dict(job.options)
        known = recall(str(options["backbone"]), options.get("size")) if options.get("init") != "random" else None
        return None if known is None else fingerprint_of([known.weights_digest, known.preprocessing])

    def is_kept(self, job: Finetune, key: str) -> bool:
        """Tell whether a fine-tune is finished, and the weights behind its backbone's name are still the same."""
        return self.folder.has(key) and self.folder.results[key].weights in (None, self.weights_of(job))

    def is_done(self) -> bool:
        """Tell whether the folder holds the results of all jobs and no others."""
        tunes = self.finetunes()
        keys = {key for _, key in tunes.values()}
        for extraction, found in self.features.items():
            if found is None or not found.complete:
                return False
            keys |= set(self.fits(extraction, found).values())
        kept = all(self.is_kept(job, key) for job, (_, key) in tunes.items())
        return kept and keys == set(self.folder.results) and all(map(self.folder.has, keys))

    def keep(self, result: JobResult, predictions: Predictions) -> None:
        """Keep a result on disk and report progress."""
        self.folder.append(result, predictions)
        self.computed += 1
        self.report_progress()

    def report_progress(self) -> None:
        """Report how many jobs are behind us."""
        self.progress(self.computed + len(self.failures), self.total, "all jobs")
