"""Worker processes that may die, hang or grow: each is watched, ended where it breaks a limit, and replaced.

Image libraries are C++. One bad header ends in a segmentation fault, a wait for ever or gigabytes of memory, which no
`except` catches.
"""

from __future__ import annotations

import math
import multiprocessing
import os
import signal
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from typing import Any

from nnunet_mim.errors import MiMError, last_line

STARTS = 3
"""workers in all that may fail to start"""
START_SECONDS = 300.0
"""limit for a worker to start: it imports PyTorch, on a cold network disk"""
_CONTEXT: Any = multiprocessing.get_context("forkserver" if sys.platform == "linux" else "spawn")
"""a fork of a process that has imported everything starts in milliseconds; it is safe on Linux only"""


@dataclass(frozen=True)
class Limits:
    """What a worker may use for one item."""

    seconds: float
    memory: int = 0
    """bytes beyond what the worker holds before its first item; 0: no limit. Linux only (RLIMIT_DATA): it counts memory
    that the process can write, and not, as RLIMIT_AS does, libraries and the address space that threads reserve"""


@dataclass(frozen=True)
class Failure:
    """Why an item has no result, in words."""

    reason: str
    needs_memory: bool = False
    """whether it may succeed with more memory"""


class _Worker:
    """A process that computes one item at a time."""

    def __init__(self, function: Callable[[Any], Any], limits: Limits) -> None:
        self.limits = limits
        self.pipe, other = _CONTEXT.Pipe()
        self.process = _CONTEXT.Process(target=_serve, args=(other, function, limits.memory), daemon=True)
        with _without_main() if function.__module__ != "__main__" else nullcontext():
            self.process.start()
        other.close()
        self.item: int | None = None
        """index of the item it is at"""
        self.ready = False
        self.deadline = time.monotonic() + START_SECONDS

    def begin(self, index: int, item: Any) -> None:
        self.item, self.deadline = index, time.monotonic() + self.limits.seconds
        with suppress(OSError):  # where it has just died; its pipe will say so
            self.pipe.send(item)

    def outcome(self) -> Any:
        """What the process has sent, or the failure that ended it. Called once it has sent something or is too late."""
        if not self.pipe.poll():
            self.end()
            return Failure(f"it takes more than {self.limits.seconds:g} s")
        try:
            return self.pipe.recv()
        except (EOFError, OSError):
            self.process.join(1)
            self.end()
        code = self.process.exitcode or 0
        how = signal.Signals(-code).name if code < 0 else f"exit code {code}"
        killed = how == "SIGKILL"
        return Failure(f"its process died of {how}{', out of memory?' if killed else ''}", needs_memory=True)

    def end(self) -> None:
        self.process.kill()
        self.process.join()
        self.pipe.close()


@contextmanager
def _without_main() -> Iterator[None]:
    """Workers that are started do not run the user's script again, as Python has them do, to find functions in it."""
    main = sys.modules["__main__"]
    kept: dict[str, Any] = {name: vars(main).pop(name) for name in ("__file__", "__spec__") if name in vars(main)}
    main.__spec__ = None
    try:
        yield
    finally:
        vars(main).update(kept)


def prepare_workers(*modules: str) -> None:
    """Let workers compute in one thread and find modules imported. To call before the first of them starts."""
    for library in ("OMP", "OPENBLAS", "MKL", "ITK_GLOBAL_DEFAULT"):
        os.environ[f"{library}_{'NUMBER_OF' if library.startswith('ITK') else 'NUM'}_THREADS"] = "1"
    if sys.platform == "linux":
        _CONTEXT.set_forkserver_preload(list(modules))


def guarded_map(
    function: Callable[[Any], Any], items: Iterable[Any], processes: int, limits: Limits
) -> Generator[tuple[int, Any], None, None]:
    """Yield (index of the item, function(item) or a Failure), in the order in which they are finished.

    The function and what goes in and out are pickled. Close the iterator (`contextlib.closing`) to end all workers.
    Raises MiMError where the function has raised it, or no worker can be started.
    """
    waiting = deque(enumerate(items))
    workers, failed_starts = [_Worker(function, limits) for _ in range(min(processes, len(waiting)))], 0
    try:
        while workers:
            pause = max(0.0, min(worker.deadline for worker in workers) - time.monotonic())
            sent = wait([worker.pipe for worker in workers], timeout=pause)
            for worker in [w for w in workers if w.pipe in sent or time.monotonic() > w.deadline]:
                outcome, index, worker.item = worker.outcome(), worker.item, None
                if isinstance(outcome, MiMError):
                    raise outcome
                if not worker.ready and outcome is not None:
                    failed_starts += 1
                    if failed_starts == STARTS:
                        raise MiMError(f"cannot start a worker process ({outcome.reason}): free memory, and repeat")
                    workers.remove(worker)
                    worker.end()
                    workers.append(_Worker(function, limits))
                    continue
                if worker.pipe.closed or not waiting:
                    workers.remove(worker)
                    worker.end()
                    if waiting:
                        workers.append(_Worker(function, limits))
                else:
                    worker.ready = True
                    worker.begin(*waiting.popleft())
                if index is not None:
                    yield index, outcome
    finally:
        for worker in workers:
            worker.end()


def _serve(pipe: Connection, function: Callable[[Any], Any], memory: int) -> None:
    """The life of a worker: take an item, send its outcome, until it is killed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the command, which ends its workers
    threading.Thread(target=_end_with_command, daemon=True).start()
    pipe.send(None)
    nowhere = os.open(os.devnull, os.O_WRONLY)
    for stream in (1, 2):  # what libraries print about a file: the table says it
        os.dup2(nowhere, stream)
    _limit_memory(memory)
    with suppress(EOFError, OSError):
        while True:
            pipe.send(_outcome(function, pipe.recv()))


def _end_with_command() -> None:
    """End this process when the command that has started it is gone; its system parent is the server of forks."""
    command = multiprocessing.parent_process()
    if command is not None:
        command.join()
        os._exit(1)


def _outcome(function: Callable[[Any], Any], item: Any) -> Any:
    try:
        return function(item)
    except MiMError as error:
        return error
    except Exception as error:  # whatever is wrong with one file must not stop the others
        if isinstance(error, MemoryError) or "alloc" in str(error):
            return Failure("it needs more memory than there is for it", needs_memory=True)
        return Failure(last_line(error))


def _limit_memory(memory: int) -> None:
    if not memory or sys.platform != "linux":
        return
    import resource

    with open("/proc/self/status", encoding="ascii", errors="replace") as status:
        held = next((int(line.split()[1]) * 1024 for line in status if line.startswith("VmData:")), 0)
    hard = resource.getrlimit(resource.RLIMIT_DATA)[1]
    limit = held + memory
    resource.setrlimit(resource.RLIMIT_DATA, (limit if hard == resource.RLIM_INFINITY else min(limit, hard), hard))


def share_of_memory(memory: int, processes: int) -> int:
    """Bytes for each of some processes of a machine with this memory, a tenth of which is left for the rest."""
    return math.floor(0.9 * memory / processes)
