"""Made-up bodies: the same for the same seed, organs complete, on their sides, with plausible HU."""

from __future__ import annotations

import json

import numpy as np
import pytest
import SimpleITK as sitk
from scipy.ndimage import binary_erosion, binary_fill_holes

from nnunet_mim.demo.phantoms import LABELS, make_phantom, write_phantom_dataset
from nnunet_mim.errors import MiMError

SMALL = (48, 48, 48)
HU = {"liver": (75, 120), "spleen": (80, 140), "right_kidney": (95, 190), "left_kidney": (95, 190),
      "lungs": (-900, -700), "spine": (130, 350)}  # fmt: skip
ORGANS = {name: value for name, value in LABELS.items() if value}


@pytest.fixture(scope="module")
def bodies() -> list[tuple[np.ndarray, np.ndarray]]:
    """The bodies of seeds 0 to 9 at the shape of the demonstration."""
    return [make_phantom(seed) for seed in range(10)]


def centre(labels: np.ndarray, name: str) -> np.ndarray:
    """Mean voxel (z, y, x) of an organ, as a fraction of the volume."""
    return np.argwhere(labels == LABELS[name]).mean(0) / labels.shape


def test_types_and_range(bodies: list) -> None:
    for image, labels in bodies:
        assert image.shape == labels.shape == (96, 96, 96)
        assert (image.dtype, labels.dtype) == (np.int16, np.uint8)
        assert image.min() >= -1024
        assert image.max() <= 1500


def test_same_seed_same_body_other_seed_other_body() -> None:
    first, second, other = (make_phantom(seed, SMALL) for seed in (4, 4, 5))
    for a, b in zip(first, second, strict=True):
        np.testing.assert_array_equal(a, b)
    overlap = (first[1] == 1) & (other[1] == 1)
    assert overlap.sum() < 0.95 * (first[1] == 1).sum()
    assert abs(first[0].astype(float) - other[0]).mean() > 20


def test_a_seed_gives_the_same_body_at_every_shape(bodies: list) -> None:
    fine = bodies[3][1]
    coarse = make_phantom(3, SMALL)[1]
    for organ in ORGANS.values():
        a, b = fine[::2, ::2, ::2] == organ, coarse == organ
        assert 2 * (a & b).sum() / (a.sum() + b.sum()) > 0.7


def test_every_organ_is_there(bodies: list) -> None:
    for _, labels in bodies:
        counts = np.bincount(labels.ravel(), minlength=len(LABELS))
        assert len(counts) == len(LABELS)
        assert counts.min() > 500


@pytest.mark.parametrize("shape", [SMALL, (24, 24, 24), (30, 64, 50)])
def test_every_organ_is_there_at_small_shapes(shape: tuple[int, int, int]) -> None:
    for seed in range(10):
        counts = np.bincount(make_phantom(seed, shape)[1].ravel(), minlength=len(LABELS))
        assert counts.min() >= 8, (seed, counts)


@pytest.mark.parametrize("name", HU)
def test_organ_hu(bodies: list, name: str) -> None:
    means = []
    for image, labels in bodies:
        means.append(image[binary_erosion(labels == LABELS[name])].mean())
        assert HU[name][0] < means[-1] < HU[name][1]
    assert np.ptp(means) > 5  # bodies differ


def test_air_outside_and_fat_and_muscle_inside(bodies: list) -> None:
    for image, labels in bodies:
        assert abs(image[:, :4, :4].mean() + 1000) < 15
        inside = image[(labels == 0) & (image > -300)]
        assert ((inside > -140) & (inside < -70)).mean() > 0.2  # fat
        assert ((inside > 20) & (inside < 100)).mean() > 0.2  # muscle, bowel
        assert (inside > 300).mean() > 0.005  # ribs, hip bones


def test_lungs_are_air_inside_the_body(bodies: list) -> None:
    for image, labels in bodies[:3]:
        middle = labels == LABELS["lungs"]
        body = np.stack([binary_fill_holes(plane > -300) for plane in image])
        assert body[middle].mean() > 0.99


def test_organs_are_on_their_sides(bodies: list) -> None:
    """z grows to the head, y to the back, x to the patient's left."""
    for _, labels in bodies:
        at = {name: centre(labels, name) for name in ORGANS}
        assert at["liver"][2] < 0.45 < 0.55 < at["spleen"][2]
        assert at["right_kidney"][2] < 0.45 < 0.55 < at["left_kidney"][2]
        assert abs(at["spine"][2] - 0.5) < 0.05
        assert at["spine"][1] > at["liver"][1]
        assert at["lungs"][0] > at["liver"][0] > at["right_kidney"][0]
        assert at["left_kidney"][0] > at["right_kidney"][0]


def test_too_small_a_shape_is_refused() -> None:
    with pytest.raises(MiMError, match="at least 24"):
        make_phantom(0, (8, 48, 48))


def test_dataset_is_a_standard_raw_dataset(tmp_path) -> None:
    spacing = (5.0, 4.0, 3.0)
    folder = write_phantom_dataset(tmp_path, 7, "Phantoms", 2, 1, seed=20, shape=(30, 40, 50), spacing=spacing)
    assert folder == tmp_path / "Dataset007_Phantoms"
    written = sorted(str(p.relative_to(folder)) for p in folder.rglob("*.*"))
    assert written == [
        "dataset.json",
        "imagesTr/case_0000_0000.nii.gz", "imagesTr/case_0001_0000.nii.gz", "imagesTs/case_0002_0000.nii.gz",
        "labelsTr/case_0000.nii.gz", "labelsTr/case_0001.nii.gz", "labelsTs/case_0002.nii.gz",
    ]  # fmt: skip
    description = json.loads((folder / "dataset.json").read_text())
    assert description["channel_names"] == {"0": "CT"}
    assert description["numTraining"] == 2
    assert description["file_ending"] == ".nii.gz"
    assert description["labels"] == LABELS
    image = sitk.ReadImage(str(folder / "imagesTs" / "case_0002_0000.nii.gz"))
    labels = sitk.ReadImage(str(folder / "labelsTs" / "case_0002.nii.gz"))
    for volume in (image, labels):
        assert volume.GetSpacing() == pytest.approx((3.0, 4.0, 5.0))
        assert volume.GetSize() == (50, 40, 30)
        assert volume.GetDirection() == (1, 0, 0, 0, 1, 0, 0, 0, 1)
    expected = make_phantom(22, (30, 40, 50), spacing)
    np.testing.assert_array_equal(sitk.GetArrayFromImage(image), expected[0])
    np.testing.assert_array_equal(sitk.GetArrayFromImage(labels), expected[1])


def test_an_existing_dataset_is_never_overwritten(tmp_path) -> None:
    (tmp_path / "Dataset007_Phantoms").mkdir()
    with pytest.raises(MiMError, match="exists already"):
        write_phantom_dataset(tmp_path, 7, "Phantoms", 1, 0, shape=SMALL)
    assert list((tmp_path / "Dataset007_Phantoms").iterdir()) == []


@pytest.mark.parametrize("dataset_id", [0, 1000])
def test_dataset_id_out_of_range(tmp_path, dataset_id: int) -> None:
    with pytest.raises(MiMError, match="1 to 999"):
        write_phantom_dataset(tmp_path, dataset_id, "Phantoms", 1, 0, shape=SMALL)
