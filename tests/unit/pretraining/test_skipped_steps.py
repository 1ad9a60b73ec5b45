"""Steps without a finite gradient change nothing, are counted and named, and end the run where they are too many."""

import math
from copy import deepcopy

import numpy as np
import pytest
import torch

from nnunet_mim.checkpoint.format import load_checkpoint
from nnunet_mim.errors import MiMError
from nnunet_mim.nnunet.source import GONE, Source
from nnunet_mim.pretraining import loop
from nnunet_mim.pretraining.distributed.ranks import ALONE
from nnunet_mim.pretraining.monitoring.figures import LevelFigures, TrainingFigures
from nnunet_mim.pretraining.monitoring.progress import _culprits, _mean_figures
from nnunet_mim.pretraining.state import TrainingState
from nnunet_mim.pretraining.stopping import SkippedSteps

SETTINGS = ("--iterations", "12", "--val_every", "12", "--set", "val_crops=1")


@pytest.fixture
def poisoned(write_dataset, save_case, monkeypatch):
    """A data set of four cases; one that is trained on gets NaN voxels after it has been checked. Holds its name."""
    folder = write_dataset(n=4)
    original, names = loop.training_batches, []

    def poison(dataset, *args):
        names.append(dataset.cases[1].info.case)
        stamps = {case.info.case: case.info.stamp for case in dataset.cases}  # a fault of the disk shows in none
        monkeypatch.setattr(Source, "file_stamp", lambda source, case: stamps.get(case, GONE))
        save_case(folder, names[0], np.full((1, 48, 48, 48), np.nan, np.float32))
        return original(dataset, *args)

    monkeypatch.setattr(loop, "training_batches", poison)
    return names


def test_a_case_with_nan_is_skipped_and_named(poisoned, small_runs, capsys):
    assert small_runs.here("-o", "run", *SETTINGS, "--set", "max_skipped=12", batch="2") == 0
    stored = load_checkpoint(small_runs.folder("run") / "checkpoint_final.pth")
    skipped = stored["provenance"]["skipped_steps"]
    assert 0 < len(skipped) < 12
    for step in skipped:  # the other crop of the batch is not blamed
        assert {case.split(",")[0] for case in step["cases"]} == {f"Dataset900_Tiny {poisoned[0]}"}
    assert all(torch.isfinite(value).all() for value in stored["network_weights"].values())
    rows = small_runs.rows("run")
    assert sum(float(row["train/skipped"]) for row in rows) == len(skipped)
    losses = [row["train/loss"] for row in rows if row["train/loss"]]  # empty where all steps were skipped
    assert losses
    assert np.isfinite([float(loss) for loss in losses]).all()
    printed = "".join(capsys.readouterr())
    assert printed.count(" skipped: loss or gradient not finite") == len(skipped)


def test_a_skipped_step_leaves_no_trace(poisoned, small_runs, monkeypatch):
    """Weights, moments and step counters after it are those before it: checkpoints on both sides are equal."""
    saved = {}
    monkeypatch.setattr(TrainingState, "save", lambda self, run, file, resumable=False: (
        saved.update({self.iteration: deepcopy((
            dict(self.model.state_dict()), self.checkpoint(run, True)["resume_state"], len(self.skipped.steps)
        ))}) if resumable else None
    ))  # fmt: skip
    assert small_runs.here("-o", "run", *SETTINGS, "--save_every", "1", "--set", "max_skipped=12") == 0
    unchanged = [i for i in saved if i - 1 in saved and saved[i][2] > saved[i - 1][2]]
    changed = [i for i in saved if i - 1 in saved and saved[i][2] == saved[i - 1][2]]
    assert unchanged
    assert changed
    for i in unchanged:
        assert all(torch.equal(saved[i][0][name], saved[i - 1][0][name]) for name in saved[i][0])
        before, after = saved[i - 1][1]["optimizer"], saved[i][1]["optimizer"]
        assert all(torch.equal(after[name][key], before[name][key]) for name in before for key in before[name])
    for i in changed:
        assert not all(torch.equal(saved[i][0][name], saved[i - 1][0][name]) for name in saved[i][0])


def test_too_many_end_the_run_and_keep_the_checkpoint(write_dataset, small_runs, capsys):
    write_dataset(n=2)
    settings = ("--iterations", "60", "--lr", "1e30", "--save_every", "1", "--set", "val_crops=1", "max_skipped=3")
    assert small_runs.here("-o", "run", *settings) == 2
    said = capsys.readouterr().err.strip().splitlines()[-1]
    assert said.startswith("error: 4 of the last ")
    assert "Dataset900_Tiny case_0" in said
    stored = load_checkpoint(small_runs.folder("run") / "checkpoint_latest.pth")
    assert all(torch.isfinite(value).all() for value in stored["network_weights"].values())


def test_the_limit_by_hand():
    skips = SkippedSteps([], maximum=2, window=10)
    for iteration in (1, 5, 12, 15):
        skips.add(iteration, ["a"])
        skips.check(iteration, "folder")  # 1 5 | 5 12 | 12 15 lie in windows of ten
    skips.add(21, ["b, crop 4"])
    with pytest.raises(MiMError, match=r"3 of the last 10 steps .* on b, crop 4"):
        skips.check(21, "folder")
    SkippedSteps(skips.steps, maximum=2, window=10).check(25, "folder")  # 12 and 15 are forgotten


def step(loss, targets, skipped=0.0, bad=(0.0, 0.0)):
    loss, targets, skipped, bad = (torch.tensor(value) for value in (loss, targets, skipped, bad))
    level = LevelFigures(3, reconstruction=loss, targets=targets, loss=loss, nonfinite=bad)
    return TrainingFigures(levels=(level,), grad_norm=loss, skipped=skipped)


def test_means_leave_skipped_steps_out():
    steps = [step(1.0, 10.0), step(float("nan"), 7.0, 1.0, (0.0, 3.0)), step(4.0, 20.0)]
    figures, bad = _mean_figures(steps, ALONE)
    means = figures.row()
    assert means["train/level3/reconstruction"] == pytest.approx((1 * 10 + 4 * 20) / 30)
    assert means["train/level3/targets"] == 15
    assert means["train/loss"] == 2.5
    assert means["train/grad_norm"] == 2.5
    assert means["train/skipped"] == 1
    assert bad == {1: [False, True]}


def test_nothing_but_skipped_steps_give_no_figure():
    figures, bad = _mean_figures([step(float("nan"), 7.0, 1.0)], ALONE)
    means = figures.row()
    assert means.pop("train/skipped") == 1
    assert bad == {0: [False, False]}
    assert {"train/level3/reconstruction", "train/loss"} <= set(means)
    assert all(math.isnan(value) for value in means.values())


def test_all_of_a_batch_are_named_where_none_is_to_blame():
    class Crops:
        def case_of(self, index):
            class Case:
                class source:  # noqa: N801
                    dataset = "Dataset1_X"

                class info:  # noqa: N801
                    case = f"case_{index}"

            return Case

    assert _culprits(Crops(), 3, [False, True], 2) == ["Dataset1_X case_7, crop 7"]
    assert _culprits(Crops(), 3, [False, False], 2) == ["Dataset1_X case_6, crop 6", "Dataset1_X case_7, crop 7"]
