"""From an experiment to its report: check, estimate, train what is missing, report."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Collection, Iterable, Mapping, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from nnunetv2.inference.sliding_window_prediction import compute_steps_for_sliding_window
from nnunetv2.utilities.get_network_from_plans import get_network_from_plans
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

from nnunet_mim.benchmarking.bench_file import Bench
from nnunet_mim.benchmarking.bench_report import PAGE, write_bench_report
from nnunet_mim.benchmarking.cell import Cell
from nnunet_mim.benchmarking.classifiers.bench_file import ClassifierBench
from nnunet_mim.benchmarking.external import check_references
from nnunet_mim.benchmarking.guard import Seen, look_for_seen_cases, refuse_seen_cases
from nnunet_mim.benchmarking.matrix import Matrix, Place, Results, build_matrix
from nnunet_mim.benchmarking.outcome import Outcome
from nnunet_mim.benchmarking.training import reason_of
from nnunet_mim.benchmarking.work import Trainings, failures, finished_results, run_matrix
from nnunet_mim.errors import MiMError
from nnunet_mim.networks.hybrid_unet import HybridUNet
from nnunet_mim.networks.resenc import check_named_classes
from nnunet_mim.nnunet.datasets import require_environment
from nnunet_mim.nnunet.documents import check_architecture
from nnunet_mim.system.files import write_atomically


def run_experiment(bench: Bench, retry: bool = False, bench_yaml: str = "") -> None:
    """Check everything, train what has not been trained yet (with `retry` also what failed the last time), report.

    `bench_yaml`, the experiment as text, is kept in the output folder once it is checked. Raises MiMError for bad input
    before any training, and for failed trainings at the end.
    """
    check_device(bench)
    outcome, seen_tests = prepare(bench)
    matrix, results = outcome.matrix, outcome.results
    if bench_yaml:
        bench.output.mkdir(parents=True, exist_ok=True)
        write_atomically(bench.output / "bench.yaml", bench_yaml.encode())
    unfinished = train_missing(matrix, results, retry, f"trainings of {bench.iterations} iterations")
    if results:
        report(outcome, seen_tests, unfinished)
    refuse_unfinished(matrix, unfinished, retry)


def train_missing(matrix: Trainings, results: dict[Any, Any], retry: bool, what: str) -> dict[Any, str]:
    """Train what is not in `results`, which it adds to, and with `retry` also what failed the last time.

    Returns why others failed or were interrupted. `what` stands behind the number of trainings.
    """
    failed = failures(matrix)
    todo = [place for place in matrix.cells if place not in results and (retry or place not in failed)]
    state = f"{len(results)} finished, {len(todo)} to do; output {matrix.bench.output}"
    print(f"{len(matrix.cells)} {what}: {state}", flush=True)
    unfinished = {place: reason for place, reason in failed.items() if place not in todo}
    for place, reason in unfinished.items():
        print(f"failed before: {place}: {reason}")
    unfinished |= run_matrix(matrix, todo, results, lambda text: print(text, flush=True))
    if busy := len([place for place in todo if place not in results and place not in unfinished]):
        print(f"{busy} trainings are left to other processes, which are at work on them")
    return unfinished


def refuse_unfinished(matrix: Trainings, unfinished: Mapping[Any, str], retry: bool) -> None:
    """MiMError where trainings failed or were interrupted."""
    if unfinished:
        broken = failures(matrix)  # an interrupted training continues without --retry
        remedy = "see above, and repeat the command" + (" with --retry" if broken and not retry else "")
        state = f"{len(unfinished)} trainings {'failed' if broken else 'were interrupted'}"
        raise MiMError(f"{state}, {next(iter(unfinished))} first: {remedy}")


def report_experiment(bench: Bench) -> None:
    """Report what is finished. Raises MiMError where nothing is, or for bad input."""
    nothing = MiMError(f"no training in {bench.output} is finished, so there is nothing to report")
    if not bench.output.is_dir():
        raise nothing
    outcome, seen_tests = prepare(bench, only_report=True)
    if not outcome.results:
        raise nothing
    report(outcome, seen_tests, failures(outcome.matrix))


def plan_experiment(bench: Bench) -> None:
    """Print every training with its state and the hours it would take; train nothing. Raises MiMError for bad input."""
    outcome, _ = prepare(bench)
    matrix, results = outcome.matrix, outcome.results
    failed = failures(matrix)
    hours = _hours_of(matrix, results)
    for place in matrix.cells:
        state = "finished" if place in results else "failed" if place in failed else "to do"
        estimate = hours[place.dataset, place.arm]
        print(f"{place}: {state}{f', about {estimate:.2f} h' if estimate is not None else ''}")
    todo = [hours[place.dataset, place.arm] for place in matrix.cells if place not in results]
    at_a_time = len(bench.gpus) or (len(todo) if bench.slurm is not None else bench.jobs)
    print(summary_of_plan(todo, len(matrix.cells), bench.device, at_a_time))


def summary_of_plan(todo: Sequence[float | None], total: int, device: str, at_a_time: int) -> str:
    """How many of `total` trainings are to do, and how long they take; `todo` has hours, None where unknown."""
    text = f"{len(todo)} of {total} trainings to do"
    known = [hours for hours in todo if hours is not None]
    text += f", about {sum(known):.1f} h of {device}" if known else ", hours unknown" if todo else ""
    if at_a_time > 1 and todo:
        text += f"; {min(at_a_time, len(todo))} at a time"
    unknown = len(todo) - len(known)
    return f"{text} ({unknown} not counted)" if known and unknown else text


def prepare(bench: Bench, only_report: bool = False) -> tuple[Outcome, dict[str, Seen]]:
    """Check everything that can be wrong, before any training; what takes longest comes last.

    Returns what is finished, and what the pretrainings have seen of every test set, by its name.
    """
    require_environment()
    matrix = build_matrix(bench)
    results = finished_results(matrix)
    if not only_report:
        _check_references(matrix, results)
    seen = look_for_seen_cases(matrix)
    seen_tests = {test.dataset: look_for_seen_cases(matrix, test) for test in matrix.tests}
    if not bench.allow_seen:
        refuse_seen_cases(seen)
        for test, findings in seen_tests.items():
            refuse_seen_cases(findings, test)
    return Outcome(matrix, results, seen), seen_tests


def _check_references(matrix: Matrix, results: Collection[Place]) -> None:
    """MiMError where the reference of a validation case is missing, or that of a test set is no label of its image,
    which would be noticed after hours of training.
    """
    todo = [cell for place, cell in matrix.cells.items() if place not in results]
    for path, source in {cell.reference(case): cell.arm.source for cell in todo for case in cell.val_cases}.items():
        if not path.is_file():
            remedy = f"run {source.preprocess_command}, or copy it from labelsTr"
            raise MiMError(f"{path}, a validation case's reference, is missing: {remedy}")
    for test in matrix.tests if todo else ():
        check_references(test)


def check_device(bench: Bench | ClassifierBench) -> None:
    """MiMError where this machine does not have the GPUs of the experiment. Jobs of SLURM run elsewhere."""
    if bench.device != "cuda" or bench.slurm is not None:
        return
    count = torch.cuda.device_count()
    if not count:
        raise MiMError("no GPU was found: give device cpu, or run where one is")
    if wrong := [gpu for gpu in bench.gpus if not gpu.isdigit() or int(gpu) >= count]:
        raise MiMError(f"gpus: {wrong[0]}: {count} can be seen here, numbered from 0")


def report(outcome: Outcome, seen_tests: Mapping[str, Seen], failed: Mapping[Place, str]) -> None:
    """Write the report and print its tables."""
    tests = [outcome.on(test, seen_tests[test.dataset]) for test in outcome.matrix.tests]
    print(write_bench_report(outcome, failed, tests))
    print(f"page: {outcome.matrix.bench.output / PAGE}")


def _hours_of(matrix: Matrix, results: Results) -> dict[tuple[str, str], float | None]:
    """Hours of a training by (dataset, arm): the median of finished ones, else measured; None where that fails."""
    finished: dict[tuple[str, str], list[float]] = {}
    for place, result in results.items():
        if result["cost"]:
            finished.setdefault((place.dataset, place.arm), []).append(result["cost"]["seconds"] / 3600)
    hours: dict[tuple[str, str], float | None] = {key: statistics.median(values) for key, values in finished.items()}
    measured: dict[tuple[str | None, ...], float | None] = {}
    for place, cell in matrix.cells.items():
        network = (cell.arm.identity["plans_sha256"], place.dataset, str(dict(cell.arm.spec.settings)))
        if (place.dataset, place.arm) not in hours and network not in measured:
            try:
                measured[network] = measure(cell, matrix.bench.device) / 3600
            except Exception as error:  # networks are anybody's; a plan without one estimate is still a plan
                print(f"note: no estimate for {cell.arm.spec.name} ({reason_of(error)[:200]})")
                measured[network] = None
        hours.setdefault((place.dataset, place.arm), measured.get(network))
    return hours


def measure(cell: Cell, device: str) -> float:
    """Seconds of a training with its validation, from the median of three steps on made-up patches. Reading and
    augmenting patches, which runs at the same time, is not included.
    """
    source, length = cell.arm.source, cell.length
    manager = PlansManager(dict(source.plans))
    configuration = manager.get_configuration(source.configuration)
    heads = manager.get_label_manager(cell.dataset_json).num_segmentation_heads
    architecture = configuration.configuration["architecture"]
    network = _network(architecture, str(source.plans_file), source.in_channels, heads).to(device)
    patch = tuple(configuration.patch_size)
    training = _median_seconds(network, (configuration.batch_size, source.in_channels, *patch), device, True)
    network.eval()
    forward = _median_seconds(network, (1, source.in_channels, *patch), device, False)
    steps = length.epochs * (length.iterations * training + length.val_iterations * forward * configuration.batch_size)
    shape = [max(a, round(b)) for a, b in zip(patch, configuration.median_image_size_in_voxels, strict=True)]
    patches = math.prod(len(positions) for positions in compute_steps_for_sliding_window(shape, patch, 0.5))
    return steps + len(cell.val_cases) * patches * views(cell) * forward


def _network(architecture: Mapping[str, Any], place: str, in_channels: int, heads: int) -> torch.nn.Module:
    """The network that plans, whose file is `place`, describe: this package's or one of nnU-Net's own.

    Raises MiMError for another name.
    """
    name, kwargs = architecture["network_class_name"], architecture["arch_kwargs"]
    if name == f"{HybridUNet.__module__}.{HybridUNet.__name__}":
        return HybridUNet(in_channels, heads, True, **kwargs)
    check_named_classes(architecture, place, plain=True)
    check_architecture(f"{place}: architecture", dict(architecture), "plan the dataset again", plain=True)
    imported = architecture["_kw_requires_import"]
    return get_network_from_plans(name, kwargs, imported, in_channels, heads, deep_supervision=True)


def views(cell: Cell) -> int:
    """Number of mirrored predictions of a patch."""
    if not cell.arm.spec.is_mim:
        return 2**3
    axes = cell.recipe().mirror_axes
    return 2 ** (2 if axes is None else len(axes))


def _median_seconds(network: torch.nn.Module, shape: Iterable[int], device: str, train: bool) -> float:
    """Median seconds of a forward pass, or of a forward and a backward pass, after one that does not count."""
    patch = torch.randn(*shape, device=device)
    precision = torch.autocast("cuda") if device == "cuda" else nullcontext()
    seconds = []
    for _ in range(4):
        began = time.perf_counter()
        with torch.set_grad_enabled(train), precision:
            outputs = network(patch)
            if train:
                outputs = outputs if isinstance(outputs, list | tuple) else [outputs]
                sum(output.float().square().mean() for output in outputs).backward()
                network.zero_grad()
        if device == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - began)
    return statistics.median(seconds[1:])
