"""Finetuning with the real commands, from raw images to predictions, on a few small volumes.

The pretraining file is deleted as soon
as the first training has read it: nothing after that may need it.
"""

import json
import subprocess
import time
import zipfile

import blosc2
import numpy as np
import pytest
import SimpleITK as sitk
import torch

from nnunet_mim.config import NetworkConfig, PretrainConfig
from nnunet_mim.networks.mask_in_mask import MaskInMask

DATASET = "Dataset907_Finetune"
NETWORK = NetworkConfig((6, 6, 12, 12), (1, 1, 1, 2), num_heads=2)
SIDE = 32
N_CASES = 5
RUN = "nnUNetTrainerMiM__nnUNetMiMPlans__3d_fullres"

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]


def write_checkpoint(path):
    """As `mim_pretrain` writes it, with every case among those pretrained on."""
    network = MaskInMask(NETWORK)
    config = PretrainConfig(preset="tiny", network=NETWORK, view_size=(32, 32, 32))
    torch.save(
        {
            "network_weights": network.state_dict(),
            "mim_config": config.to_dict(),
            "mim_version": "0.0.0",
            "provenance": {
                "datasets": [DATASET],
                "cases": [{"dataset": DATASET, "case": f"case_{i}", "sha256": ""} for i in range(N_CASES)],
            },
        },
        path,
    )


def run_folder(work):
    return work.folder / "nnUNet_results" / DATASET / RUN


def train(work, *arguments, trainer="nnUNetTrainerMiM", fold="0", **kwargs):
    options = ("-tr", trainer, "-p", "nnUNetMiMPlans", "-device", "cpu")
    return work("nnUNetv2_train", "907", "3d_fullres", fold, *options, *arguments, **kwargs)


def predict(work, output, **env):
    options = ("-tr", "nnUNetTrainerMiM", "-p", "nnUNetMiMPlans", "-c", "3d_fullres", "-f", "0", "-device", "cpu")
    options += ("-npp", "1", "-nps", "1", "--disable_progress_bar")
    work("nnUNetv2_predict", "-d", "907", "-i", work.folder / "new", "-o", work.folder / output, *options, **env)
    return sitk.GetArrayFromImage(sitk.ReadImage(work.folder / output / "new_1.nii.gz"))


@pytest.fixture(scope="module")
def workplace(workplace_of):
    """Images, labels and one unseen image, planned and preprocessed; a checkpoint; MiM plans for it."""
    work = workplace_of("finetune")
    folder = work.folder
    work.write_dataset(DATASET, N_CASES, SIDE)
    write_checkpoint(folder / "pretrained.pth")

    work.plan(907)
    work(
        "mim_plan", "-d", "907", "-pc", str(folder / "pretrained.pth"), "--set", "patch_size=32,32,32", "num_epochs=2",
        "iterations_per_epoch=2", "val_iterations_per_epoch=1",
    )  # fmt: skip
    work("nnUNetv2_preprocess", "-d", "907", "-plans_name", "nnUNetMiMPlans", "-c", "3d_fullres", "-np", "1")
    return work


@pytest.fixture(scope="module")
def trained(workplace):
    """Fold 0, trained by nnUNetv2_train; the checkpoint goes as soon as it has been read."""
    options = ("-tr", "nnUNetTrainerMiM", "-p", "nnUNetMiMPlans", "-device", "cpu")
    log = workplace.folder / "train.log"
    with log.open("w") as stream:
        process = subprocess.Popen(
            workplace.command("nnUNetv2_train", "907", "3d_fullres", "0", *options),
            env=workplace.env, stdout=stream, stderr=subprocess.STDOUT, cwd=workplace.folder,
        )  # fmt: skip
        while process.poll() is None and not (run_folder(workplace) / "fold_0" / "mim_transfer.json").is_file():
            time.sleep(0.2)
        (workplace.folder / "pretrained.pth").unlink()
        assert process.wait() == 0, log.read_text()[-3000:]
    return log.read_text()


def test_preprocessed_voxels_are_in_units_of_the_wide_window(workplace):
    folder = workplace.folder / "nnUNet_preprocessed" / DATASET / "nnUNetMiMPlans_3d_fullres"
    voxels = blosc2.open(str(folder / "case_0.b2nd"), mode="r")[:]
    original = sitk.GetArrayFromImage(
        sitk.ReadImage(workplace.folder / "nnUNet_raw" / DATASET / "imagesTr/case_0_0000.nii.gz")
    )
    assert voxels.ndim == 4
    levels = [5, 25, 50, 75, 95]  # resampling moves voxels, hardly their distribution
    assert np.percentile(voxels, levels) == pytest.approx(
        np.percentile(original.clip(-1000, 1000), levels) / 250, abs=0.1
    )
    assert np.abs(voxels).max() > (164 - 19) / 46  # beyond what the stock window of this data lets through


def test_training(workplace, trained):
    fold = run_folder(workplace) / "fold_0"
    assert (fold / "checkpoint_final.pth").is_file()
    assert (fold / "validation" / "summary.json").is_file()
    assert "adapted: 0 (0 values)" in trained
    assert "validation cases of this fold were PRETRAINED ON" in trained
    record = json.loads((fold / "mim_transfer.json").read_text())
    n_encoder = len(MaskInMask(NETWORK).encoder.state_dict())
    assert len(record["loaded"]) == n_encoder
    weights = torch.load(fold / "checkpoint_final.pth", weights_only=False)
    assert weights["inference_allowed_mirroring_axes"] == (0, 1)
    assert weights["current_epoch"] == 2


def test_another_fold_without_the_checkpoint_says_so_in_one_line(workplace, trained):
    said = train(workplace, fold="1", fails=True)
    assert "Traceback" not in said
    last_line = said.strip().splitlines()[-1]
    assert last_line.startswith("error: ")
    assert "pretrained.pth" in last_line
    assert "does not exist" in last_line


def test_continue_then_validate(workplace, trained):
    plans_file = workplace.folder / "nnUNet_preprocessed" / DATASET / "nnUNetMiMPlans.json"
    plans = json.loads(plans_file.read_text())
    plans["mim_finetune"]["num_epochs"] = 3
    plans_file.write_text(json.dumps(plans))
    printed = train(workplace, "--c")
    assert "Epoch 2" in printed
    assert "Epoch 1" not in printed
    assert torch.load(run_folder(workplace) / "fold_0/checkpoint_final.pth", weights_only=False)["current_epoch"] == 3
    summary = run_folder(workplace) / "fold_0" / "validation" / "summary.json"
    summary.unlink()
    train(workplace, "--val")
    assert summary.is_file()


def test_predict_export_install_predict(workplace, trained):
    here = predict(workplace, "predicted")
    assert here.shape == (SIDE, SIDE, SIDE)
    assert set(np.unique(here)) <= {0, 1}
    archive = workplace.folder / "model.zip"
    workplace(
        "nnUNetv2_export_model_to_zip", "-d", "907", "-o", archive, "-c", "3d_fullres", "-f", "0",
        "-tr", "nnUNetTrainerMiM", "-p", "nnUNetMiMPlans",
    )  # fmt: skip
    assert any(name.endswith("checkpoint_final.pth") for name in zipfile.ZipFile(archive).namelist())
    elsewhere = {"nnUNet_results": str(workplace.folder / "elsewhere")}
    elsewhere |= {name: str(workplace.folder / "nothing") for name in ("nnUNet_raw", "nnUNet_preprocessed")}
    (workplace.folder / "elsewhere").mkdir()
    workplace("nnUNetv2_install_pretrained_model_from_zip", archive, **elsewhere)
    np.testing.assert_array_equal(predict(workplace, "predicted_elsewhere", **elsewhere), here)


def test_control_and_find_best_configuration(workplace, trained):
    train(workplace, "--val", "--npz")
    printed = train(workplace, "--npz", trainer="nnUNetTrainerMiMScratch")
    assert "Pretrained weights" not in printed
    best = workplace(
        "nnUNetv2_find_best_configuration", "907", "-p", "nnUNetMiMPlans", "-c", "3d_fullres", "-f", "0", "-np", "1",
        "-tr", "nnUNetTrainerMiM", "nnUNetTrainerMiMScratch",
    )  # fmt: skip
    assert RUN in best
    assert "nnUNetTrainerMiMScratch__nnUNetMiMPlans__3d_fullres" in best
    assert "ensemble___" in best
    saved = [
        json.loads((workplace.folder / "nnUNet_results" / DATASET / name / "plans.json").read_text())
        for name in (RUN, RUN.replace("MiM__", "MiMScratch__"))
    ]
    blocks = [plans["configurations"]["3d_fullres"]["architecture"] for plans in saved]
    assert blocks[0] == blocks[1]
