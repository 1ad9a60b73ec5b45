"""Splits as published, and nested label fractions."""

import json
import math
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st
from nnunetv2.utilities.crossval_split import generate_crossval_split

from nnunet_mim.benchmarking.archives import BTCV_CASES
from nnunet_mim.benchmarking.splits import (
    btcv_splits,
    labelled_subset,
    nnunet_splits,
    write_splits,
)
from nnunet_mim.errors import MiMError

PERCENTS = (1, 5, 10, 25, 50, 100)
NAMES = st.lists(st.text("abc0123456789_", min_size=1, max_size=8), min_size=1, max_size=320, unique=True)


def numbers(names):
    return sorted(int(name.removeprefix("img")) for name in names)


def test_btcv_folds_are_the_published_ones():
    splits = btcv_splits()
    assert [numbers(split["val"]) for split in splits] == [
        [35, 36, 37, 38, 39, 40],
        [29, 30, 31, 32, 33, 34],
        [23, 24, 25, 26, 27, 28],
        [7, 8, 9, 10, 21, 22],
        [1, 2, 3, 4, 5, 6],
        [1, 2, 3, 4, 8, 22, 25, 29, 32, 35, 36, 38],
    ]
    assert [len(split["train"]) for split in splits] == [24] * 5 + [18]
    for split in splits:
        assert sorted(split["train"] + split["val"]) == sorted(BTCV_CASES)
    assert sorted(case for split in splits[:5] for case in split["val"]) == sorted(BTCV_CASES)


def test_btcv_splits_need_the_published_cases():
    with pytest.raises(MiMError, match="img0001 is missing"):
        btcv_splits(BTCV_CASES[1:])


def test_msd_folds_are_those_of_nnunet():
    names = [f"spleen_{number}" for number in range(1, 42)]
    splits = nnunet_splits(names)
    assert json.loads(json.dumps(generate_crossval_split(sorted(names), seed=12345, n_splits=5))) == splits
    assert nnunet_splits(names[::-1]) == splits
    with pytest.raises(MiMError, match="4 cases cannot be split"):
        nnunet_splits(names[:4])


def test_splits_are_written_once_and_never_replaced(tmp_path):
    path = write_splits(tmp_path / "nnUNet_preprocessed", "Dataset220_BTCV", btcv_splits())
    assert path == tmp_path / "nnUNet_preprocessed" / "Dataset220_BTCV" / "splits_final.json"
    assert json.loads(path.read_text()) == btcv_splits()
    before = path.stat().st_mtime_ns
    assert write_splits(tmp_path / "nnUNet_preprocessed", "Dataset220_BTCV", btcv_splits()) == path
    assert path.stat().st_mtime_ns == before

    others = btcv_splits()[:5]
    with pytest.raises(MiMError, match=r"splits_final\.json holds other splits"):
        write_splits(tmp_path / "nnUNet_preprocessed", "Dataset220_BTCV", others)
    assert json.loads(path.read_text()) == btcv_splits()
    path.write_text("[{")
    with pytest.raises(MiMError, match=r"cannot read .*splits_final.json"):
        write_splits(tmp_path / "nnUNet_preprocessed", "Dataset220_BTCV", others)
    assert path.read_text() == "[{"


def test_splits_that_nnunet_wrote_itself_are_the_same(tmp_path):
    from batchgenerators.utilities.file_and_folder_operations import save_json

    names = [f"lung_{number:03d}" for number in range(63)]
    path = tmp_path / "Dataset006_Lung" / "splits_final.json"
    path.parent.mkdir()
    save_json(generate_crossval_split(names, seed=12345, n_splits=5), path)
    write_splits(tmp_path, "Dataset006_Lung", nnunet_splits(names))


def test_a_folder_that_cannot_be_made(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(MiMError, match="cannot write"):
        write_splits(tmp_path / "file", "Dataset220_BTCV", btcv_splits())


@given(cases=NAMES, seed=st.integers(0, 2**31), shuffled=st.randoms())
def test_label_fractions(cases, seed, shuffled):
    subsets = [labelled_subset(cases, f"{percent}%", seed) for percent in PERCENTS]
    for percent, subset in zip(PERCENTS, subsets, strict=True):
        assert len(set(subset)) == len(subset) == max(1, math.ceil(len(cases) * percent / 100))
        assert list(subset) == sorted(subset)
        assert set(subset) <= set(cases)
    for smaller, larger in pairwise(subsets):
        assert set(smaller) <= set(larger)
    assert subsets[-1] == tuple(sorted(cases))
    other_order = list(cases)
    shuffled.shuffle(other_order)
    assert subsets == [labelled_subset(other_order, f"{percent}%", seed) for percent in PERCENTS]


@given(cases=NAMES, percents=st.lists(st.integers(1, 100), min_size=2, max_size=2), seed=st.integers(0, 99))
def test_any_two_fractions_are_nested(cases, percents, seed):
    smaller, larger = (set(labelled_subset(cases, f"{percent}%", seed)) for percent in sorted(percents))
    assert smaller <= larger


def test_fractions_of_known_cases_stay_what_they_are():
    """A benchmark that goes on next year must draw the same cases."""
    cases = [f"img{number:04d}" for number in range(1, 25)]
    assert [len(labelled_subset(cases, f"{percent}%", 0)) for percent in PERCENTS] == [1, 2, 3, 6, 12, 24]
    assert labelled_subset(cases, "10%", 0) == ("img0005", "img0019", "img0022")
    assert labelled_subset(cases, "10%", 1) == ("img0002", "img0008", "img0022")
