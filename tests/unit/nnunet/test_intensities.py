"""Normalised voxels are what nnU-Net's own scheme makes of Hounsfield units."""

import numpy as np
import pytest
from nnunetv2.preprocessing.normalization.default_normalization_schemes import CTNormalization

from nnunet_mim.nnunet.intensities import CT_NORMALIZATION, WIDE_CT_WINDOW, Intensities

NARROW = {"percentile_00_5": -103.0, "percentile_99_5": 164.0, "mean": 40.0, "std": 50.0}


@pytest.mark.parametrize("properties", [WIDE_CT_WINDOW, NARROW])
def test_window_and_scale_are_those_of_nnunet(properties):
    intensities = Intensities((CT_NORMALIZATION,), {"0": properties})
    hounsfield = np.array([-3000.0, -103.0, 0.0, 164.0, 3000.0], np.float32)
    voxels = CTNormalization(False, properties).run(hounsfield.copy())
    std, mean = intensities.scale()
    assert intensities.normalized_window() == pytest.approx((voxels.min(), voxels.max()))
    np.testing.assert_allclose(voxels * std + mean, np.clip(hounsfield, *intensities.hounsfield_window()), atol=1e-3)


def test_a_channel_that_is_no_ct_has_no_window():
    intensities = Intensities(("ZScoreNormalization", CT_NORMALIZATION), {"1": NARROW})
    assert (intensities.is_ct(), intensities.is_ct(1)) == (False, True)
    assert intensities.scale() == (1, 0)
    assert (intensities.hounsfield_window(), intensities.normalized_window()) == (None, None)
