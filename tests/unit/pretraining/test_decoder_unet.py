"""Runs with --decoder unet: what learns when, what they start from, what they leave."""

import math
from dataclasses import replace

import pytest
import torch

from nnunet_mim.checkpoint.format import load_checkpoint
from nnunet_mim.config import NetworkConfig, PretrainConfig
from nnunet_mim.errors import MiMError
from nnunet_mim.geometry import levels_of
from nnunet_mim.networks.build import build_network
from nnunet_mim.pretraining.monitoring.held_out import HeldOut
from nnunet_mim.pretraining.objective.losses import reconstruction_loss
from nnunet_mim.pretraining.state import load_weights
from nnunet_mim.pretraining.step import learning_rates

COMMON = ("--val_every", "1", "--set", "val_crops=1", "probe_every=0")
NETWORK = NetworkConfig((3, 4, 3, 6), (1, 1, 1, 1), 2, 2.0, ((2, 1, 1), (1, 2, 1), (1, 1, 1), (1, 1, 2)), 12, 1, 2)


def weights(runs, tag):
    return load_checkpoint(runs.folder(tag) / "checkpoint_final.pth")["network_weights"]


def test_before_its_phase_the_unet_changes_nothing(write_dataset, small_runs):
    """Of four iterations the last one is the phase."""
    write_dataset(n=4)
    assert small_runs.here("-o", "mim", "--iterations", "4", *COMMON) == 0
    phase = ("--decoder", "unet", "--decoder_phase", "0.25")
    assert small_runs.here("-o", "unet", "--iterations", "4", *phase, *COMMON) == 0
    for part, column in (("train", "train/level2/unet"), ("val", "val/level2/unet")):
        plain, rows = small_runs.rows("mim", part), small_runs.rows("unet", part)
        assert set(rows[0]) == {*plain[0], column}
        before = slice(0, 4 if part == "val" else 3)
        assert [{k: v for k, v in row.items() if k != column} for row in rows[before]] == plain[before]
    losses = [row["train/level2/unet"] for row in small_runs.rows("unet")]
    assert losses[:3] == ["", "", ""]
    assert 0.5 < float(losses[3]) < 5
    measured = [float(row["val/level2/unet"]) for row in small_runs.rows("unet", "val")]
    assert measured[1] != measured[0]  # by another encoder
    before, after = weights(small_runs, "mim"), weights(small_runs, "unet")
    assert {name.split(".")[0] for name in set(after) - set(before)} == {"unet"}


def test_a_run_starts_from_weights_without_a_unet(write_dataset, small_runs):
    """With a tiny learning rate they stay what they were, and the U-Net starts from the seed."""
    write_dataset(n=4)
    options = ("--iterations", "1", *COMMON, "learning_rate=1e-12")
    assert small_runs.here("-o", "mim", *options) == 0
    start = str(small_runs.folder("mim") / "checkpoint_final.pth")
    assert small_runs.here("-o", "whole", *options, "--decoder", "unet", "--init", start, "--seed", "5") == 0
    before, after = weights(small_runs, "mim"), weights(small_runs, "whole")
    for name, weight in before.items():
        torch.testing.assert_close(after[name], weight, rtol=0, atol=1e-6, msg=name)


@pytest.mark.parametrize(
    ("change", "fresh"),
    [
        ({}, set()),
        ({"decoder": "mim"}, set()),
        ({"view_size": (16, 16, 8)}, {"unet.decoder.up.4.weight"}),  # a bottleneck of another stride
    ],
)
def test_weights_of_a_unet_are_taken_where_they_fit(change, fresh):
    config = PretrainConfig(network=NETWORK, view_size=(4, 16, 8), decoder="unet")
    torch.manual_seed(0)
    source = build_network(config).state_dict()
    model = build_network(replace(config, **change))
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    load_weights(model, source)
    for name, weight in model.state_dict().items():
        assert torch.equal(weight, (before if name in fresh else source)[name]), name
    assert fresh <= set(before)
    alone = {name: weight for name, weight in source.items() if not name.startswith("unet.")}
    load_weights(model, alone)
    with pytest.raises(RuntimeError, match="norm"):
        load_weights(model, {name: weight for name, weight in alone.items() if name != "encoder.norm.weight"})


def test_the_rate_of_the_unet_rises_and_falls_within_its_phase():
    config = PretrainConfig(iterations=40, decoder="unet", decoder_phase=0.25, unet_every=3)
    rates = learning_rates(40, config.learning_rate, config.warmup_fraction, config.unet_begins)
    assert rates[:30].tolist() == [0.0] * 30
    assert rates[30:].tolist() == learning_rates(10, config.learning_rate, config.warmup_fraction).tolist()
    assert [i for i in range(40) if config.unet_learns(i)] == [30, 33, 36, 39]
    assert not any(map(PretrainConfig(iterations=40).unet_learns, range(40)))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"encoder": "resenc", "decoder": "unet"}, "--decoder unet is for --encoder hybrid"),
        ({"decoder": "other"}, "unknown decoder 'other': choose one of mim, unet"),
        ({"decoder_phase": 0.0}, "--decoder_phase must be above 0"),
        ({"decoder_phase": 1.5}, "--decoder_phase must be above 0"),
        ({"unet_views": (0, 0, 0)}, "unet_views needs three numbers"),
        ({"unet_every": 0}, "unet_every must be at least 1"),
    ],
)
def test_settings_that_cannot_work_are_named(settings, message):
    with pytest.raises(MiMError, match=message):
        PretrainConfig(**settings)


def test_data_without_the_levels_of_the_unet_is_refused(write_dataset, small_runs, capsys):
    """With factors of 1 between levels the first one is skipped."""
    write_dataset(n=4)
    options = ("--scale", "1", "1", "1", "--decoder", "unet", "--iterations", "1", *COMMON, "unet_views=1,0,0")
    assert small_runs.here("-o", "run", *options) == 2
    assert "only wide enough for levels 2 to 3: add --set unet_views=0,0,1" in capsys.readouterr().err


def test_held_out_loss_is_the_mean_over_the_target_tokens_of_all_crops():
    config = PretrainConfig(
        network=NETWORK, view_size=(4, 8, 4), n_children=(3, 2), decoder="unet", unet_views=(0, 2, 1), val_crops=3
    )
    torch.manual_seed(0)
    model, fov = build_network(config), levels_of(config)[0].fov
    crops, valid = torch.randn(3, 1, *fov), torch.tensor([[[0, n] for n in fov]] * 3)
    crops[1] = 0.0
    valid[2, 1, 0] = fov[1] // 2
    one = torch.ones(1)
    held_out = HeldOut(crops, valid, ["a", "a", "b"], -one, 0.1 * one, one, config)
    found = held_out.evaluate(model)
    assert found.level(1).unet is None
    for number, per_crop in ((2, 2), (3, 1)):
        total, count = 0.0, 0
        for views, is_target in zip(held_out.views, held_out.is_target, strict=True):
            view, target = views[number - 1], is_target[number - 1]
            for n in range(per_crop):
                rows = slice(n, n + 1)
                with torch.no_grad():
                    (prediction,) = model.reconstruct_with_unet([view.masked(rows)])
                total += float(reconstruction_loss(prediction, view.masked_tokens(rows), target[rows], one.sum()))
                count += int(target[rows].sum())
        assert 0 < count < 3 * per_crop * held_out.is_target[0][number - 1].shape[1]
        assert math.isclose(found.level(number).unet, total / count, rel_tol=1e-5)
    assert found.row()["val/level2/unet"] == found.level(2).unet
