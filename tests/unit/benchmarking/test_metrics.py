"""Dice and surface distances against SimpleITK, slow twins and cases with known distances."""

import math

import numpy as np
import pytest
import SimpleITK as sitk
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from nnunetv2.imageio.nibabel_reader_writer import NibabelIO, NibabelIOWithReorient
from nnunetv2.imageio.simpleitk_reader_writer import SimpleITKIO, SimpleITKIOWithReorient

from nnunet_mim.benchmarking import metrics
from nnunet_mim.benchmarking.metrics import _surface_distances, _surface_metrics, case_metrics, compared, dice
from nnunet_mim.errors import MiMError

SPACING = (3.0, 1.0, 1.5)
READER = SimpleITKIO()


def hausdorff95(prediction, reference, spacing):
    return _surface_metrics(prediction, reference, spacing, 1.0)[0]


def surface_dice(prediction, reference, tolerance, spacing=SPACING):
    return _surface_metrics(prediction, reference, spacing, tolerance)[1]


def box(shape, low, high):
    mask = np.zeros(shape, bool)
    mask[tuple(slice(a, b) for a, b in zip(low, high, strict=True))] = True
    return mask


def slow_surface(mask):
    """Voxels of a mask with a neighbour (of six) outside, as coordinates."""
    found = []
    for place in np.argwhere(mask):
        for axis in range(3):
            for step in (-1, 1):
                other = place.copy()
                other[axis] += step
                inside = 0 <= other[axis] < mask.shape[axis]
                if not inside or not mask[tuple(other)]:
                    found.append(tuple(place))
    return np.array(sorted(set(found)), float)


def slow_distances(a, b, spacing):
    a, b = slow_surface(a) * spacing, slow_surface(b) * spacing
    return [[min(math.dist(p, q) for q in two) for p in one] for one, two in ((a, b), (b, a))]


masks = hnp.arrays(bool, (4, 5, 6)).filter(lambda mask: mask.any())


@settings(max_examples=30, deadline=None)
@given(masks, masks)
def test_distances_are_those_of_a_slow_search(prediction, reference):
    for found, expected in zip(
        _surface_distances(prediction, reference, SPACING), slow_distances(prediction, reference, SPACING), strict=True
    ):
        assert sorted(found) == pytest.approx(sorted(expected))


@settings(max_examples=30, deadline=None)
@given(masks, masks, st.sampled_from([0.0, 1.0, 1.5, 2.0, 3.0]))
def test_surface_dice_counts_what_a_slow_search_finds_within_the_tolerance(prediction, reference, tolerance):
    one, two = slow_distances(prediction, reference, SPACING)
    near = sum(d <= tolerance for d in one + two)
    assert surface_dice(prediction, reference, tolerance) == pytest.approx(near / len(one + two))


def test_surface_dice_of_plates_by_hand():
    """Two plates one voxel thick, 3 mm apart along the first axis: nothing agrees within 2.9 mm, everything within 3;
    half of one plate and the whole of the other agree where half of it is missing.
    """
    plate, other = box((9, 10, 10), (4, 0, 0), (5, 10, 10)), box((9, 10, 10), (5, 0, 0), (6, 10, 10))
    assert surface_dice(plate, other, 2.9) == 0.0
    assert surface_dice(plate, other, 3.0) == 1.0
    half = box((9, 10, 10), (4, 0, 0), (5, 5, 10))
    assert surface_dice(half, plate, 0.5) == pytest.approx((50 + 50) / (50 + 100))
    assert surface_dice(half, plate, 1.0) == pytest.approx((50 + 60) / (50 + 100)), "one voxel further is 1 mm away"


@settings(max_examples=30, deadline=None)
@given(masks, masks)
def test_the_largest_distance_and_dice_are_simpleitks(prediction, reference):
    """SimpleITK measures from set to set: it gets the surfaces alone."""

    def image(mask):
        made = sitk.GetImageFromArray(mask.astype(np.uint8))
        made.SetSpacing(SPACING[::-1])
        return made

    def surface(mask):
        found = np.zeros_like(mask)
        found[tuple(slow_surface(mask).astype(int).T)] = True
        return found

    largest = sitk.HausdorffDistanceImageFilter()
    largest.Execute(image(surface(prediction)), image(surface(reference)))
    found = _surface_distances(prediction, reference, SPACING)
    assert max(map(max, found)) == pytest.approx(largest.GetHausdorffDistance(), rel=1e-5)
    overlap = sitk.LabelOverlapMeasuresImageFilter()
    overlap.Execute(image(prediction), image(reference))
    assert dice(prediction, reference) == pytest.approx(overlap.GetDiceCoefficient(1))


def test_a_shifted_box_by_hand():
    """Two voxels along the first axis, 3 mm each: 6 mm, which more than 5 % of both surfaces have."""
    reference = box((20, 20, 20), (5, 5, 5), (10, 15, 15))
    prediction = box((20, 20, 20), (7, 5, 5), (12, 15, 15))
    assert hausdorff95(prediction, reference, SPACING) == 6.0
    assert dice(prediction, reference) == pytest.approx(2 * 3 / (5 + 5))
    assert hausdorff95(reference, reference, SPACING) == 0.0


def test_one_far_voxel_in_a_hundred_does_not_count():
    reference = box((40, 20, 20), (5, 5, 5), (15, 15, 15))
    prediction = reference.copy()
    prediction[39, 19, 19] = True
    assert hausdorff95(prediction, reference, (1, 1, 1)) == 0.0
    assert max(_surface_distances(prediction, reference, (1, 1, 1))[0]) > 24


def test_masks_that_touch_the_border_have_a_surface_there():
    whole = np.ones((4, 4, 4), bool)
    assert len(_surface_distances(whole, whole, (1, 1, 1))[0]) == 4**3 - 2**3


def test_empty_masks():
    empty, full = np.zeros((3, 4, 12), bool), np.ones((3, 4, 12), bool)
    assert math.isnan(dice(empty, empty))
    assert all(math.isnan(value) for value in _surface_metrics(empty, empty, SPACING, 1.0))
    for pair in ((empty, full), (full, empty)):
        assert dice(*pair) == 0
        assert _surface_metrics(*pair, (1.0, 1.0, 1.0), 1.0) == (13.0, 0.0)  # 3, 4, 12: the diagonal


def test_of_files_in_mm(tmp_path):
    reference = box((20, 20, 20), (5, 5, 5), (10, 15, 15)) * 2
    prediction = box((20, 20, 20), (7, 5, 5), (12, 15, 15)) * 2
    for name, array in (("reference", reference), ("prediction", prediction)):
        image = sitk.GetImageFromArray(array.astype(np.uint8))
        image.SetSpacing(SPACING[::-1])
        sitk.WriteImage(image, str(tmp_path / f"{name}.nii.gz"))
    files = tmp_path / "prediction.nii.gz", tmp_path / "reference.nii.gz"
    found = case_metrics(*files, [1, 2], READER)
    nsd = surface_dice(prediction > 0, reference > 0, 1.0)
    figures = {"dice": pytest.approx(0.6), "hd95": pytest.approx(6.0), "nsd": pytest.approx(nsd)}
    assert found["2"] == {**figures, "n_ref": 500, "n_pred": 500}
    wider = case_metrics(*files, [2], READER, tolerance=6.0)["2"]
    assert nsd < wider["nsd"] == 1.0
    both = case_metrics(*files, [(1, 2)], READER)
    assert both == {"(1, 2)": found["2"]}, "a region, by its name in nnU-Net's summary.json"
    ignored = case_metrics(*files, [2], READER, ignore=0)["2"]
    assert (ignored["dice"], ignored["n_pred"]) == (pytest.approx(2 * 300 / 800), 300)
    assert math.isnan(found["1"]["dice"])
    assert math.isnan(found["1"]["hd95"])
    sitk.WriteImage(sitk.Image([20, 20, 19], sitk.sitkUInt8), str(tmp_path / "other.nii.gz"))
    with pytest.raises(ValueError, match=r"other\.nii\.gz has \(19, 20, 20\) voxels"):
        case_metrics(tmp_path / "other.nii.gz", files[1], [1], READER)


@given(st.integers(1, 50))
@settings(max_examples=10, deadline=None)
def test_swapping_the_masks_changes_nothing(seed):
    random = np.random.default_rng(seed)
    a, b = (random.random((5, 5, 5)) > 0.6 for _ in range(2))
    assert hausdorff95(a, b, SPACING) == hausdorff95(b, a, SPACING)


def test_images_are_compared_in_a_worker_with_limits(tmp_path, monkeypatch):
    paths = [tmp_path / "prediction.nii.gz", tmp_path / "reference.nii.gz"]
    for path in paths:
        sitk.WriteImage(sitk.GetImageFromArray(np.eye(5, dtype=np.uint8)[None].repeat(5, 0)), str(path))
    item = (*paths, [1], READER)
    assert [found["1"]["dice"] for found in compared([item, item])] == [1.0, 1.0]
    monkeypatch.setattr(metrics, "READ_SECONDS", 0.0)
    with pytest.raises(MiMError, match=r"cannot compare .*prediction\.nii\.gz with .* \(it takes more than 0 s\)"):
        compared([item])


def test_a_damaged_reference_is_named(tmp_path):
    paths = [tmp_path / "prediction.nii.gz", tmp_path / "reference.nii.gz"]
    for path in paths:
        sitk.WriteImage(sitk.Image([5, 5, 5], sitk.sitkUInt8), str(path))
    paths[1].write_bytes(paths[1].read_bytes()[:-10])
    with pytest.raises(MiMError, match=r"reference\.nii\.gz is damaged.*correct the reference"):
        compared([(*paths, [1], READER)])


@pytest.fixture
def organ(tmp_path):
    """A prediction as nnU-Net writes it, with the direction of its image; returns its path and its image."""
    array = box((12, 14, 16), (1, 2, 3), (7, 8, 6)).astype(np.uint8)
    image = sitk.GetImageFromArray(array)
    image.SetDirection((-1, 0, 0, 0, -1, 0, 0, 0, 1))
    sitk.WriteImage(image, str(tmp_path / "prediction.nii.gz"))
    return tmp_path / "prediction.nii.gz", image


@pytest.mark.parametrize("reader", [SimpleITKIO, SimpleITKIOWithReorient, NibabelIO, NibabelIOWithReorient])
@pytest.mark.parametrize("direction", [(1, 0, 0, 0, 1, 0, 0, 0, 1), (0, 0, 1, 1, 0, 0, 0, -1, 0)])
def test_a_reference_lies_on_its_image_whatever_its_header_says(organ, reader, direction):
    """Identity, and sagittal slices: each voxel is that of the image, as in training."""
    prediction, image = organ
    image.SetDirection(direction)
    reference = prediction.with_name("reference.nii.gz")
    sitk.WriteImage(image, str(reference))
    (found,) = compared([(prediction, reference, [1], reader())])
    assert found["1"]["dice"] == 1.0
    assert found["1"]["hd95"] == 0.0


def test_a_reference_stored_as_decimals_counts_as_whole_numbers(organ):
    prediction, image = organ
    reference = prediction.with_name("reference.nii.gz")
    sitk.WriteImage(sitk.Cast(image, sitk.sitkFloat32) * 0.999999, str(reference))
    assert case_metrics(prediction, reference, [1], READER)["1"]["dice"] == 1.0


def test_a_reference_with_values_that_no_label_has_is_refused(organ):
    prediction, image = organ
    reference = prediction.with_name("reference.nii.gz")
    says = r"values that dataset\.json does not declare \((3|0\.7)\).*correct the reference"
    for wrong, labels in ((image * 3, [1, (1, 2)]), (sitk.Cast(image, sitk.sitkFloat32) * 0.7, [1])):
        sitk.WriteImage(wrong, str(reference))
        with pytest.raises(MiMError, match=says):
            compared([(prediction, reference, labels, READER)])
    sitk.WriteImage(image * 3, str(reference))
    assert case_metrics(prediction, reference, [1], READER, ignore=3)["1"]["n_ref"] == 0
