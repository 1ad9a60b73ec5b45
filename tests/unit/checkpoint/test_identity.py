"""Leaked validation cases and different units are noticed."""

import re

import numpy as np
import pytest

from nnunet_mim.checkpoint.identity import leak_warning, leaked_cases, unit_differences, voxel_sha256


def never(case):
    raise AssertionError(f"{case} should not have been read")


def test_the_same_name_in_the_same_dataset_is_enough():
    provenance = {"cases": [{"dataset": "Dataset007_Toy", "case": "a", "sha256": ""}]}
    assert leaked_cases(provenance, "Dataset007_Toy", ["a", "b"], never) == ["a"]
    assert leaked_cases(provenance, "Dataset008_Other", ["a", "b"], never) == []


def test_the_same_voxels_under_another_name():
    images = {"x": np.ones((1, 2, 3, 4), np.float32), "y": np.zeros((1, 2, 3, 4), np.float32)}
    provenance = {"cases": [{"dataset": "Dataset800_Pool", "case": "patient", "sha256": voxel_sha256(images["y"])}]}
    assert leaked_cases(provenance, "Dataset007_Toy", ["x", "y"], images.get) == ["y"]


def test_no_provenance_no_reading():
    assert leaked_cases({}, "Dataset007_Toy", ["x"], never) == []


def test_the_warning_is_loud():
    warning = leak_warning([f"c{i}" for i in range(12)], 13, "ckpt.pth")
    assert "WARNING: 12 of 13 validation cases" in warning
    assert "and 2 more" in warning


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
