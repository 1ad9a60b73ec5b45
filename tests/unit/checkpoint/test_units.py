"""Voxels and Hounsfield units."""

from __future__ import annotations

import numpy as np
import pytest

from nnunet_mim.checkpoint.units import Units

WIDE = {"percentile_00_5": -1000.0, "percentile_99_5": 1000.0, "mean": 0.0, "std": 250.0}
NARROW = {"percentile_00_5": -103.0, "percentile_99_5": 164.0, "mean": 40.0, "std": 50.0}


def test_ct() -> None:
    units = Units.of({"normalization": ["CTNormalization"], "intensity_properties": {"0": NARROW}})
    assert units.name == "HU"
    assert units.scale() == (50, 40)
    assert units.hounsfield_window() == (-103, 164)
    assert units.window(0, np.zeros(3)) == pytest.approx((-2.86, 2.48))


def test_grey_scale_lies_within_what_the_window_keeps() -> None:
    voxels = np.zeros((4, 4, 4))
    assert Units(("CTNormalization",), {"0": WIDE}).grey(voxels) == (-450, 350)
    assert Units(("CTNormalization",), {"0": NARROW}).grey(voxels) == (-103, 164)
    lung = {**WIDE, "percentile_99_5": -600.0}
    assert Units(("CTNormalization",), {"0": lung}).grey(voxels) == (-1000, -600)


def test_other_modalities() -> None:
    units = Units(("ZScoreNormalization", "CTNormalization"), {"0": WIDE, "1": WIDE})
    assert (units.is_ct(), units.is_ct(1)) == (False, True)
    assert units.scale() == (1, 0)
    assert units.window(0, np.array([-3.0, 7.0])) == (-3, 7)
    assert units.window(1, np.array([-3.0, 7.0])) == (-4, 4)
    low, high = units.grey(np.full((4, 4, 4), 2.0))
    assert low < high
