"""The command `thawline`: each command parses, calls one stage and prints.

Everything heavy is imported inside the commands, so that ``--help`` answers at once.
"""

from __future__ import annotations

import json
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from features_cache.errors import ThawlineError
from pipeline.spec import (
    DEFAULT_BACKBONE,
    DEFAULT_CACHE,
    DEFAULT_LAYER,
    DEFAULT_POOL,
    ENGINES,
    POOLS,
    PRECISIONS,
    STORES,
)

if TYPE_CHECKING:
    from rich.console import Group
    from rich.table import Table

    from pipeline.fit import FitReport

Command = TypeVar("Command", bound=Callable[..., None])
CONTEXT = {"help_option_names": ["-h", "--help"], "show_default": True, "max_content_width": 110}
source_argument = click.argument("source")
cache_argument = click.argument("cache")
json_option = click.option("--json", "as_json", is_flag=True, help="Print one JSON document on stdout.")
engine_option = click.option("--engine", type=click.Choice(ENGINES), default="auto", help="What computes.")
device_option = click.option("--device", default="auto", help="auto, cpu, cuda or cuda:N.")


class AutoCount(click.IntRange):
    """A positive whole number, or ``auto``, which the stage knows as ``None``."""

    def __init__(self) -> None:
        super().__init__(min=1)

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """Return the number, or ``None``."""
        return None if value == "auto" else super().convert(value, param, ctx)


def selecting_options(command: Command) -> Command:
    """Add the options that pick one file, and one layer, of a cache."""
    for option in (
        click.option("--pool", type=click.Choice(POOLS), help="Which pooling, where the cache holds several."),
        click.option("-l", "--layer", help="Which layer, where the cache holds several."),
        click.option("-b", "--backbone", help="Which backbone, where the cache holds several."),
        click.option("--source", help="Which source, by name or location, where the cache holds several."),
    ):
        command = option(command)
    return command


@click.group(context_settings=CONTEXT)
@click.version_option(package_name="thawline")
def thawline() -> None:
    """Turn images into a trained classifier: frozen CNN features, cached once; scikit-learn heads on top."""


@thawline.command()
@click.option("-o", "--output", default="thawline-demo", help="Folder for the cache, the model and the picture.")
@json_option
def demo(output: str, as_json: bool) -> None:
    """Handwritten digits through the embedded network: where in its depth do the strokes live?"""
    from pipeline.demo import demo as run
    from pipeline.reporting.progress import progress_bar
    from pipeline.reporting.tables import fit_table

    with progress_bar() as progress:
        report = run(output, progress=progress)
    if as_json:
        _print_json({"results": _records(report.results), "summary": report.summary, "files": report.files})
        return
    _print_table(fit_table(report.results))
    click.echo(f"\n{report.summary}\n")
    for name, path in report.files.items():
        click.echo(f"{name}: {path}")


@thawline.command()
@click.argument("pattern", required=False)
@json_option
def backbones(pattern: str | None, as_json: bool) -> None:
    """List the networks, those that match PATTERN (such as 'resnet*') where one is given."""
    from pipeline.backbones.registry import list_backbones
    from pipeline.reporting.tables import rows_table

    found = list_backbones(pattern or "")
    if as_json:
        _print_json({"backbones": [entry._asdict() for entry in found]})
        return
    rows = [(entry.name, entry.zoo, ", ".join(entry.local), ", ".join(entry.weights)) for entry in found]
    _print_table(rows_table(("backbone", "zoo", "here without network", "all weights"), rows))


@thawline.command()
@click.argument("backbone")
@click.option("--size", type=int, help="Side of the network input, pixels; the backbone's own by default.")
@json_option
def layers(backbone: str, size: int | None, as_json: bool) -> None:
    """List the layers of BACKBONE: dotted name, output shape for one image, aliases."""
    from pipeline.backbones.graph import describe
    from pipeline.backbones.registry import sketch
    from pipeline.reporting.tables import rows_table

    found = describe(sketch(backbone, size))
    if as_json:
        _print_json({"layers": [row._asdict() for row in found]})
        return
    rows = [(row.name, "×".join(map(str, row.shape)), ", ".join(row.aliases)) for row in found]
    _print_table(rows_table(("layer", "shape", "aliases"), rows))


@thawline.command()
@source_argument
@click.option("-b", "--backbone", multiple=True, default=[DEFAULT_BACKBONE], help="NAME or NAME@WEIGHTS; repeat.")
@click.option("-l", "--layer", multiple=True, default=[DEFAULT_LAYER], help="Layer name or alias; repeat.")
@click.option("--pool", type=click.Choice(POOLS), default=DEFAULT_POOL, help="How activations become features.")
@click.option("-o", "--output", default=DEFAULT_CACHE, help="Folder of cache files.")
@click.option("--precision", type=click.Choice(PRECISIONS), default="auto", help="auto: bf16 where there is hardware.")
@click.option("--store", type=click.Choice(STORES), default="float32", help="Number type on disk.")
@click.option("--size", type=int, help="Side of the network input, pixels; the backbone's own by default.")
@click.option("--batch-size", type=AutoCount(), default="auto", help="Images a forward pass; auto fits the machine.")
@click.option("--workers", type=AutoCount(), default="auto", help="Decoding threads; auto is one a core.")
@click.option("--on-error", type=click.Choice(["skip", "stop"]), default="skip", help="When an image is unreadable.")
@click.option("--rehash", is_flag=True, help="Read every file again instead of trusting size and time.")
@engine_option
@device_option
@json_option
def extract(source: str, backbone: tuple[str, ...], layer: tuple[str, ...], as_json: bool, **options: Any) -> None:
    """Run frozen networks once over the images of SOURCE and cache their features.

    SOURCE is a folder of class folders (under train/val/test folders or not), a folder of images, one image, a .csv or
    .parquet manifest, a .tar shard or a folder of them, or the word digits.
    """
    from pipeline.extract import extract as run
    from pipeline.reporting.progress import progress_bar
    from pipeline.reporting.tables import extract_table, unreadable_lines

    with progress_bar() as progress:
        results = run(source, backbone, layer, progress=progress, **options)
    for note in dict.fromkeys(note for result in results for note in result.notes):
        click.echo(f"note: {note}", err=True)
    for line in unreadable_lines(results):
        click.echo(line, err=True)
    if as_json:
        _print_json({"caches": _records(results)})
        return
    _print_table(extract_table(results))


@thawline.command()
@click.argument("cache")
@click.option("-l", "--layer", multiple=True, help="Layer, or A+B joined; repeat. Every cached layer by default.")
@click.option("--head", multiple=True, default=["logreg"], help="Such as logreg, linear_svm, rbf_svm/l2; repeat.")
@click.option("--shots", multiple=True, default=["all"], help="Training images per class, or all; repeat.")
@click.option("--seed", multiple=True, type=int, default=[0], help="Seed of the split and of the shots; repeat.")
@click.option("--source", help="Which source, where the cache holds several.")
@click.option("-b", "--backbone", help="Which backbone, where the cache holds several.")
@click.option("--pool", type=click.Choice(POOLS), help="Which pooling, where the cache holds several.")
@click.option("--cv", type=click.IntRange(min=2), help="Cross-validate with so many folds; every image is test once.")
@click.option("--balanced", is_flag=True, help="Let every class count alike, whatever its size.")
@click.option("--drop-leaks", is_flag=True, help="Take test images out that are byte-equal to training images.")
@click.option("--save", type=click.Path(dir_okay=False), help="Keep the best model (by validation) as MODEL.skops.")
@click.option("--plot", type=click.Path(file_okay=False, path_type=Path), help="Draw the results into this folder.")
@click.option("--jobs", type=click.IntRange(min=1), help="Fits at a time; one a core by default.")
@json_option
def fit(
    cache: str, layer: tuple[str, ...], head: tuple[str, ...], shots: tuple[str, ...], seed: tuple[int, ...],
    plot: Path | None, as_json: bool, **options: Any,
) -> None:  # fmt: skip
    """Train heads on the features in CACHE and measure them on its test images, once."""
    from pipeline.fit import fit as run
    from pipeline.reporting.progress import progress_bar
    from pipeline.reporting.tables import fit_table, seeds_table

    if plot:
        plot.mkdir(parents=True, exist_ok=True)  # before the work that would be lost
    with progress_bar() as progress:
        report = run(cache, list(layer) or None, head, seed, _shots(shots), progress=progress, **options)
    for note in report.notes:
        click.echo(f"note: {note}", err=True)
    drawn = _draw_fit(report, plot, cache, options) if plot else []
    if as_json:
        document = {"results": _records(report.results), "summary": _records(report.summary), "notes": report.notes}
        _print_json(document | {"plots": drawn} if plot else document)
        return
    _print_table(fit_table(report.results))
    if report.summary:
        _print_table(seeds_table(report.summary))
    if report.saved:
        click.echo(f"model: {report.saved}")
    for path in drawn:
        click.echo(f"picture: {path}")


@thawline.command()
@source_argument
@click.option("-b", "--backbone", default=DEFAULT_BACKBONE, help="NAME or NAME@WEIGHTS.")
@click.option("--freeze", default="all", help="all: train a new top alone; none: everything; LAYER: what is above it.")
@click.option(
    "--init", type=click.Choice(["pretrained", "random"]), default="pretrained", help="Weights to begin with."
)
@click.option("--head-first", is_flag=True, help="Train the new top alone first, then all above the line (LP-FT).")
@click.option("--top", type=click.Choice(["linear", "hidden", "direct"]), default="linear", help="The new top.")
@click.option("--lr", type=float, help="Highest learning rate; by default one that suits the optimizer.")
@click.option("--layer-decay", type=float, default=1.0, help="How much slower each block learns than the one above it.")
@click.option("--lr-at", multiple=True, help="LAYER=RATE, a learning rate of its own; repeat.")
@click.option("--epochs", type=int, default=30, help="Passes over the training images, at most.")
@click.option("--patience", type=int, default=5, help="Epochs without a lower validation loss before it stops.")
@click.option("--optimizer", type=click.Choice(["adamw", "sgd"]), default="adamw", help="SGD has momentum 0.9.")
@click.option("--weight-decay", type=float, default=0.01, help="Not on biases and norms.")
@click.option("--schedule", type=click.Choice(["cosine", "plateau"]), default="cosine", help="Of the learning rates.")
@click.option("--warmup", type=int, default=1, help="Epochs in which the rates rise.")
@click.option("--batch-size", type=int, default=32, help="Images a step.")
@click.option("--label-smoothing", type=float, default=0.0, help="Share of the target spread over all classes.")
@click.option("--class-weights", is_flag=True, help="Let every class count alike, whatever its size.")
@click.option("--augment", default="none", help="none, or crop, flip and colour, joined by +.")
@click.option("--clip", type=float, help="Longest gradient.")
@click.option("--shots", multiple=True, default=["all"], help="Training images per class, or all; repeat.")
@click.option("--seed", "seeds", multiple=True, type=int, default=[0], help="Of split, shots and training; repeat.")
@click.option("-o", "--output", default=DEFAULT_CACHE, help="Folder of cache files and checkpoints.")
@click.option(
    "--save", type=click.Path(dir_okay=False), help="Keep the best model (by validation) as MODEL.safetensors."
)
@click.option("--picture", type=click.Path(dir_okay=False), help="Draw losses and accuracy over epochs, as a .png.")
@click.option("--precision", type=click.Choice(["auto", "fp32", "bf16"]), default="auto", help="auto: what is fastest.")
@click.option("--store", type=click.Choice(STORES), default="float32", help="Number type of cached activations.")
@click.option("--size", type=int, help="Side of the network input, pixels; the backbone's own by default.")
@click.option("--workers", type=AutoCount(), default="auto", help="Decoding threads; auto is one a core.")
@engine_option
@device_option
@json_option
def finetune(
    source: str, lr_at: tuple[str, ...], shots: tuple[str, ...], picture: str | None, as_json: bool, **options: Any
) -> None:
    """Train a network above its thaw line on the images of SOURCE, on the same splits as fit.

    What is frozen runs once, through the cache, unless images are augmented. A run that was stopped goes on.
    """
    from pipeline.finetune import finetune as run
    from pipeline.reporting.progress import progress_bar
    from pipeline.reporting.tables import finetune_table

    rates = _rates(lr_at)
    with progress_bar() as progress:
        report = run(source, lr_at=rates, shots=_shots(shots), progress=progress, say=_say, **options)
    for note in report.notes:
        click.echo(f"note: {note}", err=True)
    if picture:
        from pipeline.reporting.plots.training import save_training

        save_training(report.results, picture)
    if as_json:
        _print_json({"results": _records(report.results), "notes": report.notes})
        return
    _print_table(finetune_table(report.results))
    if report.saved:
        click.echo(f"model: {report.saved}")


@thawline.group("cache")
def cache_group() -> None:
    """Look into the files of a cache, check them, take features out, clear up."""


@cache_group.command("ls")
@cache_argument
@json_option
def cache_ls(cache: str, as_json: bool) -> None:
    """List the files of CACHE: what of which images, how much of it is done."""
    from pipeline.overview import list_files
    from pipeline.reporting.cache_tables import listing_table

    listing = list_files(cache)
    if as_json:
        _print_json(_records([listing])[0])
        return
    _print_table(listing_table(listing.files))
    for problem in listing.problems:
        click.echo(f"unusable: {problem}", err=True)
    if listing.superseded:
        megabytes = sum(file["bytes"] for file in listing.superseded) / 1e6
        click.echo(f"{len(listing.superseded)} superseded files, {megabytes:.1f} MB; see `thawline cache prune`")


@cache_group.command("show")
@cache_argument
@selecting_options
@json_option
def cache_show(cache: str, as_json: bool, **selection: Any) -> None:
    """Show all about one file of CACHE: specs, runs, classes, unreadable images, images that stand in it twice."""
    from features_cache import Catalog
    from pipeline.overview import detail
    from pipeline.reporting.cache_tables import details_view

    details = detail(Catalog(cache).find(**selection))
    if as_json:
        _print_json(_records([details])[0])
        return
    _print_table(details_view(details))


@cache_group.command("verify")
@cache_argument
@click.option("--source", help="The images: compare each row's digest with its image, too.")
@click.option("--repair", is_flag=True, help="Mark damaged rows pending, so that extract computes them.")
@json_option
def cache_verify(cache: str, source: str | None, repair: bool, as_json: bool) -> None:
    """Check structure and checksums of every file of CACHE; exit with 1 where damage is left, or an image changed."""
    from pipeline.overview import check, to_record
    from pipeline.reporting.cache_tables import finding_lines, verify_table
    from pipeline.reporting.progress import progress_bar

    with progress_bar() as progress:
        reports, problems = check(cache, source, repair, progress)
    if as_json:
        _print_json({"files": [to_record(report) for report in reports], "problems": problems, "repaired": repair})
    else:
        _print_table(verify_table(reports))
        for line in [*finding_lines(reports, repair), *(f"unusable: {problem}" for problem in problems)]:
            click.echo(line)
    damaged = any(not report.sound for report in reports) and not repair
    if damaged or problems or any(report.changed for report in reports):
        sys.exit(1)


@cache_group.command("export")
@cache_argument
@click.argument("file", type=click.Path(dir_okay=False))
@selecting_options
@json_option
def cache_export(cache: str, file: str, layer: str | None, as_json: bool, **selection: Any) -> None:
    """Write the finished rows of one layer of CACHE to FILE: .npy (with a .csv), .parquet or .safetensors."""
    from features_cache import Catalog, export
    from pipeline.overview import only_layer

    cached = Catalog(cache).find(layer, **selection)
    written = export(cached, layer or only_layer(cached), file)
    if as_json:
        _print_json({"files": [str(path) for path in written]})
        return
    click.echo("wrote " + " and ".join(map(str, written)))


@cache_group.command("prune")
@cache_argument
@click.option("--yes", is_flag=True, help="Do not ask.")
@json_option
def cache_prune(cache: str, yes: bool, as_json: bool) -> None:
    """Delete the files of CACHE that a newer one has superseded, with the rows that only they have."""
    from features_cache import prune, superseded

    paths = superseded(cache)
    for path in paths:
        click.echo(f"{path}  {path.stat().st_size / 1e6:.1f} MB", err=True)
    if not paths or not (yes or _confirmed(f"Delete {len(paths)} files?")):
        deleted, freed = [], 0
    else:
        deleted, freed = paths, prune(paths)
    if as_json:
        _print_json({"deleted": [str(path) for path in deleted], "bytes": freed})
        return
    click.echo(f"{len(deleted)} files deleted, {freed / 1e6:.1f} MB set free")


def _confirmed(question: str) -> bool:
    try:
        return click.confirm(question, err=True)
    except click.Abort:
        raise click.UsageError(
            "not answered, so nothing was deleted; add --yes to delete without being asked"
        ) from None


@thawline.command()
@click.argument("model")
@source_argument
@click.option("--csv", "csv_path", type=click.Path(dir_okay=False), help="Write the predictions to FILE.")
@click.option("-o", "--output", help="Folder of cache files to go through, so that a long run can go on after a stop.")
@engine_option
@device_option
@json_option
def predict(model: str, source: str, csv_path: str | None, as_json: bool, **options: Any) -> None:
    """Label the images of SOURCE with a saved MODEL."""
    from pipeline.predict import predict as run
    from pipeline.predict import write_csv
    from pipeline.reporting.progress import progress_bar
    from pipeline.reporting.tables import count_table, prediction_table

    with progress_bar() as progress:
        report = run(model, source, progress=progress, **options)
    for note in report.notes:
        click.echo(f"note: {note}", err=True)
    if csv_path:
        write_csv(report.predictions, Path(csv_path))
    if as_json:
        _print_json({"predictions": _records(report.predictions)})
        return
    _print_table(prediction_table(report.predictions))
    if len(report.predictions) > 1:
        _print_table(count_table(report.predictions))


@thawline.command()
@cache_argument
@click.option("--source", help="Which source, where the cache holds several.")
@click.option("-b", "--backbone", help="Only this backbone.")
@click.option("--pool", type=click.Choice(POOLS), help="Only this pooling.")
@click.option("--seed", type=click.IntRange(min=0), default=0, help="Seed of the split.")
@click.option("--fit", "fitted", is_flag=True, help="Fit logistic regression, too, and compare the orders.")
@json_option
def rank(cache: str, as_json: bool, **options: Any) -> None:
    """Order the layers and backbones in CACHE by how well they promise to suit the classes, before any fit."""
    from pipeline.diagnostics.rank import rank as run
    from pipeline.reporting.diagnostic_tables import agreement_lines, rank_table
    from pipeline.reporting.progress import progress_bar

    with progress_bar() as progress:
        report = run(cache, progress=progress, **options)
    for note in report.notes:
        click.echo(f"note: {note}", err=True)
    if as_json:
        _print_json({"ranking": _records(report.ranking), "agreement": _records(report.agreement)})
        return
    _print_table(rank_table(report.ranking))
    for line in agreement_lines(report.agreement):
        click.echo(line)


@thawline.command()
@click.argument("first")
@click.argument("second")
@click.option("-l", "--layer", default=DEFAULT_LAYER, help="A layer that both caches hold.")
@click.option("-b", "--backbone", help="Which backbone, where a cache holds several.")
@click.option("--pool", type=click.Choice(POOLS), help="Which pooling, where a cache holds several.")
@click.option("--seed", type=click.IntRange(min=0), default=0, help="Seed of draws, folds and permutations.")
@json_option
def drift(as_json: bool, **options: Any) -> None:
    """Test whether the images of the caches FIRST and SECOND are of one domain, and name the most foreign ones."""
    from pipeline.diagnostics.drift import drift as run
    from pipeline.reporting.diagnostic_tables import drift_lines, foreign_table
    from pipeline.results import to_json

    result = run(**options)
    if as_json:
        _print_json(to_json(result))
        return
    for line in drift_lines(result):
        click.echo(line)
    _print_table(foreign_table(result))


@thawline.command()
@click.argument("model")
@click.option("--onnx", "path", required=True, type=click.Path(dir_okay=False), help="The file to write.")
@json_option
def export(model: str, path: str, as_json: bool) -> None:
    """Write a saved MODEL and its network as one ONNX graph: pixels in, labels out."""
    from pipeline.export import export as run
    from pipeline.results import to_json

    result = run(model, path)
    if as_json:
        _print_json(to_json(result))
        return
    click.echo(f"{result.path}: {result.backbone}, {result.layer}, {result.head}, {result.bytes / 1e6:.1f} MB")
    for name, shape in result.inputs.items():
        click.echo(f"takes {name}: uint8 ({', '.join('n' if axis is None else str(axis) for axis in shape)})")
    click.echo(f"gives {', '.join(result.outputs)} for {result.classes} classes")


def _draw_fit(report: FitReport, folder: Path, cache: str, options: dict[str, Any]) -> list[str]:
    from features_cache import Catalog
    from pipeline.heads.cached import select
    from pipeline.reporting.plots.fit_pictures import draw_fit

    narrowed = (options["source"], options["backbone"], options["pool"])
    layer = select(Catalog(cache), [report.results[report.best].layer], *narrowed)[0]
    return [str(path) for path in draw_fit(report, layer, folder)]


@thawline.command()
@click.argument("plan", type=click.Path(dir_okay=False))
@click.option("-o", "--output", required=True, help="Run folder: results, cache and report; made if missing.")
@click.option("--dry-run", is_flag=True, help="Check all of PLAN and list its jobs with guesses at time and disk.")
@click.option("--against", type=click.Path(file_okay=False), help="Say what changed, beyond noise, since another run.")
@json_option
def compare(plan: str, output: str, dry_run: bool, against: str | None, as_json: bool) -> None:
    """Run PLAN, a TOML file of sources, backbones, layers, heads and fine-tunes, and write a report.

    Results are kept one by one: the same command again does only what is missing or changed.
    """
    from dataclasses import asdict

    if dry_run:
        _print_jobs(plan, output, as_json)
        return
    from pipeline.compare import compare as run
    from pipeline.reporting.progress import progress_bar

    with progress_bar() as progress:
        report = run(plan, output, against=against, progress=progress)
    if as_json:
        _print_json(asdict(report))
    else:
        from pipeline.reporting.compare_tables import against_lines, score_table

        _print_table(score_table(report.results))
        click.echo("\n" + "\n".join(report.answer))
        click.echo(f"\n{report.computed} results are new, {report.reused} were there; {report.seconds:.1f} s")
        for line in against_lines(report.against):
            click.echo(line)
        for name, path in report.files.items():
            click.echo(f"{name}: {path}")
    for failure in report.failures:
        click.echo(f"failed: {failure.job}: {failure.reason}", err=True)
    if report.failures:
        sys.exit(1)


def _print_jobs(plan: str, output: str, as_json: bool) -> None:
    from dataclasses import asdict

    from pipeline.compare import dry_run
    from pipeline.reporting.compare_tables import plan_line, plan_table

    planned = dry_run(plan, output)
    if as_json:
        _print_json({"jobs": [asdict(job) for job in planned]})
        return
    _print_table(plan_table(planned))
    click.echo(plan_line(planned))


def _shots(values: tuple[str, ...]) -> list[int | str]:
    for value in values:
        if value != "all" and not (value.isdigit() and int(value) > 0):
            raise click.BadParameter(f"expected a positive whole number or 'all', got {value!r}", param_hint="--shots")
    return [value if value == "all" else int(value) for value in values]


def _say(sentence: str) -> None:
    click.echo(f"note: {sentence}", err=True)


def _rates(values: tuple[str, ...]) -> tuple[tuple[str, float], ...]:
    rates = []
    for value in values:
        layer, _, rate = value.rpartition("=")
        try:
            rates.append((layer, float(rate)))
        except ValueError:
            raise click.BadParameter(f"expected LAYER=RATE, got {value!r}", param_hint="--lr-at") from None
    return tuple(rates)


def _records(records: list[Any]) -> list[dict[str, Any]]:
    from pipeline.results import to_json

    return [to_json(record) for record in records]


def _print_json(document: dict[str, Any]) -> None:
    click.echo(json.dumps(document, ensure_ascii=False, allow_nan=False))


def _print_table(table: Table | Group) -> None:
    from rich.console import Console

    width = None if sys.stdout.isatty() else 160
    Console(width=width, markup=False, highlight=False).print(table)  # file names may look like markup


@contextmanager
def _interrupt_on_sigterm() -> Iterator[None]:
    """Let SIGTERM unwind like Ctrl-C does, so that writers commit what is finished."""

    def interrupt(signum: int, frame: object) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def main() -> None:
    """Run the command line: 0 done, 1 an error of ours or the system's, 2 wrong usage, 130 interrupted."""
    try:
        with _interrupt_on_sigterm():
            thawline(prog_name="thawline", standalone_mode=False)
    except click.ClickException as error:
        error.show()
        sys.exit(error.exit_code)
    except ThawlineError as error:
        click.echo(f"thawline: {error}", err=True)
        sys.exit(1)
    except OSError as error:
        click.echo(f"thawline: {error.filename or 'system'}: {error.strerror or error}", err=True)
        sys.exit(1)
    except (KeyboardInterrupt, click.Abort):
        click.echo(
            "thawline: interrupted; what was finished is kept, and the same command goes on from there", err=True
        )
        sys.exit(130)


if __name__ == "__main__":
    main()
