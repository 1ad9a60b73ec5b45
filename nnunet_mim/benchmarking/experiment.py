"""From an experiment to its report: check, train what is missing, report."""

from __future__ import annotations

import statistics
from collections.abc import Collection, Mapping, Sequence

from nnunet_mim.benchmarking.bench_report import PAGE, write_report
from nnunet_mim.benchmarking.cell import Cell
from nnunet_mim.benchmarking.estimate import measure
from nnunet_mim.benchmarking.guard import Seen, look_for_seen_cases, refuse_seen_cases
from nnunet_mim.benchmarking.matrix import Bench, Matrix, Place, build_matrix, describe
from nnunet_mim.benchmarking.tables import Outcome
from nnunet_mim.benchmarking.work import Results, failures, finished_results, run_matrix
from nnunet_mim.errors import MiMError
from nnunet_mim.nnunet.datasets import require_environment


def run_experiment(bench: Bench, retry: bool = False) -> None:
    """Check everything, train what has not been trained yet, report.

    Args:
        bench: what.
        retry: train also what failed the last time.

    Raises:
        MiMError: bad input, before any training; a validation case that a pretraining has seen; failed trainings, at
            the end.
    """
    check_device(bench)
    matrix, seen, results = prepare(bench)
    failed = failures(matrix)
    todo = [place for place in matrix.cells if place not in results and (retry or place not in failed)]
    length = bench.length
    print(f"{len(matrix.cells)} trainings of {length.epochs * length.iterations} iterations: {len(results)} finished, "
          f"{len(todo)} to do; output {bench.output}", flush=True)  # fmt: skip
    left = {place: why for place, why in failed.items() if place not in todo}
    for place, why in left.items():
        print(f"failed before: {describe(place)}: {why}")
    began = len(results)
    left |= run_matrix(matrix, todo, results, lambda text: print(text, flush=True))
    if busy := len(todo) - (len(results) - began) - len([place for place in left if place in todo]):
        print(f"{busy} trainings are left to other processes, which are at work on them")
    if results:
        report(matrix, seen, results, left)
    if left:
        first = describe(next(iter(left)))
        broken = failures(matrix)  # what was only interrupted goes on by itself
        again = " with --retry" if broken and not retry else ""
        what = "failed" if broken else "were interrupted"
        raise MiMError(f"{len(left)} trainings {what}, {first} first: see above, and repeat the command{again}")


def report_experiment(bench: Bench) -> None:
    """Report what is finished.

    Raises:
        MiMError: nothing is, or as `run_experiment`.
    """
    nothing = MiMError(f"no training in {bench.output} is finished, so there is nothing to report")
    if not bench.output.is_dir():
        raise nothing
    matrix, seen, results = prepare(bench, only_report=True)
    if not results:
        raise nothing
    report(matrix, seen, results, failures(matrix))


def plan_experiment(bench: Bench) -> None:
    """Print every training with its state and the hours it would take; train nothing.

    Raises:
        MiMError: as `run_experiment`, before any training.
    """
    matrix, _, results = prepare(bench)
    failed = failures(matrix)
    hours = hours_of(matrix, results)
    for place in matrix.cells:
        state = "finished" if place in results else "failed" if place in failed else "to do"
        known = hours[place.dataset, place.arm]
        print(f"{describe(place)}: {state}{f', about {known:.2f} h' if known is not None else ''}")
    left = [hours[place.dataset, place.arm] for place in matrix.cells if place not in results]
    at_once = len(bench.gpus) or (len(left) if bench.slurm is not None else bench.jobs)
    print(summary_of_plan(left, len(matrix.cells), bench.device, at_once))


def summary_of_plan(left: Sequence[float | None], total: int, device: str, at_once: int) -> str:
    """One line: how many trainings are to do, and how long they take.

    Args:
        left: hours of each training that is to do, None where nobody knows.
        total: trainings, finished ones too.
        device: what the hours are of.
        at_once: trainings at a time.
    """
    text = f"{len(left)} of {total} trainings to do"
    known = [hours for hours in left if hours is not None]
    text += f", about {sum(known):.1f} h of {device}" if known else ", hours unknown" if left else ""
    if at_once > 1 and left:
        text += f"; {min(at_once, len(left))} at a time"
    unknown = len(left) - len(known)
    return f"{text} ({unknown} not counted)" if known and unknown else text


def prepare(bench: Bench, only_report: bool = False) -> tuple[Matrix, Seen, Results]:
    """Everything that can be wrong, before any training; what is quick to see first."""
    require_environment()
    matrix = build_matrix(bench)
    results = finished_results(matrix)
    if not only_report:
        check_references(matrix, results)
    seen = look_for_seen_cases(matrix)
    if not bench.allow_seen:
        refuse_seen_cases(seen)
    return matrix, seen, results


def check_references(matrix: Matrix, results: Collection[Place]) -> None:
    """MiMError where the reference of a validation case is missing, which nnU-Net notices after hours of training."""
    wanted = {
        cell.references / f"{case}{cell.dataset_json['file_ending']}": cell
        for place, cell in matrix.cells.items()
        if place not in results
        for case in cell.val_cases
    }
    for path, cell in wanted.items():
        if not path.is_file():
            source = cell.arm.source
            raise MiMError(
                f"{path}, a validation case's reference, is missing: run nnUNetv2_preprocess -d {source.dataset[7:10]} "
                f"-plans_name {source.plans_name} -c {source.configuration}, or copy it from labelsTr"
            )


def check_device(bench: Bench) -> None:
    """MiMError where this machine has not the GPUs that are asked for. Jobs of SLURM run elsewhere."""
    import torch

    if bench.device != "cuda" or bench.slurm is not None:
        return
    count = torch.cuda.device_count()
    if not count:
        raise MiMError("no GPU was found: give device cpu, or run where one is")
    if wrong := [gpu for gpu in bench.gpus if not gpu.isdigit() or int(gpu) >= count]:
        raise MiMError(f"gpus: {wrong[0]}: {count} can be seen here, numbered from 0")


def report(matrix: Matrix, seen: Seen, results: Results, failed: Mapping[Place, str]) -> None:
    """Write the report and print its tables."""
    print(write_report(Outcome(matrix, results, seen), failed))
    print(f"page: {matrix.bench.output / PAGE}")


def hours_of(matrix: Matrix, results: Results) -> dict[tuple[str, str], float | None]:
    """Hours of a training by (dataset, arm): the median of finished ones, else measured; None where that fails."""
    found: dict[tuple[str, str], float | None] = {}
    measured: dict[str, float | None] = {}
    for place, cell in matrix.cells.items():
        here = (place.dataset, place.arm)
        if here in found:
            continue
        done = [
            result["cost"]["seconds"] / 3600
            for other, result in results.items()
            if (other.dataset, other.arm) == here and result["cost"]
        ]
        if done:
            found[here] = statistics.median(done)
            continue
        key = f"{cell.arm.identity['plans_sha256']} {place.dataset} {dict(cell.settings)}"
        if key not in measured:
            measured[key] = measured_hours(cell, matrix.bench.device)
        found[here] = measured[key]
    return found


def measured_hours(cell: Cell, device: str) -> float | None:
    """Hours from a few steps; None, with a note, where these fail."""
    try:
        return measure(cell, cell.dataset_json, device) / 3600
    except Exception as error:  # networks are anybody's; a plan without one estimate is still a plan
        print(f"note: no estimate for {cell.arm.name} ({type(error).__name__}: {' '.join(str(error).split())[:200]})")
        return None
