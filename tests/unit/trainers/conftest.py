"""A tiny preprocessed dataset in nnU-Net's folders."""

import json

import numpy as np
import pytest
from nnunetv2.training.dataloading.nnunet_dataset import nnUNetDatasetBlosc2

from nnunet_mim.networks.hybrid_unet import plans_architecture

DATASET = "Dataset007_Toy"
CASES = [f"case_{i}" for i in range(5)]


@pytest.fixture
def dataset_json():
    return {
        "channel_names": {"0": "CT"},
        "labels": {"background": 0, "organ": 1},
        "numTraining": 5,
        "file_ending": ".nii.gz",
    }


@pytest.fixture
def voxels():
    """Identifier → (1, 40, 36, 34) float32."""
    return {
        case: np.random.default_rng(i).normal(size=(1, 40, 36, 34)).astype(np.float32) for i, case in enumerate(CASES)
    }


@pytest.fixture
def folders(tmp_path, monkeypatch, plans, dataset_json, voxels):
    """nnU-Net's three folders with the toy dataset preprocessed; returns their parent."""
    for name in ("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results"):
        (tmp_path / name).mkdir()
        monkeypatch.setenv(name, str(tmp_path / name))
    monkeypatch.setenv("nnUNet_n_proc_DA", "0")
    monkeypatch.delenv("nnUNet_mim_checkpoint", raising=False)
    base = tmp_path / "nnUNet_preprocessed" / DATASET
    data = base / "nnUNetPlans_3d_fullres"
    data.mkdir(parents=True)
    for case, image in voxels.items():
        seg = np.zeros(image.shape, np.int8)
        seg[:, 10:20, 10:20, 10:20] = 1
        properties = {"class_locations": {1: np.argwhere(seg == 1)}, "spacing": [2.0, 2.0, 2.0]}
        nnUNetDatasetBlosc2.save_case(image, seg, properties, str(data / case))
    (base / "nnUNetPlans.json").write_text(json.dumps(plans))
    (base / "dataset.json").write_text(json.dumps(dataset_json))
    (base / "dataset_fingerprint.json").write_text("{}")
    return tmp_path


@pytest.fixture
def mim_plans(plans, network_config):
    """As `mim_plan` leaves them: HybridUNet named, the recipe short."""
    plans["plans_name"] = "nnUNetMiMPlans"
    config = plans["configurations"]["3d_fullres"]
    config["architecture"] = plans_architecture(network_config, config["patch_size"])
    plans["configurations"] = {"3d_fullres": config}
    return plans
