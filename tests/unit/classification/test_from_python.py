"""`nnunet_mim.api.classify` and `report`: the commands, with settings as arguments and errors as exceptions."""

import csv

import pytest

from nnunet_mim.api import classify, report
from nnunet_mim.errors import MiMError


def test_a_probe_and_its_report(folders):
    settings = {"checkpoint": "none", "roi": "labels", "margin": 4.0}
    folder = classify(7, "lesion", device="cpu", **settings)
    assert folder == folders.results / "mim_classify__nnUNetPlans__3d_fullres" / "lesion"
    assert (folder / "probe_random" / "fold_4" / "predictions.csv").is_file()
    (folder / "report.html").unlink()
    assert report(7, ["lesion"]) == folder
    assert "probe_random" in (folder / "report.html").read_text()
    rows = list(csv.DictReader((folder / "report.csv").open()))
    assert {row["classifier"] for row in rows} >= {"probe_random", "baseline_size"}


def test_errors_are_exceptions(folders):
    with pytest.raises(MiMError, match=r"unknown setting 'rio': take one of .*roi"):
        classify(7, "lesion", device="cpu", rio="labels")
    with pytest.raises(MiMError, match="colour"):
        classify(7, "colour", device="cpu", checkpoint="none")
