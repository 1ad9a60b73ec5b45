import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from nnunet_mim.classification.folds import find_folds, grouped_split, stratified_folds
from nnunet_mim.classification.labels import LabelTable, Target
from nnunet_mim.errors import MiMError


def table_of(patients, *labels):
    cases = tuple(f"case_{i:03d}" for i in range(len(patients)))
    targets = tuple(
        Target(f"t{i}", tuple(map(str, range(max(values) + 1))), np.array(values)) for i, values in enumerate(labels)
    )
    return LabelTable(cases, tuple(patients), targets, np.zeros((len(cases), 0)))


@given(
    st.lists(st.tuples(st.integers(0, 14), st.integers(-1, 2), st.integers(0, 1)), min_size=12, max_size=60),
    st.integers(2, 5),
    st.integers(0, 100),
)
def test_no_patient_is_split(rows, n_folds, seed):
    patients = [f"p{patient}" for patient, _, _ in rows] + [f"q{i}" for i in range(n_folds)]
    first, second = ([row[i] for row in rows] + [0] * n_folds for i in (1, 2))
    table = table_of(patients, first, second)
    splits = stratified_folds(table, n_folds, seed)
    assert sorted(row for _, val in splits for row in val) == list(range(len(patients)))
    for train, val in splits:
        assert not {patients[row] for row in train} & {patients[row] for row in val}
        assert len(train) + len(val) == len(patients)


def test_classes_are_spread_evenly():
    rng = np.random.default_rng(0)
    patients = [f"p{i}" for i in rng.integers(0, 200, size=400)]
    labels = (rng.random(400) < 0.2).astype(int)
    shares = [labels[val].mean() for _, val in grouped_split(labels, patients, 5, seed=1)]
    assert max(shares) - min(shares) < 0.04


PATIENTS = [f"p{i // 2}" for i in range(20)]
TABLE = table_of(PATIENTS, [(i // 2) % 2 for i in range(20)])


def entry(table, rows):
    return {
        "train": [case for i, case in enumerate(table.cases) if i not in rows],
        "val": [table.cases[i] for i in rows],
    }


def test_folds_are_written_once_and_can_be_replaced(tmp_path):
    first = find_folds(tmp_path, TABLE, 5)
    assert len(first) == 5
    assert not first.is_nnunet
    stored = json.loads(first.file.read_text())
    assert stored == [entry(TABLE, rows) for rows in first.validation]
    assert find_folds(tmp_path, TABLE, 3) == first  # the file decides
    first.file.write_text(json.dumps([entry(TABLE, range(10)), entry(TABLE, range(10, 20))]))
    assert find_folds(tmp_path, TABLE, 5).validation == (tuple(range(10)), tuple(range(10, 20)))


def test_a_file_may_train_on_some_cases_only(tmp_path):
    splits = [entry(TABLE, range(10)), entry(TABLE, range(10, 20))]
    splits[0]["train"] = splits[0]["train"][:4]
    (tmp_path / "splits_classification.json").write_text(json.dumps(splits))
    assert find_folds(tmp_path, TABLE, 5).training[0] == (10, 11, 12, 13)


def test_splits_of_nnunet_are_used_if_they_split_no_patient(tmp_path, capsys):
    path = tmp_path / "splits_final.json"
    path.write_text(json.dumps([entry(TABLE, range(10)), entry(TABLE, range(10, 20))]))
    safe = find_folds(tmp_path, TABLE, 5)
    assert safe.is_nnunet
    assert len(safe) == 2
    path.write_text(json.dumps([entry(TABLE, range(9)), entry(TABLE, range(9, 20))]))
    new = find_folds(tmp_path, TABLE, 5)
    assert new.file.name == "splits_classification.json"
    assert len(new) == 5
    assert "patient p4" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("splits", "message"),
    [
        ({"train": []}, "is no list like"),
        ([{"train": ["a"]}, {"train": [], "val": []}], "is no list like"),
        ([entry(TABLE, range(9)), entry(TABLE, range(9, 20))], "has patient p4 .* validation of fold 0"),
        ([entry(TABLE, range(10)), entry(TABLE, range(10, 18))], "has case_018 in the validation of 0 folds, not one"),
        (
            [entry(TABLE, range(10)), entry(TABLE, range(10)), entry(TABLE, range(10, 20))],
            "has case_000 in the validation of 2 folds, not one",
        ),
        ([{"train": ["case_000"], "val": list(TABLE.cases[2:])}] * 2, "no training case of fold 0 is '1'"),
    ],
)
def test_bad_files(tmp_path, splits, message):
    (tmp_path / "splits_classification.json").write_text(json.dumps(splits))
    with pytest.raises(MiMError, match=message) as error:
        find_folds(tmp_path, TABLE, 5)
    assert "delete splits_classification.json" in str(error.value)
