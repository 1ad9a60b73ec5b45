"""Folds of splits_final.json: every name is a case, and everything else is one line that names the file."""

import json
import os
from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
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


def test_a_case_that_a_fold_names_twice(source):
    """In both parts it would be validated on what it was trained on; twice in one it would weigh double."""
    for split in ({"train": CASES, "val": ["case_1"]}, {"train": [*CASES[:4], "case_1"], "val": CASES[4:]}):
        path = write(source, [{"train": CASES[1:], "val": CASES[:1]}, split])
        assert split_of(source, 0)[1] == ("case_0",)
        with pytest.raises(MiMError, match=r"splits_final\.json names case_1 twice: leave it once") as error:
            split_of(source, 1)
        assert str(path) in str(error.value)


JUNK = (
    ..., None, True, -1, 0, 2**70, 0.5, float("nan"), "", "x", "case_0", "case_5", "../case_0", "case_0\n", "\x1b[2J",
    [], {}, [[]], [1], ["case_0"], ["case_5"], ["case_0", "case_0"], {"train": ["case_0"], "val": ["case_1"]}, [None],
    {"train": [], "val": []}, {"a": 1},
)  # fmt: skip
SPLITS = [{"train": [c for n, c in enumerate(CASES) if n % 3 != k], "val": list(CASES[k::3])} for k in range(3)]


def test_no_split_is_misread(source, junk, examples):
    """Junk in any place of splits_final.json: what is taken names cases, each of them once in the fold."""
    path = write(source, SPLITS)

    @examples(150, 3000)
    @given(share=st.floats(0, 1, exclude_max=True), value=st.sampled_from(JUNK), fold=st.integers(-1, 3))
    @example(0, {"train": ["case_0"], "val": ["case_1"]}, 0)
    def holds(share, value, fold):
        content = junk.put(SPLITS, junk.at(SPLITS, share), value)
        write(source, content)
        found = junk.taken(lambda _: (split_of(source, fold), fold_validation_cases(source, fold)), path)
        if found is None:
            return
        assert 0 <= fold < len(content)
        assert all({*part} >= {"train", "val"} for part in content)
        train, val = content[fold]["train"], content[fold]["val"]
        assert len({*train, *val}) == len(train) + len(val)
        assert {*train, *val} <= {*CASES}
        assert found == ((tuple(train), tuple(val)), tuple(val))
        assert val

    holds()
