"""A checkpoint in words and tables."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from nnunet_mim.config import PretrainConfig
from nnunet_mim.networks.mask_in_mask import MaskInMask
from nnunet_mim.pretraining.report import summary
from nnunet_mim.pretraining.report.summary import Facts

WINDOW = {"percentile_00_5": -1000.0, "percentile_99_5": 1000.0, "mean": 0.0, "std": 250.0}


def make_facts(history=(), provenance=None, **settings) -> Facts:
    config = PretrainConfig(**{"preset": "tiny", "learning_rate": 5e-4, "view_size": (64, 64, 64), **settings})
    with torch.device("meta"):
        weights = MaskInMask(config.network, config.in_channels).state_dict()
    base = {
        "datasets": ["Dataset501_HeadNeckOAR"], "plans_name": "nnUNetMiMPlans", "configuration": "3d_fullres",
        "fold": 2, "spacing": [4.688, 3.0, 4.688], "normalization": ["CTNormalization"] * config.in_channels,
        "intensity_properties": {str(c): WINDOW for c in range(config.in_channels)}, "iterations": 500,
        "loss_history": list(history),
        "cases": [{"dataset": "Dataset501_HeadNeckOAR", "case": f"c{i}", "sha256": str(i)} for i in range(3)],
    }  # fmt: skip
    return Facts({
        "mim_config": config.to_dict(), "network_weights": weights, "mim_version": "0.1.0",
        "provenance": {**base, **(provenance or {})},
    })  # fmt: skip


def row(iteration, loss, **more):
    figures = {
        "iteration": iteration, "val/loss": 2 * loss, "val/level1/reconstruction": loss,
        "val/level3/reconstruction": loss, "baseline/level1/token_mean": 1.0, "baseline/level1/infill": 0.9,
    }  # fmt: skip
    return {**figures, **{name.replace("__", "/"): value for name, value in more.items()}}


def test_facts_table() -> None:
    table = dict(summary.facts_table(make_facts(), {"Dataset501_HeadNeckOAR": 2, "Dataset800_More": 1}))
    assert table["network"].startswith("tiny: encoder 12-24-48-96 with 2-2-2-11 blocks, decoder of width 192")
    assert "5.03 million parameters (encoder 2.15, decoder 2.59, projectors 0.30)" in table["network"]
    assert table["data"] == (
        "Dataset501_HeadNeckOAR: 3 cases trained on, 2 held out; Dataset800_More: 0 cases trained on, 1 held out"
    )
    assert table["plans"] == "nnUNetMiMPlans, 3d_fullres, fold 2 left out"
    assert table["spacing"] == "4.69 × 3 × 4.69 mm, in the order of the plans"
    assert table["intensities"] == "CTNormalization, -1000 to 1000 HU, divided by 250"
    assert table["training"] == "500 of 250000 iterations of 2 crops"
    assert "features" not in table


def test_more_facts() -> None:
    history = [row(0, 1.0, val__probe__dice=0.1), row(250, 0.8, val__probe__dice=0.4),
               row(500, 0.7, val__level3__alignment_top1=0.5, val__level3__alignment_chance=0.008,
                   val__features__rank=23.2)]  # fmt: skip
    facts = make_facts(history, {"skipped_steps": [{}, {}], "fold": "all"}, init_checkpoint="/x/earlier.pth")
    table = dict(summary.facts_table(facts))
    assert table["training"].endswith("2 crops, 2 skipped for want of a finite gradient")
    assert table["started from"] == "/x/earlier.pth"
    assert table["plans"].endswith("no fold left out")
    assert table["features"] == (
        "level 3 finds its place in 50% of views (chance 0.8%); effective rank of the encoder's features 23 of 96; "
        "label probe Dice 0.40 (0.10 at the start)"
    )


def test_datasets() -> None:
    history = [row(0, 1.0), row(500, 0.7, val__A__level3=0.25)]
    facts = make_facts(history, {"crops_seen": {"A": 90, "B": 10}, "cases": [{"dataset": "A"}, {"dataset": "A"}]})
    table = summary.datasets_table(facts)
    assert table[0] == ["dataset", "cases", "crops", "level 1", "level 3"]
    assert table[1:] == [["A", "2", "90", "–", "0.250"], ["B", "0", "10", "–", "–"]]
    assert len(summary.datasets_table(make_facts(history))) == 1  # an earlier version's checkpoint


def test_converted_weights() -> None:
    unknown = {"datasets": [], "cases": [], "spacing": [], "plans_name": "", "iterations": 0,
               "converted_from": "official.pth"}  # fmt: skip
    facts = make_facts(provenance=unknown)
    table = dict(summary.facts_table(facts))
    assert (table["data"], table["spacing"]) == ("unknown cases", "unknown")
    assert table["training"] == "converted from official.pth"
    assert "plans" not in table
    assert summary.levels_table(facts)[1][2] == "?"
    assert summary.commands(facts, Path("out.pth"))[0] == "mim_plan -d DATASET -pc out.pth"


def test_levels() -> None:
    assert summary.levels_table(make_facts())[1:] == [
        ["level 1", "128 × 128 × 128", "600 × 384 × 600", "64 × 64 × 64", "32 of 64", "1"],
        ["level 2", "64 × 64 × 64", "300 × 192 × 300", "64 × 64 × 64", "39 of 64", "4"],
        ["level 3", "16 × 16 × 16", "75 × 48 × 75", "64 × 64 × 64", "32 of 64", "16"],
    ]


def test_losses_beside_trivial_guesses() -> None:
    table = summary.losses_table(make_facts([row(0, 1.1), row(250, 0.8)]))
    assert table[1:] == [["level 1", "1.000", "0.900", "0.800", "1.100"], ["level 3", "–", "–", "0.800", "1.100"]]
    psnr = {"val__level1__psnr": 18.9, "baseline__level1__infill_psnr": 14.5}
    assert summary.losses_table(make_facts([row(0, 1.1), row(250, 0.8, **psnr)]))[1][-1] == "18.9 (14.5) dB"
    assert len(summary.losses_table(make_facts())) == 1


def test_settings_mark_what_is_not_the_default() -> None:
    table, marked = summary.settings_and_defaults(make_facts(batch_size=4, seed=3))
    assert {table[i][0] for i in marked} == {"preset", "batch_size", "seed"}  # the learning rate is the preset's own
    batch = next(r for r in table if r[0] == "batch_size")
    assert batch[1:3] == ["4", "2"]
    assert batch[3].startswith("crops per optimiser step")
    assert next(r for r in table if r[0] == "view_size")[1:3] == ["64, 64, 64", "by data"]
    assert next(r for r in table if r[0] == "network.strides")[1] == "(2, 2, 2), (2, 2, 2), (2, 2, 2), (2, 2, 2)"
    assert {len(r) for r in table} == {4}
    assert "network" not in {r[0] for r in table}


def test_commands() -> None:
    lines = summary.commands(make_facts(), Path("runs/checkpoint_final.pth"))
    assert lines[1] == "nnUNetv2_train 501 3d_fullres 2 -tr nnUNetTrainerMiM -p nnUNetMiMPlans"
    assert lines[3] == "mim_plan -d DATASET -pc runs/checkpoint_final.pth"


@pytest.mark.parametrize(("n", "kind"), [(2, "too early to say"), (8, "learning")])
def test_verdict_knows_the_warmup(n, kind) -> None:
    facts = make_facts([row(250 * i, 1 - i / 20) for i in range(n)], iterations=5000)
    assert facts.verdict().kind == kind
    history = facts.provenance["loss_history"]
    assert make_facts(history, iterations=100_000).verdict().kind == "too early to say"
    untrained = make_facts(history, level_weights=(0.0, 1.0, 1.0), iterations=5000).verdict().sentence
    assert "level 1" not in untrained
