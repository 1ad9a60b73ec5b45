"""Leaked validation cases are noticed."""

import numpy as np

from nnunet_mim.checkpoint.identity import leak_warning, leaked_cases, merged_records, voxel_sha256


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


def test_records_of_an_earlier_run_come_first_and_once():
    a, b = ({"dataset": "D", "case": case, "sha256": case} for case in "ab")
    assert merged_records([a], [b, a]) == [a, b]
