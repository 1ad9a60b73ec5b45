"""Weights of the published architecture, from their file to a finetuned network, with the real commands."""

import json

import pytest
import torch

DATASET = "Dataset908_Convert"

pytestmark = [pytest.mark.long, pytest.mark.timeout(900)]


def test_published_weights_finetune(workplace_of, golden_folder, reference):
    work = workplace_of("convert")
    shapes = json.loads((golden_folder / "published_keys.json").read_text())
    torch.save(reference.golden.checkpoint(shapes, reference.network.sincos), work.folder / "official.pth")
    assert "363 tensors: 361 converted" in work("mim_convert", "official.pth", "-o", "out.pth")

    work.write_dataset(DATASET, 5, 32)
    work.plan(908)
    recipe = ("num_epochs=1", "iterations_per_epoch=1", "val_iterations_per_epoch=1")
    work("mim_plan", "-d", "908", "-pc", "out.pth", "--set", "patch_size=32,32,32", "batch_size=1", *recipe)
    work("nnUNetv2_preprocess", "-d", "908", "-plans_name", "nnUNetMiMPlans", "-c", "3d_fullres", "-np", "1")
    options = ("-tr", "nnUNetTrainerMiM", "-p", "nnUNetMiMPlans", "-device", "cpu")
    work("nnUNetv2_train", "908", "3d_fullres", "0", *options)

    run = work.folder / "nnUNet_results" / DATASET / "nnUNetTrainerMiM__nnUNetMiMPlans__3d_fullres" / "fold_0"
    transfer = json.loads((run / "mim_transfer.json").read_text())
    published = [key for key in shapes if not key.startswith(("decoder", "aggregate", "mask_token", "pos_embed"))]
    stages = [key for key in published if key.startswith("stage")]
    assert len(transfer["loaded"]) == len(published)  # the whole encoder, the convolutions to tokens included
    assert len(stages) == 6
    assert transfer["adapted"] == {}
    assert transfer["unit_differences"] == []
    assert "licence" in transfer["pretraining"]["note"]
    summary = json.loads((run / "validation" / "summary.json").read_text())
    assert "Dice" in summary["mean"]["1"]
