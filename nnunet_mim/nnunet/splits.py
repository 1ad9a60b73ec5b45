"""Training and validation cases of nnU-Net's folds."""

from __future__ import annotations

from nnunetv2.utilities.crossval_split import generate_crossval_split

from nnunet_mim.errors import MiMError
from nnunet_mim.nnunet.datasets import read_json
from nnunet_mim.nnunet.source import Source

N_FOLDS = 5
"""number of folds of nnU-Net's own split"""


def fold_validation_cases(source: Source, fold: int) -> tuple[str, ...]:
    """Preprocessed validation cases of a fold; empty for a dataset without labels. Raises MiMError as `split_of`."""
    preprocessed = set(source.cases)
    return tuple(case for case in split_of(source, fold)[1] if case in preprocessed)


def split_of(source: Source, fold: int) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Training and validation cases of a fold, preprocessed or not; both empty for a dataset without labels.

    Reads `splits_final.json`, or computes what nnU-Net would write there. Raises MiMError where there is no such fold,
    or there are too few cases for nnU-Net's split.
    """
    base = source.folder.parent
    splits_file = base / "splits_final.json"
    if splits_file.is_file():
        splits = read_json(splits_file)
    elif (base / "gt_segmentations").is_dir():
        if len(source.cases) < N_FOLDS:
            raise MiMError(
                f"{source.dataset} has {len(source.cases)} cases, too few for nnU-Net's {N_FOLDS} folds: leave out -f, "
                f"or write a split of your own into {splits_file}"
            )
        splits = generate_crossval_split(list(source.cases), seed=12345, n_splits=N_FOLDS)
    else:
        return (), ()
    if not 0 <= fold < len(splits):
        raise MiMError(f"fold {fold} does not exist in {splits_file} ({len(splits)} folds): choose another with -f")
    return tuple(splits[fold]["train"]), tuple(splits[fold]["val"])
