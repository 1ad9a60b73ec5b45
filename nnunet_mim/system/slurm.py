"""Jobs of SLURM, through submitit, which is an extra of the package."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from nnunet_mim.errors import MiMError, last_line


def slurm_executor(parameters: Mapping[str, Any], folder: Path, defaults: Mapping[str, Any], where: str) -> Any:
    """An executor of submitit. Nothing is written or submitted yet.

    Args:
        parameters: of submitit, as the user gives them; `cluster` chooses another one of its executors.
        folder: of the jobs' files and logs.
        defaults: parameters that the user's replace.
        where: what the user gave them with, for messages: `slurm` or `--slurm`.

    Raises:
        MiMError: submitit or SLURM is missing, or it does not take these parameters.
    """
    try:
        import submitit
    except ImportError as error:
        raise MiMError("submitit is missing: pip install 'nnunet_mim[slurm]'") from error
    given = dict(parameters)
    if not {"timeout_min", "slurm_time"} & set(given):
        raise MiMError(f"{where}: give timeout_min: a job without it gets five minutes")
    try:
        executor = submitit.AutoExecutor(folder=str(folder), cluster=given.pop("cluster", "slurm"))
    except (RuntimeError, ValueError) as error:
        raise MiMError(f"{where}: {last_line(error)}: run where SLURM is, or leave '{where}' out") from error
    try:
        executor.update_parameters(**{**defaults, **given})
    except (TypeError, ValueError, NameError) as error:
        raise MiMError(f"{where}: {last_line(error)}: see submitit's parameters") from error
    return executor


def submit_all(executor: Any, tasks: Iterable[Callable[[], Any]], where: str) -> list[Any]:
    """Submit tasks, and return their jobs.

    Raises MiMError where SLURM does not take one of them; the others are cancelled then.
    """
    jobs: list[Any] = []
    try:
        for task in tasks:
            jobs.append(executor.submit(task))
    except (RuntimeError, OSError) as error:  # what sbatch says about partitions, limits, accounts
        for job in jobs:
            job.cancel()
        raise MiMError(f"{where}: {cause_of(error)}: correct the parameters, see sinfo") from error
    return jobs


def cause_of(error: Exception) -> str:
    """The error of a job, in one line, from what submitit says about it: it has the log of the job in it."""
    lines = [line.strip() for line in str(error).splitlines() if ": " in line]
    lines = [line for line in lines if not line.startswith("-")]  # names of logs, below the traceback
    return lines[-1][:300] if lines else last_line(error)
