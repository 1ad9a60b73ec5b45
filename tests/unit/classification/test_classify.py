"""mim_classify from labels to predictions, on made-up lesions."""

import csv
import json
import shutil

import numpy as np
import pytest
from sklearn.metrics import roc_auc_score

from nnunet_mim.classification import cli
from nnunet_mim.classification.job import set_up
from nnunet_mim.classification.options import ClassifyConfig, DataOptions
from nnunet_mim.classification.results import joined, read_predictions
from nnunet_mim.classification.train import train_probe


def classify(*arguments):
    return cli.main([str(argument) for argument in arguments])


TRAIN = ("train", "-d", 7, "--target", "lesion", "-device", "cpu", "-pc", "none")


def out_of_fold(folder):
    return joined([read_predictions(path)[0] for path in sorted(folder.glob("fold_*/predictions.csv"))])


def auroc_of(folder):
    found = out_of_fold(folder)
    return roc_auc_score(found.target.labels, found.positive)


@pytest.fixture
def results(folders):
    return folders.results / "mim_classify__nnUNetPlans__3d_fullres"


def test_lesions_are_told_and_predicted(folders, results, tmp_path, capsys):
    """The whole way; a prediction of a raw image is the out-of-fold value of the same fold."""
    assert classify(*TRAIN, "--roi", "labels", "--margin", 4, "--covariate", "voxels") == 0
    printed = capsys.readouterr().out
    arms = results / "lesion"
    assert auroc_of(arms / "probe_random") >= 0.95
    assert auroc_of(arms / "baseline_size_hu") >= 0.95
    assert 0.15 < auroc_of(arms / "baseline_size") < 0.8
    assert auroc_of(arms / "probe_random+covariates") >= 0.95
    assert "lesion: probe_random beats the size alone: AUROC" in printed
    found = out_of_fold(arms / "probe_random")
    assert len(found.cases) == 36
    patients = {patient: set() for patient in found.patients}
    for patient, fold in zip(found.patients, found.folds, strict=True):
        patients[patient].add(int(fold))
    assert all(len(folds) == 1 for folds in patients.values())
    settings = json.loads((arms / "probe_random" / "fold_0" / "settings.json").read_text())
    assert settings["targets"] == {"lesion": ["0", "1"]}
    assert settings["encoder"]["origin"] == "random weights"

    page = (arms / "report.html").read_text()
    assert "worst cases" in page
    assert (arms / "report.md").read_text().count("| probe_random |") >= 1
    rows = list(csv.DictReader((arms / "report.csv").open()))
    value = next(r for r in rows if (r["classifier"], r["class"], r["figure"]) == ("probe_random", "", "auroc"))
    assert float(value["value"]) == pytest.approx(auroc_of(arms / "probe_random"))

    assert classify("report", "-d", 7, "--target", "lesion", "--where", "voxels", 0, 200) == 0
    assert "Only cases with voxels from 0 to below 200." in capsys.readouterr().out

    out = tmp_path / "out.csv"
    masks = folders.raw / "labelsTr"
    predict = ("predict", "-d", 7, "--target", "lesion", "-device", "cpu", "-i", folders.raw / "imagesTr", "-o", out)
    assert classify(*predict, "--roi", masks) == 0
    rows = {row["case"]: row for row in csv.DictReader(out.open())}
    for case, fold, p in zip(found.cases, found.folds, found.positive, strict=True):
        assert float(rows[case][f"lesion=1:fold_{fold}"]) == pytest.approx(p, abs=1e-5)
        by_fold = [float(rows[case][f"lesion=1:fold_{fold}"]) for fold in range(5)]
        assert float(rows[case]["lesion=1"]) == pytest.approx(np.mean(by_fold))
        assert rows[case]["lesion"] == str(int(float(rows[case]["lesion=1"]) > 0.5))

    assert classify(*predict) == 2
    assert "add --roi MASKS" in capsys.readouterr().err
    assert classify(*predict, "--roi", masks, "--classifier", "finetune") == 2
    assert "choose one of probe_random" in capsys.readouterr().err
    assert classify(*predict, "--roi", masks, "-f", 7) == 2
    assert "fold_7" in capsys.readouterr().err


def test_whole_cases_and_several_targets(folders, results, capsys):
    """Two targets at once, one of three classes; a missing label is predicted but not counted."""
    table = (folders.raw / "labels.csv").read_text().replace("case_01,patient_0,0,b", "case_01,patient_0,,b")
    labels = results.parent.parent / "other.csv"
    labels.write_text(table)
    arguments = ("train", "-d", 7, "--target", "lesion", "kind", "-device", "cpu", "-pc", "none", "--labels", labels)
    assert classify(*arguments, "--window", 16, "--folds", 3, "--no-baselines") == 0
    arms = results / "lesion+kind"
    parts = [read_predictions(path) for path in sorted(arms.glob("probe_random/fold_*/predictions.csv"))]
    assert [part.target.name for part in parts[0]] == ["lesion", "kind"]
    kinds = joined([part[1] for part in parts])
    assert kinds.target.classes == ("a", "b", "c")
    np.testing.assert_allclose(kinds.calibrated.sum(axis=1), 1, rtol=1e-6)
    lesions = joined([part[0] for part in parts])
    assert len(lesions.cases) == 36
    assert lesions.target.labels[1] == -1
    assert roc_auc_score(lesions.target.labels[lesions.target.known], lesions.positive[lesions.target.known]) >= 0.9
    page = (arms / "report.html").read_text()
    assert "35 cases of 9 patients" in page
    assert "36 cases of 9 patients (a: 12, b: 12, c: 12)" in page
    assert "kind: probe_random has an AUROC of 0." in capsys.readouterr().out


def test_shuffled_labels_are_not_told(folders, results, tmp_path):
    """Nothing leaks from the validation cases. With so few cases chance lies below one half: where a fold has more of a
    class, its training cases have less. test_probe.py has many cases.
    """
    rows = list(csv.reader((folders.raw / "labels.csv").open()))
    found = []
    for seed in range(5):
        lesion = np.random.default_rng(seed).permutation([row[2] for row in rows[1:]])
        path = tmp_path / f"shuffled_{seed}.csv"
        shuffled = [[*row[:2], value, *row[3:]] for row, value in zip(rows[1:], lesion, strict=True)]
        with path.open("w", newline="") as file:
            csv.writer(file).writerows([rows[0], *shuffled])
        config = ClassifyConfig(checkpoint="none", roi="labels", labels=str(path), tag=str(seed), folds=3)
        train_probe(set_up(DataOptions("7", target=("lesion",)), config), range(3), "cpu")
        found.append(auroc_of(results / "lesion" / f"probe_random_{seed}"))
        (folders.base / "splits_classification.json").unlink()
    assert np.mean(found) < 0.6, found


def test_a_pretrained_encoder_has_seen_the_cases(folders, results, make_checkpoint, capsys):
    seen = [{"dataset": "Dataset007_Toy", "case": f"case_{i:02d}", "sha256": ""} for i in range(10)]
    path, _ = make_checkpoint(provenance={"cases": seen, "datasets": ["Dataset007_Toy"]})
    assert classify(*TRAIN[:-1], path, "--roi", "labels", "--no-baselines") == 0
    assert "pretrained on the images of 10 of 36 validation cases" in capsys.readouterr().out
    path.unlink()  # prediction needs it no more
    images, masks = results.parent / "images", folders.raw / "labelsTr"
    images.mkdir()
    shutil.copy(folders.raw / "imagesTr" / "case_00_0000.nii.gz", images)
    out = results.parent / "out.csv"
    assert classify("predict", "-d", 7, "--target", "lesion", "-device", "cpu", "-i", images, "-o", out,
                    "--roi", masks, "-f", 0, 3) == 0  # fmt: skip
    (row,) = csv.DictReader(out.open())
    assert {name for name in row if "fold" in name} == {f"lesion={k}:fold_{f}" for k in (0, 1) for f in (0, 3)}


def test_a_report_without_all_folds(folders, results, capsys):
    few = (*TRAIN, "--roi", "labels", "--no-baselines", "--folds", 3)
    assert classify(*few, "-f", 0, 2) == 0
    assert sorted(path.name for path in (results / "lesion" / "probe_random").glob("fold_*")) == ["fold_0", "fold_2"]
    capsys.readouterr()
    assert classify(*few, "-o", "all") == 0
    assert "probe_random is left out:" in capsys.readouterr().out
    assert classify(*few, "-f", 1) == 0  # the last one
    printed = capsys.readouterr().out
    assert "report.html" in printed
    assert "left out" not in printed


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((*TRAIN, "--target", "ill"), "no column 'ill'"),
        ((*TRAIN, "--target", "lesion", "lesion"), "--target lesion is given twice"),
        ((*TRAIN, "--covariate", "lesion"), "lesion is both --target and --covariate"),
        ((*TRAIN, "--roi", "nowhere"), "--roi nowhere is no folder"),
        ((*TRAIN, "-f", "5"), "-f takes all, or numbers from 0 to 4"),
        ((*TRAIN, "--folds", "1"), "--folds must be at least 2"),
        ((*TRAIN, "--mask_channel"), "--mask_channel needs a mask"),
        ((*TRAIN, "--target", "voxels"), "fewer than 5 folds"),
        ((*TRAIN[:-2], "-pc", "nowhere.pth"), "nowhere.pth does not exist"),
        (("report", "-d", 7, "--target", "kind"), "nothing is trained in"),
    ],
)
def test_bad_input_ends_in_one_line(folders, capsys, arguments, message):
    assert classify(*arguments) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ")
    assert message in line


def test_predict_names_files_that_are_no_good(folders, results, tmp_path, capsys):
    assert classify(*TRAIN, "-f", 0, "--no-baselines") == 0
    images = tmp_path / "images"
    predict = ("predict", "-d", 7, "--target", "lesion", "-device", "cpu", "-i", images, "-o", tmp_path / "out.csv")
    assert classify(*predict) == 2
    images.mkdir()
    assert classify(*predict) == 2
    (images / "case_90_0000.nii.gz").write_bytes(b"nothing")
    assert classify(*predict) == 2
    assert classify(*predict, "--roi", folders.raw / "labelsTr") == 2
    lines = capsys.readouterr().err.splitlines()
    messages = ("is no folder", "holds no image named CASE_0000.nii.gz", "case_90_0000.nii.gz", "leave out --roi")
    assert len(lines) == 4
    assert all(message in line for message, line in zip(messages, lines, strict=True))
    assert not (tmp_path / "out.csv").exists()
