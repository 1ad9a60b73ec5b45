"""A tiny untrained checkpoint, and smooth made-up CT in any direction."""

from __future__ import annotations

import numpy as np
import pytest
import SimpleITK as sitk
import torch

from nnunet_mim.checkpoint.format import build_checkpoint, save_atomically
from nnunet_mim.config import NetworkConfig, PretrainConfig
from nnunet_mim.networks.mask_in_mask import MaskInMask

NETWORK = NetworkConfig((6, 6, 6, 12), (1, 1, 1, 1), 2, decoder_embed_dim=12, decoder_depth=1, decoder_num_heads=2)
WINDOW = {"percentile_00_5": -1000.0, "percentile_99_5": 1000.0, "mean": 0.0, "std": 250.0}


@pytest.fixture
def write_checkpoint(tmp_path):
    """write(spacing=…, transpose_forward=…, channels=1, **provenance) → path of a checkpoint; None leaves a key out."""

    def write(spacing=(3.0, 2.5, 4.0), transpose_forward=(0, 1, 2), channels=1, **changes):
        torch.manual_seed(0)
        config = PretrainConfig(preset="tiny", network=NETWORK, view_size=(32, 32, 32), in_channels=channels)
        provenance = {
            "datasets": ["Dataset900_Tiny"], "plans_name": "tinyPlans", "configuration": "3d_fullres", "fold": 0,
            "spacing": list(spacing), "transpose_forward": transpose_forward and list(transpose_forward),
            "normalization": ["CTNormalization"] * channels,
            "intensity_properties": {str(c): WINDOW for c in range(channels)}, "iterations": 500, "loss_history": [],
            "cases": [{"dataset": "Dataset900_Tiny", "case": "case_00", "sha256": "0"}], **changes,
        }  # fmt: skip
        provenance = {name: value for name, value in provenance.items() if value is not None}
        path = tmp_path / "checkpoint_final.pth"
        save_atomically(build_checkpoint(MaskInMask(NETWORK, channels).state_dict(), config, provenance), path)
        return path

    return write


@pytest.fixture
def write_ct(tmp_path):
    """write(direction=…, spacing=…, size=…, margin=0, name=…) → path of a CT that varies slowly in space."""

    def write(
        direction=((1, 0, 0), (0, 1, 0), (0, 0, 1)), spacing=(3.0, 2.0, 4.0), size=(60, 72, 50), margin=0,
        name="body.nii.gz", add=0.0,
    ):  # fmt: skip
        axes = np.meshgrid(*(np.arange(n) * s for n, s in zip(size, spacing, strict=True)), indexing="ij")
        periods = (97, 0.3), (83, 1.1), (91, 2.0)  # mm, phase
        waves = [np.sin(2 * np.pi * x / period + phase) for x, (period, phase) in zip(axes, periods, strict=True)]
        hu = 100 + add + 150 * waves[0] + 120 * waves[1] + 180 * waves[2] + 60 * waves[0] * waves[1]
        if margin:  # nnU-Net cuts off what is 0
            inside = np.zeros(size, bool)
            inside[margin:, margin : -margin - 2, :-margin] = True
            hu = np.where(inside, hu, 0)
        image = sitk.GetImageFromArray(hu.transpose(2, 1, 0).astype(np.float32))
        image.SetSpacing(spacing)
        image.SetOrigin((-120.0, 37.0, 411.0))
        image.SetDirection(np.asarray(direction, float).flatten().tolist())
        path = tmp_path / name
        sitk.WriteImage(image, str(path))
        return path

    return write
