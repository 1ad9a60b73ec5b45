"""The one exception that commands turn into a one-line message."""

from __future__ import annotations

import errno
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any


def printable(text: object, limit: int | None = 200) -> str:
    """A text from a file for one line of a terminal: control characters are escaped, and a long one is cut short."""
    shown = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in str(text))
    return shown if limit is None or len(shown) <= limit else f"{shown[:limit]}…"


def printable_lines(text: str) -> str:
    """A text of several lines for a terminal, its control characters escaped."""
    return "\n".join(printable(line, None) for line in text.split("\n"))


class MiMError(RuntimeError):
    """Bad input or a bad environment. The message is one line that names the file or option, and a remedy."""


class ExitingMiMError(MiMError, SystemExit):
    """A MiMError that ends another project's command (nnUNetv2_train) with one line instead of a traceback."""

    def __init__(self, message: str) -> None:
        RuntimeError.__init__(self, message)
        SystemExit.__init__(self, f"error: {printable(message, None)}")  # what Python prints, with exit code 1
        self.args = (message,)


@contextmanager
def one_line_errors() -> Iterator[None]:
    """Turn a MiMError raised inside into an ExitingMiMError."""
    try:
        yield
    except MiMError as error:
        raise ExitingMiMError(str(error)) from None


REMEDIES = {
    errno.EACCES: "give yourself the right to it",
    errno.EPERM: "give yourself the right to it",
    errno.EROFS: "name a folder that can be written to",
    errno.ENOSPC: "free some disk space",
    errno.EDQUOT: "free some disk space",
    errno.ENAMETOOLONG: "choose shorter names",
    errno.ENOTDIR: "name a folder",
    errno.EISDIR: "name a file",
    errno.ENOENT: "correct the path",
    errno.EIO: "see whether the disk is well",
    errno.ESTALE: "mount the disk again",
}
"""what to do about an error of the file system"""


def last_line(error: BaseException) -> str:
    """The last line of an error's message, at most 200 characters."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return " ".join(lines[-1].split())[:200]


INTERRUPTED = 130
"""exit code after Ctrl-C, as shells say it"""


def exit_code(run: Callable[[], Any]) -> int:
    """Run a command; its exit code is 0, 2 after an error that is printed in one line, or 130 after Ctrl-C.

    Errors are a MiMError, and an error of the file system that names a file. Everything else is a fault of this package
    and ends in a traceback.
    """
    try:
        with _terminated_as_interrupted():
            run()
    except MiMError as error:
        print(f"error: {printable(error, None)}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return INTERRUPTED
    except OSError as error:
        if error.filename is None or error.errno not in REMEDIES:
            raise
        print(f"error: {printable(error.filename, None)}: {error.strerror}: {REMEDIES[error.errno]}", file=sys.stderr)
        return 2
    return 0


@contextmanager
def _terminated_as_interrupted() -> Iterator[None]:
    """While entered, SIGTERM raises KeyboardInterrupt first, and then has the effect that it had before.

    So a command that kill or scancel ends stops what it has started, and removes what it has half written. A second
    SIGTERM ends it at once. Only in the main thread; elsewhere nothing changes.
    """
    received = []

    def interrupt(*_: object) -> None:
        received.append(True)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        raise KeyboardInterrupt

    try:
        before = signal.signal(signal.SIGTERM, interrupt)
    except ValueError:  # not the main thread
        yield
        return
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
        if received:
            sys.stdout.flush()
            signal.raise_signal(signal.SIGTERM)
