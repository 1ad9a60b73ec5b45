"""The written views lie over the CT: SimpleITK, which knows nothing of ours, finds the same voxels there."""

from __future__ import annotations

import numpy as np
import pytest
import SimpleITK as sitk

from nnunet_mim.checkpoint.format import load_checkpoint
from nnunet_mim.inspection.show import show_case
from nnunet_mim.nnunet.raw_image import read_image
from nnunet_mim.pretraining.report.pictures import load_network
from nnunet_mim.pretraining.report.summary import Facts

ANGLE = np.deg2rad(25)
TILT = np.array([[1, 0, 0], [0, np.cos(ANGLE), -np.sin(ANGLE)], [0, np.sin(ANGLE), np.cos(ANGLE)]])
TURN = np.array([[np.cos(ANGLE), -np.sin(ANGLE), 0], [np.sin(ANGLE), np.cos(ANGLE), 0], [0, 0, 1]])
DIRECTIONS = {
    "identity": np.eye(3),
    "flipped": np.diag([-1.0, -1.0, 1.0]),
    "sagittal": np.array([[0.0, 0, 1], [-1, 0, 0], [0, -1, 0]]),
    "oblique": TILT @ TURN @ np.diag([1.0, -1.0, -1.0]),
}


def resampled(ct: sitk.Image, view: sitk.Image) -> np.ndarray:
    """The CT on the grid of a view: the mean of 3 x 3 x 3 points in each voxel of the view."""
    total = 0.0
    for shift in np.stack(np.meshgrid(*[(-1 / 3, 0, 1 / 3)] * 3), -1).reshape(-1, 3):
        total = total + on_grid(ct, view, shift, sitk.sitkBSpline) / 27
    return total


def on_grid(image: sitk.Image, view: sitk.Image, shift, interpolator) -> np.ndarray:
    """An image on the grid of a view, moved by a part of its voxels; 0 outside."""
    grid = sitk.Image(view.GetSize(), sitk.sitkUInt8)
    grid.CopyInformation(view)
    grid.SetOrigin(view.TransformContinuousIndexToPhysicalPoint([float(s) for s in shift]))
    return sitk.GetArrayFromImage(sitk.Resample(image, grid, sitk.Transform(), interpolator, 0, image.GetPixelID()))


def check(ct_path, folder, name, level, tolerance):
    """Voxels of the written input agree with the CT there; the other files agree with it where nothing is masked."""
    ct = sitk.ReadImage(str(ct_path), sitk.sitkFloat32)
    parts = {
        part: sitk.ReadImage(str(folder / f"{name}_{level}_{part}.nii.gz"))
        for part in ("input", "masked", "reconstruction", "mask")
    }
    arrays = {part: sitk.GetArrayFromImage(image) for part, image in parts.items()}
    visible = arrays["mask"] == 0
    assert 0.3 < visible.mean() < 0.7
    for image in parts.values():
        assert image.GetSize() == parts["input"].GetSize()
        np.testing.assert_allclose(image.GetOrigin(), parts["input"].GetOrigin())
    np.testing.assert_array_equal(arrays["masked"][visible], arrays["input"][visible])
    np.testing.assert_array_equal(arrays["reconstruction"][visible], arrays["input"][visible])
    np.testing.assert_allclose(arrays["masked"][~visible], -1000, atol=1e-3)
    inside = sitk.BinaryErode(ct != 0, (3, 3, 3), sitk.sitkBall, 0.0, 1.0)  # what nnU-Net does not cut off
    compared = (on_grid(inside, parts["input"], (0, 0, 0), sitk.sitkNearestNeighbor) > 0) & visible
    assert compared.sum() > 500
    error = np.abs(arrays["input"] - resampled(ct, parts["input"]))[compared]
    assert np.percentile(error, 95) < tolerance, np.percentile(error, (50, 95, 100))
    moved = sitk.Image(parts["input"])  # the comparison would notice half a voxel
    moved.SetOrigin(parts["input"].TransformContinuousIndexToPhysicalPoint([0.5, 0.5, 0.5]))
    wrong = np.abs(arrays["input"] - resampled(ct, moved))[compared]
    assert np.percentile(wrong, 95) > 3 * tolerance, np.percentile(wrong, (50, 95, 100))


def write_views(checkpoint_path, ct, folder) -> None:
    """What mim_inspect does, without the page."""
    checkpoint = load_checkpoint(checkpoint_path)
    image = read_image([ct])
    folder.mkdir()
    files = show_case(Facts(checkpoint), load_network(checkpoint), image, folder / image.name, 0, None)[1]
    assert len(files) == 12


@pytest.mark.parametrize(
    ("direction", "forward"),
    [("identity", (0, 1, 2)), ("flipped", (1, 0, 2)), ("sagittal", (2, 0, 1)), ("oblique", (2, 0, 1)),
     ("oblique", (0, 2, 1))],
)  # fmt: skip
def test_views_lie_over_a_smooth_ct(write_checkpoint, write_ct, tmp_path, direction, forward) -> None:
    checkpoint = write_checkpoint((3.3, 2.5, 2.8), forward)
    ct = write_ct(DIRECTIONS[direction], margin=4)
    write_views(checkpoint, ct, tmp_path / "out")
    check(ct, tmp_path / "out", "body", "level1", 4)
    check(ct, tmp_path / "out", "body", "level2", 3)


def test_a_small_anisotropic_ct_is_padded(write_checkpoint, write_ct, tmp_path) -> None:
    checkpoint = write_checkpoint((3.0, 3.0, 3.0))
    ct = write_ct(DIRECTIONS["oblique"], spacing=(2.0, 2.0, 2.5), size=(64, 60, 56))
    write_views(checkpoint, ct, tmp_path / "out")
    view = sitk.GetArrayFromImage(sitk.ReadImage(str(tmp_path / "out" / "body_level1_input.nii.gz")))
    assert view.min() == pytest.approx(-1000)
    check(ct, tmp_path / "out", "body", "level1", 4)


def test_third_level_lies_in_its_masked_place(write_checkpoint, write_ct, tmp_path) -> None:
    checkpoint, ct = write_checkpoint((3.3, 2.5, 2.8), (1, 0, 2)), write_ct(DIRECTIONS["oblique"])
    write_views(checkpoint, ct, tmp_path / "out")
    level2, level3 = (
        [sitk.ReadImage(str(tmp_path / "out" / f"body_level{n}_{part}.nii.gz")) for part in ("input", "mask")]
        for n in (2, 3)
    )
    np.testing.assert_allclose(level3[0].GetSpacing(), np.array(level2[0].GetSpacing()) / 2, rtol=1e-5)
    over = sitk.GetArrayFromImage(sitk.Resample(level2[1], level3[0], sitk.Transform(), sitk.sitkNearestNeighbor, 0))
    assert over.all()  # a mask in a mask
    inner = sitk.GetArrayFromImage(sitk.Resample(level2[0], level3[0], sitk.Transform(), sitk.sitkLinear))
    made = sitk.GetArrayFromImage(level3[0])
    part = (slice(2, -2),) * 3
    np.testing.assert_allclose(made[part], inner[part], atol=0.5)


def test_a_real_ct(shared_data, write_checkpoint, tmp_path) -> None:
    ct = shared_data / "single" / "abdomen_image.nii.gz"
    checkpoint = write_checkpoint((3.0, 3.0, 3.0))
    write_views(checkpoint, ct, tmp_path / "out")
    image = sitk.ReadImage(str(ct), sitk.sitkFloat32)
    view = sitk.ReadImage(str(tmp_path / "out" / "abdomen_image_level2_input.nii.gz"))
    mask = sitk.GetArrayFromImage(sitk.ReadImage(str(tmp_path / "out" / "abdomen_image_level2_mask.nii.gz")))
    there = sitk.GetArrayFromImage(sitk.Resample(image, view, sitk.Transform(), sitk.sitkLinear, -1000.0))
    made = sitk.GetArrayFromImage(view)
    np.testing.assert_allclose(made[mask == 0], np.clip(there, -1000, 1000)[mask == 0], atol=0.1)  # no resampling
