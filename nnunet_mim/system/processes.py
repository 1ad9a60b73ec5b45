"""How processes end: with the process that started them, or after their run has saved itself. Imports no torch."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
import time

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
