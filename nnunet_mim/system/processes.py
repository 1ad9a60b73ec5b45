"""How processes end: with the one that started them, or after the run that they read for has saved itself. No torch."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
import time

WATCH_EVERY = 0.5
"""seconds"""
STOP_SIGNALS = tuple(getattr(signal, name) for name in ("SIGTERM", "SIGUSR1", "SIGINT") if hasattr(signal, name))
"""what asks a run to save itself and to end"""
GRACE = 30.0
"""seconds that a process that reads crops lives on after SIGTERM; SLURM gives as much by default"""


def end_with_parent(parent: int | None = None) -> None:
    """End this process, and the worker processes that it has started, as soon as the one that started it is gone.

    Args:
        parent: its number, where this process may be orphaned already; None: as it is now.
    """
    started_by = os.getppid() if parent is None else parent

    def watch() -> None:
        while os.getppid() == started_by:
            time.sleep(WATCH_EVERY)
        for child in multiprocessing.active_children():
            child.kill()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def leave_stopping_to_parent(worker: int) -> None:
    """For processes that read crops. A signal to the whole group must not end them before the run has saved itself:
    they ignore it, but for SIGTERM, which ends them `GRACE` seconds later.
    """
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda *_: _end_later())


def _end_later() -> None:
    timer = threading.Timer(GRACE, os._exit, (1,))
    timer.daemon = True
    timer.start()
