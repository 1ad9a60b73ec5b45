"""From an experiment of classifiers to its report: check, train what is missing, report."""

from __future__ import annotations

import statistics
from collections.abc import Mapping

from nnunet_mim.benchmarking.classifiers.bench_file import ClassifierBench
from nnunet_mim.benchmarking.classifiers.matrix import ClassifierPlace, build_classifier_matrix
from nnunet_mim.benchmarking.classifiers.outcome import ClassifierOutcome
from nnunet_mim.benchmarking.classifiers.report import PAGE, write_classifier_report
from nnunet_mim.benchmarking.experiment import check_device, refuse_unfinished, summary_of_plan, train_missing
from nnunet_mim.benchmarking.work import failures, finished_results
from nnunet_mim.errors import MiMError
from nnunet_mim.nnunet.datasets import require_environment


def run_classifiers(bench: ClassifierBench, retry: bool) -> None:
    """Check everything, train what has not been trained yet (with `retry` also what failed the last time), report.

    Raises MiMError for bad input before any training, and for failed trainings at the end.
    """
    check_device(bench)
    outcome = _prepare(bench)
    unfinished = train_missing(outcome.matrix, outcome.results, retry, "trainings of all folds")
    if outcome.results:
        _report(outcome, unfinished)
    refuse_unfinished(outcome.matrix, unfinished, retry)


def report_classifiers(bench: ClassifierBench) -> None:
    """Report what is finished. Raises MiMError where nothing is, or for bad input."""
    outcome = _prepare(bench)
    if not outcome.results:
        raise MiMError(f"no training in {bench.output} is finished, so there is nothing to report")
    _report(outcome, failures(outcome.matrix))


def plan_classifiers(bench: ClassifierBench) -> None:
    """Print every training with its state and, where others like it are finished, the hours it would take.

    Trains nothing. Raises MiMError for bad input.
    """
    outcome = _prepare(bench)
    matrix, failed = outcome.matrix, failures(outcome.matrix)
    seconds: dict[tuple[str, str], list[float]] = {}
    for place, result in outcome.results.items():
        seconds.setdefault((place.dataset, place.arm), []).append(result["seconds"])
    hours = {key: statistics.median(values) / 3600 for key, values in seconds.items()}
    for place in matrix.cells:
        state = "finished" if place in outcome.results else "failed" if place in failed else "to do"
        estimate = hours.get((place.dataset, place.arm))
        print(f"{place}: {state}{f', about {estimate:.2f} h' if estimate is not None else ''}")
    todo = [hours.get((place.dataset, place.arm)) for place in matrix.cells if place not in outcome.results]
    at_a_time = len(bench.gpus) or (len(todo) if bench.slurm is not None else bench.jobs)
    print(summary_of_plan(todo, len(matrix.cells), bench.device, at_a_time))


def _prepare(bench: ClassifierBench) -> ClassifierOutcome:
    """Check everything that can be wrong, before any training. Returns what is finished."""
    require_environment()
    matrix = build_classifier_matrix(bench)
    outcome = ClassifierOutcome(matrix, finished_results(matrix))
    outcome.check_where()
    return outcome


def _report(outcome: ClassifierOutcome, failed: Mapping[ClassifierPlace, str]) -> None:
    """Write the report and print its tables."""
    print(write_classifier_report(outcome, failed))
    print(f"page: {outcome.matrix.bench.output / PAGE}")
