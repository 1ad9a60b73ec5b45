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
    assert "adapted: 0 parameters" in printed
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
