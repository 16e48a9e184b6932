"""Start the command `thawline`, and end it with one line and the right exit code, whatever comes.

Everything is imported inside, so that an interrupt while modules are being imported is one line, too.
"""

from __future__ import annotations

import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager


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
            from pipeline.commands.group import thawline
            from pipeline.commands.output import bear_any_encoding, keep_matplotlibs_cache

            bear_any_encoding()
            keep_matplotlibs_cache()
            thawline(prog_name="thawline", standalone_mode=False)
    except BaseException as error:
        behind = list(_chain(error))
        if any(isinstance(each, KeyboardInterrupt) for each in behind):
            signal.signal(signal.SIGINT, signal.SIG_IGN)  # libraries still clear up: pressed twice is no second error
            notes = [note for each in behind for note in getattr(each, "__notes__", ())]
            print("; ".join(["thawline: interrupted", *notes]), file=sys.stderr)
            sys.exit(130)
        sys.exit(_tell(error))


def _tell(error: BaseException) -> int:
    """Print what the user should know about an error, and return the exit code; raise what is a fault of ours."""
    import click

    from features_cache import ThawlineError

    if isinstance(error, click.ClickException):
        error.show()
        return error.exit_code
    if isinstance(error, OSError):
        error = ThawlineError(f"{error.filename or 'system'}: {error.strerror or error}")
    if not isinstance(error, ThawlineError):
        raise error
    print(f"thawline: {error}", file=sys.stderr)
    return 1


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    """Yield an error and what is behind it: click, and a library being imported, make others of an interrupt."""
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


if __name__ == "__main__":
    main()
