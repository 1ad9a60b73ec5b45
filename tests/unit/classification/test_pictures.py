"""Slices of cases and maps of what a network rests on, in the report."""

from types import SimpleNamespace

import numpy as np
import pytest

from nnunet_mim.classification import cli, pictures
from nnunet_mim.classification.regions import CaseReader
from nnunet_mim.reporting.classifiers import CasePicture, cases_figure


@pytest.fixture
def asked(monkeypatch):
    """Networks that rest on the mask; which fold was asked about which case."""
    found = []

    def load(folder, folds, device):
        (fold,) = folds

        def saliency(case):
            found.append((case.name, fold, folder.name, device))
            values = np.where(case.mask, 4.0, -1.0).astype(np.float32)
            return {"lesion": values, "other": -values}

        return SimpleNamespace(config=SimpleNamespace(roi="labels"), saliency=saliency)

    monkeypatch.setattr(pictures, "load_classifier", load)
    return found


def test_maps_lie_on_their_slices(source, asked, tmp_path):
    titles, folds = {"case_02": "two", "case_05": "five"}, {"case_02": 1, "case_05": 0, "case_07": 2}
    made = pictures.saliency_pictures(source, tmp_path / "finetune", "lesion", titles, folds, "cpu")
    assert asked == [("case_02", "1", "finetune", "cpu"), ("case_05", "0", "finetune", "cpu")]
    for picture, plain in zip(made, pictures.pictures_of(source, "labels", titles), strict=True):
        assert picture.title == plain.title
        np.testing.assert_array_equal(picture.image, plain.image)
        np.testing.assert_array_equal(picture.saliency, np.where(plain.mask, 1.0, -0.25))
        assert plain.mask.any()
        assert plain.saliency is None
        read = CaseReader(source, "labels").read("case_02" if picture.title == "two" else "case_05")
        assert plain.mask.sum() == read.mask.sum(axis=(0, 2)).max(), "the plans have the axial slices on axis 1"


def test_a_map_is_drawn_below_its_slice():
    image, mask = np.zeros((6, 8)), np.zeros((6, 8), bool)
    mask[2:4, 2:4] = True
    saliency = np.where(mask, 0.81, -0.25)
    plain = [CasePicture(f"case {i}", image, mask, (1.0, 1.0, 1.0)) for i in range(5)]
    with_maps = [CasePicture(each.title, image, mask, each.spacing, saliency) for each in plain]
    assert len(cases_figure(plain, (-1000, 400)).axes) == 8
    figure = cases_figure(with_maps, (-1000, 400))
    assert len(figure.axes) == 16, "two rows for each four cases"
    titles = [axes.get_title() for axes in figure.axes]
    assert titles[:4] == [f"case {i}" for i in range(4)]
    assert titles[8] == "case 4"
    drawn = figure.axes[4].images[1]
    np.testing.assert_array_equal(drawn.get_array(), saliency)
    np.testing.assert_array_equal(drawn.get_alpha(), np.where(mask, 0.81, 0.25))
    assert drawn.get_clim() == (-1, 1)
    assert "what the network rests on" in figure.get_label()
    assert "what the network rests on" not in cases_figure(plain, (-1000, 400)).get_label()


def test_a_probe_has_no_maps(folders, capsys):
    train = ("train", "-d", "7", "--target", "lesion", "-device", "cpu", "-pc", "none", "--roi", "labels")
    assert cli.main([*train, "--folds", "3", "--no-baselines"]) == 0
    capsys.readouterr()
    assert cli.main(["report", "-d", "7", "--target", "lesion", "--saliency", "-device", "cpu"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "has no trained network, and a probe has no gradients: leave it out, or run mim_classify train" in line
