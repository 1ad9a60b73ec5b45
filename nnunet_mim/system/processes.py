"""How processes end: with the process that started them, or after their run has saved itself. Imports no torch."""

from __future__ import annotations

import multiprocessing
import os
import signal
import subprocess
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from nnunet_mim.errors import MiMError

SECONDS_BETWEEN_CHECKS = 0.5
STOP_SIGNALS = tuple(getattr(signal, name) for name in ("SIGTERM", "SIGUSR1", "SIGINT") if hasattr(signal, name))
"""signals that ask a run to save itself and end"""
SECONDS_AFTER_SIGTERM = 30.0
"""how long a process that reads crops lives on; SLURM gives as much by default"""


def end_with_parent(parent: int | None = None) -> None:
    """End this process and the workers it has started as soon as its parent is gone.

    Args:
        parent: process id of the parent, for a process that may be orphaned already; None: the parent of now.
    """
    started_by = os.getppid() if parent is None else parent

    def watch() -> None:
        while os.getppid() == started_by:
            time.sleep(SECONDS_BETWEEN_CHECKS)
        for child in multiprocessing.active_children():
            child.kill()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def leave_stopping_to_parent(worker: int) -> None:
    """Ignore the stop signals in a process that reads crops; SIGTERM ends it `SECONDS_AFTER_SIGTERM` later.

    A signal to the whole process group would otherwise end it before the run has saved itself.

    Args:
        worker: number of the worker, which PyTorch's DataLoader passes.
    """
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)

    def end_later(*_: object) -> None:
        timer = threading.Timer(SECONDS_AFTER_SIGTERM, os._exit, (1,))
        timer.daemon = True
        timer.start()

    signal.signal(signal.SIGTERM, end_later)


@contextmanager
def killed_readers_named() -> Iterator[None]:
    """Turn PyTorch's traceback about a process of a DataLoader that was ended from outside into one line."""
    try:
        yield
    except RuntimeError as error:
        if "DataLoader worker" not in str(error):
            raise
        reason = str(error).splitlines()[0].rstrip(". ")
        raise MiMError(
            f"a process that reads crops has ended ({reason}), often for lack of memory: lower --workers (0 reads in "
            "this process), and give --c where checkpoint_latest.pth has been written"
        ) from error


def run_command(
    command: Sequence[str], log: Path, environment: Mapping[str, str], stop: threading.Event | None = None
) -> int:
    """Run a command, whose output is added to `log`, until it ends or `stop` is set. Returns its exit code.

    It has a process group of its own: Ctrl-C in the terminal does not reach it, and it is ended with its children when
    this process is interrupted.
    """
    with log.open("ab") as output:
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT, env=environment,
            start_new_session=True,
        )  # fmt: skip
    try:
        while stop is None or not stop.is_set():
            with suppress(subprocess.TimeoutExpired):
                return process.wait(SECONDS_BETWEEN_CHECKS)
        _end_group(process, "SIGTERM")
        return process.wait()
    except BaseException:
        _end_group(process, "SIGKILL")
        process.wait()
        raise


def _end_group(process: subprocess.Popen, name: str) -> None:
    """Send a signal to a process and its children; Windows has no groups, and ends the process alone."""
    if not hasattr(os, "killpg"):
        process.kill()
        return
    with suppress(ProcessLookupError):
        os.killpg(process.pid, getattr(signal, name))
