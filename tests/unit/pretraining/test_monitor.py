"""Means by hand, the CSV file over an interruption, and what the progress bar says."""

import csv

import pytest

from nnunet_mim.pretraining.loop import progress_text
from nnunet_mim.pretraining.monitor import MetricsFile, WeightedMean


def test_weighted_mean_by_hand():
    mean = WeightedMean()
    mean.add("a", 1.0, 3)
    mean.add("a", 5.0, 1)
    mean.add("a", 1000.0, 0)  # a crop without a target says nothing
    mean.add("b", 7.0, 0)
    assert mean.result() == {"a": pytest.approx(2.0), "b": 0.0}


def rows_of(path):
    with path.open(newline="") as file:
        return [(int(row["iteration"]), float(row["loss"])) for row in csv.DictReader(file)]


def test_metrics_file_of_a_continued_run_drops_what_came_after_the_checkpoint(tmp_path):
    path = tmp_path / "train.csv"
    first = MetricsFile(path, start=0)
    for iteration in (10, 20, 30):
        first.append(iteration, {"loss": 1 / iteration})
    second = MetricsFile(path, start=20)
    assert [iteration for iteration, _ in rows_of(path)] == [10, 20]
    second.append(30, {"loss": 0.5})
    assert rows_of(path) == [(10, pytest.approx(0.1)), (20, pytest.approx(0.05)), (30, 0.5)]


def test_a_new_run_starts_a_new_file(tmp_path):
    path = tmp_path / "train.csv"
    path.write_text("iteration,loss\n10,1\n")
    MetricsFile(path, start=0).append(1, {"loss": 2.0})
    assert rows_of(path) == [(1, 2.0)]


def test_progress_names_levels_and_speed():
    train = {f"train/level{n}/reconstruction": n / 10 for n in (2, 3)}
    val = {f"val/level{n}/reconstruction": n / 2 for n in (2, 3)} | {"val/loss": 9.0}
    assert progress_text(train, val, 1.5) == {"L2": "0.200", "L3": "0.300", "val": "1.000/1.500", "crops/s": "1.50"}
