"""The trainings that an experiment stands for, and running them without training anything."""

import json
import os
import signal
import threading
import time
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nnunet_mim.benchmarking import matrix as matrix_module
from nnunet_mim.benchmarking import work
from nnunet_mim.benchmarking.bench_file import ArmSpec, Bench, DatasetSpec
from nnunet_mim.benchmarking.cell import Arm
from nnunet_mim.benchmarking.matrix import Place, build_matrix
from nnunet_mim.benchmarking.splits import labelled_subset
from nnunet_mim.benchmarking.training import FAILED, InterruptedTrainingError, Training
from nnunet_mim.errors import MiMError
from nnunet_mim.system.locks import exclusive_lock

MIM, SCRATCH = ArmSpec("MiM", "nnUNetTrainerMiM", "P", "a.pth"), ArmSpec("Scratch", "nnUNetTrainerMiMScratch", "P")
TRAIN = tuple(f"case_{i:02d}" for i in range(40))


@given(st.integers(2, 30), st.integers(0, 100))
@settings(max_examples=30, deadline=None)
def test_subsets_are_nested_and_differ_by_seed(available, seed):
    cases = [f"case_{i:02d}" for i in range(available)]
    subsets = [labelled_subset(cases, str(count), seed) for count in range(1, available + 1)]
    for smaller, larger in pairwise(subsets):
        assert set(smaller) < set(larger)
        assert len(larger) == len(smaller) + 1
    assert subsets[-1] == tuple(cases)


def test_other_seeds_draw_other_cases():
    assert len({labelled_subset(TRAIN, "5", seed) for seed in range(10)}) == 10


def test_numbers_percentages_and_all():
    assert labelled_subset(TRAIN, "all", 3) == TRAIN
    assert len(labelled_subset(TRAIN, "10%", 3)) == 4
    assert labelled_subset(TRAIN, "4", 3) == labelled_subset(TRAIN, "10%", 3), "of one seed, the same cases"
    for labels in ("0", "41", "0%", "101%", "few", "-1", "1.5"):
        with pytest.raises(MiMError, match="give numbers from 1 to 40"):
            labelled_subset(TRAIN, labels, 0)


@dataclass(frozen=True)
class Preprocessed:
    """As much of a Source as a matrix looks at."""

    dataset: str
    plans_name: str
    configuration: str
    cases: tuple[str, ...]
    plans: dict
    folder: Path
    preprocess_command: str = "nnUNetv2_preprocess -d 501"


@pytest.fixture
def bench(tmp_path, monkeypatch):
    """Two datasets, two arms, as far as a matrix looks at them; nothing is on the disk but the checkpoint."""
    (tmp_path / "a.pth").write_bytes(b"weights")

    def resolve(spec, dataset, configuration, fold):
        source = Preprocessed(
            dataset=dataset, plans_name=spec.plans, configuration=configuration, cases=(*TRAIN, "v0", "v1"), plans={},
            folder=tmp_path / dataset / "P",
        )  # fmt: skip
        return Arm(spec, source, str(tmp_path / spec.checkpoint) if spec.checkpoint else None)

    monkeypatch.setattr(matrix_module, "resolve_arm", resolve)
    monkeypatch.setattr(matrix_module, "dataset_name", lambda given: f"Dataset{given}_X")
    monkeypatch.setattr(matrix_module, "split_of", lambda source, fold, setting: (TRAIN, (f"v{fold}",)))
    return Bench((DatasetSpec("501", (0, 1)), DatasetSpec("502")), (MIM, SCRATCH), ("1", "10%"), 2, 1, 1, 1,
                 output=tmp_path / "out", device="cpu")  # fmt: skip


def test_all_combinations_with_the_same_cases_for_all_arms(bench):
    matrix = build_matrix(bench)
    assert len(matrix.cells) == 3 * 2 * 2 * 2
    assert [place.seed for place in matrix.cells] == [0] * 12 + [1] * 12, "every arm and dataset has a result early"
    for place, cell in matrix.cells.items():
        assert cell.train_cases == matrix.cells[place._replace(arm="Scratch")].train_cases
        assert len(cell.train_cases) == (1 if place.labels == "1" else 4)
    assert len({matrix.training(place).folder for place in matrix.cells}) == 24
    assert matrix.datasets == ["Dataset501_X", "Dataset502_X"]
    assert matrix.folds("Dataset501_X") == [0, 1]
    assert matrix.train_count("Dataset501_X", 1, "10%") == 4


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"arms": (replace(MIM, name="a/b"),)}, "arm a/b: a name has letters"),
        ({"labels": ("5", "5")}, "labels are there twice"),
        ({"labels": ()}, "labels: give numbers"),
        ({"labels": ("²",)}, "give numbers from 1 to 40"),
        ({"datasets": (DatasetSpec("501"), DatasetSpec("501", (1,)))}, "Dataset501_X is there twice"),
        ({"labels": ("50",)}, "labels 50: give numbers from 1 to 40"),
        ({"arms": (replace(MIM, settings={"nothing": 1}),)}, "unknown setting 'nothing'"),
    ],
)
def test_bad_experiments_before_any_training(bench, changes, says):
    with pytest.raises(MiMError, match=says):
        build_matrix(replace(bench, **changes))


def test_a_case_that_two_folds_validate_would_count_twice(bench, monkeypatch):
    monkeypatch.setattr(matrix_module, "split_of", lambda source, fold, setting: (TRAIN, ("v0", f"v{fold}")))
    with pytest.raises(MiMError, match="Dataset501_X: folds 0 and 1 both validate v0"):
        build_matrix(bench)


def test_every_case_of_the_split_is_needed_by_every_arm(bench, monkeypatch):
    """Also by the first one: its split is not cut to what it has."""
    whole = matrix_module.resolve_arm
    for short in ("MiM", "Scratch"):

        def resolve(spec, *where, short=short):
            arm = whole(spec, *where)
            return replace(arm, source=replace(arm.source, cases=arm.source.cases[1:])) if spec.name == short else arm

        monkeypatch.setattr(matrix_module, "resolve_arm", resolve)
        with pytest.raises(MiMError, match="case_00 is not preprocessed for P: run nnUNetv2_preprocess"):
            build_matrix(bench)


def test_labels_are_reported_from_few_to_many(bench):
    assert build_matrix(replace(bench, labels=("10%", "all", "1"))).labels == ["1", "10%", "all"]


class Trainings:
    """Takes the place of nnU-Net: notes which ran when, and fails where it is told to."""

    def __init__(self, monkeypatch):
        self.done, self.running, self.most, self.gpus, self.fails = [], 0, 0, set(), ()
        self.lock = threading.Lock()
        monkeypatch.setattr(Training, "train", lambda training, gpu, stop: self.run(training, gpu))

    def run(self, training, gpu):
        cell, folder = training.cell, training.folder
        with self.lock:
            self.running += 1
            self.most = max(self.most, self.running)
            self.gpus.add(gpu)
        time.sleep(0.02)
        with self.lock:
            self.running -= 1
        if cell.arm.spec.name in self.fails:
            (folder / FAILED).write_text("no")
            raise MiMError("no")
        self.done.append(folder)
        metrics = {"dice": 0.5, "hd95": 1.0, "nsd": 0.5, "n_ref": 1, "n_pred": 1}
        result = {
            "cases": {case: {"1": metrics} for case in cell.val_cases}, "curve": [0.5], "names": {"1": "organ"},
            "tolerance": training.tolerance, "cost": {},
        }  # fmt: skip
        (folder / "key.json").write_text(json.dumps(cell.key()))
        (folder / "result.json").write_text(json.dumps(result))
        return result


@pytest.fixture
def trainings(monkeypatch):
    return Trainings(monkeypatch)


def run(bench, places=None):
    matrix, results, lines = build_matrix(bench), {}, []
    results |= work.finished_results(matrix)
    todo = [place for place in matrix.cells if place not in results]
    failed = work.run_matrix(matrix, todo if places is None else places, results, lines.append)
    return matrix, results, failed, lines


def test_one_failure_does_not_end_the_others_and_finished_ones_are_kept(bench, trainings):
    trainings.fails = ("MiM",)
    matrix, results, failed, lines = run(bench)
    assert len(results) == len(failed) == 12
    assert {place.arm for place in failed} == {"MiM"}
    assert set(work.failures(matrix)) == set(failed)
    assert sum(line.startswith("failed: Dataset50") for line in lines) == 12
    assert any(line.startswith("[12/24] Dataset50") for line in lines)
    trainings.fails, trainings.done = (), []
    _, results, failed, _ = run(bench)
    assert (len(results), failed, len(trainings.done)) == (24, {}, 12), "only what was missing"
    assert run(bench)[3] == []


def test_one_training_a_gpu_at_a_time(bench, trainings):
    run(replace(bench, device="cuda", gpus=("0", "3")))
    assert (trainings.most, trainings.gpus) == (2, {"0", "3"})


def test_jobs_on_one_device(bench, trainings):
    run(replace(bench, jobs=3))
    assert (trainings.most, trainings.gpus) == (3, {None})


def test_a_training_that_another_command_has_finished_meanwhile_is_taken(bench, trainings):
    matrix = build_matrix(bench)
    place = next(iter(matrix.cells))
    run(bench, [place])
    trainings.done = []
    _, results, failed, _ = run(bench, [place])
    assert (list(results), failed, trainings.done) == ([place], {}, [])


def test_what_another_command_is_at_work_on_is_left_to_it(bench, trainings):
    matrix = build_matrix(bench)
    place = next(iter(matrix.cells))
    with exclusive_lock(matrix.training(place).folder / ".lock", "busy"):
        _, results, failed, lines = run(bench, [place])
    assert (results, failed, trainings.done) == ({}, {}, [])
    assert lines == [f"left: {place}: another process is at work on it"]


@pytest.fixture
def ctrl_c():
    """SIGINT interrupts; a process that a shell has started in the background ignores it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("ctrl_c")
def test_ctrl_c_ends_the_trainings_and_says_how_to_go_on(bench, monkeypatch):
    seen = []

    def train(training, gpu, stop):
        if not seen:
            seen.append(stop)
            os.kill(os.getpid(), signal.SIGINT)
        assert stop.wait(20)
        raise InterruptedTrainingError("interrupted")

    monkeypatch.setattr(Training, "train", train)
    with pytest.raises(MiMError, match="interrupted: repeat the command to go on"):
        run(replace(bench, jobs=2))
    assert seen[0].is_set()
    assert work.failures(build_matrix(bench)) == {}


def test_a_training_that_is_ended_from_outside_is_named(bench, monkeypatch):
    def train(*_):
        raise InterruptedTrainingError("interrupted, see log.txt")

    monkeypatch.setattr(Training, "train", train)
    place = next(iter(build_matrix(bench).cells))
    _, results, failed, lines = run(bench, [place])
    assert (results, failed) == ({}, {place: "interrupted, see log.txt"})
    assert lines == [f"not finished: {place}: interrupted, see log.txt"]


def test_gpus_are_counted_among_those_that_can_be_seen(monkeypatch):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert work.visible(("0", "1")) == ("0", "1")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,GPU-7")
    assert work.visible(("1", "0")) == ("GPU-7", "4")


def test_a_job_whose_time_is_over_is_put_into_the_queue_again(bench):
    matrix = build_matrix(bench)
    training = matrix.training(next(iter(matrix.cells)))
    assert training.checkpoint().function is training


SLURM = {"cluster": "local", "gpus_per_node": 0, "timeout_min": 2}
"""submitit's own executor on this machine"""


@pytest.mark.long
def test_through_submitit_in_processes_of_their_own(bench, monkeypatch):
    """The jobs fail for want of data, each with its own error, and nothing hangs."""
    monkeypatch.setattr(work, "SLURM_POLL_SECONDS", 0.1)
    small = replace(bench, slurm=SLURM, seeds=1, labels=("1",), datasets=(DatasetSpec("502"),))
    _, results, failed, _ = run(small)
    assert results == {}
    assert set(failed) == {Place("Dataset502_X", 0, "1", 0, arm) for arm in ("MiM", "Scratch")}
    assert all("Dataset502_X" in why and ": see " in why for why in failed.values()), failed


def test_bad_settings_of_slurm(bench, monkeypatch):
    for options, says in (
        ({**SLURM, "no_such": 1}, r"slurm: .*see submitit's parameters"),
        ({"cluster": "local"}, "slurm: give timeout_min"),
    ):
        with pytest.raises(MiMError, match=says):
            run(replace(bench, slurm=options))
    monkeypatch.setenv("PATH", "")
    with pytest.raises(MiMError, match=r"slurm: .*run where SLURM is, or leave 'slurm' out"):
        run(replace(bench, slurm={"timeout_min": 2}))


def test_what_sbatch_refuses_is_one_line(bench, monkeypatch):
    def submit(_):
        raise RuntimeError("sbatch: error: Invalid account")

    monkeypatch.setattr(work, "slurm_executor", lambda *_: SimpleNamespace(submit=submit))
    with pytest.raises(MiMError, match=r"^slurm: sbatch: error: Invalid account: correct the parameters"):
        run(replace(bench, slurm=SLURM))
