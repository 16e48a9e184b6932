"""Stage 3: train the top of a network above its thaw line, on the very splits that `fit` uses, to compare the two.

What is frozen runs once: where images are not augmented, the activations at the line come from the cache, and only
what is above the line trains.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.evaluation.comparisons import compare_models, preference, tie_notes
from pipeline.evaluation.predictions import Predictions, collect_predictions, measure
from pipeline.evaluation.splits import check_draws
from pipeline.results import ExtractResult, FinetuneResult, Progress, silent, to_json
from pipeline.spec import DEFAULT_BACKBONE, DEFAULT_CACHE, DEFAULT_LAYER, DEFAULT_POOL, LayerSpec

if TYPE_CHECKING:
    from pipeline.finetuning.material import Material
    from pipeline.finetuning.network import Network
    from pipeline.finetuning.plan import Plan
    from pipeline.finetuning.recipe import Recipe
    from pipeline.finetuning.run import Run


@dataclass(frozen=True, eq=False)
class FinetuneReport:
    """All results of a call, in the order seeds × shots.

    Parameters
    ----------
    results : list of FinetuneResult
    predictions : list of Predictions
        One for each result.
    notes : list of str
        What a user should know, a sentence each.
    classes : tuple of str
        Class names by number.
    best : int
        Place in `results` of the model that is kept: that of most shots, of these the one of best validation accuracy,
        the first on a tie.
    saved : Path or None
        The model file.
    extracted : list of list of ExtractResult
        The cache files that what is frozen was extracted into, or was in already; of each call of `extract`.
    """

    results: list[FinetuneResult]
    predictions: list[Predictions]
    notes: list[str]
    classes: tuple[str, ...]
    best: int
    saved: Path | None
    extracted: list[list[ExtractResult]]


def finetune(
    source: str | Path,
    backbone: str = DEFAULT_BACKBONE,
    *,
    freeze: str = "all",
    seeds: Sequence[int] = (0,),
    shots: Sequence[int | str] = ("all",),
    output: str | Path = DEFAULT_CACHE,
    init: str = "pretrained",
    head_first: bool = False,
    watch: str | None = None,
    save: str | Path | None = None,
    precision: str = "auto",
    store: str = "float32",
    size: int | None = None,
    engine: str = "auto",
    device: str = "auto",
    workers: int | None = None,
    progress: Progress | None = None,
    say: Callable[[str], None] | None = None,
    **training: Any,
) -> FinetuneReport:
    """Train a network above its thaw line, once for each seed and number of shots.

    Parameters
    ----------
    source : str or Path
        Anything `pipeline.extract.extract` takes, with labels.
    backbone : str, default "efficientnet_lite0"
        ``NAME`` or ``NAME@WEIGHTS``.
    freeze : str, default "all"
        ``"all"`` trains a new top alone, ``"none"`` everything, a layer what is above it.
    seeds : sequence of int, default (0,)
        Draw the splits that the source does not give, the shots, the order of batches, and random weights.
    shots : sequence of int or "all", default ("all",)
        Training images of each class; there is no early stopping then, for validation images would be more shots.
    output : str or Path, default "thawline-cache"
        Folder of cache files; what it does not hold yet, and checkpoints, go to ``finetune`` in it.
    init : {"pretrained", "random"}
        ``random`` trains from scratch.
    head_first : bool, default False
        Train the new top on frozen features first, then everything above the line (LP-FT; Kumar et al. 2022).
    watch : {"gradients"}, optional
        Record the norms of each thawed layer's gradients, steps and weights, and its dead units, in the history of the
        results (see `pipeline.finetuning.watch.Watch`), and say in the notes where they are bad.
    save : str or Path, optional
        Write the network that was trained on most shots here, of several the one of best validation accuracy.
    precision : {"auto", "fp32", "bf16"}
        Below the line as for extraction; above it ``auto`` is bf16 where that trains faster.
    store, size, engine, device, workers
        As for extraction.
    progress : callable, optional
        ``progress(done, total, text, how it goes)``.
    say : callable, optional
        Called beforehand with what the user should know by then: the disk space that activations will take.
    **training
        Fields of `pipeline.finetuning.recipe.Recipe`: ``lr``, ``layer_decay``, ``lr_at``, ``epochs``, ``patience``,
        ``optimizer``, ``weight_decay``, ``schedule``, ``warmup``, ``batch_size``, ``label_smoothing``,
        ``class_weights``, ``augment``, ``views``, ``clip``, ``top``.

    Raises
    ------
    FitError
        If an option or the rows do not allow it, or the loss is not finite before the first epoch is over.
    BackboneError
        If the line cannot be drawn there; the message says where it can.
    ThawlineError
        Whatever extraction raises.
    """
    from pipeline.finetuning.material import gather
    from pipeline.finetuning.plan import Plan
    from pipeline.finetuning.recipe import check_start, make_recipe
    from pipeline.finetuning.run import run

    recipe = make_recipe(training)
    check_start(recipe, backbone, freeze, init=init, head_first=head_first, precision=precision, watch=watch)
    check_draws(seeds, shots)
    destination = None
    if save is not None:
        from pipeline.model_file import check_destination

        destination = check_destination(save)
    notes: list[str] = []
    plan = Plan(
        source, backbone, freeze, recipe, init, head_first, watch is not None, Path(output), precision, store, size,
        engine, device, workers, progress or silent, say or notes.append,
    )  # fmt: skip
    results: list[FinetuneResult] = []
    predictions: list[Predictions] = []
    best, kept = 0, None
    for seed in dict.fromkeys(seeds):
        if not results or init == "random":
            named = f"{backbone}@random:{seed}" if init == "random" else backbone
            draws = list(itertools.product([seed] if init == "random" else seeds, shots))
            material = gather(replace(plan, backbone=named), draws)
            notes += material.table.notes
        for count in dict.fromkeys(shots):
            came = run(material, plan, seed, count)
            notes += [*came.splits.notes, *came.trained.notes]
            if count == "all" and not len(came.splits.val):
                notes.append("without validation images training goes through all epochs and keeps the last weights")
            predictions.append(_predictions(came, material))
            results.append(_result(came, predictions[-1], material, plan, seed, count))
            ranks = [preference(one.shots, one.validation_accuracy, place) for place, one in enumerate(results)]
            if ranks[-1] == max(ranks):
                best, kept = len(results) - 1, came.network if destination else None
            del came  # its optimizer and its pictures, which would stay until the next run is over
    p_values = compare_models([said.uris for said in predictions], [said.right for said in predictions])
    results = [replace(one, p_vs_best=p) for one, p in zip(results, p_values, strict=True)]
    if destination is not None and kept is not None:
        _save(destination, kept, material, recipe, results[best])
    notes = list(dict.fromkeys([*notes, *tie_notes(p_values)]))
    return FinetuneReport(results, predictions, notes, material.table.classes, best, destination, plan.extracted)


def _predictions(came: Run, material: Material) -> Predictions:
    labels = came.probabilities.argmax(1)
    return collect_predictions(material.table, [came.splits.test], [labels], [came.probabilities], [came.temperature])


def _result(
    came: Run, said: Predictions, material: Material, plan: Plan, seed: int, shots: int | str
) -> FinetuneResult:
    table, splits, trained = material.table, came.splits, came.trained
    how = {"init": plan.init, "head_first": plan.head_first}
    how |= {"precision": came.precision, "best_epoch": trained.best_epoch}
    return FinetuneResult(
        kind="finetune",
        backbone=material.backbone.handle,
        layer=DEFAULT_LAYER,
        pool=DEFAULT_POOL,
        head=plan.recipe.top,
        params=plan.recipe.to_json() | {"lr": plan.rate} | how,
        seed=seed,
        shots=shots,
        n_train=len(splits.train),
        n_val=len(splits.val),
        n_pool=len(table.labels) - len(splits.test),
        **measure(said, len(table.classes)),
        seconds=came.seconds,
        converged=not trained.diverged,
        balanced=plan.recipe.class_weights,
        validation_accuracy=trained.valid_accuracy,
        freeze=plan.freeze,
        epochs=len(trained.history),
        trainable_parameters=sum(item.numel() for item in came.network.parameters() if item.requires_grad),
        history=trained.history,
    )


def _save(path: Path, network: Network, material: Material, recipe: Recipe, result: FinetuneResult) -> None:
    from pipeline.backbones.network_file import TOP_LAYER, TunedModel, save_network
    from pipeline.backbones.weights import weights_digest
    from pipeline.finetuning.precision import scores_precision

    backbone, state = material.backbone, network.cpu().whole_state()
    precision = scores_precision(network)
    digest = weights_digest(state)
    spec = LayerSpec(backbone.name, digest, TOP_LAYER, DEFAULT_POOL, backbone.preprocessing, precision)
    model = TunedModel(spec, recipe.top, material.table.classes, result.temperature, to_json(result))
    save_network(path, model, {name: item.contiguous().numpy() for name, item in state.items()})
