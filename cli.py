"""The command `thawline`.

What is heavy is imported inside the commands, so that ``--help`` answers at once.
"""

from __future__ import annotations

import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import click

from features_cache import ThawlineError
from pipeline.commands.cache import cache_group
from pipeline.commands.compare import compare
from pipeline.commands.demo import demo
from pipeline.commands.drift import drift
from pipeline.commands.export import export
from pipeline.commands.extract import extract
from pipeline.commands.finetune import finetune
from pipeline.commands.fit import fit
from pipeline.commands.networks import backbones, layers
from pipeline.commands.predict import predict
from pipeline.commands.rank import rank
from pipeline.provenance import installed_version

CONTEXT = {"help_option_names": ["-h", "--help"], "show_default": True, "max_content_width": 110}


@click.group(context_settings=CONTEXT)
@click.version_option(installed_version("thawline"))
def thawline() -> None:
    """Turn images into a trained classifier: frozen CNN features, cached once; scikit-learn heads on top."""


for command in (
    demo, backbones, layers, extract, cache_group, fit, finetune, predict, export, rank, drift, compare,
):  # fmt: skip
    thawline.add_command(command)


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
    except BaseException as error:
        behind = list(_chain(error))
        if not any(isinstance(each, KeyboardInterrupt | click.Abort) for each in behind):
            raise
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # libraries still clear up: pressed twice is no second error
        notes = [note for each in behind for note in getattr(each, "__notes__", ())]
        click.echo("; ".join(["thawline: interrupted", *notes]), err=True)
        sys.exit(130)


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    """Yield an error and what is behind it: click, and a library being imported, make others of an interrupt."""
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


if __name__ == "__main__":
    main()
