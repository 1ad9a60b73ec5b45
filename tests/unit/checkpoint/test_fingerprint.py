"""Copies of a CT are told by their fingerprints, other patients are not taken for copies."""

import math

import numpy as np
import pytest
import SimpleITK as sitk
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.ndimage import zoom
from scipy.special import eval_hermite

from nnunet_mim.checkpoint import fingerprint as module
from nnunet_mim.checkpoint.fingerprint import (
    FINGERPRINT_SHAPE,
    SCALE,
    SHIFTS_HU,
    copied_from,
    fingerprint,
    fingerprints_of_copy,
    from_text,
    most_similar,
    to_text,
)  # fmt: skip
from nnunet_mim.demo.phantoms import make_phantom
from nnunet_mim.nnunet.intensities import Intensities

WIDE, STOCK, LIVER = (-1000.0, 1000.0), (-103.0, 164.0), (-17.0, 201.0)
"""CT windows (HU)"""


def of(hounsfield, spacing=(4.5, 4.5, 4.5), window=WIDE, made_by=fingerprint):
    """Fingerprint of an image in a CT window."""
    low, high = window
    properties = {"percentile_00_5": low, "percentile_99_5": high, "mean": 40.0, "std": 120.0}
    voxels = (np.asarray(hounsfield, np.float32)[None].clip(low, high) - 40) / 120
    return made_by(voxels, Intensities(("CTNormalization",), {"0": properties}), spacing)


def copies_of(*image):
    return of(*image, made_by=fingerprints_of_copy)


def probably_same(a, b):
    return most_similar(a[None], b[None]).tolist() == [0]


@pytest.fixture(scope="module")
def bodies():
    return [make_phantom(seed, (64, 60, 56))[0].astype(np.float32) for seed in range(4)]


@pytest.fixture(scope="module")
def real(shared_data):
    """Three CT of the head and neck: voxels and mm."""
    images = [
        sitk.ReadImage(str(path))
        for path in sorted((shared_data / "nnUNet_raw/Dataset501_HeadNeckOAR/imagesTr").glob("*.nii.gz"))[:3]
    ]
    return [(sitk.GetArrayFromImage(i).astype(np.float32), np.array(i.GetSpacing()[::-1])) for i in images]


def test_coefficients_are_those_of_hermite_functions_written_out():
    tissue = np.random.default_rng(0).random((5, 6, 7))
    axes = []
    for axis in range(3):
        weights = tissue.sum(axis=tuple({0, 1, 2} - {axis}))
        places = np.arange(len(weights))
        mean = (places * weights).sum() / weights.sum()
        axes.append(SCALE * (places - mean) / np.sqrt(((places - mean) ** 2 * weights).sum() / weights.sum()))
    for degrees, found in zip(module._DEGREES.tolist(), module._expansion(tissue), strict=True):
        functions = [
            eval_hermite(n, x) * np.exp(-(x**2) / 2) / math.sqrt(2.0**n * math.factorial(n) * math.sqrt(math.pi))
            for n, x in zip(degrees, axes, strict=True)
        ]
        assert found == pytest.approx(np.einsum("xyz,x,y,z", tissue, *functions), abs=1e-4)


@pytest.mark.parametrize(("matrix", "times_x"), [(0, False), (1, True)])
def test_shifts_and_stretches_are_derivatives(matrix, times_x):
    coefficients = np.zeros(module.DEGREE + 1)
    coefficients[:9] = np.random.default_rng(0).normal(size=9)  # what has a degree above DEGREE would be cut off
    x, step = np.linspace(-3, 3, 31), 1e-5
    slope = coefficients @ (module._hermite_functions(x + step) - module._hermite_functions(x - step)) / (2 * step)
    changed = module._CHANGES[matrix] @ coefficients @ module._hermite_functions(x)
    np.testing.assert_allclose(changed, slope * x if times_x else slope, atol=1e-6)


@settings(max_examples=20)
@given(
    order=st.permutations(range(3)), mirrored=st.sets(st.integers(0, 2)),
    padding=st.lists(st.tuples(st.integers(0, 9), st.integers(0, 9)), min_size=3, max_size=3),
    crop=st.lists(st.integers(0, 1), min_size=3, max_size=3), noise=st.floats(0, 1), offset=st.integers(-10, 10),
)  # fmt: skip
def test_a_copy_is_found_however_it_was_changed(bodies, order, mirrored, padding, crop, noise, offset):
    changed = bodies[0][tuple(slice(n, None) for n in crop)] + offset
    changed = np.pad(changed, padding, constant_values=-1024).transpose(order)
    changed = np.flip(changed, tuple(mirrored))
    changed = changed + noise * np.random.default_rng(0).normal(size=changed.shape)
    originals = np.array([of(body) for body in bodies])
    for window in (WIDE, STOCK, LIVER):
        assert most_similar(of(changed, window=window)[None], originals).tolist() == [0]


@given(order=st.permutations(range(3)), mirrored=st.sets(st.integers(0, 2)))
@settings(max_examples=10)
def test_turning_an_image_turns_its_coefficients_only(bodies, order, mirrored):
    """Similarity with the turned image is that with itself, but for the rounding to int8."""
    turned = of(np.flip(bodies[1].transpose(order), tuple(mirrored)))
    for a, b in zip(of(bodies[1]), turned, strict=True):
        assert np.sort(np.abs(a.astype(int))) == pytest.approx(np.sort(np.abs(b.astype(int))), abs=1)


@pytest.mark.parametrize("window", [WIDE, STOCK, LIVER])
def test_real_images_are_found_again_and_told_apart(real, window):
    known = np.array([of(*image) for image in real])
    for number, (voxels, mm) in enumerate(real):
        coarse = zoom(voxels, mm / 5, order=1, grid_mode=True, mode="nearest")
        for changed in (voxels[::-1], voxels[2:, 2:, 2:], voxels[:-1], np.round(voxels, -1), coarse, voxels + 10):
            assert most_similar(of(changed, mm, window)[None], known).tolist() == [number]
        others = np.delete(known, number, axis=0)
        assert most_similar(of(voxels, mm, window)[None], others).tolist() == [-1]


def test_made_up_bodies_are_told_apart(bodies):
    known = np.array([of(body) for body in bodies])
    assert most_similar(known, known, only_earlier=True).tolist() == [-1] * len(bodies)
    twice = np.concatenate([known, known[[2]]])
    assert most_similar(twice, twice, only_earlier=True).tolist() == [-1] * len(bodies) + [2]


@pytest.mark.parametrize(("window", "measures"), [(WIDE, [1, 1]), (LIVER, [0, 1]), ((20.0, 300.0), [0, 0])])
def test_a_window_decides_what_can_be_measured(bodies, window, measures):
    assert of(bodies[0], window=window).any(axis=1).tolist() == [bool(m) for m in measures]


@pytest.mark.parametrize(
    "image",
    [np.full((64, 64, 64), -1000.0), np.full((64, 64, 64), np.nan), np.eye(64)[None].repeat(10, axis=0) * 100],
    ids=["air", "not finite", "45 mm"],
)
def test_what_cannot_be_compared_has_no_fingerprint_and_is_like_nothing(image):
    rows = of(image)
    assert rows.shape == FINGERPRINT_SHAPE
    assert not rows.any()
    assert not probably_same(rows, rows)


def test_other_modalities_have_no_fingerprint(bodies):
    assert not fingerprint(bodies[0][None], Intensities(("ZScoreNormalization",), {}), (4.5, 4.5, 4.5)).any()


def test_one_plane_of_tissue_has_no_fingerprint():
    image = np.full((40, 40, 40), -1000.0)
    image[20] = 50
    assert not of(image).any()


def test_text_and_back(bodies):
    rows = of(bodies[0])
    assert np.array_equal(from_text(to_text(rows)), rows)
    assert len(to_text(rows)) < 1300
    assert to_text(np.zeros_like(rows)) == ""
    for text in ("", None, "no base64!", "AAAA", "ä"):
        assert not from_text(text).any()


@pytest.mark.parametrize("shift", [-32, 24])
def test_shifted_hu_are_found_in_a_narrow_window_too(real, shift):
    """They are looked for where the first measure is lacking on one side, and without them one such copy is missed."""
    coarse = [zoom(voxels, mm / 5, order=1, grid_mode=True, mode="nearest") for voxels, mm in real]
    known = np.array([of(voxels, (5.0, 5.0, 5.0)) for voxels in coarse])
    for number, (voxels, mm) in enumerate(real):
        rows = copies_of(voxels + shift, mm, LIVER)
        assert rows.shape == (1 + len(SHIFTS_HU), *FINGERPRINT_SHAPE)
        assert (rows[0] == of(voxels + shift, mm, LIVER)).all()
        assert copied_from(rows[None], known).tolist() == [number]
        assert copied_from(copies_of(voxels, mm, LIVER)[None], np.delete(known, number, axis=0)).tolist() == [-1]
    alone = np.array([of(voxels + shift, mm, LIVER) for voxels, mm in real])
    assert -1 in most_similar(alone, known), "all would be found without them"


def test_shifts_do_not_count_where_both_images_have_the_first_measure(bodies):
    rows = copies_of(bodies[0])
    assert rows[:, 0].any(axis=1).all()
    assert (rows[:, 0] == rows[0, 0]).all()
    assert (rows[1:, 1] != rows[0, 1]).any(axis=1).all()
    elsewhere = rows.copy()
    elsewhere[:, 0] = of(bodies[1])[0]
    known = of(bodies[0])[None]
    assert copied_from(rows[None], known).tolist() == [0]
    assert copied_from(elsewhere[None], known).tolist() == [-1], "the second measure has decided"


def test_nothing_is_like_nothing_with_shifts(bodies):
    empty = copies_of(np.full((64, 64, 64), -1000.0))
    assert not empty.any()
    assert copied_from(empty[None], np.array([of(body) for body in bodies])).tolist() == [-1]
    assert copied_from(copies_of(bodies[0])[None], np.zeros((0, *FINGERPRINT_SHAPE), np.int8)).tolist() == [-1]
