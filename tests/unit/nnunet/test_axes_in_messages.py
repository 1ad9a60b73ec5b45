"""Triples in messages say which order their numbers have."""

import pytest
import SimpleITK as sitk

from nnunet_mim.checkpoint.units import unit_differences
from nnunet_mim.errors import MiMError
from nnunet_mim.networks.resenc import check_view
from nnunet_mim.nnunet.image_files import FileHeader
from nnunet_mim.nnunet.raw_image import read_image
from nnunet_mim.preparation.screening import _size_warnings, shape_problem, spacing_problem

PLANS_ORDER = "the plans' order of axes"


def test_what_is_in_the_plans_order():
    config = {"spacing": [1.0, 2.0, 3.0], "normalization_schemes": []}
    (difference,) = unit_differences({"spacing": [3.0, 2.0, 1.0]}, config, {})
    assert difference == f"spacing (mm, {PLANS_ORDER}): pretrained at [3.0, 2.0, 1.0], now [1.0, 2.0, 3.0]"
    block = {"arch_kwargs": {"strides": [[1, 1, 1], [2, 2, 2]]}}
    with pytest.raises(MiMError, match=rf"larger \({PLANS_ORDER}\)"):
        check_view(block, (3, 4, 4))


def test_what_is_in_the_order_of_a_file(tmp_path):
    assert shape_problem((20, 18, 4), 1, 16) == "fewer than 16 slices (20 x 18 x 4, x y z)"
    assert spacing_problem([1.0, 2.0, 30.0]) == "implausible spacing (1, 2, 30 mm, x y z)"
    header = FileHeader((10, 10, 10), (0.1, 0.1, 0.1), (1, 0, 0, 0, 1, 0, 0, 0, 1))
    assert "of voxels of 0.1 x 0.1 x 0.1 mm, x y z)" in _size_warnings(header)[0]
    sitk.WriteImage(sitk.Image([20, 18, 1], sitk.sitkInt16) + 1, str(tmp_path / "a.nii.gz"))
    with pytest.raises(MiMError, match=r"size 20 × 18 × 1\) along x y z"):
        read_image([tmp_path / "a.nii.gz"])
