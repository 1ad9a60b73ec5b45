"""Running the trainings of an experiment: one after the other, on several GPUs, or through SLURM."""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from pathlib import Path
from queue import SimpleQueue
from typing import Any

from nnunet_mim.benchmarking.cell import Cell, failure, finished, run_cell
from nnunet_mim.benchmarking.matrix import Matrix, Place, describe, mean_dice
from nnunet_mim.errors import MiMError
from nnunet_mim.lock import alone
from nnunet_mim.machine import usable_cores

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
        Why trainings failed. One failure does not end the others.
    """
    bench, failed = matrix.bench, {}
    began, total = time.monotonic(), len(matrix.cells)
    trained = 0

    def done(place: Place, outcome: dict[str, Any] | Exception) -> None:
        nonlocal trained
        if isinstance(outcome, Exception):
            kind = "" if isinstance(outcome, MiMError) else f"{type(outcome).__name__}: "
            failed[place] = f"{kind}{outcome}"
            say(f"failed: {describe(place)}: {failed[place]}")
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


def run_alone(
    cell: Cell, folder: Path, device: str, threads: int, tolerance: float, gpu: str | None = None
) -> dict[str, Any]:
    """Train unless another process has done so meanwhile.

    Raises:
        MiMError: another process is at work on it, or the training failed.
    """
    with alone(folder / ".lock", BUSY):
        result = finished(cell, folder, tolerance)
        return result or run_cell(cell, folder, device, threads, tolerance, gpu)


def _on_this_machine(matrix: Matrix, todo: list[Place], done: Callable[[Place, Any], None]) -> None:
    bench = matrix.bench
    slots: SimpleQueue[str | None] = SimpleQueue()
    for gpu in bench.gpus or (None,) * bench.jobs:
        slots.put(gpu)
    workers = slots.qsize()
    threads = max(1, usable_cores() // workers) if workers > 1 and bench.device == "cpu" else 0

    def train(place: Place) -> dict[str, Any] | Exception:
        gpu = slots.get()
        try:
            return run_alone(
                matrix.cells[place], matrix.folder(place), bench.device, threads, bench.nsd_tolerance_mm, gpu
            )
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
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def _through_submitit(matrix: Matrix, todo: list[Place], done: Callable[[Place, Any], None]) -> None:
    """One job a training; jobs go on when this command ends, and repeating it takes what they have finished."""
    try:
        import submitit
    except ImportError as error:
        raise MiMError("submitit is missing: pip install 'nnunet_mim[slurm]'") from error
    bench = matrix.bench
    options = dict(bench.slurm or {})
    executor = submitit.AutoExecutor(folder=str(bench.output / "slurm"), cluster=options.pop("cluster", None))
    try:
        executor.update_parameters(**{"name": "mim_benchmark", "gpus_per_node": 1, **options})
    except (TypeError, ValueError, NameError) as error:
        raise MiMError(f"slurm: {' '.join(str(error).split())}: see submitit's parameters") from error
    waiting = {}
    for place in todo:
        arguments = (matrix.cells[place], matrix.folder(place), bench.device, 0, bench.nsd_tolerance_mm)
        waiting[place] = executor.submit(run_alone, *arguments)
    while waiting:
        for place, job in [(place, job) for place, job in waiting.items() if job.done()]:
            del waiting[place]
            try:
                done(place, job.result())
            except Exception as error:  # submitit's own, with the log of the job in it
                done(place, MiMError(f"job {job.job_id} failed ({_last_line(error)}): see {job.paths.stderr}"))
        if waiting:
            time.sleep(POLL)


def _last_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[-1][:300]
