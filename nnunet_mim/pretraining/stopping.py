"""What ends a run before its last iteration: a request from outside, or steps that cannot be used."""

from __future__ import annotations

import signal
from collections.abc import Sequence
from types import FrameType, TracebackType
from typing import Any

from nnunet_mim.config import SKIP_WINDOW
from nnunet_mim.errors import MiMError
from nnunet_mim.system.processes import STOP_SIGNALS

EXIT_CODE = 75
"""of a run that was asked to stop and can be continued (EX_TEMPFAIL of sysexits.h)"""
MAX_NAMED = 1000
"""skipped steps that a checkpoint remembers"""


class StoppedError(Exception):
    """The run was asked to stop, has saved itself and can be continued."""


class StopRequests:
    """While entered, SIGTERM, SIGUSR1 and Ctrl-C set `received` instead of ending the process; a second Ctrl-C ends it.

    Only in the main thread; elsewhere nothing changes.
    """

    def __init__(self) -> None:
        self.received = ""
        self._before: dict[int, Any] = {}

    def __enter__(self) -> StopRequests:
        try:
            self._before = {number: signal.signal(number, self._note) for number in STOP_SIGNALS}
        except ValueError:  # not the main thread
            self._before = {}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.received and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.received = signal.Signals(number).name


class SkippedSteps:
    """Steps whose gradient was not finite. They changed nothing; too many of them end the run.

    Args:
        stored: of the checkpoint that is continued, oldest first.
        maximum: number of skipped steps among the last `window` that is still accepted.
        window: steps.
    """

    def __init__(self, stored: Sequence[dict[str, Any]], maximum: int, window: int = SKIP_WINDOW) -> None:
        self.steps = list(stored)
        self.maximum = maximum
        self.window = window

    def add(self, iteration: int, cases: Sequence[str]) -> str:
        """Note one skipped step, and return a line that names it.

        Args:
            iteration: of the step, counted from 1.
            cases: what it was computed from; those alone whose features were not finite, where there are any.
        """
        self.steps = [*self.steps, {"iteration": iteration, "cases": list(cases)}][-MAX_NAMED:]
        return f"step {iteration} skipped: loss or gradient not finite ({'; '.join(cases)})"

    def check(self, iteration: int, folder: object) -> None:
        """Raise MiMError if too many of the steps up to `iteration` were skipped."""
        recent = [step for step in self.steps if iteration - self.window < step["iteration"] <= iteration]
        if len(recent) > self.maximum:
            raise MiMError(
                f"{len(recent)} of the last {min(iteration, self.window)} steps were skipped because loss or gradient "
                f"was not finite, the last one on {'; '.join(recent[-1]['cases'])}: lower --lr or take the named cases "
                f"out, and start anew with -o TAG and --init; the last good checkpoint is in {folder}"
            )
