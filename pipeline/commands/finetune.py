"""`finetune`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from pipeline.commands.options import AutoCount, as_shots, device_option, engine_option, json_option, source_argument
from pipeline.commands.output import print_json, print_table, say, say_all, to_records
from pipeline.errors import FitError, resumable
from pipeline.finetuning.recipe import INITS, OPTIMIZERS, SCHEDULES, TOPS, TRAIN_PRECISIONS, WATCHES, Recipe, parse_rate
from pipeline.spec import DEFAULT_BACKBONE, DEFAULT_CACHE, STORES

if TYPE_CHECKING:
    from pipeline.results import FinetuneResult


def _rates(_: click.Context, __: click.Parameter, values: tuple[str, ...]) -> tuple[tuple[str, float], ...]:
    try:
        return tuple(map(parse_rate, values))
    except FitError as error:
        raise click.BadParameter(str(error)) from None


@click.command()
@source_argument
@click.option("-b", "--backbone", default=DEFAULT_BACKBONE, help="NAME or NAME@WEIGHTS.")
@click.option("--freeze", default="all", help="all: train a new top alone; none: everything; LAYER: what is above it.")
@click.option("--init", type=click.Choice(INITS), default=INITS[0], help="Weights to begin with.")
@click.option("--head-first", is_flag=True, help="Train the new top alone first, then all above the line (LP-FT).")
@click.option("--top", type=click.Choice(TOPS), default=Recipe.top, help="The new top.")
@click.option("--lr", type=float, help="Highest learning rate; by default one that suits the optimizer.")
@click.option(
    "--layer-decay",
    type=float,
    default=Recipe.layer_decay,
    help="How much slower each block learns than the one above it.",
)
@click.option("--lr-at", multiple=True, callback=_rates, help="LAYER=RATE, a learning rate of its own; repeat.")
@click.option("--epochs", type=int, default=Recipe.epochs, help="Passes over the training images, at most.")
@click.option(
    "--patience", type=int, default=Recipe.patience, help="Epochs without a lower validation loss before it stops."
)
@click.option("--optimizer", type=click.Choice(OPTIMIZERS), default=Recipe.optimizer, help="SGD has momentum 0.9.")
@click.option("--weight-decay", type=float, default=Recipe.weight_decay, help="Not on biases and norms.")
@click.option("--schedule", type=click.Choice(SCHEDULES), default=Recipe.schedule, help="Of the learning rates.")
@click.option("--warmup", type=int, default=Recipe.warmup, help="Epochs in which the rates rise.")
@click.option("--batch-size", type=int, default=Recipe.batch_size, help="Images a step.")
@click.option(
    "--label-smoothing", type=float, default=Recipe.label_smoothing, help="Share of the target spread over all classes."
)
@click.option("--class-weights", is_flag=True, help="Let every class count alike, whatever its size.")
@click.option("--augment", default=Recipe.augment, help="none, or crop, flip and colour, joined by +.")
@click.option("--views", type=int, help="With --augment: so many views of each image, frozen activations cached.")
@click.option("--clip", type=float, help="Longest gradient.")
@click.option("--shots", multiple=True, default=["all"], help="Training images per class, or all; repeat.")
@click.option("--seed", "seeds", multiple=True, type=int, default=[0], help="Of split, shots and training; repeat.")
@click.option("-o", "--output", default=DEFAULT_CACHE, help="Folder of cache files and checkpoints.")
@click.option(
    "--save",
    type=click.Path(dir_okay=False),
    help="Keep the model of most shots, of several the best by validation, as MODEL.safetensors.",
)
@click.option("--watch", type=click.Choice(WATCHES), help="Record and judge them, layer by layer.")
@click.option(
    "--picture",
    type=click.Path(dir_okay=False, path_type=Path),
    help="Draw losses over epochs, as a .png; with --watch also NAME-gradients.png.",
)
@click.option("--precision", type=click.Choice(TRAIN_PRECISIONS), default="auto", help="auto: what is fastest.")
@click.option("--store", type=click.Choice(STORES), default="float32", help="Number type of cached activations.")
@click.option("--size", type=int, help="Side of the network input, pixels; the backbone's own by default.")
@click.option("--workers", type=AutoCount(), default="auto", help="Decoding threads; auto is one a core.")
@engine_option
@device_option
@json_option
@resumable()
def finetune(source: str, shots: tuple[str, ...], picture: Path | None, as_json: bool, **options: Any) -> None:
    """Train a network above its thaw line.

    Splits of SOURCE are those of fit. What is frozen runs once, through the cache; where images are augmented,
    only with --views. A run that was stopped goes on.
    """
    from pipeline.finetune import finetune as run
    from pipeline.model_file import check_destination
    from pipeline.reporting.terminal.progress import progress_bar
    from pipeline.reporting.terminal.tables import finetune_table

    if picture:
        check_destination(picture)
    with progress_bar() as progress:
        report = run(source, shots=as_shots(shots), progress=progress, say=say, **options)
    say_all(report.notes)
    if as_json:
        saved = str(report.saved) if report.saved else None
        print_json({"results": to_records(report.results), "notes": report.notes, "best": report.best, "saved": saved})
    else:
        print_table(finetune_table(report.results))
        if report.saved:
            kept = report.results[report.best]
            chosen = "" if kept.validation_accuracy is None else f", validation accuracy {kept.validation_accuracy:.3f}"
            click.echo(f"model: {report.saved} (seed {kept.seed}, shots {kept.shots}{chosen})")
    if picture:
        _draw(report.results, picture, gradients=options["watch"] is not None)


def _draw(results: Sequence[FinetuneResult], picture: Path, *, gradients: bool) -> None:
    from pipeline.reporting.charts.gradients import save_gradients
    from pipeline.reporting.charts.training import save_training

    save_training(results, picture)
    if gradients:
        save_gradients(results, picture.with_stem(f"{picture.stem}-gradients"))
