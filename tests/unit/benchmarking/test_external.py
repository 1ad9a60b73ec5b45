"""External test sets: what is refused, what is predicted and measured once, and whose means are reported."""

import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import SimpleITK as sitk
import torch

from nnunet_mim.benchmarking import experiment
from nnunet_mim.benchmarking import training as training_module
from nnunet_mim.benchmarking.bench_file import ArmSpec, Bench, DatasetSpec
from nnunet_mim.benchmarking.bench_report import write_bench_report
from nnunet_mim.benchmarking.cell import Arm, Cell
from nnunet_mim.benchmarking.external import ExternalSet, check_references, find_external, link_images
from nnunet_mim.benchmarking.guard import Findings, look_for_seen_cases, refuse_seen_cases, seen_tests
from nnunet_mim.benchmarking.matrix import Matrix, Place
from nnunet_mim.benchmarking.outcome import MARK, Outcome
from nnunet_mim.benchmarking.seeded_training import Length
from nnunet_mim.benchmarking.training import RESULT, Training
from nnunet_mim.checkpoint.identity import voxel_sha256
from nnunet_mim.errors import MiMError

TRAINED, TEST = "Dataset001_Train", "Dataset002_Test"
DESCRIPTION = {
    "channel_names": {"0": "CT"}, "labels": {"background": 0, "a": 1}, "numTraining": 2, "file_ending": ".nii.gz",
}  # fmt: skip


@pytest.fixture
def raw(tmp_path, monkeypatch):
    """nnUNet_raw with a dataset to train on and one to test with, two cases each."""
    monkeypatch.setenv("nnUNet_raw", str(tmp_path / "raw"))
    for number, dataset in enumerate((TRAINED, TEST)):
        folder = tmp_path / "raw" / dataset
        for name in ("imagesTr", "labelsTr"):
            (folder / name).mkdir(parents=True)
        for i, case in enumerate("xy"):
            voxels = np.random.default_rng(10 * number + i).integers(-900, 900, (7, 8, 9)).astype(np.int16)
            image = sitk.GetImageFromArray(voxels)
            sitk.WriteImage(image, str(folder / "imagesTr" / f"{case}_0000.nii.gz"))
            sitk.WriteImage(sitk.Cast(image > 0, sitk.sitkUInt8), str(folder / "labelsTr" / f"{case}.nii.gz"))
        (folder / "dataset.json").write_text(json.dumps(DESCRIPTION))
    return tmp_path / "raw"


def test_the_labelled_cases_of_another_dataset(raw, tmp_path):
    found = find_external("2", {TRAINED: DESCRIPTION})
    assert found.dataset == TEST
    assert found.references == {case: raw / TEST / "labelsTr" / f"{case}.nii.gz" for case in "xy"}
    link_images(found, tmp_path / "links")
    assert sorted(path.name for path in (tmp_path / "links").iterdir()) == ["x_0000.nii.gz", "y_0000.nii.gz"]
    assert (tmp_path / "links" / "x_0000.nii.gz").read_bytes() == found.images["x"][0].read_bytes()


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda raw: None, r"Dataset001_Train is trained on: give a dataset"),
        (lambda raw: (raw / TEST / "dataset.json").unlink(), r"Dataset002_Test has no dataset.json"),
        (lambda raw: (raw / TEST / "labelsTr" / "y.nii.gz").unlink(), r"label image .*y\.nii\.gz is missing"),
        (
            lambda raw: (raw / TEST / "dataset.json").write_text(
                json.dumps({**DESCRIPTION, "labels": {"background": 0, "b": 1}})
            ),
            r"labels of Dataset002_Test is .*'b'.*that of Dataset001_Train .*'a'",
        ),
        (
            lambda raw: (raw / TEST / "imagesTr" / "y_0000.nii.gz").write_bytes(
                (raw / TRAINED / "imagesTr" / "x_0000.nii.gz").read_bytes()
            ),
            r"Dataset002_Test y is the same image as Dataset001_Train x",
        ),
        (lambda raw: [path.unlink() for path in (raw / TEST / "imagesTr").iterdir()], r"has no training cases"),
    ],
)
def test_what_cannot_be_a_test_set_is_refused(raw, change, says):
    given = "1" if "is trained on" in says else "2"
    change(raw)
    with pytest.raises(MiMError, match=says):
        find_external(given, {TRAINED: DESCRIPTION})


@pytest.fixture
def training(raw, tmp_path):
    """A training whose network was trained and validated already, but predicted no test set."""
    base = tmp_path / "preprocessed" / TRAINED
    (base / "P_3d").mkdir(parents=True)
    (base / "gt_segmentations").mkdir()
    (base / "dataset.json").write_text(json.dumps(DESCRIPTION))
    plans = {"image_reader_writer": "SimpleITKIO", "label_manager": "LabelManager", "configurations": {}}
    source = SimpleNamespace(
        dataset=TRAINED, plans_name="P", configuration="3d", folder=base / "P_3d", plans=plans
    )  # fmt: skip
    cell = Cell(Arm(ArmSpec("A", "nnUNetTrainer", "P"), source), 0, ("y",), ("x",), 0, Length(1, 2, 1))
    made = Training(cell, tmp_path / "cell", "cpu", 1.0, 1, (find_external("2", {TRAINED: DESCRIPTION}),))
    label = raw / TRAINED / "labelsTr" / "x.nii.gz"
    for path in (base / "gt_segmentations" / "x.nii.gz", made.predictions() / "x.nii.gz"):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(label.read_bytes())
    metrics = {"1": {"Dice": 1.0}}
    summary = {"metric_per_case": [{"prediction_file": "x.nii.gz", "metrics": metrics}], "mean": metrics}
    (made.predictions() / "summary.json").write_text(json.dumps(summary))
    torch.save({"logging": {"mean_fg_dice": [0.5]}}, made.output / "checkpoint_final.pth")
    return made


class Predictor:
    """Takes the place of nnU-Net's commands: writes every label image but for its first voxel plane, notes the rest."""

    def __init__(self, fails_after=99):
        self.commands, self.fails_after = [], fails_after

    def __call__(self, command, log, environment, stop):
        self.commands.append(command)
        with log.open("a") as file:
            file.write("nnU-Net says\n")
        if "nnUNetv2_predict" not in command:
            return 0
        given, made = (Path(command[command.index(flag) + 1]) for flag in ("-i", "-o"))
        made.mkdir(parents=True)
        for number, path in enumerate(sorted(given.iterdir())):
            if number >= self.fails_after:
                return 1
            label = sitk.Cast(sitk.ReadImage(str(path)) > 0, sitk.sitkUInt8)
            array = sitk.GetArrayFromImage(label)
            array[0] = 0
            changed = sitk.GetImageFromArray(array)
            changed.CopyInformation(label)
            sitk.WriteImage(changed, str(made / path.name.replace("_0000", "")))
        return 0


def test_a_finished_training_only_predicts_a_new_test_set(training, raw, monkeypatch):
    """Dice by hand: 2 |A ∩ B| / (|A| + |B|), where A lacks the first plane of B."""
    fake = Predictor()
    monkeypatch.setattr(training_module, "run_command", fake)
    without = Training(training.cell, training.folder, "cpu", 1.0, 1)
    without.folder.mkdir(exist_ok=True)
    kept = without.train()
    assert "tests" not in kept
    assert training.finished() is None, "the test set is missing"
    fake.commands.clear()
    result = training()
    (command,) = fake.commands
    assert command[command.index("nnUNetv2_predict") + 1 :][4:6] == ["-d", TRAINED]
    assert command[command.index("-tr") + 1] == "nnUNetTrainer"
    assert result["cases"] == kept["cases"], "validation stays what it is"
    for case in "xy":
        truth = sitk.GetArrayFromImage(sitk.ReadImage(str(raw / TEST / "labelsTr" / f"{case}.nii.gz"))) > 0
        expected = 2 * truth[1:].sum() / (truth.sum() + truth[1:].sum())
        assert result["tests"][TEST][case]["1"]["dice"] == pytest.approx(expected)
    assert training.finished() == json.loads((training.folder / RESULT).read_text())
    fake.commands.clear()
    training()
    assert fake.commands == [], "nothing is left to do"
    assert without.finished() is not None, "an experiment without the test set takes the same training"
    wider = Training(training.cell, training.folder, "cpu", 3.0, 1, training.tests)
    assert wider.finished()["tests"][TEST]["x"]["1"]["nsd"] > result["tests"][TEST]["x"]["1"]["nsd"]


def test_half_a_prediction_is_made_again(training, monkeypatch):
    monkeypatch.setattr(training_module, "run_command", Predictor(fails_after=1))
    with pytest.raises(MiMError, match=r"training failed, see .*log\.txt"):
        training()
    assert not training.predictions(training.tests[0]).exists()
    monkeypatch.setattr(training_module, "run_command", Predictor())
    assert set(training()["tests"][TEST]) == {"x", "y"}


def figures(dice, n=5):
    return {"1": {"dice": dice, "hd95": 2.0, "nsd": 0.5, "n_ref": n, "n_pred": n}}


@pytest.fixture
def outcome(raw, tmp_path):
    """Two folds, two arms, one seed; the test set's Dice of every fold and case is known."""
    test = find_external("2", {TRAINED: DESCRIPTION})
    specs = (ArmSpec("MiM", "nnUNetTrainerMiM", "P", "a.pth"), ArmSpec("Scratch", "nnUNetTrainerMiMScratch", "P"))
    bench = Bench((DatasetSpec(TRAINED, (0, 1)),), specs, iterations=4, iterations_per_epoch=2, output=tmp_path / "out")
    source = SimpleNamespace(folder=tmp_path / TRAINED / "P_3d", dataset=TRAINED, plans_name="P", configuration="3d")
    (tmp_path / TRAINED).mkdir()
    (tmp_path / TRAINED / "dataset.json").write_text(json.dumps(DESCRIPTION))
    cells, results = {}, {}
    of_test = {("MiM", 0): (0.8, 0.6), ("MiM", 1): (0.6, float("nan")), ("Scratch", 0): (0.5, 0.5),
               ("Scratch", 1): (0.5, 0.5)}  # fmt: skip
    for fold in (0, 1):
        for spec in specs:
            place = Place(TRAINED, fold, "all", 0, spec.name)
            cells[place] = Cell(Arm(spec, source, spec.checkpoint), fold, ("t",), (f"v{fold}",), 0, bench.length)
            x, y = of_test[spec.name, fold]
            results[place] = {
                "cases": {f"v{fold}": figures(0.9)}, "curve": [0.1, 0.2], "names": {"1": "organ"}, "cost": {},
                "tests": {TEST: {"x": figures(x), "y": figures(y, 5 if y == y else 0)}},
            }  # fmt: skip
    seen = {(TRAINED, fold, spec.name): Findings() for fold in (0, 1) for spec in specs}
    return Outcome(Matrix(bench, cells, "Scratch", (test,)), results, seen)


def test_every_case_counts_once_with_its_mean_over_folds(outcome):
    """MiM: x (0.8 + 0.6) / 2, y 0.6, as the second fold has no value there; Scratch: 0.5 both."""
    test = outcome.matrix.tests[0]
    tested = outcome.on(test, outcome.seen)
    assert outcome.values(TRAINED, "all", [0], "MiM", "dice").tolist() == [[0.9, 0.9]]
    assert tested.values(TRAINED, "all", [0], "MiM", "dice") == pytest.approx(np.array([[0.7, 0.6]]))
    (comparison, seeds) = tested.comparisons[TRAINED, "all", "MiM"]
    assert (comparison.difference, seeds) == (pytest.approx(15.0), [0])
    assert outcome.comparisons[TRAINED, "all", "MiM"][0].difference == 0


def test_the_report_has_both_and_keeps_them_apart(outcome, tmp_path):
    seen = {**outcome.seen, (TRAINED, 1, "MiM"): Findings(("y",))}
    text = write_bench_report(outcome, {}, [outcome.on(outcome.matrix.tests[0], seen)])
    heading = f"## {TEST}, trained on {TRAINED}, folds 0, 1, 2 test cases"
    validation, test = text.replace("\\", "").split(heading)
    assert "2 validation cases" in validation
    assert "| 65.00 |" in test
    assert "65.00" not in validation
    assert "iterations to reach it" in validation
    assert "iterations to reach it" not in test
    assert f"MiM{MARK}: WARNING: its pretraining has seen 1 of the cases of {TEST}" in test
    page = (tmp_path / "out" / "report.html").read_text()
    assert f"{TEST}, trained on {TRAINED} with labels all: +15.0 Dice" in page
    rows = (tmp_path / "out" / f"test_{TEST}.csv").read_text().splitlines()
    assert len(rows) == 1 + 4 * 2
    assert ",yes," in next(row for row in rows if ",MiM,y," in row and f"{TRAINED},1," in row)
    assert "v0" not in (tmp_path / "out" / f"test_{TEST}.csv").read_text()


def test_a_case_that_was_pretrained_on_is_found(raw, tmp_path):
    """By its name, or by its image under another name; the search is kept, and refused by name."""
    test = find_external("2", {TRAINED: DESCRIPTION})
    image = sitk.GetArrayFromImage(sitk.ReadImage(str(test.images["y"][0])))[None].astype(np.float32)
    provenance = {
        "cases": [{"dataset": "Dataset009_X", "case": "p", "sha256": "1" * 64, "image_sha256": voxel_sha256(image)}],
        "spacing": [1.0, 1.0, 1.0], "normalization": ["CTNormalization"], "configuration": "3d",
        "transpose_forward": [0, 1, 2], "image_reader_writer": "SimpleITKIO",
        "intensity_properties": {"0": {"percentile_00_5": -1000.0, "percentile_99_5": 1000.0, "mean": 0.0, "std": 9.0,
                                       "min": -1000.0, "max": 1000.0, "median": 0.0}},
    }  # fmt: skip
    assert seen_tests(provenance, test).same == ("y",)
    named = {**provenance, "cases": [{"dataset": TEST, "case": "x", "sha256": "1" * 64}]}
    assert seen_tests(named, test).same == ("x",)
    assert seen_tests({**provenance, "cases": [{"dataset": "D", "case": "x", "sha256": "1" * 64}]}, test).same == ()
    assert seen_tests(None, test).unknown
    torch.save({"provenance": provenance}, tmp_path / "a.pth")
    arm = SimpleNamespace(checkpoint=str(tmp_path / "a.pth"), identity={"checkpoint_sha256": "2"})
    cells = {Place(TRAINED, 0, "all", 0, "MiM"): SimpleNamespace(arm=arm, val_cases=("v",))}
    matrix = SimpleNamespace(bench=SimpleNamespace(output=tmp_path / "out"), cells=cells)
    found = look_for_seen_cases(matrix, test)
    assert found[TRAINED, 0, "MiM"].same == ("y",)
    with pytest.raises(MiMError, match=rf"arm MiM has seen 1 of the cases of {TEST}, y first: pretrain without them,"):
        refuse_seen_cases(found, TEST)


def _rewrite(path, change):
    image = sitk.ReadImage(str(path))
    voxels = change(sitk.GetArrayFromImage(image))
    sitk.WriteImage(sitk.GetImageFromArray(voxels), str(path))


def _with_value(value, dtype=np.uint8):
    def change(voxels):
        voxels = voxels.astype(dtype)
        voxels[2, 3, 4] = value
        return voxels

    return change


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (_with_value(7), r"y: label with values that dataset\.json does not declare \(7\): .*y\.nii\.gz"),
        (_with_value(0.5, np.float32), r"y: label with values that dataset\.json does not declare \(0\.5\)"),
        (_with_value(1.0002, np.float32), None),
        (lambda voxels: voxels[1:], r"y: label has 9 x 8 x 6 voxels, its image 9 x 8 x 7 \(x, y, z\)"),
    ],
)
def test_references_are_checked_as_labels_for_training(raw, change, says):
    test = find_external("2", {TRAINED: DESCRIPTION})
    check_references(test)
    _rewrite(test.references["y"], change)
    if says is None:
        check_references(test)
        return
    with pytest.raises(MiMError, match=f"^test: {TEST} {says}.*: correct the label, or move the case out"):
        check_references(test)


def test_the_first_of_several_bad_references_is_named(raw):
    test = find_external("2", {TRAINED: DESCRIPTION})
    _rewrite(test.references["y"], _with_value(7))
    content = test.references["x"].read_bytes()
    test.references["x"].write_bytes(content[: len(content) // 2])
    with pytest.raises(MiMError, match=r"Dataset002_Test x: damaged .*x\.nii\.gz \(one of 2 cases\): correct"):
        check_references(test)


def test_references_are_checked_before_anything_is_trained(raw, monkeypatch):
    """And only where something is to be trained."""
    test = find_external("2", {TRAINED: DESCRIPTION})
    _rewrite(test.references["x"], _with_value(2))
    cell = SimpleNamespace(val_cases=(), arm=SimpleNamespace(source=None))
    matrix = SimpleNamespace(cells={"a": cell}, tests=(test,))
    with pytest.raises(MiMError, match=r"Dataset002_Test x: .*\(2\)"):
        experiment._check_references(matrix, {})
    experiment._check_references(matrix, {"a"})


def test_bench_yaml_takes_test_sets(raw, tmp_path):
    from nnunet_mim.benchmarking.bench_file import bench_of

    content = {"datasets": [1], "arms": ["Scratch"], "test": [2]}
    assert bench_of(content, tmp_path).test == ("2",)
    assert bench_of({**content, "test": None}, tmp_path).test == ()


def test_a_set_is_made_of_plain_values():
    """Trainings travel to other machines as pickles."""
    import pickle

    made = ExternalSet(TEST, {"x": (Path("x"),)}, {"x": Path("y")})
    assert pickle.loads(pickle.dumps(made)) == made
