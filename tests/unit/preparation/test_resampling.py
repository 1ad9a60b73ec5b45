"""Lean resampling against nnU-Net's own."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from nnunetv2.preprocessing.resampling.default_resampling import compute_new_shape, resample_data_or_seg_to_shape

from nnunet_mim.preparation.resampling import (
    LeanConfiguration,
    _resample_image,
    _resample_labels,
    _resample_outside,
    _spline_matrix,
)

SPACING = st.tuples(*[st.floats(0.4, 6.0)] * 3)


@settings(max_examples=40)
@given(st.tuples(*[st.integers(1, 14)] * 3), SPACING, SPACING, st.integers(0, 99))
def test_equal_to_nnunets(shape, spacing, new_spacing, seed):
    """Isotropic or not, larger and smaller; nnU-Net resamples thick slices one by one."""
    image = np.random.default_rng(seed).uniform(-4, 4, (2, *shape)).astype(np.float32)
    new_shape = np.maximum(compute_new_shape(shape, spacing, new_spacing), 1)
    expected = resample_data_or_seg_to_shape(image.copy(), new_shape, spacing, new_spacing, False, 3, 0, None)
    found = _resample_image(image, new_shape, spacing, new_spacing)
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, expected, atol=1e-5)


@pytest.mark.parametrize("spacing", [(1, 1, 1), (5, 1, 1), (1, 5, 1), (1, 1, 5)])
def test_each_thick_axis(spacing):
    image = np.random.default_rng(0).normal(size=(1, 9, 11, 10)).astype(np.float32)
    shape = compute_new_shape(image.shape[1:], spacing, (1.5, 1.5, 1.5))
    expected = resample_data_or_seg_to_shape(image.copy(), shape, spacing, (1.5, 1.5, 1.5), False, 3, 0, None)
    np.testing.assert_allclose(_resample_image(image, shape, spacing, (1.5, 1.5, 1.5)), expected, atol=1e-5)


def test_the_input_is_left_alone_and_an_equal_shape_costs_nothing():
    image = np.random.default_rng(0).normal(size=(1, 6, 7, 8)).astype(np.float32)
    before = image.copy()
    _resample_image(image, (3, 9, 8), (1, 1, 1), (2, 0.8, 1))
    assert np.array_equal(image, before)
    assert _resample_image(image, (6, 7, 8), (1, 1, 1), (1, 1, 1)) is image


def test_columns_sum_to_one():
    """A constant stays constant."""
    for old, new in ((5, 9), (9, 5), (1, 4), (40, 13)):
        assert _spline_matrix(old, new).sum(axis=1) == pytest.approx(1, abs=1e-5)


@settings(max_examples=40)
@given(
    st.tuples(*[st.integers(1, 24)] * 3),
    st.tuples(*[st.integers(1, 40)] * 3),
    st.floats(0.05, 0.95),
    st.integers(0, 99),
)
def test_the_mask_of_what_is_outside_equals_nnunets(shape, new_shape, share, seed):
    """But where the interpolated mask is one half, up to rounding: there either answer is right."""
    seg = -(np.random.default_rng(seed).random((1, *shape)) < share).astype(np.int8)
    spacings = (1, 1, 1), (1, 1, 1)
    expected = resample_data_or_seg_to_shape(seg, new_shape, *spacings, True, 1, 0, None)
    found = _resample_outside(seg, new_shape)
    assert found.dtype == np.int8
    mask = resample_data_or_seg_to_shape(-seg.astype(float), new_shape, *spacings, False, 1, 0, None)
    clear = np.abs(mask - 0.5) > 1e-9
    assert np.array_equal(found[clear], expected[clear])


@settings(max_examples=40, deadline=None)
@given(
    st.tuples(*[st.integers(1, 12)] * 3), st.tuples(*[st.integers(1, 20)] * 3), st.integers(1, 5), st.integers(0, 99)
)
def test_labels_equal_nnunets(shape, new_shape, n_labels, seed):
    seg = np.random.default_rng(seed).integers(-1, n_labels + 1, (1, *shape)).astype(np.int16)
    seg[0, 0, 0, 0] = n_labels
    spacings = (1, 1, 1), (1, 1, 1)
    expected = resample_data_or_seg_to_shape(seg.astype(np.float32), new_shape, *spacings, True, 1, 0, None)
    for found in (_resample_labels(seg, new_shape), configuration().resampling_fn_seg(seg, new_shape, *spacings)):
        assert found.dtype == np.int16
        assert np.array_equal(found, expected)


def configuration(**changes):
    kwargs = {"order": 3, "order_z": 0, "force_separate_z": None}
    return LeanConfiguration(
        {
            "architecture": {},
            "resampling_fn_data": "resample_data_or_seg_to_shape",
            "resampling_fn_data_kwargs": {"is_seg": False, **kwargs, **changes},
            "resampling_fn_seg": "resample_data_or_seg_to_shape",
            "resampling_fn_seg_kwargs": {"is_seg": True, **kwargs, "order": 1},
        }
    )


def test_other_resampling_of_the_plans_is_kept():
    assert configuration().resampling_fn_data is _resample_image
    assert configuration(order=1).resampling_fn_data.keywords["order"] == 1


def test_segmentations_are_nnunets():
    seg = np.zeros((1, 8, 8, 8), np.int8)
    lean = configuration().resampling_fn_seg
    arguments = (10, 10, 10), (1, 1, 1), (0.8, 0.8, 0.8)
    assert np.array_equal(lean(seg - 1, *arguments), np.full((1, 10, 10, 10), -1))
    seg[0, 2:5, 3:7, 1:6] = 2
    expected = resample_data_or_seg_to_shape(seg, *arguments, True, 1, 0, None)
    assert np.array_equal(lean(seg, *arguments), expected)
