"""Training and validation cases of nnU-Net's folds."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

from nnunet_mim.errors import MiMError
from nnunet_mim.nnunet.documents import read_splits
from nnunet_mim.nnunet.source import Source
from nnunet_mim.system.untrusted import MAX_LOG, limited, parse_json

N_FOLDS = 5
"""number of folds of nnU-Net's own split"""


def fold_validation_cases(source: Source, fold: int) -> tuple[str, ...]:
    """Preprocessed validation cases of a fold; empty for a dataset without labels. Raises MiMError as `split_of`, and
    for names of no case: a misspelt one would be trained on.
    """
    train, val = split_of(source, fold)
    unknown = sorted({*train, *val} - {*source.cases} - left_out_cases(source))
    if unknown:
        raise MiMError(
            f"{_splits_file(source)} names {len(unknown)} cases in fold {fold} that are not in {source.folder}, "
            f"{unknown[0]} first: correct the name, or preprocess the case"
        )
    preprocessed = {*source.cases}
    found = tuple(case for case in val if case in preprocessed)
    if val and not found:
        raise MiMError(f"mim_prepare has left out all validation cases of fold {fold}: choose another with -f")
    return found


def left_out_of_fold(source: Source, fold: int) -> list[str]:
    """Validation cases of a fold that are not preprocessed, as mim_prepare has left them out. Raises as `split_of`."""
    return sorted(({*split_of(source, fold)[1]} - {*source.cases}) & left_out_cases(source))


def left_out_cases(source: Source) -> set[str]:
    """Cases that mim_prepare has left out of a dataset, by its log; empty where there is no such log.

    Raises MiMError where the log cannot be read.
    """
    reasons: dict[str, Any] = {}
    log = source.folder.parent / "mim_prepare" / f"{source.folder.name}.jsonl"
    try:
        content = limited(log, MAX_LOG) if log.exists() else b""
    except (OSError, ValueError) as error:
        raise MiMError(f"cannot read {log} ({error}): restore it") from error
    for line in content.decode(errors="replace").splitlines():
        try:
            entry = parse_json(line)
        except ValueError:  # cut short
            continue
        if isinstance(entry, dict) and isinstance(entry.get("case"), str):
            reasons[entry["case"]] = entry.get("reason")
    return {case for case, reason in reasons.items() if reason}


def split_of(source: Source, fold: int, setting: str = "-f") -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Training and validation cases of a fold, preprocessed or not; both empty for a dataset without labels.

    Reads `splits_final.json`, or computes what nnU-Net would write there. Raises MiMError where the file is not as
    nnU-Net writes it, there is no such fold, no validation case or one case twice in it, or there are too few cases for
    nnU-Net's split.
    `setting` is what the user chooses the fold with, for messages.
    """
    base = source.folder.parent
    splits_file = _splits_file(source)
    if splits_file.is_file():
        splits = read_splits(splits_file, "correct it, or delete it to have nnU-Net's own split")
    elif (base / "gt_segmentations").is_dir():
        if len(source.cases) < N_FOLDS:
            raise MiMError(
                f"{source.dataset} has {len(source.cases)} cases, too few for nnU-Net's {N_FOLDS} folds: "
                f"{'leave out -f, or ' if setting == '-f' else ''}write a split of your own into {splits_file}"
            )
        from nnunetv2.utilities.crossval_split import generate_crossval_split  # scikit-learn takes a second to import

        splits = generate_crossval_split(list(source.cases), seed=12345, n_splits=N_FOLDS)
    else:
        return (), ()
    if not 0 <= fold < len(splits):
        count = f"{len(splits)} folds"
        raise MiMError(f"fold {fold} does not exist in {splits_file} ({count}): choose another with {setting}")
    if not len(splits[fold]["val"]):
        where = f"fold {fold} in {splits_file}"
        raise MiMError(f"{where} has no validation case: name some, or choose another with {setting}")
    train, val = (tuple(splits[fold][part]) for part in ("train", "val"))
    if len({*train, *val}) < len(train) + len(val):
        (name, _), *_ = Counter((*train, *val)).most_common(1)
        where = f"fold {fold} in {splits_file} names {name} twice"
        raise MiMError(f"{where}: leave it once, in train or in val")
    return train, val


def _splits_file(source: Source) -> Path:
    return source.folder.parent / "splits_final.json"


def labelled_count(labels: str, total: int, what: str) -> int:
    """How many of `total` cases or patients are labelled: a number, a percentage (rounded up, at least one), or all.

    Raises MiMError for anything else, or more than there are; `what` says what there are `total` of.
    """
    amount = labels if labels != "all" else "100%"
    number, maximum = amount.removesuffix("%"), 100 if amount.endswith("%") else total
    if not (number.isascii() and number.isdigit()) or not 1 <= int(number) <= maximum:
        numbers = f"numbers from 1 to {total} ({what})"
        raise MiMError(f"labels {labels}: give {numbers}, percentages from 1% to 100%, or all")
    return -(-total * int(number) // maximum)
