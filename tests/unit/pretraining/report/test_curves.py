"""progress.png: quick, whatever the columns, and never in the way of the run."""

from __future__ import annotations

import time

import numpy as np
import pytest

from nnunet_mim.pretraining.monitoring.figures import Measurement, TrainingFigures
from nnunet_mim.pretraining.report.curves import (
    MAX_POINTS,
    columns_of,
    panels_of,
    progress_figure,
    read_columns,
    write_progress,
)

TRAIN = ("train/level1/reconstruction", "train/level2/reconstruction", "train/loss", "train/grad_norm", "lr",
         "crops_per_s")  # fmt: skip
OLD = ("val/level1/reconstruction", "val/level2/reconstruction", "val/loss", "baseline/level1/token_mean",
       "baseline/level1/infill", "val/level2/alignment_top1")  # fmt: skip
NEW = (*OLD, "val/level2/alignment_chance", "val/features/rank", "val/features/std", "val/probe/dice",
       "val/probe/dice_1", "val/probe/dice_10", "val/probe/dice_2")  # fmt: skip

training, measured = TrainingFigures.from_row, Measurement.from_row


def write_csv(path, names, n, step=10):
    lines = ["iteration," + ",".join(names)]
    for i in range(n):
        values = [f"{0.5 + 0.4 / (1 + i) + k / 100:.6g}" for k in range(len(names))]
        lines.append(",".join([str(step * i), *values]))
    path.write_text("\n".join(lines) + "\n")


def test_a_run_with_everything(tmp_path) -> None:
    write_csv(tmp_path / "train.csv", TRAIN, 100)
    write_csv(tmp_path / "val.csv", NEW, 5, 250)
    panels = panels_of(training(read_columns(tmp_path / "train.csv")), measured(read_columns(tmp_path / "val.csv")))
    assert [panel.title.split(":")[0] for panel in panels] == [
        "level 1", "level 2", "alignment", "encoder features (rank 1, spread 0", "label probe", "optimisation", "speed",
    ]  # fmt: skip
    assert [line.name for line in panels[0].lines] == [
        "training", "held out", "guess: the token's mean", "guess: copy the nearest voxels",
    ]  # fmt: skip
    assert [line.name for line in panels[4].lines] == ["mean", "label 1", "label 2", "label 10"]
    figure = progress_figure(panels)
    assert len(figure.axes) == len(panels) + 2  # two panels with an axis on the right
    assert "level 1: reconstruction loss (training ends at" in figure.get_label()
    write_progress(tmp_path)
    assert (tmp_path / "progress.png").read_bytes()[:4] == b"\x89PNG"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["progress.png", "train.csv", "val.csv"]


def test_an_older_run_and_one_that_has_just_begun(tmp_path) -> None:
    write_csv(tmp_path / "val.csv", OLD, 1)
    panels = panels_of(training({}), measured(read_columns(tmp_path / "val.csv")))
    assert [panel.title for panel in panels] == [
        "level 1: reconstruction loss", "level 2: reconstruction loss", "alignment: right place found",
    ]  # fmt: skip
    write_progress(tmp_path)
    assert (tmp_path / "progress.png").is_file()


def test_nothing_to_draw(tmp_path, capsys) -> None:
    write_progress(tmp_path)
    (tmp_path / "val.csv").write_text("iteration,val/loss\n")
    (tmp_path / "train.csv").write_text("")
    write_progress(tmp_path)
    assert not (tmp_path / "progress.png").exists()
    assert capsys.readouterr().out == ""


def test_a_failure_is_a_note(tmp_path, capsys) -> None:
    write_csv(tmp_path / "val.csv", OLD, 3)
    (tmp_path / "progress.png").mkdir()
    write_progress(tmp_path)
    said = capsys.readouterr().out
    assert said.startswith("note: ")
    assert said.count("\n") == 1
    assert not list(tmp_path.glob("*.tmp"))


def test_gaps_and_a_last_row_that_is_cut_short(tmp_path) -> None:
    (tmp_path / "val.csv").write_text("iteration,val/loss,val/probe/dice\n0,3,0.1\n250,2,\n500,1.5,nan\n750,1.")
    columns = read_columns(tmp_path / "val.csv")
    np.testing.assert_array_equal(columns["val/loss"], [3, 2, 1.5])
    np.testing.assert_array_equal(columns["val/probe/dice"], [0.1, np.nan, np.nan])
    rows = [{"iteration": 0, "val/loss": 3, "val/probe/dice": 0.1}, {"val/loss": 2}, {"val/loss": 1.5}]
    np.testing.assert_array_equal(columns_of(rows)["val/probe/dice"], columns["val/probe/dice"])


def test_a_long_run_is_thinned_and_quick(tmp_path) -> None:
    write_csv(tmp_path / "train.csv", TRAIN, 25_000)
    write_csv(tmp_path / "val.csv", NEW, 1000, 250)
    columns = read_columns(tmp_path / "train.csv")
    assert len(columns["lr"]) <= 3000
    assert columns["iteration"][-1] == 249_990
    line = panels_of(training(columns), measured({}))[0].lines[0]
    assert len(line.x) <= MAX_POINTS
    write_progress(tmp_path)  # the first figure of a process loads fonts
    began = time.process_time()
    write_progress(tmp_path)
    assert time.process_time() - began < 3  # 0.8 s where it was written


@pytest.mark.parametrize("norm", [0.0, np.nan])
def test_gradient_norms_that_have_no_logarithm(norm) -> None:
    train = {"iteration": np.arange(3.0), "lr": np.ones(3), "train/grad_norm": np.array([1.0, norm, 2.0])}
    assert progress_figure(panels_of(training(train), measured({}))).axes
