"""How far the command of a stage is, read from its log."""

from __future__ import annotations

import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from nnunet_mim.system.progress import ProgressBar

BAR = re.compile(rb"(\d+)/(\d+) \[")
"""state of a progress bar of tqdm"""
EPOCH = re.compile(rb"Epoch (\d+)\s*\n")
"""nnU-Net's trainer begins an epoch, counted from 0"""
LOOKED_AT = 20_000
"""bytes at the end of a log; a progress bar stands in the last ones"""
SECONDS = 1.0
"""between two looks"""


@contextmanager
def watched(log: Path, epochs: int) -> Iterator[None]:
    """Show how far a command is that writes into a log, and the time left, in one line.

    Args:
        log: need not exist yet.
        epochs: of a training of nnU-Net, which does not say them.
    """
    done = threading.Event()
    thread = threading.Thread(target=_show, args=(log, epochs, done), name="watching", daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()


def position(log: Path, epochs: int) -> tuple[int, int] | None:
    """(steps done, steps in all) of what a command is doing now; None where its log does not say it."""
    if not log.is_file():
        return None
    with log.open("rb") as file:
        file.seek(max(0, log.stat().st_size - LOOKED_AT))
        text = file.read()
    states = [(match.start(), int(match[1]), int(match[2])) for match in BAR.finditer(text)]
    states += [(match.start(), int(match[1]), epochs) for match in EPOCH.finditer(text)]
    if not states:
        return None
    _, n_done, n_all = max(states)
    return n_done, n_all


def _show(log: Path, epochs: int, done: threading.Event) -> None:
    bar = None
    while not done.wait(SECONDS):
        if (now := position(log, epochs)) is None:
            continue
        n_done, n_all = now
        if bar is None or bar.total != n_all or n_done < bar.n:  # another bar
            if bar is not None:
                bar.close()
            bar = ProgressBar(total=n_all, initial=n_done, desc="      so far", leave=False)
        bar.update(n_done - bar.n)
    if bar is not None:
        bar.close()
