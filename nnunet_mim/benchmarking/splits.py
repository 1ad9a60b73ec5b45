"""Which cases train and which validate: the splits that papers use, and few labels as nested subsets."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from nnunetv2.utilities.crossval_split import generate_crossval_split

from nnunet_mim.benchmarking.archives import BTCV_CASES
from nnunet_mim.errors import MiMError
from nnunet_mim.nnunet.splits import N_FOLDS, labelled_count
from nnunet_mim.system.files import write_atomically
from nnunet_mim.system.untrusted import read_json

Split = dict[str, list[str]]
"""train and val: names of cases, as an entry of nnU-Net's splits_final.json"""

SPLITS_FILE = "splits_final.json"
BTCV_BLOCKS = (range(35, 41), range(29, 35), range(23, 29), (7, 8, 9, 10, 21, 22), range(1, 7))
"""validation cases of the published five folds of 24 and 6, by number; the first one is the usual 24/6 split"""
BTCV_TEST = (1, 2, 3, 4, 8, 22, 25, 29, 32, 35, 36, 38)
"""test cases of the 18/12 split"""


def nnunet_splits(cases: Sequence[str]) -> list[Split]:
    """The five folds that nnU-Net itself makes of these cases. MiMError where there are fewer cases than folds."""
    if len(cases) < N_FOLDS:
        raise MiMError(f"{len(cases)} cases cannot be split into {N_FOLDS} folds: take more, or leave out --splits")
    splits = generate_crossval_split(sorted(cases), seed=12345, n_splits=N_FOLDS)
    return [{part: [str(case) for case in names] for part, names in split.items()} for split in splits]


def btcv_splits(cases: Sequence[str] = BTCV_CASES) -> list[Split]:
    """The published splits of BTCV's training cases: folds 0 to 4 (24/6), and as fold 5 the 18/12 one. MiMError unless
    `cases` are all 30.
    """
    if missing := sorted({*BTCV_CASES} - {*cases}):
        raise MiMError(f"BTCV's published splits need all 30 cases, {missing[0]} is missing: leave out --splits")
    splits = []
    for block in (*BTCV_BLOCKS, BTCV_TEST):
        val = [f"img{number:04d}" for number in sorted(block)]
        splits.append({"train": [case for case in BTCV_CASES if case not in val], "val": val})
    return splits


def labelled_subset(cases: Sequence[str], labels: str, seed: int) -> tuple[str, ...]:
    """The labelled cases of one training, sorted. With the same seed a larger subset contains the smaller ones.

    `labels` is their number, a percentage of `cases` (10%: rounded up, at least one), or all. Raises MiMError for
    anything else, or more than there are.
    """
    count, cases = labelled_count(labels, len(cases), "the training cases of the fold"), sorted(cases)
    order = np.random.default_rng(seed).permutation(len(cases))
    return tuple(sorted(cases[i] for i in order[:count]))


def write_splits(preprocessed: Path, dataset: str, splits: Sequence[Split]) -> Path:
    """Write splits_final.json, which nnU-Net then uses, into nnUNet_preprocessed/DATASET. Returns the file.

    Raises MiMError where one with other splits exists, which is kept, or it cannot be read or written.
    """
    path = preprocessed / dataset / SPLITS_FILE
    check_splits(path, splits)
    if not path.exists():
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(path, json.dumps(list(splits), indent=4).encode())
        except OSError as error:
            raise MiMError(f"cannot write {path} ({error.strerror}): make it writable") from error
    return path


def check_splits(path: Path, splits: Sequence[Split]) -> None:
    """MiMError if a file with other splits exists."""
    if not path.exists():
        return
    stored = read_json(path, "restore it, or move it away")
    if stored != list(splits):
        raise MiMError(f"{path} holds other splits, which trainings may have used: move it away, or leave out --splits")
