"""Train a backbone on a nearby task whose labels cost nothing, and save it as a weights file.

The loop, its checkpoints and its early stopping are those of `finetune` with nothing frozen.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from features_cache import DONE, CacheFile, explained, nearest
from pipeline.arrays import IntArray
from pipeline.errors import FitError
from pipeline.evaluation.leaks import join_units
from pipeline.evaluation.rows import check_readable
from pipeline.evaluation.splits import hold_out, make_splits
from pipeline.images.sources.registry import ImageSource, open_source
from pipeline.invalidation import stage_key
from pipeline.model_file import check_destination, writing
from pipeline.options import PRETRAIN, check_options
from pipeline.results import PretrainResult, Progress, silent, to_json
from pipeline.spec import DEFAULT_BACKBONE, DEFAULT_CACHE, NO_AUGMENT, Size, json_fields

if TYPE_CHECKING:
    from pipeline.backbones.backbone import Backbone
    from pipeline.finetuning.data import TrainingSetup
    from pipeline.finetuning.inputs import DecodedImages
    from pipeline.finetuning.network import ThawedNetwork
    from pipeline.pretraining.tasks import Task

AUGMENTED = {"rotation": "crop", "pseudo-classes": "crop+flip+colour"}
"""How images are augmented by default, by task; the other tasks make their own views."""
MOST_CLASSES = 8000
"""Most pseudo-classes, as many as in the first experiments of Dosovitskiy et al. (2014)."""
_VALIDATION = 1 << 40
"""Views whose number, divided by 100,000, is at least this are shown in validation alone."""


@dataclass(frozen=True, eq=False)
class PretrainReport:
    """The result of a call, and notes: what a user should know, a sentence each."""

    result: PretrainResult
    notes: list[str]


@dataclass(frozen=True, eq=False)
class _Lesson:
    """A task, the images in plain form with their digests, and the rows to train and to validate on (perhaps none).

    `shown` says in words what the task shows, and `following` has the row of the next frame, by row, in sequences.
    """

    task: Task
    images: DecodedImages
    digests: NDArray[np.uint8]
    train: IntArray
    val: IntArray
    shown: str
    following: Mapping[int, int] = field(default_factory=dict)


def pretrain(
    source: str | Path | ImageSource,
    backbone: str = DEFAULT_BACKBONE,
    *,
    task: str,
    save: str | Path,
    init: str = "random",
    augment: str | None = None,
    seed: int = 0,
    output: str | Path = DEFAULT_CACHE,
    precision: str = "auto",
    size: Size | None = None,
    white: int | None = None,
    device: str = "auto",
    workers: int | None = None,
    progress: Progress | None = None,
    say: Callable[[str], None] | None = None,
    **training: Any,
) -> PretrainReport:
    """Train all of a network on a pretext task, and save it without the top that the task needed.

    The images need no labels, and no label is looked at, except that the images that `fit` and `finetune` would test
    with the same seed are left out, and theirs for validation stop the training.

    Parameters
    ----------
    source : str, Path or ImageSource
        Anything `pipeline.extract.extract` takes.
    backbone : str, default "efficientnet_lite0"
        ``NAME`` or ``NAME@WEIGHTS``.
    task : {"rotation", "pseudo-classes", "slow", "ego-motion"}
        See `pipeline.pretraining.tasks`.
    save : str or Path
        The ``.safetensors`` file to write; the trained backbone is then ``NAME@FILE``.
    init : {"random", "pretrained"}
        ``random`` draws the weights by `seed`; ``pretrained`` begins with those that `backbone` names.
    augment : str, optional
        ``"none"``, or ``"crop"``, ``"flip"`` and ``"colour"``, joined by ``+``; by default ``crop`` for rotation and
        all three for pseudo-classes. The other tasks make their own views.
    seed : int, default 0
        Draws the split, the weights, the order of batches, and what the task shows.
    output : str or Path, default "thawline-cache"
        Cache folder; checkpoints and what is listed of the images are kept in the folder ``finetune`` in it.
    precision, size, white, device, workers, progress, say
        As for `pipeline.finetune.finetune`.
    **training
        Fields of `pipeline.finetuning.recipe.Recipe`: ``lr``, ``epochs``, ``patience``, ``batch_size`` (in images),
        ``optimizer``, ``schedule``, ``warmup``, ``weight_decay``, ``clip``.

    Returns
    -------
    PretrainReport

    Raises
    ------
    FitError
        If an option is wrong, there are too few images, or the loss is not finite before the first epoch is over.
    BackboneError
        If the network does not exist, or no new top can be put on it.
    ThawlineError
        Whatever extraction raises.
    ModelFileError
        If the file cannot be written; before any work where `save` says so already.
    """
    destination = check_destination(save, ".safetensors")
    options = {"task": task, "init": init, "augment": augment, "seed": seed, "precision": precision}
    check_options(PRETRAIN, options | training)
    known = [one.parameter for one in PRETRAIN]
    for name in training:
        if name not in known:
            raise FitError(f"pretraining has no option '{name}'{nearest(name, known)}; it has {', '.join(known)}")
    from pipeline.backbones.aliases import INPUT
    from pipeline.backbones.registry import load_backbone
    from pipeline.finetuning.data import TrainingSetup, extract_plain
    from pipeline.finetuning.recipe import make_recipe

    recipe = make_recipe(training | {"augment": _augmentation(task, augment)})
    notes: list[str] = []
    setup = TrainingSetup(
        open_source(source), _start(backbone, init, seed), "none", recipe, init, False, False, Path(output), precision,
        "float32", size, white, "auto", device, workers, None, progress or silent, say or notes.append,
    )  # fmt: skip
    loaded = load_backbone(setup.backbone, size, white)
    loaded.check_rebuilt()
    height, width = loaded.preprocessing.size
    if height != width and task != "pseudo-classes":
        raise FitError(f"the task {task} needs square inputs, got {height}x{width}; use one side, or pseudo-classes")
    lesson = _lesson(task, setup, loaded, extract_plain(setup, INPUT), seed, notes)
    network, outcome = _train(lesson, task, setup, loaded, seed, notes)
    saved_as = f"{loaded.handle.partition('@')[0]}@{destination}"
    result = PretrainResult(saved_as=saved_as, path=str(destination), **outcome)
    _save(destination, network, loaded, result)
    return PretrainReport(result, list(dict.fromkeys(notes)))


def _start(backbone: str, init: str, seed: int) -> str:
    """Return the backbone with the weights to begin with."""
    _, named, weights = backbone.partition("@")
    if init == "pretrained":
        return backbone
    if named and not weights.startswith("random"):
        raise FitError(f"init random draws its own weights; to begin with {weights}, use init pretrained")
    return backbone if named else f"{backbone}@random:{seed}"


def _augmentation(task: str, augment: str | None) -> str:
    if augment is None:
        return AUGMENTED.get(task, NO_AUGMENT)
    if task not in AUGMENTED and augment != NO_AUGMENT:
        raise FitError(f"the task {task} makes its own views of each image; leave out augment")
    if task == "pseudo-classes" and augment == NO_AUGMENT:
        raise FitError("pseudo-classes are told by augmented views; name an augmentation, such as augment crop+flip")
    return augment


def _lesson(
    name: str, setup: TrainingSetup, backbone: Backbone, listing: CacheFile, seed: int, notes: list[str]
) -> _Lesson:
    """Divide the images that can be read, and make the task."""
    from pipeline.finetuning.inputs import DecodedImages
    from pipeline.pretraining.tasks import Canvases, EgoMotion, PseudoClasses, Rotation, SlowFeatures, next_frames
    from pipeline.pretraining.windows import canvas_of

    augment, digests = setup.recipe.augment, np.asarray(listing.digests)

    def images_as(preprocessing: Any) -> DecodedImages:
        return DecodedImages(setup.source, preprocessing, augment, setup.workers, digests)

    train, val = _divide(listing, seed, notes)
    images = images_as(backbone.preprocessing)
    canvases = Canvases(images_as(canvas_of(backbone.preprocessing)), backbone.preprocessing.size, digests)
    lesson = partial(_Lesson, images=images, digests=digests, train=train, val=val)
    if name == "rotation":
        views = "" if augment == NO_AUGMENT else f" of {augment} views"
        return lesson(Rotation(images, augmented=augment != NO_AUGMENT), shown=f"four turns{views}")
    if name == "pseudo-classes":
        rng = np.random.default_rng(seed)
        train = np.sort(rng.permutation(train)[:MOST_CLASSES])
        val = np.sort(rng.permutation(train)[: max(1, len(train) // 5)])
        shown = f"{augment} views of {len(train)} images"
        return lesson(PseudoClasses(images, train), shown=shown, train=train, val=val)
    if name == "ego-motion":
        return lesson(EgoMotion(canvases), shown="two windows of each image")
    uris, groups = listing.uris.tolist(), listing.groups.tolist()
    following = next_frames(uris, groups, train) | next_frames(uris, groups, val)
    if not any(row in following for row in train.tolist()):
        return lesson(SlowFeatures(images, canvases, None), shown="synthetic pans over each image")
    train, val = (np.array([row for row in part.tolist() if row in following], np.int64) for part in (train, val))
    shown = f"sequences of frames: {len({groups[row] for row in train.tolist()})} groups in the order of their names"
    task = SlowFeatures(images, canvases, following)
    return lesson(task, shown=shown, train=train, val=val, following=following)


def _divide(listing: CacheFile, seed: int, notes: list[str]) -> tuple[IntArray, IntArray]:
    """Return the training and the validation rows: those of `fit` with the same seed, and images without a label.

    What `fit` would test is left out, and so is what has its bytes or is of its group. Without labels of two classes,
    a fifth of the images is for validation, unless the source says which.
    """
    listing.check_columns()
    check_readable(listing)
    done = listing.states == DONE
    labels = np.where(done, listing.labels, -1)
    splits, groups, digests = listing.splits, listing.groups, np.asarray(listing.digests)
    units = join_units(groups, digests)
    if len(np.unique(labels[labels >= 0])) > 1:
        found = make_splits(labels, splits, groups, digests, seed, "all", listing.classes)
        train, val, test = found.train, found.val, found.test
        if not (splits[test] == "test").all():
            notes.append(
                f"{len(test)} images that seed {seed} draws as test images are left out; other seeds of fit and "
                "finetune test images that pretraining has seen"
            )
    else:
        labels = np.full(len(labels), -1)  # one class tells nothing: its images are as if they had no label
        train, val, test = (np.flatnonzero(done & (splits == part)) for part in ("train", "val", "test"))
        if not len(test):
            notes.append("no images are left out: what fit tests by labels of a table may have been seen here")
    held = np.isin(units, units[np.concatenate([val, test])])
    free = np.flatnonzero(done & (labels < 0) & ~held & np.isin(splits, ["", "train"]))
    train = np.union1d(train, free)
    if len(train) < 2:
        raise FitError(f"pretraining needs at least two training images, got {len(train)}")
    if not len(val):
        train, val = hold_out(train, np.zeros(len(done), np.int64), units, np.random.default_rng(seed))
        notes.append(f"{len(val)} images were drawn for validation, by seed")
    return train, val


def _train(
    lesson: _Lesson, name: str, setup: TrainingSetup, backbone: Backbone, seed: int, notes: list[str]
) -> tuple[ThawedNetwork, dict[str, Any]]:
    """Train, and return the network and the fields of the result."""
    import torch

    from pipeline.engines.select import resolve
    from pipeline.engines.torch_engine import exact_float32
    from pipeline.finetuning.loop import train
    from pipeline.finetuning.network import NOTHING, ThawedNetwork, train_precision
    from pipeline.pretraining.tasks import TaskRows

    began, recipe = time.perf_counter(), setup.recipe
    resolved = resolve(setup.engine, setup.device, setup.precision)
    torch.manual_seed(seed)  # draws the weights of the new top
    network = ThawedNetwork(backbone, NOTHING, "linear", 1)
    network.new_head.layers = lesson.task.top(len(network.new_head.standardise.mean))
    network.precision = train_precision(network, resolved, setup.precision)
    rows = TaskRows(lesson.task, lesson.images, lesson.train, recipe.batch_size, seed)
    val = TaskRows(lesson.task, lesson.images, lesson.val, recipe.batch_size, _VALIDATION + seed)
    with explained(setup.folder, "make the folder of checkpoints"):
        setup.folder.mkdir(parents=True, exist_ok=True)
    how = {"task": name, "seed": seed, "precision": network.precision, "device": resolved.device}
    checkpoint = setup.folder / f"{_key(lesson, setup, backbone, **how)}.pt"
    with exact_float32():
        trained = train(
            network, recipe, setup.rate, rows, val if len(lesson.val) else None, lesson.task.objective, checkpoint,
            seed, resolved.device, setup.progress, f"{backbone.handle}, {name}, seed {seed}",
        )  # fmt: skip
    notes += trained.notes
    if not len(lesson.val):
        notes.append("without validation images training goes through all epochs and keeps the last weights")
    kept = trained.history[trained.best_epoch - 1]
    params = {key: value for key, value in json_fields(recipe).items() if key in {one.parameter for one in PRETRAIN}}
    return network, {
        "kind": "pretrain",
        "backbone": backbone.handle,
        "task": name,
        "shown": lesson.shown,
        "init": setup.init,
        "params": params | {"lr": setup.rate, "precision": network.precision},
        "seed": seed,
        "n_train": len(lesson.train),
        "n_val": len(lesson.val),
        "inputs_per_image": lesson.task.copies,
        "chance": lesson.task.chance,
        "epochs": len(trained.history),
        "best_epoch": trained.best_epoch,
        "steps": trained.best_epoch * rows.n_batches,
        "train_loss": kept["train_loss"],
        "valid_loss": kept.get("valid_loss"),
        "valid_accuracy": kept.get("valid_acc"),
        "seconds": time.perf_counter() - began + trained.resumed_seconds,
        "converged": not trained.diverged,
        "history": trained.history,
    }


def _key(lesson: _Lesson, setup: TrainingSetup, backbone: Backbone, **inputs: Any) -> str:
    """Return the name of the checkpoint: it changes with all that the trained weights depend on."""
    rows = hashlib.blake2b(digest_size=16)
    shown = np.concatenate([lesson.train, lesson.val])
    after = np.array([lesson.following[row] for row in shown.tolist() if lesson.following], np.int64)
    for index in (lesson.train, lesson.val, after):
        rows.update(lesson.digests[index].tobytes() + b"|")
    return stage_key(
        "pretext checkpoint",
        recipe=json_fields(setup.recipe),
        rate=setup.rate,
        backbone=backbone.name,
        weights=backbone.weights_digest,
        preprocessing=json_fields(backbone.preprocessing),
        rows=rows.hexdigest(),
        **inputs,
    )


def _save(path: Path, network: ThawedNetwork, backbone: Backbone, result: PretrainResult) -> None:
    """Write the weights of `backbone` as trained, without its classifier, and how they were trained in the header."""
    from safetensors.torch import save_file

    state = backbone.module.state_dict() | network.cpu().body.state_dict()
    prefixes = tuple(f"{one}." for one in backbone.classifiers)
    kept = {name: item.contiguous().clone() for name, item in state.items() if not name.startswith(prefixes)}
    with writing(path) as draft:
        save_file(kept, draft, {"format": "pt", "pretrain": json.dumps(to_json(result), allow_nan=False)})
