"""Voxels and Hounsfield units; different units of two stages are noticed."""

from __future__ import annotations

import re

import numpy as np
import pytest

from nnunet_mim.checkpoint.units import Units, unit_differences

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


WINDOW = {"percentile_00_5": -1000, "percentile_99_5": 1000, "mean": 0, "std": 250}
PROVENANCE = {"spacing": [2.0, 1.0, 1.0], "normalization": ["CTNormalization"], "intensity_properties": {"0": WINDOW}}
CONFIG = {"spacing": [2.0, 1.0, 1.0], "normalization_schemes": ["CTNormalization"]}


@pytest.mark.parametrize(
    ("config", "window", "expected"),
    [
        ({}, {}, None),
        ({"spacing": [2.01, 1.0, 1.0]}, {}, None),
        ({"spacing": [3.0, 1.0, 1.0]}, {}, "spacing"),
        ({}, {"percentile_00_5": -103.0}, "-1000…1000 HU .* now CT window -103…1000 HU"),
        ({"normalization_schemes": ["ZScoreNormalization"]}, {}, "pretrained with CTNormalization, now ZScore"),
        ({"normalization_schemes": ["CTNormalization"] * 2}, {}, None),
    ],
)
def test_units(config, window, expected):
    intensity = {str(c): {**WINDOW, **window} for c in range(2)}
    differences = unit_differences(PROVENANCE, {**CONFIG, **config}, intensity)
    if expected is None:
        assert differences == []
    else:
        assert len(differences) == 1
        assert re.search(expected, differences[0])


def test_units_of_a_checkpoint_that_says_nothing():
    assert unit_differences({}, CONFIG, {"0": WINDOW}) == []
