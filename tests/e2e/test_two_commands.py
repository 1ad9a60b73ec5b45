"""The two commands at the top of the README, on stock plans; then the predictions. Real pretraining, tiny schedules."""

import json

import numpy as np
import pytest
import SimpleITK as sitk

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

DATASET = "Dataset908_Stock"


def test_pretrain_train_predict_on_stock_plans(workplace_of):
    work = workplace_of("stock")
    work.write_dataset(DATASET, 5, 40)
    work("nnUNetv2_plan_and_preprocess", "-d", "908", "-c", "3d_fullres", "-np", "1", nnUNet_n_proc_DA="1")
    plans_file = work.folder / "nnUNet_preprocessed" / DATASET / "nnUNetPlans.json"
    plans = json.loads(plans_file.read_text())
    plans["mim_finetune"] = {"num_epochs": 1, "iterations_per_epoch": 2, "val_iterations_per_epoch": 1}
    plans_file.write_text(json.dumps(plans))

    small = ("--preset", "tiny", "--view", "32", "--iterations", "2", "--children", "1", "1", "-device", "cpu")
    printed = work("mim_pretrain", "-d", "908", "-f", "0", *small)
    assert "warning: the plans 'nnUNetPlans' clip CT" in printed
    assert "level3" in printed

    printed = work("nnUNetv2_train", "908", "3d_fullres", "0", "-tr", "nnUNetTrainerMiM", "-device", "cpu")
    assert "MiMPretrain__nnUNetPlans__3d_fullres/fold_0/checkpoint_final.pth" in printed
    assert "loaded: " in printed
    assert "adapted: 0 (0 values)" in printed
    assert "PRETRAINED ON" not in printed, "fold 0 was left out of pretraining"
    run = work.folder / "nnUNet_results" / DATASET / "nnUNetTrainerMiM__nnUNetPlans__3d_fullres"
    summary = json.loads((run / "fold_0" / "validation" / "summary.json").read_text())
    assert len(summary["metric_per_case"]) == 1

    (work.folder / "nnUNet_results" / DATASET / "MiMPretrain__nnUNetPlans__3d_fullres" / "fold_0").rename(
        work.folder / "moved_away"
    )
    work(
        "nnUNetv2_predict", "-d", "908", "-c", "3d_fullres", "-f", "0", "-tr", "nnUNetTrainerMiM", "-device", "cpu",
        "-i", work.folder / "new", "-o", work.folder / "predicted", "-npp", "1", "-nps", "1",
    )  # fmt: skip
    image = sitk.ReadImage(work.folder / "new" / "new_1_0000.nii.gz")
    segmentation = sitk.ReadImage(work.folder / "predicted" / "new_1.nii.gz")
    assert segmentation.GetSize() == image.GetSize()
    assert segmentation.GetSpacing() == pytest.approx(image.GetSpacing())
    assert set(np.unique(sitk.GetArrayFromImage(segmentation))) <= {0, 1}


@pytest.mark.long
def test_the_shortest_way_needs_no_pretraining_and_no_network(workplace_of):
    """README's three commands with the weights of the package, on a dataset that nnU-Net has not planned yet."""
    work = workplace_of("shipped")
    work.write_dataset("Dataset909_Shortest", 5, 40)
    offline = {"HF_HUB_OFFLINE": "1", "http_proxy": "http://127.0.0.1:9", "https_proxy": "http://127.0.0.1:9"}
    small = ("num_epochs=1", "iterations_per_epoch=2", "val_iterations_per_epoch=1", "patch_size=32,32,32")
    planned = work("mim_plan", "-d", "909", "-pc", "tiny-ct", "--set", *small, **offline)
    assert "nnU-Net plans it first" in planned
    next_commands = planned.split("next:\n")[1].splitlines()
    for command in next_commands:
        device = ("-device", "cpu") if "train" in command else ("-np", "1")
        printed = work(*command.split(), *device, **offline)
    assert "Pretrained weights: tiny-ct" in printed
    assert "PRETRAINED ON" not in printed
    record = work.folder / "nnUNet_results" / "Dataset909_Shortest" / "nnUNetTrainerMiM__nnUNetMiMPlans__3d_fullres"
    transfer = json.loads((record / "fold_0" / "mim_transfer.json").read_text())
    assert transfer["source"] == "tiny-ct"
    assert len(transfer["loaded"]) + len(transfer["adapted"]) > 100
