"""Arrays are turned as SimpleITK turns images."""

from __future__ import annotations

from itertools import permutations, product

import numpy as np
import pytest
import SimpleITK as sitk

from nnunet_mim.nnunet.orientation import Orientation, direction_of, orientation_of

FORWARD = [(0, 1, 2), (1, 0, 2), (2, 0, 1)]


def turned_by_sitk(image: sitk.Image) -> np.ndarray:
    """(z, y, x), to head, back and left."""
    return sitk.GetArrayFromImage(sitk.DICOMOrient(image, "LPS"))


@pytest.mark.parametrize("forward", FORWARD)
def test_all_directions_and_orders_of_axes(forward) -> None:
    volume = np.random.default_rng(0).normal(size=(4, 5, 6))
    for axes, signs in product(permutations(range(3)), product((1, -1), repeat=3)):
        direction = np.eye(3)[:, axes] * signs
        image = sitk.GetImageFromArray(volume)
        image.SetDirection(direction.flatten().tolist())
        turn = orientation_of(forward, direction)
        preprocessed = volume.transpose(forward)
        np.testing.assert_array_equal(turn.array(preprocessed), turned_by_sitk(image))
        assert turn.triple(preprocessed.shape) == turned_by_sitk(image).shape


def test_oblique_directions_are_turned_to_the_nearest() -> None:
    angle = np.deg2rad(20)
    turn = np.array([[np.cos(angle), -np.sin(angle), 0], [np.sin(angle), np.cos(angle), 0], [0, 0, 1]])
    assert orientation_of((0, 1, 2), turn) == Orientation()
    assert orientation_of((0, 1, 2), turn @ np.diag([-1, -1, 1])) == Orientation((0, 1, 2), (False, True, True))


def test_boxes_turn_with_their_arrays() -> None:
    volume = np.random.default_rng(0).normal(size=(4, 6, 8))
    box = (slice(0, 2), slice(1, 3), slice(5, 8))
    turn = Orientation((2, 0, 1), (True, False, True))
    np.testing.assert_array_equal(turn.array(volume)[turn.box(box, volume.shape)], turn.array(volume[box]))


def test_directions_from_what_nnunets_readers_keep() -> None:
    direction = np.diag([-1.0, -1.0, 1.0])
    np.testing.assert_array_equal(direction_of({"sitk_stuff": {"direction": tuple(direction.flatten())}}), direction)
    affine = np.diag([3.0, 2.0, 1.0, 1.0])  # NIfTI: to right, anterior, superior
    np.testing.assert_array_equal(direction_of({"nibabel_stuff": {"original_affine": affine}}), direction)
    assert direction_of({"spacing": (1, 1, 1)}) is None
    assert direction_of({"sitk_stuff": {"direction": (1, 0, 0, 1)}}) is None
    assert orientation_of(()) == Orientation()
