"""The command `thawline`.

What is heavy is imported inside the commands, so that ``--help`` answers at once.
"""

from __future__ import annotations

import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import click

from features_cache.errors import ThawlineError
from pipeline.commands.cache import cache_group
from pipeline.commands.compare import compare
from pipeline.commands.demo import demo
from pipeline.commands.diagnose import drift, rank
from pipeline.commands.extract import backbones, extract, layers
from pipeline.commands.finetune import finetune
from pipeline.commands.fit import fit
from pipeline.commands.models import export, predict

CONTEXT = {"help_option_names": ["-h", "--help"], "show_default": True, "max_content_width": 110}


@click.group(context_settings=CONTEXT)
@click.version_option(package_name="thawline")
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
        if not _is_interrupt(error):
            raise
        click.echo(
            "thawline: interrupted; what was finished is kept, and the same command goes on from there", err=True
        )
        sys.exit(130)


def _is_interrupt(error: BaseException | None) -> bool:
    """Tell whether an interrupt is behind an error: a library that is being imported makes an ImportError of it."""
    while error is not None and not isinstance(error, KeyboardInterrupt | click.Abort):
        error = error.__cause__ or error.__context__
    return error is not None


if __name__ == "__main__":
    main()
