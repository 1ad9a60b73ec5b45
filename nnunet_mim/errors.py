"""The one exception that commands turn into a one-line message."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager


class MiMError(RuntimeError):
    """Bad input or a bad environment. The message is one line that names the file or option, and a remedy."""


class ExitingMiMError(MiMError, SystemExit):
    """A MiMError that ends another project's command (nnUNetv2_train) with one line instead of a traceback."""

    def __init__(self, message: str) -> None:
        RuntimeError.__init__(self, message)
        SystemExit.__init__(self, f"error: {message}")  # what Python prints, with exit code 1
        self.args = (message,)


@contextmanager
def one_line_errors() -> Iterator[None]:
    """Turn a MiMError raised inside into an ExitingMiMError."""
    try:
        yield
    except MiMError as error:
        raise ExitingMiMError(str(error)) from None


def exit_code(run: Callable[[], None]) -> int:
    """Run a command; its exit code is 0, or 2 after a MiMError, which is printed in one line."""
    try:
        run()
    except MiMError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0
