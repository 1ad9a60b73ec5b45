"""Preparing cases in jobs of SLURM, each of which takes a share of them.

A job appends a line per finished case to a file of its own. The command reads these files and writes the log, which has
one writer here too. What jobs have finished after the command was killed is taken by the next one.
"""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nnunet_mim.errors import MiMError
from nnunet_mim.preparation.case_log import is_result
from nnunet_mim.preparation.prepare_case import Job, file_stamps, run_jobs
from nnunet_mim.system.guarded import prepare_workers
from nnunet_mim.system.slurm import cause_of, slurm_executor, submit_all
from nnunet_mim.system.untrusted import MAX_LOG, limited, parse_json

FLAG = "--slurm"
POLL_SECONDS = 5.0


@dataclass(frozen=True, eq=False)
class Share:
    """The cases of one job, which submitit pickles and calls."""

    jobs: tuple[Job, ...]
    processes: int
    file: Path
    """for results; the command makes it, and where it is gone nobody waits for the job any more"""

    def __call__(self) -> None:
        """Prepare the cases that are not in the file yet. Raises OSError where the file is gone."""
        prepare_workers("nnunet_mim.preparation.prepare_case")
        finished = {line["case"] for line in read_lines(self.file, 0)[0]}
        keys = {job.case.name: job.key for job in self.jobs}
        todo = [job for job in self.jobs if job.case.name not in finished]
        with closing(run_jobs(todo, self.processes)) as results:
            for case, result in results:
                line = json.dumps({"case": case, "key": keys[case], "result": result})
                with open(os.open(self.file, os.O_WRONLY | os.O_APPEND), "w", encoding="utf-8") as file:
                    file.write(f"\n{line}\n")  # a line that an ended job has cut short stays by itself

    def checkpoint(self, *_: Any) -> Any:
        """The job that submitit queues when the time of this one is over: the same, which continues."""
        from submitit.helpers import DelayedSubmission

        return DelayedSubmission(self)


def cluster_executor(slurm: Mapping[str, Any], processes: int, folder: Path) -> tuple[Any, int]:
    """submitit's executor, and the number of jobs. Raises MiMError for settings that it does not take."""
    given = dict(slurm)
    count = given.pop("jobs", 1)
    if not isinstance(count, int) or count < 1:
        raise MiMError(f"{FLAG} jobs={count}: give a number of jobs, such as jobs=16")
    return slurm_executor(given, folder, {"name": "mim_prepare", "cpus_per_task": processes}, FLAG), count


def run_shares(
    jobs: Sequence[Job], processes: int, slurm: Mapping[str, Any], folder: Path
) -> Iterator[tuple[str, dict[str, Any]]]:
    """Prepare cases in jobs of SLURM; yields (case, result) as they are finished.

    Args:
        jobs: the cases, with their keys.
        processes: of each job.
        slurm: parameters of submitit, and `jobs`, the number of jobs.
        folder: for files of the jobs, which see it too. It stays where a job has failed, for its log.

    Raises:
        MiMError: a job failed; the others have been waited for, and finished cases are kept.
    """
    executor, count = cluster_executor(slurm, processes, folder)
    waiting = {job.case.name: job for job in jobs}
    for file in sorted(folder.glob("*.jsonl")):  # of a command that was killed
        for line in read_lines(file, 0)[0]:
            if _is_still_true(line, waiting):
                del waiting[line["case"]]
                yield line["case"], line["result"]
    shutil.rmtree(folder, ignore_errors=True)  # its jobs end where they are still running
    folder.mkdir(parents=True)
    call = time.time_ns()  # the files of no other call have these names
    shares = [
        Share(tuple(waiting.values())[number::count], processes, folder / f"share_{call}_{number}.jsonl")
        for number in range(min(count, len(waiting)))
    ]
    for share in shares:
        share.file.touch()
    failed = yield from _results(dict(zip(shares, submit_all(executor, shares, FLAG), strict=True)))
    if failed:
        raise MiMError(f"{failed[0]}; {len(failed)} jobs failed: repeat the command to prepare what is left")
    shutil.rmtree(folder, ignore_errors=True)


def _results(running: dict[Share, Any]) -> Generator[tuple[str, dict[str, Any]], None, list[str]]:
    """Yield what jobs append to their files, until all have ended. Cancels them where the command is interrupted.

    Returns why jobs failed.
    """
    read, failed = dict.fromkeys(running, 0), list[str]()
    left = {share: len(share.jobs) for share in running}
    names = {share: {job.case.name for job in share.jobs} for share in running}
    try:
        while running:
            ended = [share for share, job in running.items() if job.done()]  # these append nothing after this
            for share in running:
                lines, read[share] = read_lines(share.file, read[share])
                lines = [line for line in lines if line["case"] in names[share]]
                left[share] -= len(lines)
                yield from ((line["case"], line["result"]) for line in lines)
            for share in ended:
                job = running.pop(share)
                try:
                    job.result()
                    cause = f"{left[share]} cases have no result" if left[share] else ""
                except Exception as error:  # submitit's own, or that of the job
                    cause = cause_of(error)
                if cause:
                    failed.append(f"job {job.job_id}: {cause}: see {job.paths.stderr}")
            if running:
                time.sleep(POLL_SECONDS)
    finally:
        for job in running.values():
            job.cancel()
    return failed


def read_lines(file: Path, start: int) -> tuple[list[dict[str, Any]], int]:
    """The complete lines of a file of results from a byte on, and the byte after them. A damaged line is left out.

    Raises MiMError where the file is larger than a log may be, or no regular one.
    """
    try:
        text = limited(file, MAX_LOG, start=start)
    except ValueError as error:
        raise MiMError(f"cannot read {file} ({error}): delete it, and repeat the command") from error
    end = text.rfind(b"\n") + 1
    lines = []
    for line in text[:end].decode(errors="replace").splitlines():
        try:
            content = parse_json(line)
        except ValueError:
            continue
        if _is_line(content):
            lines.append(content)
    return lines, start + end


def _is_line(content: Any) -> bool:
    """Whether it is what a job writes of a case."""
    if not isinstance(content, dict) or content.keys() != {"case", "key", "result"}:
        return False
    return isinstance(content["case"], str) and isinstance(content["key"], str) and is_result(content["result"])


def _is_still_true(line: Mapping[str, Any], waiting: Mapping[str, Job]) -> bool:
    """Whether a result of an earlier call is that of a case of this one, whose files are there."""
    if line["case"] not in waiting:
        return False
    job, stamps = waiting[line["case"]], line["result"].get("stamps")
    return line["key"] == job.key and stamps is not None and stamps == file_stamps(job.source.folder, job.case.name)
