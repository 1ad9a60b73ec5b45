"""Worker processes of a preparation."""

from __future__ import annotations

import multiprocessing
import os
import shutil
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any

from nnunet_mim.errors import MiMError
from nnunet_mim.preparation.prepare_case import Job, prepare_case
from nnunet_mim.system.processes import end_with_parent

ONE_THREAD = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")


def run_jobs(jobs: Sequence[Job], processes: int) -> Iterator[tuple[str, dict[str, Any]]]:
    """Prepare cases in worker processes; yields (case, result) as they are finished.

    Raises:
        MiMError: a worker died, or could not write. Finished cases are kept.
    """
    if not jobs:
        return
    partial = Path(f"{jobs[0].source.folder}.partial-{os.getpid()}")  # half-written cases
    remove_abandoned(partial)
    partial.mkdir()
    os.environ.update(ONE_THREAD)  # of the workers; this process does not compute
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(min(processes, len(jobs)), mp_context=context, initializer=end_with_parent) as pool:
        futures = {pool.submit(prepare_case, job, str(partial)): job.case.name for job in jobs}
        try:
            for future in as_completed(futures):
                yield futures[future], future.result()
        except BrokenProcessPool as error:
            running = ", ".join(sorted(path.stem for path in partial.glob("*.running"))) or "unknown"
            raise MiMError(
                f"a worker process died (out of memory?) at one of these cases: {running}. What is finished is kept: "
                "repeat the command with fewer processes (-np), or move the case away"
            ) from error
        finally:
            pool.shutdown(wait=True, cancel_futures=True)
            shutil.rmtree(partial, ignore_errors=True)


def remove_abandoned(partial: Path) -> None:
    """Remove the folders NAME-PROCESS beside `partial`, which has such a name, whose process has ended."""
    if os.name == "nt":  # os.kill(…, 0) ends a process there
        return
    stem = partial.name.rsplit("-", 1)[0]
    for folder in partial.parent.glob(f"{stem}-*"):
        try:
            os.kill(int(folder.name.rsplit("-", 1)[1]), 0)
        except (OSError, ValueError):
            shutil.rmtree(folder, ignore_errors=True)
