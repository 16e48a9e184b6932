"""Every option of every command: what it is called, what it takes, its default, and what a plan may say about it.

The command line (`pipeline.commands`), plans (`pipeline.comparing.plan`) and the checks of a fine-tune
(`pipeline.finetuning.recipe`) all read this table. To add an option, add a line here and a parameter to the stage.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from numbers import Integral, Real
from typing import Any, Literal, cast

from features_cache import nearest
from pipeline.errors import FitError
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
)

OPTIMIZERS = ("adamw", "sgd")
SCHEDULES = ("cosine", "plateau")
TOPS = ("linear", "hidden", "direct")
INITS = ("pretrained", "random")
TRAIN_PRECISIONS = ("auto", "fp32", "bf16")
WATCHES = ("gradients",)


class Kind(ABC):
    """The values that an option takes: ``value in kind`` tests one, and ``str(kind)`` says what is expected."""

    @abstractmethod
    def __contains__(self, value: object) -> bool: ...

    @abstractmethod
    def __str__(self) -> str: ...

    def problem(self, value: object) -> str:
        """Return what is wrong with a value, ``""`` if nothing is."""
        return "" if value in self else f"expected {self}, got {value!r}"


@dataclass(frozen=True)
class Text(Kind):
    """Any text that is not blank; whether what it names exists is checked where it is looked up."""

    def __contains__(self, value: object) -> bool:
        return isinstance(value, str) and bool(value.strip())

    def __str__(self) -> str:
        return "a text"


class File(Text):
    """A file to write."""


class Folder(Text):
    """A folder to read or write."""


@dataclass(frozen=True)
class OneOf(Kind):
    """One of several names."""

    names: tuple[str, ...]

    def __contains__(self, value: object) -> bool:
        return value in self.names

    def __str__(self) -> str:
        return f"one of {', '.join(self.names)}"

    def problem(self, value: object) -> str:
        """Return what is wrong with a value, and the name that is nearest to it; ``""`` if nothing is."""
        return "" if value in self else super().problem(value) + nearest(str(value), self.names)


@dataclass(frozen=True)
class Whole(Kind):
    """A whole number from `min` on; with `auto` the command line also takes ``auto``, which the stage gets as None."""

    min: int = 1
    auto: bool = False

    def __contains__(self, value: object) -> bool:
        return isinstance(value, Integral) and not isinstance(value, bool) and int(value) >= self.min

    def __str__(self) -> str:
        return f"a whole number, at least {self.min}"


@dataclass(frozen=True)
class Number(Kind):
    """A finite number from `min` to `max`; an open end is excluded."""

    min: float = 0.0
    max: float = math.inf
    min_open: bool = False
    max_open: bool = False

    def __contains__(self, value: object) -> bool:
        if not isinstance(value, Real) or isinstance(value, bool) or not math.isfinite(value):
            return False
        number = float(value)
        excluded = (self.min_open and number == self.min) or (self.max_open and number == self.max)
        return self.min <= number <= self.max and not excluded

    def __str__(self) -> str:
        low = f"{'above' if self.min_open else 'at least'} {self.min:g}"
        high = f" and {'below' if self.max_open else 'at most'} {self.max:g}" if self.max < math.inf else ""
        return f"a number {low}{high}"


@dataclass(frozen=True)
class Flag(Kind):
    """Yes or no."""

    def __contains__(self, value: object) -> bool:
        return isinstance(value, bool)

    def __str__(self) -> str:
        return "true or false"


@dataclass(frozen=True)
class Shots(Kind):
    """A number of training images per class, or ``"all"``."""

    def __contains__(self, value: object) -> bool:
        return value == "all" or value in Whole()

    def __str__(self) -> str:
        return "a positive number of images per class, or 'all'"


@dataclass(frozen=True)
class Rate(Kind):
    """A layer and its learning rate, as a pair or as ``LAYER=RATE``."""

    def __contains__(self, value: object) -> bool:
        try:
            layer, rate = parse_rate(value) if isinstance(value, str) else cast("tuple[str, float]", value)
        except ValueError:
            return False
        return bool(layer) and rate in POSITIVE

    def __str__(self) -> str:
        return "LAYER=RATE with a rate above 0, such as blocks.5=0.0001"


POSITIVE = Number(min_open=True)


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
        For a repeated option the only value; None leaves the choice to the stage.
    short : str
        One letter, ``"b"`` for ``-b``; ``""`` for none.
    repeat : bool
        Whether the command takes it several times, and the stage a sequence.
    plan : {"", "crossed", "joined", "once"}
        How a plan may give it: not at all; a list makes a job of each value; a list makes one value, joined by commas;
        one value that says how to run and makes no other job.
    stage_name : str
        Name of the stage's parameter where it is not `name`.
    required : bool
    """

    name: str
    kind: Kind
    help: str
    default: Any = None
    short: str = ""
    repeat: bool = False
    plan: Literal["", "crossed", "joined", "once"] = ""
    stage_name: str = ""
    required: bool = False

    @property
    def parameter(self) -> str:
        """Name of the stage function's parameter."""
        return self.stage_name or self.name.replace("-", "_")

    @property
    def crossed(self) -> bool:
        """Whether each value makes another job."""
        return self.plan in ("crossed", "joined")


JSON = Option("json", Flag(), "Print one JSON document on stdout.", default=False, stage_name="as_json")
"""Every command has it."""
SIZE_HELP = "Side of the network's input, in pixels; default: the backbone's own."
CLASSES_HELP = "Give every class the same weight, whatever its number of images."
SIZE = Option("size", Whole(), SIZE_HELP, plan="crossed")
STORE = Option("store", OneOf(STORES), "Number type of the features on disk.", "float32", plan="crossed")
WORKERS = Option("workers", Whole(auto=True), "Decoding threads; auto is one per core.", plan="once")
ENGINE = Option("engine", OneOf(ENGINES), "What runs the network.", "auto", plan="once")
DEVICE = Option("device", Text(), "auto, cpu, cuda or cuda:N.", "auto", plan="once")
OUTPUT = Option("output", Text(), "Cache folder.", DEFAULT_CACHE, "o", plan="once")
SHOTS = Option(
    "shots", Shots(), "Training images per class, or all; can be repeated.", "all", repeat=True, plan="crossed"
)
SEED = Option(
    "seed", Whole(0), "Seed of the split and the shots; can be repeated.", 0, repeat=True, plan="crossed",
    stage_name="seeds",
)  # fmt: skip
WHICH_SOURCE = Option("source", Text(), "Which source, if the cache holds several: its name or location.")
WHICH_BACKBONE = Option("backbone", Text(), "Which backbone, if the cache holds several.", short="b")
WHICH_LAYER = Option("layer", Text(), "Which layer, if the cache holds several.", short="l")
WHICH_POOL = Option("pool", OneOf(POOLS), "Which pooling, if the cache holds several.")
ONE_CACHE = (WHICH_SOURCE, WHICH_BACKBONE, WHICH_LAYER, WHICH_POOL)

EXTRACT = (
    Option(
        "backbone", Text(), "NAME or NAME@WEIGHTS; can be repeated.", DEFAULT_BACKBONE, "b", repeat=True,
        plan="crossed", stage_name="backbones",
    ),
    Option(
        "layer", Text(), "Layer name or alias; can be repeated.", DEFAULT_LAYER, "l", repeat=True, plan="crossed",
        stage_name="layers",
    ),
    Option("pool", OneOf(POOLS), "How a layer's activations become features.", DEFAULT_POOL, plan="crossed"),
    OUTPUT,
    Option("precision", OneOf(PRECISIONS), "auto is bf16 where the hardware has it.", "auto", plan="crossed"),
    STORE,
    SIZE,
    Option("batch-size", Whole(auto=True), "Images per forward pass; auto suits the machine.", plan="once"),
    WORKERS,
    Option("on-error", OneOf(("skip", "stop")), "What to do when an image is unreadable.", "skip", plan="once"),
    Option("rehash", Flag(), "Read every file again instead of trusting its size and time.", default=False),
    ENGINE,
    DEVICE,
)  # fmt: skip
FIT = (
    Option(
        "layer", Text(), "Layer, or A+B to join two; can be repeated. Default: every cached layer.", None, "l",
        repeat=True, plan="crossed", stage_name="layers",
    ),
    Option(
        "head", Text(), "Such as logreg, linear_svm or rbf_svm/l2; can be repeated.", "logreg", repeat=True,
        plan="crossed", stage_name="heads",
    ),
    SHOTS,
    SEED,
    WHICH_SOURCE,
    WHICH_BACKBONE,
    WHICH_POOL,
    Option("cv", Whole(2), "Cross-validate with this many folds; every image is tested once.", plan="once"),
    Option("balanced", Flag(), CLASSES_HELP, default=False, plan="once"),
    Option(
        "drop-leaks", Flag(), "Leave out test images that are byte-identical to training images.", default=False,
        plan="once",
    ),
    Option("save", File(), "Write the best model (most shots, then best by validation) to this file."),
    Option("plot", Folder(), "Draw the results into this folder."),
    Option("jobs", Whole(), "Fits at a time; default: one per core.", plan="once"),
    replace(DEVICE, help="Where logreg is trained: cpu (which auto means), cuda or cuda:N."),
)  # fmt: skip
RECIPE = (
    Option("top", OneOf(TOPS), "The new top.", "linear", plan="crossed"),
    Option(
        "lr", POSITIVE, "Highest learning rate; default: one that suits the optimizer.", plan="crossed"
    ),
    Option(
        "layer-decay", Number(max=1.0, min_open=True), "Multiply the rate by this for each block further down.", 1.0,
        plan="crossed",
    ),
    Option(
        "lr-at", Rate(), "LAYER=RATE: a layer's own learning rate; can be repeated.", repeat=True, plan="joined"
    ),
    Option("epochs", Whole(), "Passes over the training images, at most.", 30, plan="crossed"),
    Option("patience", Whole(), "Stop after this many epochs without a lower validation loss.", 5, plan="crossed"),
    Option("batch-size", Whole(), "Images per step.", 32, plan="crossed"),
    Option("optimizer", OneOf(OPTIMIZERS), "SGD has Nesterov momentum 0.9.", "adamw", plan="crossed"),
    Option("schedule", OneOf(SCHEDULES), "How the learning rates fall.", "cosine", plan="crossed"),
    Option("warmup", Whole(0), "Epochs in which the learning rates rise.", 1, plan="crossed"),
    Option("weight-decay", Number(), "Not applied to biases and norm layers.", 0.01, plan="crossed"),
    Option(
        "label-smoothing", Number(max=1.0, max_open=True), "Share of the target that is spread over all classes.", 0.0,
        plan="crossed",
    ),
    Option("class-weights", Flag(), CLASSES_HELP, default=False, plan="crossed"),
    Option("augment", Text(), "none, or crop, flip and colour, joined by +.", NO_AUGMENT, plan="crossed"),
    Option(
        "views", Whole(), "With --augment: cache the frozen activations of this many views of each image.",
        plan="crossed",
    ),
    Option("clip", POSITIVE, "Clip the gradient over all weights to this norm.", plan="crossed"),
)  # fmt: skip
"""How a fine-tune trains: the fields of `pipeline.finetuning.recipe.Recipe`."""
FINETUNE = (
    Option("backbone", Text(), "NAME or NAME@WEIGHTS.", DEFAULT_BACKBONE, "b", plan="crossed"),
    Option(
        "freeze", Text(), "all: train only a new top; none: train everything; LAYER: train what is above it.", "all",
        plan="crossed",
    ),
    Option("init", OneOf(INITS), "Weights to start from.", "pretrained", plan="crossed"),
    Option(
        "head-first", Flag(), "Train the new top alone first, then everything above the thaw line (LP-FT).",
        default=False, plan="crossed",
    ),
    *RECIPE,
    SHOTS,
    replace(SEED, help="Seed of the split, the shots and the training; can be repeated."),
    replace(OUTPUT, help="Folder of cache files and checkpoints."),
    Option("save", File(), "Write the best model (most shots, then best by validation) as this .safetensors file."),
    Option("watch", OneOf(WATCHES), "Record these for each layer, and say where they are unhealthy."),
    Option("picture", File(), "Draw the loss curves as a .png; with --watch also NAME-gradients.png."),
    Option("precision", OneOf(TRAIN_PRECISIONS), "auto is whatever trains fastest.", "auto", plan="crossed"),
    replace(STORE, help="Number type of the cached activations."),
    SIZE,
    WORKERS,
    ENGINE,
    DEVICE,
)  # fmt: skip
SPLIT_SEED = Option("seed", Whole(0), "Seed of the split.", 0)
COMMANDS: dict[str, tuple[Option, ...]] = {
    "backbones": (),
    "layers": (SIZE,),
    "extract": EXTRACT,
    "fit": FIT,
    "finetune": FINETUNE,
    "predict": (
        Option("csv", File(), "Write the predictions to this file."),
        Option("output", Text(), "Cache folder to work through, so that a long run can resume.", short="o"),
        ENGINE,
        DEVICE,
    ),
    "export": (Option("onnx", File(), "The file to write.", required=True, stage_name="path"),),
    "rank": (
        WHICH_SOURCE,
        replace(WHICH_BACKBONE, help="Only this backbone."),
        replace(WHICH_POOL, help="Only this pooling."),
        SPLIT_SEED,
        Option("fit", Flag(), "Also fit logistic regression, and compare the orders.", False, stage_name="fitted"),
    ),
    "drift": (
        Option("layer", Text(), "A layer that both caches hold.", DEFAULT_LAYER, "l"),
        replace(WHICH_BACKBONE, help="Which backbone, if a cache holds several."),
        replace(WHICH_POOL, help="Which pooling, if a cache holds several."),
        replace(SPLIT_SEED, help="Seed of draws, folds and permutations."),
    ),
    "compare": (
        Option(
            "output", Text(), "Run folder, for results, cache and report; made if missing.", short="o", required=True
        ),
        Option("dry-run", Flag(), "Check all of PLAN, and list its jobs with rough times and sizes.", default=False),
        Option("against", Folder(), "Say what changed, beyond noise, since the run in this folder."),
    ),
    "demo": (
        Option(
            "output",
            Text(),
            "Folder for the cache, the model and the picture.",
            "thawline-demo",
            "o",
            stage_name="folder",
        ),
    ),
    "cache ls": (),
    "cache show": ONE_CACHE,
    "cache verify": (
        Option("source", Text(), "The images: also compare the digest of each row with its image."),
        Option("repair", Flag(), "Mark damaged rows as pending, so that extract computes them again.", default=False),
    ),
    "cache export": ONE_CACHE,
    "cache prune": (Option("yes", Flag(), "Do not ask before deleting.", default=False),),
}
"""The options of each command, in the order of its help."""
TABLES: dict[str, dict[str, Option]] = {
    command: {option.name: option for option in COMMANDS[command] if option.plan}
    for command in ("extract", "fit", "finetune")
}
"""The tables of a plan, and the keys that each may hold.

Their order is part of the keys of results: a fine-tune that was kept is found again by its options in this order.
"""


def shared_keys() -> dict[str, Option]:
    """Return what may stand above a plan's tables: ``source``, and keys that mean the same in several tables."""
    source = Option("source", Text(), "", plan="crossed")
    tables: dict[str, list[Option]] = {}
    for table in TABLES.values():
        for key, option in table.items():
            tables.setdefault(key, []).append(option)
    # A batch is a forward pass in one table and a training step in another.
    shared = {key: options[0] for key, options in tables.items() if len(options) > 1 and key != "batch-size"}
    return {"source": source, **shared}


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


def parse_rate(text: str) -> tuple[str, float]:
    """Return the layer and the learning rate of ``LAYER=RATE``; raises `ValueError` where there is no number.

    Examples
    --------
    >>> parse_rate("blocks.5=0.0001")
    ('blocks.5', 0.0001)
    """
    layer, _, rate = text.rpartition("=")
    return layer.strip(), float(rate)
