"""Slices with contours: which cases, which slice, which way up."""

import json
import os
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import SimpleITK as sitk

from nnunet_mim.benchmarking import bench_figures
from nnunet_mim.benchmarking.bench_figures import _around, case_pictures, cases_figure
from nnunet_mim.benchmarking.bench_file import ArmSpec, Bench, DatasetSpec
from nnunet_mim.benchmarking.cell import Arm, Cell
from nnunet_mim.benchmarking.matrix import Matrix, Place
from nnunet_mim.benchmarking.outcome import Outcome

DATASET = "Dataset001_X"
SPECS = (ArmSpec("A", "nnUNetTrainer", "P"), ArmSpec("B", "nnUNetTrainer", "Q"))
DICE = {"c0": 0.9, "c1": 0.1, "c2": 0.5, "c3": float("nan"), "c4": 0.7}


def write(path, array, turned=False):
    """(z, y, x) to head, back, left; or the same volume stored the other way round."""
    path.parent.mkdir(parents=True, exist_ok=True)
    image = sitk.GetImageFromArray(array)
    image.SetSpacing((2.0, 3.0, 5.0))
    sitk.WriteImage(sitk.DICOMOrient(image, "RAS") if turned else image, str(path))


@pytest.fixture
def outcome(tmp_path, monkeypatch):
    """Five cases of two arms: a CT that rises along z, y and x, a label in the corner, and predictions of it."""
    monkeypatch.setenv("nnUNet_raw", str(tmp_path / "raw"))
    raw = tmp_path / "raw" / DATASET
    base = tmp_path / "preprocessed" / DATASET
    z, y, x = np.meshgrid(*map(np.arange, (6, 40, 50)), indexing="ij")
    ct = (z * 100 + y * 2 + x).astype(np.int16)
    label = ((z == 4) & (y < 10) & (x < 8) | (z == 2) & (y < 3) & (x < 3)).astype(np.uint8)
    bench = Bench((DatasetSpec(DATASET),), SPECS, output=tmp_path / "out")
    source = SimpleNamespace(dataset=DATASET, plans_name="P", configuration="3d", folder=base / "P_3d")
    cells = {
        Place(DATASET, 0, "all", 0, spec.name): Cell(
            Arm(spec, source), 0, ("t",), tuple(DICE), 0, bench.length
        )
        for spec in SPECS
    }  # fmt: skip
    matrix = Matrix(bench, cells, "A")
    for number, case in enumerate(DICE):
        turned = number % 2 == 1
        write(raw / "imagesTr" / f"{case}_0000.nii.gz", ct, turned)
        write(raw / "labelsTr" / f"{case}.nii.gz", label, turned)
        write(base / "gt_segmentations" / f"{case}.nii.gz", label, turned)
        for place in cells:
            predicted = matrix.training(place).output / "validation" / f"{case}.nii.gz"
            write(predicted, label * (place.arm == "A"), turned)
    content = {
        "labels": {"background": 0, "x": 1},
        "channel_names": {"0": "CT"},
        "numTraining": 5,
        "file_ending": ".nii.gz",
    }
    for folder in (raw, base):
        (folder / "dataset.json").write_text(json.dumps(content))
    results = {
        place: {"cases": {case: {"1": {"dice": dice, "n_ref": 1, "n_pred": 1}} for case, dice in DICE.items()}}
        for place in cells
    }  # fmt: skip
    return Outcome(matrix, results, {})


def test_worst_median_and_best_case_upright(outcome):
    """Case c1 is stored with its axes turned and looks like the others: the label at the patient's front right."""
    pictures = case_pictures(outcome, DATASET, {1})
    assert [(p.title, p.name) for p in pictures] == [("worst", "c1"), ("median", "c4"), ("best", "c0")]
    for picture in pictures:
        assert picture.spacing == (3.0, 2.0)
        assert picture.ct[0, 0] == 400, "slice 4 has most of the label"
        assert picture.ct[3, 5] == 400 + 3 * 2 + 5, "y to the back, x to the left"
        assert picture.reference.sum() == 80
        assert picture.reference[:10, :8].all()
        assert (picture.predictions["A"] == picture.reference).all()
        assert not picture.predictions["B"].any()
        assert picture.ct.shape == (10 + 10, 8 + 15), "30 mm around the label, as far as there is image"
    figure = cases_figure(pictures, {1: "x"})
    assert len(figure.axes) == 6
    assert figure.axes[0].get_title() == "A: 10.0 %"
    assert "worst: c1, Dice A 10.0 %" in figure.get_label()
    for axes in figure.axes:
        right, left = sorted(axes.texts, key=lambda text: text.get_position()[0])
        assert (right.get_text(), left.get_text()) == ("R", "L"), "the label at the patient's right is on the left"


def test_no_pictures_without_images_or_results(outcome, monkeypatch, tmp_path):
    assert case_pictures(Outcome(outcome.matrix, {}, {}), DATASET, {1}) == []
    monkeypatch.setenv("nnUNet_raw", str(tmp_path / "nowhere"))
    assert case_pictures(outcome, DATASET, {1}) == []


def test_a_prediction_that_is_gone_costs_its_picture_only(outcome, capsys):
    place = next(iter(outcome.matrix.cells))
    (outcome.matrix.training(place).output / "validation" / "c1.nii.gz").unlink()
    assert [p.name for p in case_pictures(outcome, DATASET, {1})] == ["c4", "c0"]
    assert "note: no picture of c1" in capsys.readouterr().out


def test_labels_that_are_not_shown_do_not_choose_the_slice(outcome):
    """As an ignore label: the slice is the one in the middle."""
    assert case_pictures(outcome, DATASET, {2})[0].ct[0, 0] == 300


def test_a_window_around_nothing_is_everything():
    assert _around(np.zeros((5, 6), bool), (1.0, 1.0)) == (slice(None), slice(None))


def test_an_image_that_takes_too_long_costs_its_picture_only(outcome, capsys, monkeypatch):
    monkeypatch.setattr(bench_figures, "READ_SECONDS", 0.0)
    assert case_pictures(outcome, DATASET, {1}) == []
    assert "note: no picture of c1 (it takes more than 0 s)" in capsys.readouterr().out


def test_a_damaged_image_is_named(outcome, capsys):
    image = next(Path(os.environ["nnUNet_raw"], DATASET, "imagesTr").glob("c1_0000.*"))
    image.write_bytes(image.read_bytes()[:-20])
    assert [p.name for p in case_pictures(outcome, DATASET, {1})] == ["c4", "c0"]
    assert f"{image} damaged" in capsys.readouterr().out
