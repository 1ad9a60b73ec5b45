"""Triples in messages say which order their numbers have."""

import pytest
import SimpleITK as sitk
from nnunetv2.imageio.simpleitk_reader_writer import SimpleITKIO

from nnunet_mim.benchmarking.metrics import case_metrics
from nnunet_mim.checkpoint.units import unit_differences
from nnunet_mim.classification.options import ClassifyConfig
from nnunet_mim.config import LevelConfig, PretrainConfig
from nnunet_mim.errors import MiMError
from nnunet_mim.geometry import build_levels
from nnunet_mim.networks.resenc import check_view
from nnunet_mim.nnunet.image_files import FileHeader
from nnunet_mim.nnunet.raw_image import read_image
from nnunet_mim.preparation.mim_plans import PlanSettings
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


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: PlanSettings(spacing=(0, 1, 2)), r"--set spacing \(mm, {order}\) must be above 0, got \(0, 1, 2\)"),
        (lambda: PretrainConfig(view_size=(96, 96, 97)), r"--view \(96, 96, 97\) \({order}\) must be a multiple"),
        (lambda: PretrainConfig(scale=(1, 2, 3)), r"--scale must be 1 or 2 per axis, got \(1, 2, 3\) \({order}\)"),
        (
            lambda: ClassifyConfig(window=(0, 1, 2)),
            r"--window takes one number above 0 or three \({order}\), got \(0, 1",
        ),
        (
            lambda: build_levels(tuple(LevelConfig((n,) * 3, 0.5, 1) for n in (12, 8)), (8, 8, 8), (2, 2, 2)),
            r"\(12, 12, 12\) is not divisible by the next one \(8, 8, 8\) \({order}\)",
        ),
    ],
)
def test_settings_that_are_refused(make, says):
    with pytest.raises(MiMError, match=says.format(order=PLANS_ORDER)):
        make()


def test_segmentations_of_different_sizes(tmp_path):
    files = [tmp_path / f"{name}.nii.gz" for name in "ab"]
    for file, size in zip(files, ((4, 5, 6), (4, 5, 7)), strict=True):
        sitk.WriteImage(sitk.Image(size, sitk.sitkUInt8), str(file))
    with pytest.raises(ValueError, match=r"has \(6, 5, 4\) voxels, .* \(7, 5, 4\) \(z, y, x\)"):
        case_metrics(*files, [1], SimpleITKIO())
