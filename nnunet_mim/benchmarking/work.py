"""Running the trainings of an experiment: one after the other, on several GPUs, or through SLURM.

docs/adr/0004-local-jobs.md says why trainings on this machine do not go through submitit.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from queue import SimpleQueue
from threading import Event
from typing import Any, Protocol

from nnunet_mim.benchmarking.training import BUSY, InterruptedTrainingError, KeptTraining, reason_of
from nnunet_mim.errors import MiMError
from nnunet_mim.system.machine import usable_cores
from nnunet_mim.system.slurm import cause_of, slurm_executor, submit_all

SLURM_POLL_SECONDS = 5.0
Report = Callable[[Any, "dict[str, Any] | Exception"], None]
"""what is called with the place of a training in its matrix and its result, or why there is none"""


class Trainings(Protocol):
    """As much of an experiment as it takes to run its trainings: `Matrix`, or `ClassifierMatrix`."""

    @property
    def bench(self) -> Any:
        """The experiment, with gpus, jobs, slurm, device and output."""

    @property
    def cells(self) -> Mapping[Any, Any]:
        """What is trained, by its place."""

    def training(self, place: Any, threads: int = 0) -> KeptTraining:
        """The training at a place; threads: number of PyTorch's threads, 0 as usual."""

    def shown(self, result: Mapping[str, Any]) -> str:
        """The figure of a result that is printed when it is there."""


def finished_results(matrix: Trainings) -> dict[Any, dict[str, Any]]:
    """Results of the trainings that are finished already. Raises MiMError where a folder holds another experiment."""
    found = {place: matrix.training(place).finished() for place in matrix.cells}
    return {place: result for place, result in found.items() if result is not None}


def failures(matrix: Trainings) -> dict[Any, str]:
    """Why the last attempt failed, for trainings where it did."""
    found = {place: matrix.training(place).failure() for place in matrix.cells}
    return {place: reason for place, reason in found.items() if reason is not None}


def run_matrix(
    matrix: Trainings, todo: list[Any], results: dict[Any, dict[str, Any]], say: Callable[[str], None] = print
) -> dict[Any, str]:
    """Train `todo`; adds to `results` as trainings finish. Returns why others failed or were interrupted."""
    failed: dict[Any, str] = {}
    began = time.monotonic()

    def report(place: Any, outcome: dict[str, Any] | Exception) -> None:
        if isinstance(outcome, Exception) and BUSY in str(outcome):
            say(f"left: {place}: {BUSY}")
        elif isinstance(outcome, Exception):
            failed[place] = reason_of(outcome)
            state = "not finished" if isinstance(outcome, InterruptedTrainingError) else "failed"
            say(f"{state}: {place}: {failed[place]}")
        else:
            results[place] = outcome
            trained = sum(other in results for other in todo)
            left = len(todo) - trained - len(failed)
            hours = (time.monotonic() - began) / trained * left / 3600
            ahead = f", {left} to go, about {hours:.1f} h" if left else ""
            say(f"[{len(results)}/{len(matrix.cells)}] {place}: {matrix.shown(outcome)}{ahead}")

    run = _run_here if matrix.bench.slurm is None else _run_on_slurm
    run(matrix, todo, report)
    return failed


def _run_here(matrix: Trainings, todo: list[Any], report: Report) -> None:
    """One training at a time for each of `gpus`, or `jobs` trainings at a time."""
    bench = matrix.bench
    slots: SimpleQueue[str | None] = SimpleQueue()
    for gpu in visible(bench.gpus) or (None,) * bench.jobs:
        slots.put(gpu)
    stop = Event()
    workers = slots.qsize()
    threads = max(1, usable_cores() // workers) if bench.device == "cpu" else 0  # more than cores spin

    def train(place: Any) -> dict[str, Any] | Exception:
        gpu = slots.get()
        try:
            return matrix.training(place, threads)(gpu, stop)
        except Exception as error:  # one training must not end the others
            return error
        finally:
            slots.put(gpu)

    with ThreadPoolExecutor(workers) as pool:
        try:
            running = {pool.submit(train, place): place for place in todo}
            for future in as_completed(running):
                report(running[future], future.result())
        except KeyboardInterrupt:
            stop.set()
            pool.shutdown(wait=True, cancel_futures=True)
            raise MiMError("interrupted: repeat the command to go on") from None


def visible(gpus: Sequence[str]) -> tuple[str, ...]:
    """GPUs by their number among those that this process sees → as CUDA_VISIBLE_DEVICES names them."""
    seen = [name for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name]
    return tuple(seen[int(gpu)] for gpu in gpus) if seen else tuple(gpus)


def _run_on_slurm(matrix: Trainings, todo: list[Any], report: Report) -> None:
    """One job a training. Jobs continue when this command ends, and repeating it takes what they have finished."""
    defaults = {"name": "mim_benchmark", "gpus_per_node": 1, "cpus_per_task": 8}
    executor = slurm_executor(matrix.bench.slurm or {}, matrix.bench.output / "slurm", defaults, "slurm")
    waiting = dict(zip(todo, submit_all(executor, map(matrix.training, todo), "slurm"), strict=True))
    print(f"{len(waiting)} jobs submitted; they go on when this command ends, and repeating it takes their results")
    while waiting:
        for place, job in [(place, job) for place, job in waiting.items() if job.done()]:
            del waiting[place]
            try:
                report(place, job.result())
            except Exception as error:  # submitit's own, with the log of the job in it
                reason = BUSY if BUSY in str(error) else matrix.training(place).failure() or cause_of(error)
                report(place, MiMError(f"job {job.job_id}: {reason}: see {job.paths.stderr}"))
        if waiting:
            time.sleep(SLURM_POLL_SECONDS)
