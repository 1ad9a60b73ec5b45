"""Which axis of stored images is left-right; SimpleITK's DICOMOrient stores them one way or another."""

import pytest
import SimpleITK as sitk

from nnunet_mim.nnunet.orientation import _left_right_axes, mirroring_is_unsafe

DATASET_JSON = {"channel_names": {"0": "CT"}, "labels": {"background": 0, "organ": 1}, "file_ending": ".nii.gz"}


@pytest.fixture
def raw(tmp_path):
    (tmp_path / "imagesTr").mkdir()
    return tmp_path


def store(raw, name, orientation):
    """The first letter is the direction of the file's first axis (x), the last axis of nnU-Net's arrays."""
    image = sitk.DICOMOrient(sitk.Image(3, 4, 5, sitk.sitkInt16), orientation)
    sitk.WriteImage(image, raw / "imagesTr" / f"{name}_0000.nii.gz")


@pytest.mark.parametrize(
    ("orientation", "axis"), [("LPS", 2), ("RAS", 2), ("LSA", 2), ("PLS", 1), ("PSL", 0), ("SPR", 0)]
)
def test_the_axis_and_whether_mirroring_the_others_is_safe(raw, orientation, axis):
    store(raw, "a", orientation)
    assert _left_right_axes((raw / "imagesTr").iterdir()) == {axis}
    assert mirroring_is_unsafe(raw, DATASET_JSON) == (axis != 2)


def test_one_image_stored_otherwise_is_enough(raw):
    store(raw, "a", "LPS")
    store(raw, "b", "PSL")
    assert mirroring_is_unsafe(raw, DATASET_JSON)


def test_what_cannot_be_read_says_nothing(raw):
    (raw / "imagesTr" / "a_0000.nii.gz").write_bytes(b"no image")
    assert not mirroring_is_unsafe(raw, DATASET_JSON)
    (raw / "imagesTr" / "notes.nii.gz").write_bytes(b"of no channel")
    assert not mirroring_is_unsafe(raw, DATASET_JSON)
    assert not mirroring_is_unsafe(raw / "gone", DATASET_JSON)
