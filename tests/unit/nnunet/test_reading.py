"""Images read by nnU-Net's readers in a worker of its own."""

import subprocess
import sys

import numpy as np
import pytest
import SimpleITK as sitk

from nnunet_mim.nnunet.image_files import read_headers
from nnunet_mim.nnunet.reading import read_voxels
from nnunet_mim.system.guarded import Failure


def test_voxels_and_spacing_are_those_of_the_reader(tmp_path):
    voxels = np.random.default_rng(0).integers(-1000, 1000, (5, 6, 7)).astype(np.int16)
    image = sitk.GetImageFromArray(voxels)
    image.SetSpacing((1.0, 2.0, 3.0))
    sitk.WriteImage(image, str(tmp_path / "ct.nii.gz"))
    found, spacing = read_voxels(tmp_path / "ct.nii.gz", "SimpleITKIO")
    assert np.array_equal(found, voxels[None])
    assert spacing == [3.0, 2.0, 1.0]


def test_a_damaged_file_is_a_failure(tmp_path):
    (tmp_path / "ct.nii.gz").write_bytes(b"no image")
    outcome = read_voxels(tmp_path / "ct.nii.gz", "SimpleITKIO")
    assert isinstance(outcome, Failure)
    assert "damaged" in outcome.reason


@pytest.mark.parametrize("module", ["reading", "raw_image"])
def test_a_worker_does_not_wait_for_pytorch(module):
    """Each call starts a process that imports this module: with PyTorch that takes several seconds."""
    code = f"import sys, nnunet_mim.nnunet.{module}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_a_name_with_a_nul_character_is_no_file():
    assert read_headers(["a\0b.nii"], 1) == ["cannot be read (a\0b.nii is not there)"]
