"""Processes that must not outlive the one that started them. No torch: this runs before anything that takes time."""

from __future__ import annotations

import multiprocessing
import os
import threading
import time

WATCH_EVERY = 0.5
"""seconds"""


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
