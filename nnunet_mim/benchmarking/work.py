"""Running the trainings of an experiment: one after the other, on several GPUs, or through SLURM."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from queue import SimpleQueue
from threading import Event
from typing import Any

from nnunet_mim.benchmarking.cell import Cell, InterruptedTrainingError, failure, finished, run_cell
from nnunet_mim.benchmarking.matrix import Matrix, Place, describe, mean_dice
from nnunet_mim.errors import MiMError
from nnunet_mim.system.locks import exclusive_lock
from nnunet_mim.system.machine import usable_cores

Results = dict[Place, dict[str, Any]]
BUSY = "another process is at work on it"
POLL = 5.0
"""seconds between looks at SLURM"""


def finished_results(matrix: Matrix) -> Results:
    """Results that are there already.

    Raises:
        MiMError: a folder holds another experiment.
    """
    tolerance = matrix.bench.nsd_tolerance_mm
    found = {place: finished(cell, matrix.folder(place), tolerance) for place, cell in matrix.cells.items()}
    return {place: result for place, result in found.items() if result is not None}


def failures(matrix: Matrix) -> dict[Place, str]:
    """Trainings whose last attempt failed, and why."""
    found = {place: failure(matrix.folder(place)) for place in matrix.cells}
    return {place: why for place, why in found.items() if why is not None}


def run_matrix(
    matrix: Matrix, todo: list[Place], results: Results, say: Callable[[str], None] = print
) -> dict[Place, str]:
    """Train `todo`; adds to `results` as trainings finish.

    Returns:
        Why trainings failed or were interrupted. One failure does not end the others.
    """
    bench, failed = matrix.bench, {}
    began, total = time.monotonic(), len(matrix.cells)
    trained = 0

    def done(place: Place, outcome: dict[str, Any] | Exception) -> None:
        nonlocal trained
        if isinstance(outcome, BusyError):
            say(f"left: {describe(place)}: {outcome}")
            return
        if isinstance(outcome, Exception):
            kind = "" if isinstance(outcome, MiMError) else f"{type(outcome).__name__}: "
            failed[place] = f"{kind}{outcome}"
            how = "not finished" if isinstance(outcome, InterruptedTrainingError) else "failed"
            say(f"{how}: {describe(place)}: {failed[place]}")
            return
        results[place] = outcome
        trained += 1
        left = len(todo) - trained - len(failed)
        hours = (time.monotonic() - began) / trained * left / 3600
        ahead = f", {left} to go, about {hours:.1f} h" if left else ""
        say(f"[{len(results)}/{total}] {describe(place)}: mean Dice {mean_dice(outcome):.3f}{ahead}")

    if bench.slurm is not None:
        _through_submitit(matrix, todo, done)
    else:
        _on_this_machine(matrix, todo, done)
    return failed


class BusyError(MiMError):
    """Another process is at work on a training."""


@dataclass(frozen=True)
class Task:
    """One training, as a job of SLURM or on this machine."""

    cell: Cell
    folder: Path
    device: str
    threads: int
    tolerance: float

    def __call__(self, gpu: str | None = None, stop: Event | None = None) -> dict[str, Any]:
        """Train unless another process has done so meanwhile.

        Raises:
            BusyError: another process is at work on it.
            MiMError: the training failed.
        """
        with ExitStack() as lock:
            try:
                lock.enter_context(exclusive_lock(self.folder / ".lock", BUSY))
            except MiMError as error:
                raise BusyError(str(error)) if str(error) == BUSY else error from None
            result = finished(self.cell, self.folder, self.tolerance)
            return result or run_cell(
                self.cell, self.folder, self.device, self.threads, self.tolerance, gpu, stop
            )  # fmt: skip

    def checkpoint(self, *_: Any) -> Any:
        """What submitit puts into the queue again when a job's time is over: the same, which goes on where it was."""
        from submitit.helpers import DelayedSubmission

        return DelayedSubmission(self)


def _on_this_machine(matrix: Matrix, todo: list[Place], done: Callable[[Place, Any], None]) -> None:
    bench = matrix.bench
    slots: SimpleQueue[str | None] = SimpleQueue()
    for gpu in visible(bench.gpus) or (None,) * bench.jobs:
        slots.put(gpu)
    stop = Event()
    workers = slots.qsize()
    threads = max(1, usable_cores() // workers) if workers > 1 and bench.device == "cpu" else 0

    def train(place: Place) -> dict[str, Any] | Exception:
        gpu = slots.get()
        try:
            task = Task(
                matrix.cells[place], matrix.folder(place), bench.device, threads, bench.nsd_tolerance_mm
            )  # fmt: skip
            return task(gpu, stop)
        except Exception as error:  # one training must not end the others
            return error
        finally:
            slots.put(gpu)

    with ThreadPoolExecutor(workers) as pool:
        running: dict[Future[Any], Place] = {}
        try:
            for place in todo:
                future = pool.submit(train, place)
                running[future] = place
            for future in as_completed(running):
                done(running[future], future.result())
        except KeyboardInterrupt:
            stop.set()
            pool.shutdown(wait=True, cancel_futures=True)
            raise MiMError("interrupted: repeat the command to go on") from None


def visible(gpus: Sequence[str]) -> tuple[str, ...]:
    """GPUs by their number among those that this process sees → as CUDA_VISIBLE_DEVICES names them."""
    seen = [name for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name]
    return tuple(seen[int(gpu)] for gpu in gpus) if seen else tuple(gpus)


def _through_submitit(matrix: Matrix, todo: list[Place], done: Callable[[Place, Any], None]) -> None:
    """One job a training; jobs go on when this command ends, and repeating it takes what they have finished."""
    try:
        import submitit
    except ImportError as error:
        raise MiMError("submitit is missing: pip install 'nnunet_mim[slurm]'") from error
    bench = matrix.bench
    options = dict(bench.slurm or {})
    if not {"timeout_min", "slurm_time"} & set(options):
        raise MiMError("slurm: give timeout_min: a job without it gets five minutes")
    cluster = options.pop("cluster", "slurm")
    try:
        executor = submitit.AutoExecutor(folder=str(bench.output / "slurm"), cluster=cluster)
    except RuntimeError as error:
        raise MiMError(f"slurm: {_one_line(error)}: run where SLURM is, or leave 'slurm' out") from error
    try:
        executor.update_parameters(**{"name": "mim_benchmark", "gpus_per_node": 1, "cpus_per_task": 8, **options})
    except (TypeError, ValueError, NameError) as error:
        raise MiMError(f"slurm: {_one_line(error)}: see submitit's parameters") from error
    waiting = {}
    for place in todo:
        task = Task(matrix.cells[place], matrix.folder(place), bench.device, 0, bench.nsd_tolerance_mm)
        waiting[place] = executor.submit(task)
    print(f"{len(waiting)} jobs submitted; they go on when this command ends, and repeating it takes their results")
    while waiting:
        for place, job in [(place, job) for place, job in waiting.items() if job.done()]:
            del waiting[place]
            try:
                done(place, job.result())
            except Exception as error:  # submitit's own, with the log of the job in it
                why = BUSY if BUSY in str(error) else failure(matrix.folder(place)) or _cause(error)
                done(
                    place,
                    BusyError(why) if why == BUSY else MiMError(f"job {job.job_id}: {why}: see {job.paths.stderr}"),
                )
        if waiting:
            time.sleep(POLL)


def _cause(error: Exception) -> str:
    """The last line of a job's traceback, which submitit puts above the names of its logs."""
    lines = [line.strip() for line in str(error).splitlines() if ": " in line and not line.lstrip().startswith("-")]
    return (lines or [type(error).__name__])[-1][:300]


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())
