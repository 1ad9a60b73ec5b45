"""The progress bar of all commands."""

from __future__ import annotations

import sys
from io import StringIO
from typing import Any

from tqdm import tqdm

SHOWN_EVERY_S = 10.0
"""between two lines in a log file"""


class ProgressBar(tqdm):  # type: ignore[type-arg]
    """tqdm's bar on a terminal. In a log file, where each state stays, it is a line each 10 seconds, and none for what
    takes less.
    """

    def __init__(self, *args: Any, **settings: Any) -> None:
        if not sys.stderr.isatty():
            settings = {"mininterval": SHOWN_EVERY_S, "delay": SHOWN_EVERY_S, "ascii": True, **settings}
        super().__init__(*args, **settings)

    @staticmethod
    def status_printer(file: Any) -> Any:
        """What shows a state: redraws the bar, or writes a line."""
        if file.isatty():
            return tqdm.status_printer(file)

        def write_line(state: str) -> None:
            file.write(f"{state}\n")
            file.flush()

        return write_line

    def close(self) -> None:
        """Show the last state."""
        if not sys.stderr.isatty():
            self.fp = StringIO()  # tqdm ends the line once more
        super().close()

    @classmethod
    def write(cls, s: str, file: Any = None, end: str = "\n", nolock: bool = False) -> None:
        """Print a text above the bar."""
        if sys.stderr.isatty():
            super().write(s, file, end, nolock)
        else:
            print(s, end=end, file=file, flush=True)
