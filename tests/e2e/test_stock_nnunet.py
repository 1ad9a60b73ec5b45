"""What stock nnU-Net can do with plans and checkpoints of this package: nnU-Net's own trainer and network."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

DATASET = "Dataset909_Stock"
BRANCH = Path(sys.executable).with_name("nnUNetv2_train_pretrained")
pytestmark = [pytest.mark.long, pytest.mark.timeout(1500)]


@pytest.fixture(scope="module")
def workplace(workplace_of):
    work = workplace_of("stock")
    work.write_dataset(DATASET, 5, 32)
    work.plan(909)
    return work


def train(work, plans, *more):
    """nnUNetTrainer, one epoch of two iterations."""
    command = [sys.executable, "-m", "nnunet_mim.benchmarking.seeded_training"]
    command += [str(os.getpid()), "0", "1", "2", "1", "0", str(work.folder / f"cost_{plans}.json"), "nnUNetv2_train"]
    command += ["909", "3d_fullres", "0", "-tr", "nnUNetTrainer", "-p", plans, "-device", "cpu", *map(str, more)]
    done = subprocess.run(command, env=work.env, capture_output=True, encoding="utf-8", cwd=work.folder)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout


def test_plans_of_mim_plan_train_with_the_stock_trainer(workplace):
    workplace("mim_plan", "-d", "909", "--preset", "tiny", "--set", "patch_size=32,32,32")
    workplace("nnUNetv2_preprocess", "-d", "909", "-plans_name", "nnUNetMiMPlans", "-c", "3d_fullres", "-np", "1")
    train(workplace, "nnUNetMiMPlans")
    run = workplace.folder / "nnUNet_results" / DATASET / "nnUNetTrainer__nnUNetMiMPlans__3d_fullres"
    assert (run / "fold_0" / "validation" / "summary.json").is_file()
    weights = torch.load(run / "fold_0" / "checkpoint_final.pth", weights_only=False)["network_weights"]
    assert "encoder.vit_blocks.0.attn.qkv.weight" in weights
    options = ("-tr", "nnUNetTrainer", "-p", "nnUNetMiMPlans", "-c", "3d_fullres", "-f", "0", "-device", "cpu")
    images = ("-i", workplace.folder / "new", "-o", workplace.folder / "predicted")
    workplace("nnUNetv2_predict", "-d", "909", *images, *options, "-npp", "1", "-nps", "1")
    assert (workplace.folder / "predicted" / "new_1.nii.gz").is_file()


RUN = ("-d", "909", "-p", "MiMResEnc", "-f", "0", "-device", "cpu", "--workers", "0")


@pytest.fixture(scope="module")
def pretrained(workplace):
    """ResEnc-L planned, and pretrained for two steps: (checkpoint, what the command said)."""
    workplace("nnUNetv2_plan_experiment", "-d", "909", "-pl", "nnUNetPlannerResEncL", nnUNet_n_proc_DA="1")
    said = workplace("mim_plan", "-d", "909", "-p", "nnUNetResEncUNetLPlans", "--encoder", "resenc", "-o", "MiMResEnc")
    assert "nnU-Net's own, of nnUNetResEncUNetLPlans" in said
    workplace("nnUNetv2_preprocess", "-d", "909", "-plans_name", "MiMResEnc", "-c", "3d_fullres", "-np", "1")
    small = ("--view", "32", "--iterations", "2", "--batch", "1", "--children", "1", "1", "--encoder", "resenc")
    said = workplace("mim_pretrain", *RUN, *small)
    results = workplace.folder / "nnUNet_results" / DATASET
    return results / "MiMPretrain__MiMResEnc__3d_fullres" / "fold_0" / "checkpoint_final.pth", said


def test_a_pretrained_residual_encoder_is_finetuned_by_stock_nnunet(workplace, pretrained):
    """nnU-Net's own -pretrained_weights takes every weight but the heads."""
    checkpoint, said = pretrained
    assert f"-pretrained_weights {checkpoint} -p MiMResEnc" in said
    assert (checkpoint.parent / "report.html").is_file()
    assert "residual encoder U-Net" in workplace("mim_inspect", checkpoint)
    said = train(workplace, "MiMResEnc", "-pretrained_weights", checkpoint)
    assert "Loading pretrained weights from file" in said
    fold = workplace.folder / "nnUNet_results" / DATASET / "nnUNetTrainer__MiMResEnc__3d_fullres" / "fold_0"
    assert (fold / "validation" / "summary.json").is_file()
    before = torch.load(checkpoint, weights_only=True)["network_weights"]
    after = torch.load(fold / "checkpoint_final.pth", weights_only=False)["network_weights"]
    assert set(after) <= set(before)
    moved = [float((after[n] - before[n]).abs().max()) for n in after if "conv.weight" in n and "seg_layers" not in n]
    assert max(moved) < 0.1, "two steps from the pretrained weights, not from random ones"
    said = workplace.refused(
        "mim_pretrain", *RUN, "--view", "32", "--encoder", "resenc", "--preset", "tiny", "-o", "x", "--recompute", "1"
    )
    assert "--recompute is for --encoder hybrid" in said
    said = workplace.refused("mim_plan", "-d", "909", "--encoder", "resenc", "-o", "Other")
    assert "the plans name PlainConvUNet, not ResidualEncoderUNet" in said


@pytest.mark.skipif(not BRANCH.is_file(), reason="needs nnU-Net's development branch")
def test_nnunets_own_finetuning_of_a_pretrained_resenc(workplace, pretrained):
    """The branch's documentation, workflow A: its planning reads the checkpoint, its training loads the weights."""
    checkpoint, _ = pretrained
    workplace("nnUNetv2_plan_like_dynamic", "-d", "909", "-n", "mim", "-pc", checkpoint, "-pl", "MiMResEnc")
    plans = "ptPlans_dynamic__mim"
    stored = json.loads((workplace.folder / "nnUNet_preprocessed" / DATASET / f"{plans}.json").read_text())
    assert stored["pretrain_info"]["key_to_lpe"] is None
    command = [BRANCH, "909", "3d_fullres", "0", "-p", plans, "-tr", "DynamicPretrainedTrainer", "-device", "cpu"]
    pipe = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    training = subprocess.Popen(command, env=workplace.env, start_new_session=True, **pipe)
    said = ""
    for line in training.stdout:  # an epoch of it takes hours here: it is enough that the first begins
        said += line
        if "Epoch 0" in line:
            break
    os.killpg(training.pid, signal.SIGKILL)
    training.wait()
    assert "Epoch 0" in said, said[-3000:]
