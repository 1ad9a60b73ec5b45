"""Which training patients are labelled, and what a training with few labels leaves."""

import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from nnunet_mim.classification import cli
from nnunet_mim.classification.folds import Folds, grouped_split
from nnunet_mim.classification.labelled import labelled_folds, labelled_order
from nnunet_mim.classification.labels import LabelTable, Target
from nnunet_mim.classification.options import ClassifyConfig
from nnunet_mim.classification.results import joined, read_predictions
from nnunet_mim.errors import MiMError


def table_of(patients, labels):
    cases = tuple(f"case_{i:03d}" for i in range(len(patients)))
    target = Target("ill", ("no", "yes"), np.array(labels))
    return LabelTable(cases, tuple(patients), (target,), np.zeros((len(cases), 0)))


def folds_of(table, tmp_path, n_folds=3):
    splits = grouped_split(table.targets[0].labels, table.patients, n_folds, seed=0)
    training, validation = zip(*((tuple(map(int, t)), tuple(map(int, v))) for t, v in splits), strict=True)
    return Folds(training, validation, tmp_path / "splits_classification.json")


@st.composite
def cohorts(draw):
    """Patients with one to three cases each, at least ten of either kind and not many more of one than of the other."""
    ill = draw(st.lists(st.booleans(), min_size=4, max_size=20)) + [True] * 10 + [False] * 10
    patients, labels = [], []
    for number, positive in enumerate(ill):
        of_patient = draw(st.lists(st.booleans(), min_size=0, max_size=2)) if positive else []
        for label in [positive, *of_patient]:
            patients.append(f"p{number}")
            labels.append(int(label))
    return table_of(patients, labels)


@given(cohorts(), st.integers(0, 50), st.lists(st.integers(50, 100), min_size=2, max_size=4))
def test_labelled_patients_are_nested_and_in_no_validation(tmp_path_factory, table, seed, percents):
    folds = folds_of(table, tmp_path_factory.getbasetemp())
    percents = sorted(percents)
    found = [labelled_folds(folds, table, f"{percent}%", seed) for percent in percents]
    for fold, every in enumerate(folds.training):
        chosen = [each.training[fold] for each in found]
        all_patients = {table.patients[row] for row in every}
        for smaller, larger in zip(chosen, [*chosen[1:], every], strict=True):
            assert set(smaller) <= set(larger)
        for rows, percent in zip(chosen, percents, strict=True):
            patients = {table.patients[row] for row in rows}
            assert len(patients) == -(-len(all_patients) * percent // 100)
            assert set(rows) == {row for row in every if table.patients[row] in patients}, "all cases of a patient"
            assert not patients & {table.patients[row] for row in folds.validation[fold]}
    assert all(each.validation == folds.validation for each in found)


@given(cohorts(), st.integers(0, 50))
def test_every_number_of_patients_has_the_classes_in_their_shares(table, seed):
    """A patient counts as its rarest class; of two classes Webster's apportionment is never off by a patient."""
    labels = table.targets[0].labels
    counts = np.bincount(labels)
    rarest = int(counts[1] <= counts[0])
    rare = {patient for patient, label in zip(table.patients, labels, strict=True) if label == rarest}
    if counts[0] == counts[1]:
        rare -= {patient for patient, label in zip(table.patients, labels, strict=True) if label == 0}
    order = labelled_order(labels, table.patients, seed)
    assert sorted(order) == sorted(set(table.patients))
    share = len(rare) / len(order)
    for n in range(1, len(order) + 1):
        assert abs(sum(patient in rare for patient in order[:n]) - n * share) < 1


def test_seeds_choose_other_patients():
    table = table_of([f"p{i}" for i in range(40)], [0, 1] * 20)
    labels = table.targets[0].labels
    assert len({tuple(labelled_order(labels, table.patients, seed)[:8]) for seed in range(10)}) == 10
    shuffled = np.random.default_rng(0).permutation(40)
    again = labelled_order(labels[shuffled], [table.patients[i] for i in shuffled], 3)
    assert again == labelled_order(labels, table.patients, 3), "the order of the rows does not matter"


def test_all_keeps_the_folds(tmp_path):
    table = table_of([f"p{i}" for i in range(12)], [0, 1] * 6)
    folds = folds_of(table, tmp_path)
    assert labelled_folds(folds, table, "all", 0) is folds
    assert labelled_folds(folds, table, "100%", 0) == folds


@pytest.mark.parametrize(
    ("labelled", "message"),
    [
        ("2", "1 of 2 patients of fold 0 have 'ill' '(no|yes)', at least 2 are needed: give more labels"),
        ("9", "give numbers from 1 to 8 .the training patients of fold 0., percentages from 1% to 100%, or all"),
        ("101%", "labels 101%: give numbers"),
    ],
)
def test_too_few_and_too_many(tmp_path, labelled, message):
    table = table_of([f"p{i}" for i in range(12)], [0, 1] * 6)
    with pytest.raises(MiMError, match=message):
        labelled_folds(folds_of(table, tmp_path), table, labelled, 0)


@pytest.mark.parametrize("labelled", ["", "0", "0%", "010", "ten", "10 %", "-1", "1.5%"])
def test_no_number_of_patients(labelled):
    with pytest.raises(MiMError, match="--labelled takes a number above 0"):
        ClassifyConfig(labelled=labelled)


def test_names_of_results_say_what_was_labelled():
    few = ClassifyConfig(checkpoint="none", labelled="10%", seed=2, tag="x")
    assert few.arm == "probe_random_labelled10pct_seed2_x"
    assert few.baseline_arm("baseline_size") == "baseline_size_labelled10pct_seed2"
    assert ClassifyConfig(mode="scratch", labelled="20").arm == "scratch_labelled20"
    assert ClassifyConfig(seed=2).baseline_arm("baseline_size") == "baseline_size"
    assert ClassifyConfig.from_dict(few.to_dict()) == few


def test_a_probe_of_few_labels_predicts_every_case(folders, capsys):
    arguments = ("train", "-d", 7, "--target", "lesion", "-device", "cpu", "-pc", "none", "--roi", "labels")
    arguments += ("--folds", 3, "--labelled", "50%", "--seed", 1)
    assert cli.main(list(map(str, arguments))) == 0
    arms = folders.results / "mim_classify__nnUNetPlans__3d_fullres" / "lesion"
    for arm in ("probe_random_labelled50pct_seed1", "baseline_size_labelled50pct_seed1"):
        paths = sorted((arms / arm).glob("fold_*/predictions.csv"))
        assert len(joined([read_predictions(path)[0] for path in paths]).cases) == 36
        settings = [json.loads(path.with_name("settings.json").read_text()) for path in paths]
        assert [each["n_training_cases"] for each in settings] == [12, 12, 12], "three of six patients, four cases each"
    assert "probe_random_labelled50pct_seed1 has an AUROC of" in capsys.readouterr().out
    page = (arms / "report.html").read_text()
    assert page.index("probe_random_labelled50pct_seed1") < page.index("baseline_prevalence_labelled50pct_seed1")
    assert cli.main([*map(str, arguments[:-4]), "--labelled", "1"]) == 2
    assert "labels 1: " in capsys.readouterr().err
