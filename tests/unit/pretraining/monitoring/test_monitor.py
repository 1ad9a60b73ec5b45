"""Held-out figures by hand, the CSV file over an interruption, and what the progress bar says."""

import csv
import math
from dataclasses import replace

import pytest
import torch

from nnunet_mim.config import NetworkConfig, PretrainConfig
from nnunet_mim.geometry import levels_of
from nnunet_mim.networks.mask_in_mask import MaskInMask
from nnunet_mim.nnunet.source import find_source
from nnunet_mim.pretraining.data.run_data import index_sources, run_data
from nnunet_mim.pretraining.distributed.ranks import ALONE
from nnunet_mim.pretraining.monitoring.figures import LevelFigures, Measurement, TrainingFigures
from nnunet_mim.pretraining.monitoring.held_out import HeldOut, _decibel, _feature_spread, _weighted_mean
from nnunet_mim.pretraining.monitoring.metrics_log import _MetricsFile
from nnunet_mim.pretraining.monitoring.monitor import _held_out_crops
from nnunet_mim.pretraining.monitoring.progress import _mean_figures, _progress_text
from nnunet_mim.pretraining.monitoring.verdict import verdict
from nnunet_mim.pretraining.report.summary import losses_text


def test_weighted_mean_by_hand():
    assert _weighted_mean([1.0, 5.0, 1000.0], [3, 1, 0]) == pytest.approx(2.0)  # a crop without a target says nothing
    assert _weighted_mean([7.0], [0]) == 0.0
    assert _weighted_mean([1.0, 5.0]) == 3.0


def rows_of(path):
    with path.open(newline="") as file:
        return [(int(row["iteration"]), float(row["loss"])) for row in csv.DictReader(file)]


def test_metrics_file_of_a_continued_run_drops_what_came_after_the_checkpoint(tmp_path):
    path = tmp_path / "train.csv"
    first = _MetricsFile(path, start=0)
    for iteration in (10, 20, 30):
        first.append(iteration, {"loss": 1 / iteration})
    second = _MetricsFile(path, start=20)
    assert [iteration for iteration, _ in rows_of(path)] == [10, 20]
    second.append(30, {"loss": 0.5})
    assert rows_of(path) == [(10, pytest.approx(0.1)), (20, pytest.approx(0.05)), (30, 0.5)]


def test_a_new_run_starts_a_new_file(tmp_path):
    path = tmp_path / "train.csv"
    path.write_text("iteration,loss\n10,1\n")
    _MetricsFile(path, start=0).append(1, {"loss": 2.0})
    assert rows_of(path) == [(1, 2.0)]


def test_no_figure_is_an_empty_cell_and_keeps_its_column(tmp_path):
    file = _MetricsFile(tmp_path / "train.csv", start=0)
    file.append(10, {"loss": float("nan"), "skipped": 10.0})
    file.append(20, {"loss": 0.5, "skipped": 0.0})
    assert file.path.read_text().splitlines() == ["iteration,loss,skipped", "10,,10", "20,0.5,0"]


def test_progress_names_levels_and_speed():
    train = {f"train/level{n}/reconstruction": n / 10 for n in (2, 3)}
    val = {f"val/level{n}/reconstruction": n / 2 for n in (2, 3)} | {"val/loss": 9.0}
    figures = TrainingFigures.from_row(train), Measurement.from_row(val)
    assert _progress_text(*figures, 1.5) == {"L2": "0.200", "L3": "0.300", "val": "1.000/1.500", "crops/s": "1.50"}


def test_a_row_that_was_cut_short_is_dropped(tmp_path):
    path = tmp_path / "train.csv"
    path.write_text("iteration,loss\n10,1.5\n20,0.25\n3")  # 30 was being written when the power went
    _MetricsFile(path, start=30).append(30, {"loss": 0.125})
    assert rows_of(path) == [(10, 1.5), (20, 0.25), (30, 0.125)]


def test_spread_of_features_by_hand():
    """Two directions of equal strength: rank 2. All tokens the same: rank 1, no deviation. Random: rank near D, 1."""
    cross = torch.tensor([[1.0, 0, 0], [-1, 0, 0], [0, 1, 0], [0, -1, 0]])
    rank, std = _feature_spread(cross)
    assert rank == pytest.approx(2)
    assert std == pytest.approx(2 * (2 / 3) ** 0.5 / 3 * 3**0.5)  # two axes deviate by sqrt(2/3), the third not at all
    rank, std = _feature_spread(torch.ones(50, 8) + 1e-9 * torch.randn(50, 8))
    assert std < 1e-6
    torch.manual_seed(0)
    rank, std = _feature_spread(torch.randn(2000, 16))
    assert 15.5 < rank <= 16
    assert std == pytest.approx(1, abs=0.05)
    rank, _ = _feature_spread(torch.randn(2000, 1) * torch.randn(1, 16) + 0.01 * torch.randn(2000, 16))
    assert rank < 2.5


def toy(inside=None):
    """A small network, and a function that makes HeldOut of three crops of noise; `inside`: what is no padding."""
    network = NetworkConfig((6, 6, 12, 12), (1, 1, 1, 2), 2, decoder_embed_dim=12, decoder_depth=2, decoder_num_heads=2)
    config = PretrainConfig(network=network, view_size=(32, 32, 32), n_children=(2, 2))
    levels = levels_of(config)
    torch.manual_seed(0)
    model = MaskInMask(network)
    crops = torch.randn(3, 1, *levels[0].fov)
    valid = torch.tensor([inside or [[0, n] for n in levels[0].fov]] * 3)

    def held_out(datasets=("A", "A", "A"), **options):
        tensors = torch.zeros(1), torch.tensor([0.04]), torch.tensor([8.0])
        return HeldOut(crops, valid, list(datasets), *tensors, config, **options)

    return model, held_out


def test_losses_by_dataset_make_up_the_whole():
    """Each crop's dataset by itself; weighted by their targets they give the loss of all."""
    model, held_out = toy()
    figures = held_out(["A", "B", "A"]).evaluate(model).row()
    assert {name for name in figures if name.startswith(("val/A", "val/B"))} == {
        f"val/{dataset}/level{n}" for dataset in "AB" for n in (1, 2, 3)
    }
    for n in (1, 2, 3):  # crops of noise: every masked token is a target, so all crops weigh the same
        both = (2 * figures[f"val/A/level{n}"] + figures[f"val/B/level{n}"]) / 3
        assert figures[f"val/level{n}/reconstruction"] == pytest.approx(both, rel=1e-5)
    assert figures["val/A/level3"] != figures["val/B/level3"]
    one = held_out(["A", "A", "A"]).evaluate(model).row()
    assert not any(name.startswith("val/A") for name in one)


def test_a_level_without_a_target_has_no_loss_anywhere():
    """Voxels 16 to 48 of 64 along an axis: no token of level 1 (32 voxels) is whole, but those of level 2 (16) are."""
    model, make = toy(inside=((16, 48), (0, 64), (0, 64)))
    held_out = make()
    assert held_out.n_targets[0] == [0, 0, 0]
    assert all(sum(n) > 0 for n in held_out.n_targets[1:])
    assert held_out.without_targets == [1]
    measured = held_out.evaluate(model)
    row = measured.row()
    assert [level.number for level in measured.reconstructed] == [2, 3]
    unmeasured = (
        "val/level1/reconstruction",
        "val/level1/psnr",
        "baseline/level1/infill",
        "baseline/level1/token_mean",
    )
    assert not set(unmeasured) & set(row)
    assert all(name.replace("1", "2") in row for name in unmeasured)
    assert row["val/loss"] == pytest.approx(sum(row[f"val/level{n}/loss"] for n in (1, 2, 3)))
    text = losses_text(measured)
    assert "level1" not in text
    assert "0.000" not in text
    sentence = verdict([replace(measured, iteration=n) for n in range(5)]).sentence
    assert "level 1" not in sentence


def test_without_any_target_nothing_is_said_to_be_better_than_anything():
    model, make = toy(inside=((0, 3), (0, 3), (0, 3)))
    measured = make().evaluate(model)
    assert measured.reconstructed == ()
    assert measured.loss is None
    assert "val/loss" not in measured.row()
    assert "no level was measured" in losses_text(measured)
    rows = [replace(measured, iteration=n) for n in range(5)]
    assert verdict(rows).sentence == "too early to say: no reconstruction loss on held-out cases"


def test_a_stored_loss_over_no_target_is_not_compared():
    """Former versions wrote 0 for it."""
    level = {"reconstruction": 0.0, "targets": 0.0}
    row = {f"val/level1/{name}": value for name, value in level.items()}
    row |= {"val/level2/reconstruction": 0.5, "val/level2/targets": 7.0}
    assert [level.number for level in Measurement.from_row(row).reconstructed] == [2]


def test_steps_without_a_target_have_no_mean_loss():
    """Of three steps two have targets; then none."""

    def step(reconstruction, targets):
        level = LevelFigures(1, *map(torch.tensor, (reconstruction, targets)), nonfinite=torch.zeros(1))
        return TrainingFigures(levels=(level,), skipped=torch.tensor(0.0))

    steps = [step(0.5, 1.0), step(0.0, 0.0), step(1.0, 3.0)]
    assert _mean_figures(steps, ALONE)[0].level(1).reconstruction == pytest.approx(0.875)
    means = _mean_figures([step(0.0, 0.0)] * 2, ALONE)[0]
    assert math.isnan(means.level(1).reconstruction)
    assert _progress_text(means, Measurement.from_row({"val/level1/reconstruction": 0.5}), 1.0)["val"] == "0.500"
    assert "L1" not in _progress_text(means, Measurement.from_row({"val/level1/reconstruction": 0.5}), 1.0)


def test_held_out_crops_come_from_every_dataset(write_dataset):
    for number, n in ((900, 12), (920, 3), (930, 1)):
        write_dataset(n=n, number=number)
    sources = [find_source(str(number), "tinyPlans", "3d_fullres") for number in (900, 920, 930)]
    config = PretrainConfig(preset="tiny", view_size=(32, 32, 32), val_crops=5)
    data = run_data(index_sources(sources)[0], "all", config)
    assert data.val.counts.tolist() == [1, 1, 0]  # a tenth, at least one, but not the only one
    assert data.train.counts.tolist() == [11, 2, 1]
    crops, valid, names = _held_out_crops(data, config)
    assert names == ["Dataset900_Tiny", "Dataset920_Tiny", "Dataset900_Tiny", "Dataset920_Tiny", "Dataset900_Tiny"]
    assert len(crops) == len(valid) == 5


def test_decibel_by_hand():
    assert _decibel(0.01) == pytest.approx(20)
    assert _decibel(1.0) == 0


def test_held_out_figures_match_another_way_to_get_them():
    """PSNR from predictions made view by view; whatever the number of views in a pass."""
    model, make = toy()
    held_out = make()
    width = held_out.width
    measured = held_out.evaluate(model)
    figures = measured.row()
    assert make(views_per_pass=1).evaluate(model).row() == pytest.approx(figures, rel=1e-4)
    squares, count = 0.0, 0
    for views in held_out.views:
        view = views[2]
        for n in range(view.images.shape[0]):
            with torch.no_grad():
                made = model([view.masked(slice(n, n + 1))])[0].prediction[0]
            for prediction, voxels in zip(made, view.masked_tokens()[n], strict=True):
                if voxels.std() >= 0.04:
                    error = prediction * (voxels.var() + 1e-6).sqrt() + voxels.mean() - voxels
                    squares, count = squares + float((error / width).square().mean()), count + 1
    assert count > 0
    assert figures["val/level3/psnr"] == pytest.approx(-10 * math.log10(squares / count), rel=1e-4)
    assert measured.level(2).alignment_chance == 1 / 8  # octants of one parent
    assert measured.level(3).alignment_chance == 1 / (2 * 8)  # tokens of two parents
    assert measured.level(3).guesses.token_mean == pytest.approx(1, abs=0.01)
    assert measured.level(3).guesses.token_mean_psnr > 0
    assert 1 <= figures["val/features/rank"] <= 12
