"""Labels lie on their images voxel by voxel, and hold what dataset.json declares."""

import json

import numpy as np
import pytest
import SimpleITK as sitk
from hypothesis import given
from hypothesis import strategies as st
from nnunetv2.imageio.simpleitk_reader_writer import SimpleITKIOWithReorient

from nnunet_mim.errors import MiMError
from nnunet_mim.nnunet.labels import ROUNDING, declared_values, geometry_differences, whole_numbers

NAME = "Dataset501_L"
DIRECTIONS = {
    "half a turn, as CT often has it": (-1, 0, 0, 0, -1, 0, 0, 0, 1),
    "from head to foot": (1, 0, 0, 0, 1, 0, 0, 0, -1),
    "sagittal slices": (0, 0, 1, 1, 0, 0, 0, -1, 0),
}


def with_header(image, direction, spacing=None, origin=None):
    """The same voxels with another direction, spacing or origin."""
    copy = sitk.Image(image)
    copy.SetDirection(direction)
    copy.SetSpacing(spacing or image.GetSpacing())
    copy.SetOrigin(origin or image.GetOrigin())
    return copy


@pytest.fixture(params=DIRECTIONS.values(), ids=DIRECTIONS.keys())
def turned(request, ct, preparing):
    """A CT whose header has a direction, and its label whose header has another one, of the same voxels."""
    image = with_header(ct(3), request.param)
    label = preparing.organ_of(image)
    return image, label, with_header(label, np.eye(3).ravel().tolist())


def test_a_label_with_another_direction_stays_on_its_image(preparing, turned, without_fingerprint, capsys):
    """The same label with the header of its image is the yardstick, for training and for what validation compares."""
    image, label, label_with_another_header = turned
    preparing.write_raw("Dataset502_Same", [[image]], [label])
    preparing.write_raw(NAME, [[image]], [label_with_another_header])
    assert preparing(502) == 0
    assert "doubtful" not in capsys.readouterr().out
    assert preparing(501) == 0
    assert "1 cases prepared, 1 of them doubtful, 0 left out" in (said := capsys.readouterr().out)
    assert "1 doubtful: label has another direction than its image" in said
    (data, expected, _), (_, found, _) = preparing.voxels("case_0", "Dataset502_Same"), preparing.voxels("case_0", NAME)
    assert np.array_equal(found, expected)
    assert expected.any()
    assert (250 * data[found > 0] > -150).mean() > 0.95, "labelled voxels are those that are denser than 20 HU"
    reader = SimpleITKIOWithReorient()
    references = [
        preparing.root / "nnUNet_preprocessed" / name / "gt_segmentations" / "case_0.nii.gz"
        for name in ("Dataset502_Same", NAME)
    ]
    one, other = (reader.read_seg(str(path))[0] for path in references)
    assert np.array_equal(one, other)


def test_the_reference_of_a_turned_label_is_made_anew_where_an_earlier_one_is_wrong(preparing, ct, without_fingerprint):
    image = with_header(ct(3), DIRECTIONS["half a turn, as CT often has it"])
    label = with_header(preparing.organ_of(image), np.eye(3).ravel().tolist())
    raw = preparing.write_raw(NAME, [[image]], [label])
    assert preparing(501) == 0
    reference = preparing.root / "nnUNet_preprocessed" / NAME / "gt_segmentations" / "case_0.nii.gz"
    right = reference.read_bytes()
    reference.write_bytes((raw / "labelsTr" / "case_0.nii.gz").read_bytes())  # what former versions copied
    assert preparing(501) == 0
    assert reference.read_bytes() == right
    before = reference.stat().st_mtime_ns
    assert preparing(501) == 0
    assert reference.stat().st_mtime_ns == before


def test_labels_that_were_stored_as_decimals_lose_no_class(preparing, ct, without_fingerprint):
    image = ct(3)
    label = sitk.Cast(preparing.organ_of(image), sitk.sitkFloat32) * 0.999999
    preparing.write_raw(NAME, [[image]], [label])
    preparing.write_raw("Dataset502_Whole", [[image]], [preparing.organ_of(image)])
    assert preparing(501, 502) == 0
    expected = preparing.voxels("case_0", "Dataset502_Whole")[1]
    assert np.array_equal(preparing.voxels("case_0", NAME)[1], expected)
    reference = preparing.root / "nnUNet_preprocessed" / NAME / "gt_segmentations" / "case_0.nii.gz"
    stored = sitk.GetArrayFromImage(sitk.ReadImage(str(reference)))
    assert np.array_equal(stored, sitk.GetArrayFromImage(preparing.organ_of(image)))


def test_values_that_dataset_json_does_not_declare_are_named_and_tried_again(
    preparing, ct, without_fingerprint, capsys
):
    labels = [preparing.organ_of(ct(i)) for i in range(3)]
    labels[1] = sitk.Cast(labels[1] * 7, sitk.sitkUInt8)
    labels[2] = sitk.Cast(labels[2], sitk.sitkFloat32) * 0.5
    raw = preparing.write_raw(NAME, [[ct(i)] for i in range(3)], labels)
    assert preparing(501) == 0
    reasons = {name: entry["reason"] for name, entry in preparing.log(NAME).skipped.items()}
    folder = raw / "labelsTr"
    assert reasons == {
        "case_1": f"label with values that dataset.json does not declare (7): {folder}/case_1.nii.gz",
        "case_2": f"label with values that dataset.json does not declare (0.5): {folder}/case_2.nii.gz",
    }
    assert "2 label with values that dataset.json does not declare" in capsys.readouterr().out
    content = json.loads((raw / "dataset.json").read_text())
    content["labels"] |= {str(value): value for value in range(2, 8)}
    (raw / "dataset.json").write_text(json.dumps(content))
    assert preparing(501) == 0
    assert list(preparing.log(NAME).skipped) == ["case_2"]


def test_a_label_of_another_size(preparing, ct, without_fingerprint):
    image = ct(0)
    preparing.write_raw(NAME, [[image], [ct(1)]], [preparing.organ_of(image)[:, :, 1:], preparing.organ_of(ct(1))])
    assert preparing(501) == 0
    reason = preparing.log(NAME).skipped["case_0"]["reason"]
    assert reason.startswith("label has 32 x 28 x 23 voxels, its image 32 x 28 x 24 (x, y, z): ")


def test_spacing_and_origin_that_differ_are_doubtful(preparing, ct, without_fingerprint):
    image = ct(0)
    label = with_header(preparing.organ_of(image), image.GetDirection(), (1, 1, 1), (0, 0, 0))
    preparing.write_raw(NAME, [[image]], [label])
    assert preparing(501) == 0
    assert preparing.log(NAME).prepared["case_0"]["warnings"] == [
        "label has spacing (1, 1, 1) mm, its image (3, 3, 4) mm (x, y, z): taken voxel by voxel, as nnU-Net does",
        "label has origin (0, 0, 0) mm, its image (-40, 12.5, 100) mm (x, y, z): taken voxel by voxel, as nnU-Net does",
    ]


def test_an_image_with_a_label_that_is_no_ct_in_hu_is_doubtful(preparing, ct, without_fingerprint):
    swapped = sitk.GetImageFromArray(sitk.GetArrayFromImage(ct(0)).byteswap())
    swapped.CopyInformation(ct(0))
    preparing.write_raw(NAME, [[swapped], [ct(1)]], [preparing.organ_of(ct(i)) for i in range(2)])
    assert preparing(501) == 0
    warnings = {name: entry["warnings"] for name, entry in preparing.log(NAME).prepared.items()}
    assert warnings["case_1"] == []
    assert "wrong byte order or scale" in warnings["case_0"][0]


def test_real_labels_have_the_grid_of_their_images(shared_data):
    """Contours of a clinic, on CT whose headers have gone through several programs."""
    raw = shared_data / "nnUNet_raw" / "Dataset501_HeadNeckOAR"
    for label in sorted((raw / "labelsTr").iterdir())[:5]:
        image = raw / "imagesTr" / label.name.replace(".nii.gz", "_0000.nii.gz")
        assert geometry_differences(label, image) == {}


@given(st.lists(st.integers(0, 4), min_size=1, max_size=30), st.floats(-0.99, 0.99))
def test_what_is_nearly_whole_is_rounded(values, noise):
    expected = np.array(values, np.int16)
    voxels = (expected + noise * ROUNDING).astype(np.float64)
    found = whole_numbers(voxels, range(5))
    assert isinstance(found, np.ndarray)
    assert found.dtype == np.int16
    assert np.array_equal(found, expected)


@given(st.lists(st.integers(0, 4), min_size=1, max_size=30), st.floats(1.1 * ROUNDING, 1 - 1.1 * ROUNDING))
def test_what_is_not_is_refused(values, noise):
    voxels = np.array([*values, values[0] + noise])
    assert "does not declare" in whole_numbers(voxels, range(6))


@pytest.mark.parametrize(
    ("labels", "says"),
    [
        ({"organ": 1}, "Background label not declared"),
        ({"background": 0, "organ": 2}, "have the values [0, 2], nnU-Net wants 0, 1, 2"),
        ({"background": 0, "organ": "one"}, "are not as nnU-Net wants them"),
        ({"background": 0, "a": [1, 2], "b": 2}, "regions_class_order"),
    ],
)
def test_labels_that_nnunet_would_refuse(tmp_path, labels, says):
    with pytest.raises(MiMError, match=r"dataset\.json") as error:
        declared_values({"labels": labels}, tmp_path / "dataset.json")
    assert says in str(error.value)


def test_the_label_to_ignore_may_occur(tmp_path):
    labels = {"background": 0, "a": 1, "b": 2, "ignore": 3}
    assert declared_values({"labels": labels}, tmp_path) == [0, 1, 2, 3]
