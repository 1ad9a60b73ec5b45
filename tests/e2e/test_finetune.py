"""Finetuning with the real commands, from raw images to predictions, on a few small volumes.

Real CT (cropped) where the test data is present, else noise with a ball in it. The pretraining file is deleted as soon
as the first training has read it: nothing after that may need it.
"""

import json
import os
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import blosc2
import numpy as np
import pytest
import SimpleITK as sitk
import torch

from nnunet_mim.config import NetworkConfig, PretrainConfig
from nnunet_mim.networks.hybrid_encoder import HybridEncoder

REPOSITORY = Path(__file__).parents[2]
DATA = Path(os.environ.get("MIM_TEST_DATA", REPOSITORY.parent / "shared" / "data"))
DATASET = "Dataset907_Finetune"
NETWORK = NetworkConfig((6, 6, 12, 12), (1, 1, 1, 2), num_heads=2)
SIDE = 32
N_CASES = 5
RUN = "nnUNetTrainerMiM__nnUNetMiMPlans__3d_fullres"

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]


def real_case(index):
    """A crop of a real CT around its organs, or None where there is no test data."""
    folder = DATA / "nnUNet_raw" / "Dataset501_HeadNeckOAR"
    files = sorted((folder / "imagesTr").glob("*.nii.gz"))
    if len(files) <= index:
        return None
    image = sitk.ReadImage(files[index])
    label = sitk.ReadImage(folder / "labelsTr" / files[index].name.replace("_0000", ""))
    centre = np.argwhere(sitk.GetArrayFromImage(label) > 0).mean(0)[::-1]
    start = [int(np.clip(c - SIDE // 2, 0, n - SIDE)) for c, n in zip(centre, image.GetSize(), strict=True)]
    image, label = (sitk.RegionOfInterest(x, [SIDE] * 3, start) for x in (image, label))
    return image, sitk.Cast(label > 0, sitk.sitkUInt8)


def made_up_case(index):
    """Noise with a denser ball; (image, label)."""
    rng = np.random.default_rng(index)
    grid = np.stack(np.meshgrid(*[np.arange(SIDE)] * 3, indexing="ij"))
    ball = ((grid - rng.integers(12, 20, (3, 1, 1, 1))) ** 2).sum(0) < 64
    voxels = rng.normal(40, 60, (SIDE,) * 3) + 300 * ball
    return sitk.GetImageFromArray(voxels.astype(np.int16)), sitk.GetImageFromArray(ball.astype(np.uint8))


def write_checkpoint(path):
    """As `mim_pretrain` writes it, with every case among those pretrained on."""
    encoder = HybridEncoder(1, NETWORK.embed_dims, NETWORK.depths, NETWORK.strides, NETWORK.num_heads)
    config = PretrainConfig(preset="tiny", network=NETWORK, view_size=(32, 32, 32))
    torch.save(
        {
            "network_weights": {f"encoder.{k}": v for k, v in encoder.state_dict().items()},
            "mim_config": config.to_dict(),
            "mim_version": "0.0.0",
            "provenance": {
                "datasets": [DATASET],
                "cases": [{"dataset": DATASET, "case": f"case_{i}", "sha256": ""} for i in range(N_CASES)],
            },
        },
        path,
    )


class Workplace:
    """nnU-Net's folders, and its commands run in them."""

    def __init__(self, folder):
        self.folder = folder
        plugin = folder / "plugin"
        plugin.mkdir()
        (plugin / "mim_test_plugin.py").write_text(
            "from nnunet_mim.trainers import nnUNetTrainerMiM, nnUNetTrainerMiMScratch\n"
        )
        self.env = {
            **{k: v for k, v in os.environ.items() if k != "nnUNet_mim_checkpoint"},
            **{name: str(folder / name) for name in ("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results")},
            "nnUNet_extTrainer": str(plugin),
            "nnUNet_n_proc_DA": "0",
            "nnUNet_def_n_proc": "1",
            "PYTHONPATH": os.pathsep.join([str(REPOSITORY), os.environ.get("PYTHONPATH", "")]).rstrip(os.pathsep),
        }
        self.bin = Path(sys.executable).parent

    @property
    def run_folder(self):
        return self.folder / "nnUNet_results" / DATASET / RUN

    def command(self, name, *arguments):
        if name == "mim_plan":
            return [sys.executable, "-m", "nnunet_mim.preparation.cli", *arguments]
        return [str(self.bin / name), *map(str, arguments)]

    def __call__(self, name, *arguments, fails=False, **env):
        done = subprocess.run(
            self.command(name, *arguments), env={**self.env, **env}, capture_output=True, text=True, cwd=self.folder
        )
        assert (done.returncode != 0) == fails, f"{name} {arguments}:\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
        return done.stderr if fails else done.stdout

    def train(self, *arguments, trainer="nnUNetTrainerMiM", fold="0", **kwargs):
        options = ("-tr", trainer, "-p", "nnUNetMiMPlans", "-device", "cpu")
        return self("nnUNetv2_train", "907", "3d_fullres", fold, *options, *arguments, **kwargs)

    def predict(self, output, **env):
        options = ("-tr", "nnUNetTrainerMiM", "-p", "nnUNetMiMPlans", "-c", "3d_fullres", "-f", "0", "-device", "cpu")
        options += ("-npp", "1", "-nps", "1", "--disable_progress_bar")
        self("nnUNetv2_predict", "-d", "907", "-i", self.folder / "new", "-o", self.folder / output, *options, **env)
        return sitk.GetArrayFromImage(sitk.ReadImage(self.folder / output / "new_1.nii.gz"))


@pytest.fixture(scope="module")
def workplace(tmp_path_factory):
    """Images, labels and one unseen image, planned and preprocessed; a checkpoint; MiM plans for it."""
    folder = tmp_path_factory.mktemp("finetune")
    work = Workplace(folder)
    dataset = folder / "nnUNet_raw" / DATASET
    for name in ("imagesTr", "labelsTr"):
        (dataset / name).mkdir(parents=True)
    for name in ("nnUNet_preprocessed", "nnUNet_results", "new"):
        (folder / name).mkdir()
    for i in range(N_CASES):
        image, label = real_case(i) or made_up_case(i)
        sitk.WriteImage(image, dataset / "imagesTr" / f"case_{i}_0000.nii.gz")
        sitk.WriteImage(label, dataset / "labelsTr" / f"case_{i}.nii.gz")
    image, _ = real_case(N_CASES) or made_up_case(N_CASES)
    sitk.WriteImage(image, folder / "new" / "new_1_0000.nii.gz")
    labels = {"background": 0, "organ": 1}
    content = {"channel_names": {"0": "CT"}, "labels": labels, "numTraining": N_CASES, "file_ending": ".nii.gz"}
    (dataset / "dataset.json").write_text(json.dumps(content))
    write_checkpoint(folder / "pretrained.pth")

    work(
        "nnUNetv2_plan_and_preprocess",
        "-d",
        "907",
        "-c",
        "3d_fullres",
        "-npfp",
        "1",
        "-np",
        "1",
        "--no_pp",
        nnUNet_n_proc_DA="1",
    )
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
        while process.poll() is None and not (workplace.run_folder / "fold_0" / "mim_transfer.json").is_file():
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
    fold = workplace.run_folder / "fold_0"
    assert (fold / "checkpoint_final.pth").is_file()
    assert (fold / "validation" / "summary.json").is_file()
    assert "adapted: 0 parameters" in trained
    assert "validation cases of this fold were PRETRAINED ON" in trained
    record = json.loads((fold / "mim_transfer.json").read_text())
    n_encoder = len(HybridEncoder(1, NETWORK.embed_dims, NETWORK.depths, num_heads=2).state_dict())
    assert len(record["loaded"]) == n_encoder
    weights = torch.load(fold / "checkpoint_final.pth", weights_only=False)
    assert weights["inference_allowed_mirroring_axes"] == (0, 1)
    assert weights["current_epoch"] == 2


def test_another_fold_without_the_checkpoint_says_so_in_its_last_line(workplace, trained):
    last_line = workplace.train(fold="1", fails=True).strip().splitlines()[-1]
    assert "MiMError" in last_line
    assert "pretrained.pth" in last_line
    assert "does not exist" in last_line


def test_continue_then_validate(workplace, trained):
    plans_file = workplace.folder / "nnUNet_preprocessed" / DATASET / "nnUNetMiMPlans.json"
    plans = json.loads(plans_file.read_text())
    plans["mim_finetune"]["num_epochs"] = 3
    plans_file.write_text(json.dumps(plans))
    printed = workplace.train("--c")
    assert "Epoch 2" in printed
    assert "Epoch 1" not in printed
    assert torch.load(workplace.run_folder / "fold_0/checkpoint_final.pth", weights_only=False)["current_epoch"] == 3
    summary = workplace.run_folder / "fold_0" / "validation" / "summary.json"
    summary.unlink()
    workplace.train("--val")
    assert summary.is_file()


def test_predict_export_install_predict(workplace, trained):
    here = workplace.predict("predicted")
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
    np.testing.assert_array_equal(workplace.predict("predicted_elsewhere", **elsewhere), here)


def test_control_and_find_best_configuration(workplace, trained):
    printed = workplace.train(trainer="nnUNetTrainerMiMScratch")
    assert "Pretrained weights" not in printed
    best = workplace(
        "nnUNetv2_find_best_configuration", "907", "-p", "nnUNetMiMPlans", "-c", "3d_fullres", "-f", "0", "-np", "1",
        "-tr", "nnUNetTrainerMiM", "nnUNetTrainerMiMScratch", "--disable_ensembling",
    )  # fmt: skip
    assert RUN in best
    assert "nnUNetTrainerMiMScratch__nnUNetMiMPlans__3d_fullres" in best
    saved = [
        json.loads((workplace.folder / "nnUNet_results" / DATASET / name / "plans.json").read_text())
        for name in (RUN, RUN.replace("MiM__", "MiMScratch__"))
    ]
    blocks = [plans["configurations"]["3d_fullres"]["architecture"] for plans in saved]
    assert blocks[0] == blocks[1]
