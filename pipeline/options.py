"""Every option of every command: what it is called, what it takes, its default, and what a plan may say about it.

The command line (`pipeline.commands`), plans (`pipeline.comparing.plan`) and the checks of a fine-tune
(`pipeline.finetuning.recipe`) all read this table. To add an option, add a line here and a parameter to the stage.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from numbers import Integral, Real
from pathlib import Path
from typing import Any, Literal

from features_cache import nearest
from pipeline.errors import BackboneError, FitError
from pipeline.spec import (
    DEFAULT_BACKBONE,
    DEFAULT_CACHE,
    DEFAULT_LAYER,
    DEFAULT_POOL,
    ENGINES,
    NO_AUGMENT,
    POOLS,
    PRECISIONS,
    STORES,
    parse_size,
)

OPTIMIZERS = ("adamw", "sgd")
SCHEDULES = ("cosine", "plateau")
TOPS = ("linear", "hidden", "direct")
INITS = ("pretrained", "random")
NEARBY_TASKS = ("rotation", "pseudo-classes", "slow", "ego-motion")
TRAIN_PRECISIONS = ("auto", "fp32", "bf16")
WATCHES = ("gradients",)
CLASSIFICATION, MULTILABEL, REGRESSION = TASKS = ("classification", "multilabel", "regression")
METRICS = (
    "accuracy",
    "mean_per_class_accuracy",
    "macro_f1",
    "kappa",
    "auroc",
    "average_precision",
    "top5_accuracy",
)
"""What parameters and models may be chosen by, on validation rows, if classes are predicted."""
METRICS_OF = {
    CLASSIFICATION: METRICS,
    MULTILABEL: ("average_precision", "macro_f1", "micro_f1"),
    REGRESSION: ("r2", "rmse", "mae"),
}
"""The metrics of each task, the default first."""
DEFAULT_HEADS = {CLASSIFICATION: "logreg", MULTILABEL: "logreg", REGRESSION: "ridge"}


@dataclass(frozen=True)
class Kind:
    """What an option takes.

    Parameters
    ----------
    type : type
        Of a value: ``float`` for any finite number, ``object`` where `fits` says it all.
    expected : str
        What fits, in words.
    fits : callable
        Whether a value of that type fits; by default all do.
    names : tuple of str
        What a choice is between.
    least : int
        Least value of a whole number.
    """

    type: type
    expected: str
    fits: Callable[[Any], bool] = lambda _: True
    names: tuple[str, ...] = ()
    least: int = 0

    def problem(self, value: Any) -> str:
        """Return what is wrong with a value, ``""`` if nothing is."""
        if self.type in (int, float):
            typed = isinstance(value, Integral if self.type is int else Real) and not isinstance(value, bool)
        else:
            typed = isinstance(value, self.type)
        if typed and (self.type is not float or math.isfinite(value)) and self.fits(value):
            return ""
        return f"expected {self.expected}, got {value!r}{nearest(str(value), self.names)}"


def choice(*names: str) -> Kind:
    """Return the kind of one of several names."""
    return Kind(str, f"one of {', '.join(names)}", names.__contains__, names)


def whole(least: int = 1) -> Kind:
    """Return the kind of a whole number."""
    return Kind(int, f"a whole number, at least {least}", lambda value: value >= least, least=least)


def parse_rate(text: str) -> tuple[str, float]:
    """Return the layer and the learning rate of ``LAYER=RATE``; raises `ValueError` where there is no number.

    Examples
    --------
    >>> parse_rate("blocks.5=0.0001")
    ('blocks.5', 0.0001)
    """
    layer, _, rate = text.rpartition("=")
    return layer.strip(), float(rate)


def _is_rate(value: Any) -> bool:
    try:
        layer, rate = parse_rate(value) if isinstance(value, str) else value
    except ValueError:
        return False
    return bool(layer) and not POSITIVE.problem(rate)


def _is_size(value: Any) -> bool:
    try:
        return not isinstance(value, bool) and parse_size(value) is not None
    except BackboneError:
        return False


TEXT = Kind(str, "a text", lambda value: bool(value.strip()) and "\0" not in value)
FLAG = Kind(bool, "true or false")
HERE = replace(TEXT, expected="a folder on this machine", fits=lambda value: TEXT.fits(value) and "://" not in value)
FILE = Kind(Path, "a file")
FOLDER = Kind(Path, "a folder")
POSITIVE = Kind(float, "a number above 0", lambda value: value > 0)
NOT_NEGATIVE = Kind(float, "a number, at least 0", lambda value: value >= 0)
UP_TO_ONE = Kind(float, "a number above 0, at most 1", lambda value: 0 < value <= 1)
SHARE = Kind(float, "a number, at least 0 and below 1", lambda value: 0 <= value < 1)
SHOTS_OR_ALL = Kind(
    object,
    "a positive number of images per class, or 'all'",
    lambda value: value == "all" or not whole().problem(value),
)
NEAR = "near"
DEFAULT_SCALING = "l2"
"""Statistics of a handful of training rows are noise, and the length of a row needs none. `benchmarks/few_shot.py` has
the figures."""
LEAKS = Kind(object, f"true, false or '{NEAR}'", lambda value: isinstance(value, bool) or value == NEAR)
INPUT_SIZE = Kind(object, "a number of pixels, or HEIGHTxWIDTH such as 192x256", _is_size)
RATE = Kind(object, "LAYER=RATE with a rate above 0, such as blocks.5=0.0001", _is_rate)


def head_name(head: str) -> str:
    """Return ``FAMILY/SCALING`` for the name of a head that may lack its scaling.

    Examples
    --------
    >>> head_name("knn"), head_name("knn/none")
    ('knn/l2', 'knn/none')
    """
    return head if "/" in head else f"{head}/{DEFAULT_SCALING}"


def _is_share(value: Any) -> bool:
    index, slash, count = value.partition("/")
    return bool(slash) and index.isdecimal() and count.isdecimal() and 1 <= int(index) <= int(count)


SHARE_OF = Kind(str, "a share such as 3/64, the third of 64", _is_share)
_CLUSTER = re.compile(r"local(:[1-9]\d*)?|gpus|\w+://\S+|file:.+|[^\W\d]\w*(\.\w+)+(:\d+)?(:[1-9]\d*)?")
CLUSTER = Kind(
    str,
    "local:N, gpus, tcp://HOST:PORT, tls://HOST:PORT, file:PATH of a scheduler file, or a class such as "
    "dask_jobqueue.SLURMCluster:N or dask_jobqueue.SLURMCluster:LEAST:MOST",
    lambda value: _CLUSTER.fullmatch(value) is not None,
)


@dataclass(frozen=True)
class Option:
    """One option of one command.

    Parameters
    ----------
    name : str
        On the command line after ``--``, and the key in a plan.
    kind : Kind
        Which values it takes.
    help : str
        What ``--help`` says.
    default : object
        None leaves the choice to the stage.
    short : str
        One letter, ``"b"`` for ``-b``; ``""`` for none.
    repeat : str
        The stage's parameter, a sequence, if the option may be given several times; ``""`` if not.
    plan : {"", "crossed", "joined", "once"}
        How a plan may give it: not at all; a list makes a job of each value; a list makes one value, joined by commas;
        one value that says how to run and makes no other job.
    stage_name : str
        The stage's parameter if it has another name.
    auto : bool
        Whether the command line also takes ``auto``, which the stage gets as None.
    required : bool
        Whether the command must be given it.
    """

    name: str
    kind: Kind
    help: str
    default: Any = None
    short: str = ""
    repeat: str = ""
    plan: Literal["", "crossed", "joined", "once"] = ""
    stage_name: str = ""
    auto: bool = False
    required: bool = False

    @property
    def parameter(self) -> str:
        """Name of the stage function's parameter."""
        return self.repeat or self.stage_name or self.name.replace("-", "_")

    @property
    def crossed(self) -> bool:
        """Whether each value makes another job."""
        return self.plan in ("crossed", "joined")


crossed = partial(Option, plan="crossed")
once = partial(Option, plan="once")
JSON = Option("json", FLAG, "Print one JSON document on stdout.", default=False, stage_name="as_json")
"""Every command has it."""
CLASSES_HELP = "Give every class the same weight, whatever its number of images."
SIZE = crossed("size", INPUT_SIZE, "Side of the network's input, in pixels, or HEIGHTxWIDTH; default: its own.")
WHITE = crossed("white", whole(), "Level that is white in grey images wider than 8 bits, such as 4095 for 12 bits.")
STORE = crossed("store", choice(*STORES), "Number type of the features on disk.", "float32")
WORKERS = once("workers", whole(), "Decoding threads; auto is one per core.", auto=True)
ENGINE = once("engine", choice(*ENGINES), "What runs the network.", "auto")
DEVICE = once("device", TEXT, "auto, cpu, cuda or cuda:N.", "auto")
CLUSTER_OPTION = once("cluster", CLUSTER, "Extract on many workers: local:N, gpus, an address or a class.")
OUTPUT = once("output", TEXT, "Cache folder, or a URL of one, such as s3://bucket/photos.", DEFAULT_CACHE, "o")
SHOTS = crossed("shots", SHOTS_OR_ALL, "Training images per class, or all.", "all", repeat="shots")
SEED = crossed("seed", whole(0), "Seed of the split and the shots.", 0, repeat="seeds")
WHICH_SOURCE = Option("source", TEXT, "Which source, if the cache holds several: its name or location.")
WHICH_BACKBONE = Option("backbone", TEXT, "Which backbone, if the cache holds several.", short="b")
WHICH_LAYER = Option("layer", TEXT, "Which layer, if the cache holds several.", short="l")
WHICH_POOL = Option("pool", choice(*POOLS), "Which pooling, if the cache holds several.")
TASK = Option("task", choice(*TASKS), "What is predicted: a class, any number of labels, or a number.", CLASSIFICATION)
LABELS = (
    Option("labels", FILE, "Take labels from this table, .csv, .tsv, .jsonl or .parquet, not from the source."),
    Option(
        "target",
        TEXT,
        "Its column of labels or numbers; default: label, or the only one left. Columns of 0 and 1: a label each.",
        repeat="target",
    ),
    Option("key", TEXT, "Its column of image names; default: the first called uri, path, file or the like."),
    TASK,
)
"""Where the labels come from, and what they are."""
FIT_LABELS = (
    *LABELS,
    Option(
        "metric",
        choice(*dict.fromkeys(name for names in METRICS_OF.values() for name in names)),
        "What parameters and models are chosen by, on validation rows. Default: accuracy; labels have "
        "average_precision (default), macro_f1 and micro_f1, numbers r2 (default), rmse and mae.",
    ),
)
"""The same, and what to choose by. A plan gives these above its tables, because they are the same for all jobs."""
ONE_CACHE = (WHICH_SOURCE, WHICH_BACKBONE, WHICH_LAYER, WHICH_POOL)

LOOK_LAYER = Option("layer", TEXT, "Layer to compare images on; default: penultimate, or the only one.", short="l")
PAGE = Option("page", FILE, "Show the images on this .html page, a single file.")

EXTRACT = (
    crossed("backbone", TEXT, "NAME or NAME@WEIGHTS.", DEFAULT_BACKBONE, "b", repeat="backbones"),
    crossed("layer", TEXT, "Layer name or alias.", DEFAULT_LAYER, "l", repeat="layers"),
    crossed("pool", choice(*POOLS), "How a layer's activations become features.", DEFAULT_POOL, repeat="pool"),
    OUTPUT,
    crossed("precision", choice(*PRECISIONS), "auto is bf16 if the hardware supports it.", "auto"),
    STORE,
    SIZE,
    WHITE,
    once("batch-size", whole(), "Images per forward pass; auto suits the machine.", auto=True),
    WORKERS,
    once("on-error", choice("skip", "stop"), "What to do when an image is unreadable.", "skip"),
    Option("rehash", FLAG, "Read every file again instead of trusting its size and time.", default=False),
    ENGINE,
    DEVICE,
    Option("part", SHARE_OF, "Extract only this share of the parts, such as 3/64; for job arrays."),
    CLUSTER_OPTION,
    Option("part-rows", whole(), "Split a source of more rows into parts of at most so many rows."),
)
FIT = (
    crossed("layer", TEXT, "Layer, or A+B to join two. Default: every cached layer.", None, "l", repeat="layers"),
    crossed("head", TEXT, "Such as linear_svm or rbf_svm/l2; default: logreg, of numbers ridge.", repeat="heads"),
    SHOTS,
    SEED,
    WHICH_SOURCE,
    WHICH_BACKBONE,
    WHICH_POOL,
    *FIT_LABELS,
    Option("with", TEXT, "Column of the table to join to the features, and say what it adds.", repeat="columns"),
    once("cv", whole(2), "Cross-validate with this many folds; every image is tested once."),
    once("balanced", FLAG, CLASSES_HELP, default=False),
    once("drop-leaks", LEAKS, "Leave out test images with training images' bytes; near: near-duplicates, too.", False),
    Option("save", FILE, "Write the best model (most shots, then best by validation) as this .skops file."),
    Option("plot", FOLDER, "Draw the results into this folder."),
    once("jobs", whole(), "Fits at a time; default: one per core."),
    replace(DEVICE, help="Where logreg is trained: cpu (which auto means), cuda or cuda:N."),
)
RECIPE = (
    crossed("top", choice(*TOPS), "Kind of the new top.", "linear"),
    crossed("lr", POSITIVE, "Highest learning rate; default: one that suits the optimizer."),
    crossed("layer-decay", UP_TO_ONE, "Multiply the rate by this for each block further down.", 1.0),
    Option("lr-at", RATE, "LAYER=RATE: a layer's own learning rate.", repeat="lr_at", plan="joined"),
    crossed("epochs", whole(), "Passes over the training images, at most.", 30),
    crossed("patience", whole(), "Stop after this many epochs without a lower validation loss.", 5),
    crossed("batch-size", whole(), "Images per step.", 32),
    crossed("optimizer", choice(*OPTIMIZERS), "How weights are updated; sgd has Nesterov momentum 0.9.", "adamw"),
    crossed("schedule", choice(*SCHEDULES), "How the learning rates fall.", "cosine"),
    crossed("warmup", whole(0), "Epochs in which the learning rates rise.", 1),
    crossed("weight-decay", NOT_NEGATIVE, "Strength of weight decay; not applied to biases and norm layers.", 0.01),
    crossed("label-smoothing", SHARE, "Share of each label that is spread over all classes.", 0.0),
    crossed("class-weights", FLAG, CLASSES_HELP, default=False),
    crossed("augment", TEXT, "none, or crop, flip and colour, joined by +.", NO_AUGMENT),
    crossed("views", whole(), "With --augment: cache the trunk's activations for this many views of each image."),
    crossed("clip", POSITIVE, "Clip the gradient over all weights to this norm."),
)
"""How a fine-tune trains: the fields of `pipeline.finetuning.recipe.Recipe`."""
FINETUNE = (
    crossed("backbone", TEXT, "NAME or NAME@WEIGHTS.", DEFAULT_BACKBONE, "b"),
    crossed("freeze", TEXT, "all: train only a new top; none: train everything; LAYER: train what is above it.", "all"),
    crossed("init", choice(*INITS), "Weights to start from.", "pretrained"),
    crossed(
        "head-first", FLAG, "Train the new top alone first, then everything above the thaw line (LP-FT).", default=False
    ),
    *RECIPE,
    SHOTS,
    replace(SEED, help="Seed of the split, the shots and the training."),
    *FIT_LABELS,
    replace(OUTPUT, help="Folder of cache files and checkpoints.", kind=HERE),
    Option("save", FILE, "Write the best model (most shots, then best by validation) as this .safetensors file."),
    Option("watch", choice(*WATCHES), "What to record for each layer; warns where it is unhealthy."),
    Option("picture", FILE, "Draw the loss curves as a .png; with --watch also NAME-gradients.png."),
    crossed("precision", choice(*TRAIN_PRECISIONS), "auto is what trains fastest.", "auto"),
    replace(STORE, help="Number type of the cached activations."),
    SIZE,
    WHITE,
    WORKERS,
    ENGINE,
    DEVICE,
    CLUSTER_OPTION,
)
_NO_PRETEXT = ("top", "layer-decay", "lr-at", "label-smoothing", "class-weights", "augment", "views")
PRETRAIN = (
    Option("backbone", TEXT, "NAME or NAME@WEIGHTS.", DEFAULT_BACKBONE, "b"),
    Option("task", choice(*NEARBY_TASKS), "What the network learns to predict.", required=True),
    Option("save", FILE, "Write the backbone as this .safetensors file; it is then NAME@FILE.", required=True),
    Option("init", choice(*reversed(INITS)), "Weights to start from, unless NAME@random:SEED says it.", "random"),
    Option("augment", TEXT, "none, or crop, flip and colour, joined by +; default: what suits the task."),
    *(option for option in RECIPE if option.name not in _NO_PRETEXT),
    replace(SEED, help="Seed of the split, the weights and the training.", repeat=""),
    replace(OUTPUT, help="Folder of cache files and checkpoints.", kind=HERE),
    Option("precision", choice(*TRAIN_PRECISIONS), "auto is what trains fastest.", "auto"),
    SIZE,
    WHITE,
    WORKERS,
    DEVICE,
)
SPLIT_SEED = Option("seed", whole(0), "Seed of the split.", 0)
NEAR_THRESHOLD = Option(
    "threshold", UP_TO_ONE, "Least similarity of near-duplicates; default: measured with planted copies."
)
COMMANDS: dict[str, tuple[Option, ...]] = {
    "backbones": (),
    "layers": (SIZE,),
    "extract": EXTRACT,
    "fit": FIT,
    "finetune": FINETUNE,
    "pretrain": PRETRAIN,
    "predict": (
        Option("csv", FILE, "Write the predictions as this .csv file."),
        Option("output", TEXT, "Cache folder or URL to work through, so that a long run can resume.", short="o"),
        Option("table", FILE, "A table with the columns that the model reads beside the images (fit --with)."),
        LABELS[2],
        ENGINE,
        DEVICE,
        CLUSTER_OPTION,
    ),
    "export": (Option("onnx", FILE, "The .onnx file to write.", required=True, stage_name="path"),),
    "rank": (
        WHICH_SOURCE,
        replace(WHICH_BACKBONE, help="Only this backbone."),
        replace(WHICH_POOL, help="Only this pooling."),
        SPLIT_SEED,
        *LABELS,
        Option("fit", FLAG, "Also fit the default head, and compare the orders.", False, stage_name="fitted"),
    ),
    "units": (
        Option("layer", TEXT, "Layer name or alias.", short="l", repeat="layers", required=True),
        Option(
            "channel",
            whole(0),
            "Number of a channel to show of each layer. Default: the most selective.",
            repeat="channels",
        ),
        Option("output", FILE, "Write the page as this .html file.", "units.html", "o", stage_name="page"),
        WHICH_SOURCE,
        WHICH_BACKBONE,
        replace(SPLIT_SEED, help="Seed of the permutations."),
        Option("images", TEXT, "Where the images are now, if they have moved."),
    ),
    "drift": (
        Option("layer", TEXT, "A layer that both caches hold.", DEFAULT_LAYER, "l"),
        replace(WHICH_BACKBONE, help="Which backbone, if a cache holds several."),
        replace(WHICH_POOL, help="Which pooling, if a cache holds several."),
        replace(SPLIT_SEED, help="Seed of draws, folds and permutations."),
    ),
    "duplicates": (
        LOOK_LAYER,
        WHICH_SOURCE,
        WHICH_BACKBONE,
        WHICH_POOL,
        NEAR_THRESHOLD,
        Option("csv", FILE, "Write all that was found as this .csv file."),
        PAGE,
        ENGINE,
        DEVICE,
    ),
    "suspects": (
        LOOK_LAYER,
        WHICH_SOURCE,
        WHICH_BACKBONE,
        WHICH_POOL,
        Option("head", TEXT, "A head with probabilities.", "logreg"),
        NEAR_THRESHOLD,
        replace(SPLIT_SEED, help="Seed of the folds and of the labels that are changed on purpose."),
        Option("labels-out", FILE, "Write all labels as this .csv file, those in doubt replaced by what fits better."),
        Option(
            "corrections", FILE, "With --labels-out: change only the labels in this .csv file, as saved by the page."
        ),
        PAGE,
    ),
    "similar": (
        LOOK_LAYER,
        WHICH_SOURCE,
        WHICH_BACKBONE,
        WHICH_POOL,
        Option("count", whole(), "Images to find for each.", 10, "n"),
        Option("csv", FILE, "Write all that was found as this .csv file."),
        PAGE,
        ENGINE,
        DEVICE,
    ),
    "compare": (
        Option("output", HERE, "Run folder, for results, cache and report; made if missing.", short="o", required=True),
        Option("dry-run", FLAG, "Check all of PLAN, and list its jobs with rough times and sizes.", default=False),
        Option("against", FOLDER, "Say what changed, beyond noise, since the run in this folder."),
    ),
    "demo": (
        Option(
            "output",
            HERE,
            "Folder for the cache, the model and the picture.",
            "thawline-demo",
            "o",
            stage_name="folder",
        ),
    ),
    "lecture": (
        Option("source", TEXT, "Labelled images to measure the claims on.", "digits"),
        Option("output", HERE, "Folder for the page and for all that the claims compute.", "thawline-lecture", "o"),
        Option("quick", FLAG, "Run each claim in a short form, which shows that it works, not that it holds.", False),
    ),
    "cache ls": (),
    "cache show": ONE_CACHE,
    "cache verify": (
        Option("source", TEXT, "The images: also compare the digest of each row with its image."),
        Option("repair", FLAG, "Mark damaged rows as pending, so that extract computes them again.", default=False),
        replace(CLUSTER_OPTION, help="Verify on many workers: local:N, gpus, an address or a class."),
    ),
    "cache export": ONE_CACHE,
    "cache prune": (Option("yes", FLAG, "Do not ask before deleting.", default=False),),
}
"""The options of each command, in the order of its help."""
TABLES: dict[str, dict[str, Option]] = {
    command: {
        option.name: replace(option, kind=HERE) if option is OUTPUT else option
        for option in COMMANDS[command]
        if option.plan
    }
    for command in ("extract", "fit", "finetune")
}
"""The tables of a plan, and the keys that each may hold.

Their order is part of the keys of results: a fine-tune that was kept is found again by its options in this order.
"""


def shared_keys() -> dict[str, Option]:
    """Return what may stand above a plan's tables: sources, labels, and keys that mean the same in several tables."""
    source = crossed("source", TEXT, "")
    tables: dict[str, list[Option]] = {}
    for table in TABLES.values():
        for key, option in table.items():
            tables.setdefault(key, []).append(option)
    # A batch is a forward pass in one table and a training step in another.
    shared = {key: options[0] for key, options in tables.items() if len(options) > 1 and key != "batch-size"}
    above = {one.name: replace(one, plan="once", kind=TEXT if one.kind is FILE else one.kind) for one in FIT_LABELS}
    return {"source": source, **above, **shared}


def tune_parameters(chosen: Iterable[tuple[str, Any]]) -> dict[str, Any]:
    """Return the options of a plan's fine-tune, by their keys, as parameters of `pipeline.finetune.finetune`."""
    parameters = {TABLES["finetune"][key].parameter: value for key, value in chosen}
    if "lr_at" in parameters:
        parameters["lr_at"] = tuple(map(parse_rate, parameters["lr_at"].split(",")))
    return parameters


def check_options(options: Iterable[Option], values: Mapping[str, Any]) -> None:
    """Check the values that a stage was given, by parameter; None stands for the default.

    Raises
    ------
    FitError
        Naming the first parameter whose value does not fit, with what was expected.
    """
    for option in options:
        given = values.get(option.parameter)
        for value in () if given is None else given if option.repeat else (given,):
            if problem := option.kind.problem(value):
                raise FitError(f"{option.parameter}: {problem}")
