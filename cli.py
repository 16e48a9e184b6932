"""Start the command `thawline`, and end it with one line and the right exit code, whatever comes.

Everything is imported inside, so that an interrupt while modules are being imported is one line, too.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

INTERRUPTED = 130
"""Exit code, as shells have it: 128 and the number of the signal."""


@contextmanager
def _handling_interrupts() -> Iterator[None]:
    """Let SIGTERM unwind like Ctrl-C does, so that writers commit what is finished; see `_interrupt` for both."""
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    for number, handler in before.items():
        signal.signal(number, signal.SIG_IGN if handler is signal.SIG_IGN else _interrupt)  # jobs behind a shell's `&`
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _interrupt(signum: int, frame: FrameType | None) -> None:
    """Raise `KeyboardInterrupt`; but end at once while modules are being imported, as a kill would.

    Libraries whose native parts are being imported swallow the exception, or abort.
    """
    while frame is not None:
        if frame.f_code.co_filename.startswith("<frozen importlib"):
            cursor = b"\x1b[?25h" if sys.stderr.isatty() else b""  # which a progress bar hides
            os.write(2, cursor + b"thawline: interrupted\n")
            os._exit(INTERRUPTED)
        frame = frame.f_back
    raise KeyboardInterrupt


def main() -> None:
    """Run the command line: 0 done, 1 an error of ours or the system's, 2 wrong usage, 130 interrupted."""
    try:
        with _handling_interrupts():
            from pipeline.commands.group import thawline
            from pipeline.commands.output import bear_any_encoding, counted_warnings, keep_matplotlibs_cache

            bear_any_encoding()
            keep_matplotlibs_cache()
            with counted_warnings():
                thawline(prog_name="thawline", standalone_mode=False)
    except BaseException as error:
        behind = list(_chain(error))
        if any(isinstance(each, KeyboardInterrupt) for each in behind):
            signal.signal(signal.SIGINT, signal.SIG_IGN)  # libraries still clear up: pressed twice is no second error
            notes = [note for each in behind for note in getattr(each, "__notes__", ())]
            print("; ".join(["thawline: interrupted", *notes]), file=sys.stderr)
            sys.exit(INTERRUPTED)
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
