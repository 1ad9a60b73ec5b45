"""Leaked validation cases are noticed."""

import numpy as np
import pytest

from nnunet_mim.checkpoint.fingerprint import fingerprint, to_text
from nnunet_mim.checkpoint.identity import (
    LeakedCases,
    comparison_note,
    leak_warning,
    leaked_cases,
    merged_records,
    voxel_sha256,
)  # fmt: skip
from nnunet_mim.demo.phantoms import make_phantom
from nnunet_mim.nnunet.intensities import Intensities

WINDOW = {"percentile_00_5": -1000.0, "percentile_99_5": 1000.0, "mean": 0.0, "std": 250.0}
UNITS = Intensities(("CTNormalization",), {"0": WINDOW}), (4.5, 4.5, 4.5)


def never(case):
    raise AssertionError(f"{case} should not have been read")


def test_the_same_name_in_the_same_dataset_is_enough():
    provenance = {"cases": [{"dataset": "Dataset007_Toy", "case": "a", "sha256": ""}]}
    assert leaked_cases(provenance, "Dataset007_Toy", ["a", "b"], never, *UNITS) == LeakedCases(("a",))
    assert not leaked_cases(provenance, "Dataset008_Other", ["a", "b"], never, *UNITS)


def test_the_same_voxels_under_another_name():
    images = {"x": np.ones((1, 2, 3, 4), np.float32), "y": np.zeros((1, 2, 3, 4), np.float32)}
    provenance = {"cases": [{"dataset": "Dataset800_Pool", "case": "patient", "sha256": voxel_sha256(images["y"])}]}
    assert leaked_cases(provenance, "Dataset007_Toy", ["x", "y"], images.get, *UNITS) == LeakedCases(("y",))


@pytest.fixture(scope="module")
def bodies():
    """Three bodies, preprocessed."""
    return [make_phantom(seed, (64, 64, 64))[0][None].clip(-1000, 1000) / np.float32(250) for seed in range(3)]


@pytest.mark.parametrize(("name", "like"), [("patient", "patient"), ("", "(name left out)")])
def test_other_voxels_of_the_same_image(bodies, name, like):
    """As of an export, too, which leaves names out."""
    record = {"dataset": "Dataset800_Pool", "case": name, "sha256": voxel_sha256(bodies[0])}
    provenance = {"cases": [record | {"fingerprint": to_text(fingerprint(bodies[0], *UNITS))}]}
    images = {
        "mirrored": bodies[0][:, ::-1], "exact": bodies[0], "other": bodies[1], "small": bodies[2][:, :9],
    }  # fmt: skip
    found = leaked_cases(provenance, "Dataset007_Toy", list(images), images.get, *UNITS)
    assert found == LeakedCases(("exact",), {"mirrored": f"Dataset800_Pool {like}"}, ("small",))


def test_no_provenance_no_reading():
    assert not leaked_cases({}, "Dataset007_Toy", ["x"], never, *UNITS)


def test_the_warning_is_loud():
    warning = leak_warning(LeakedCases(tuple(f"c{i}" for i in range(12))), 13, "ckpt.pth")
    assert "WARNING: 12 of 13 validation cases" in warning
    assert "and 2 more" in warning
    assert "look like" not in warning


def test_the_warning_says_which_case_is_like_which():
    warning = leak_warning(LeakedCases((), {"a": "Dataset800_Pool b"}), 13, "ckpt.pth")
    assert "WARNING: 1 of 13 validation cases of this fold look like cases that were PRETRAINED ON" in warning
    assert "a is probably the same as Dataset800_Pool b." in warning
    assert "WARNING: 0" not in warning


def test_what_could_not_be_compared_is_counted():
    old, new = {"sha256": "0"}, {"sha256": "1", "fingerprint": "AA=="}
    assert comparison_note([], []) == ""
    assert comparison_note([new], []) == ""
    assert comparison_note([old, old], []).startswith("no case of the pretraining has a fingerprint, so only exact")
    assert comparison_note([old, new], ["x", "y"]) == (
        "1 of the 2 cases of the pretraining and 2 validation cases (x first) have no fingerprint: of these only exact "
        "copies were looked for"
    )


def test_records_of_an_earlier_run_come_first_and_once():
    a, b = ({"dataset": "D", "case": case, "sha256": case} for case in "ab")
    assert merged_records([a], [b, a]) == [a, b]


def test_a_run_that_goes_on_adds_the_fingerprints_of_its_cases():
    old = {"dataset": "D", "case": "a", "sha256": "a"}
    assert merged_records([old], [old | {"fingerprint": "x"}]) == [old | {"fingerprint": "x"}]
