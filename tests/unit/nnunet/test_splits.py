"""Folds of splits_final.json: every name is a case, and everything else is one line that names the file."""

import json
import os
from pathlib import Path

import pytest
from nnunetv2.utilities.crossval_split import generate_crossval_split

from nnunet_mim.errors import MiMError
from nnunet_mim.nnunet.source import Source
from nnunet_mim.nnunet.splits import fold_validation_cases, left_out_cases, left_out_of_fold, split_of
from nnunet_mim.preparation.case_log import CaseLog

CASES = tuple(f"case_{i}" for i in range(6))


@pytest.fixture
def source(tmp_path):
    folder = tmp_path / "Dataset501_X" / "P_3d_fullres"
    (folder.parent / "gt_segmentations").mkdir(parents=True)
    return Source("Dataset501_X", "P", "3d_fullres", folder, None, CASES, (1, 1, 1), ("CTNormalization",), {}, {})


def write(source, splits):
    path = source.folder.parent / "splits_final.json"
    path.write_text(json.dumps(splits))
    return path


def test_without_a_file_the_split_is_that_of_nnunet(source):
    expected = generate_crossval_split(list(CASES), seed=12345, n_splits=5)
    for fold in range(5):
        assert split_of(source, fold) == (tuple(expected[fold]["train"]), tuple(expected[fold]["val"]))


@pytest.mark.parametrize(
    "splits",
    [None, {}, "all", [None], [{}], [{"train": CASES}], [{"train": "a", "val": "b"}], [{"train": [1], "val": [2]}]],
)
def test_a_file_that_is_no_split(source, splits):
    path = write(source, splits)
    with pytest.raises(MiMError, match="is no list like") as error:
        split_of(source, 0)
    assert str(path) in str(error.value)


def test_a_fold_without_validation_cases(source):
    write(source, [{"train": CASES, "val": []}])
    with pytest.raises(MiMError, match=r"fold 0 in .*splits_final\.json has no validation case"):
        split_of(source, 0)


@pytest.mark.parametrize("part", ["train", "val"])
def test_a_misspelt_name(source, part):
    """The misspelt validation case itself would be trained on."""
    split = {"train": list(CASES[:4]), "val": list(CASES[4:])}
    split[part][0] = "cas_0"
    path = write(source, [split])
    with pytest.raises(MiMError, match="names 1 cases in fold 0 that are not in") as error:
        fold_validation_cases(source, 0)
    assert f"{path} " in str(error.value)
    assert "cas_0 first: correct the name" in str(error.value)


def test_a_case_that_was_left_out_on_purpose_is_no_mistake(source):
    write(source, [{"train": [*CASES[:4], "thin"], "val": [*CASES[4:], "dark"]}, {"train": CASES, "val": ["dark"]}])
    log = source.folder.parent / "mim_prepare" / "P_3d_fullres.jsonl"
    log.parent.mkdir()
    entries = [{"case": "dark", "reason": "no body"}, {"case": "thin", "reason": "2-D"}, {"case": "case_0"}]
    log.write_text("\n".join([*map(json.dumps, entries), '{"case": "hal']))
    assert fold_validation_cases(source, 0) == CASES[4:]
    assert left_out_of_fold(source, 0) == ["dark"]
    with pytest.raises(MiMError, match="mim_prepare has left out all validation cases of fold 1"):
        fold_validation_cases(source, 1)
    entries.append({"case": "thin"})  # prepared later, and vanished since
    log.write_text("\n".join(map(json.dumps, entries)))
    with pytest.raises(MiMError, match="thin first"):
        fold_validation_cases(source, 0)


def test_the_log_of_other_plans_says_nothing(source):
    write(source, [{"train": CASES[:4], "val": [*CASES[4:], "dark"]}])
    log = Path(source.folder.parent, "mim_prepare", "Other_3d_fullres.jsonl")
    log.parent.mkdir()
    log.write_text(json.dumps({"case": "dark", "reason": "no body"}))
    with pytest.raises(MiMError, match="dark first"):
        fold_validation_cases(source, 0)


@pytest.mark.parametrize("kind", ["huge", "folder"])
def test_a_log_of_mim_prepare_is_read_up_to_a_limit(source, kind):
    log = source.folder.parent / "mim_prepare" / "P_3d_fullres.jsonl"
    log.parent.mkdir()
    if kind == "folder":
        log.mkdir()
    else:
        log.touch()
        os.truncate(log, 2**31 + 1)
    for read in (lambda: left_out_cases(source), lambda: CaseLog(log)):
        with pytest.raises(MiMError, match=rf"cannot read {log} \(.*\): restore it"):
            read()
