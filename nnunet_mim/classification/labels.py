"""labels.csv: one row per case, one column per target."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path

import numpy as np

from nnunet_mim.errors import MiMError
from nnunet_mim.nnunet.datasets import required_folder
from nnunet_mim.system.untrusted import MAX_TABLE, limited, table_rows

LABELS_FILE = "labels.csv"
MISSING = {"", "na", "n/a", "nan"}
"""what stands for a missing value, in lower case"""


@dataclass(frozen=True)
class Target:
    """What is to be told from a case: one column of the table."""

    name: str
    classes: tuple[str, ...]
    """in order of their numbers, or of the alphabet; of two the second is the positive one"""
    labels: np.ndarray
    """(N,) int64: class of each case, -1 where it is not known"""

    @property
    def known(self) -> np.ndarray:
        """(N,) bool: cases whose class is known."""
        return self.labels >= 0


@dataclass(frozen=True)
class LabelTable:
    """The cases that have a label of any target, sorted by name."""

    cases: tuple[str, ...]
    patients: tuple[str, ...]
    """one per case; the case itself where the table has no such column"""
    targets: tuple[Target, ...]
    covariates: np.ndarray
    """(N, number of covariates) float64, NaN where a value is missing"""

    def target(self, name: str) -> Target:
        """A target by its name."""
        return next(target for target in self.targets if target.name == name)


def labels_file(dataset: str, given: str = "") -> Path:
    """The table of a dataset, or another one that was given. Raises MiMError where nnUNet_raw is needed and not set."""
    return Path(given) if given else Path(required_folder("nnUNet_raw"), dataset, LABELS_FILE)


def cases_where(path: Path, column: str, low: str, high: str) -> set[str]:
    """Cases whose number in a column is at least `low` and below `high`. Raises MiMError as `read_labels`."""
    for text in (low, high):
        if not _is_number(text):
            raise MiMError(f"--where {column} {low} {high}: '{text}' is no number")
    rows = _rows(path, ["case", column])
    numbers = {case: _number(path, row, column) for case, row in zip(_cases(path, rows), rows, strict=True)}
    return {case for case, number in numbers.items() if float(low) <= number < float(high)}


def read_labels(
    path: Path, targets: Sequence[str], covariates: Sequence[str] = (), per_patient: bool = False
) -> LabelTable:
    """Read some columns of a table with the columns `case`, optionally `patient`, and one per target.

    Commas, semicolons and tabs separate columns. Cases without any label of the targets are left out.

    Args:
        path: CSV file.
        targets: columns to tell.
        covariates: columns of numbers.
        per_patient: all cases of a patient have to have the same classes.

    Raises:
        MiMError: see `docs/classification.md`.
    """
    rows = _rows(path, ["case", *targets, *covariates])
    cases = _cases(path, rows)
    patients = [row.get("patient", "") or case for row, case in zip(rows, cases, strict=True)]
    table = LabelTable(
        tuple(cases), tuple(patients),
        tuple(_target(path, name, [row[name] for row in rows]) for name in targets),
        np.array([[_number(path, row, name) for name in covariates] for row in rows]).reshape(len(rows), -1),
    )  # fmt: skip
    if per_patient:
        _check_patients(path, table)
    with_label = np.any([target.known for target in table.targets], axis=0)
    return _take(table, sorted(np.flatnonzero(with_label), key=lambda row: cases[row]))


def check_cases(table: LabelTable, preprocessed: Collection[str], left_out: Collection[str], path: Path) -> LabelTable:
    """The table without cases that mim_prepare has left out.

    Args:
        table: as of `read_labels`.
        preprocessed: names of the preprocessed cases.
        left_out: names of cases that `mim_prepare` has left out, with a reason in its log.
        path: of the table.

    Raises:
        MiMError: the table names cases that do not exist, or none that does.
    """
    unknown = [case for case in table.cases if case not in preprocessed and case not in left_out]
    if unknown:
        raise MiMError(
            f"{path} names {len(unknown)} cases that are not preprocessed, {unknown[0]} first: correct the name, "
            "preprocess the case, or remove its row"
        )
    rows = [row for row, case in enumerate(table.cases) if case in preprocessed]
    if not rows:
        raise MiMError(f"{path} names no preprocessed case: preprocess the dataset, or correct the column 'case'")
    return _take(table, rows)


def check_classes(table: LabelTable, n_folds: int, path: Path) -> None:
    """Raise MiMError for a target with one class only, or a class with fewer patients than folds."""
    patients = np.array(table.patients)
    for target in table.targets:
        present = [number for number in range(len(target.classes)) if (target.labels == number).any()]
        if len(present) < 2:
            only = f" ({target.classes[present[0]]})" if present else ""
            raise MiMError(f"{path}: column '{target.name}' has one value only{only}: choose another --target")
        for number, name in enumerate(target.classes):
            n = len(set(patients[target.labels == number]))
            if n < n_folds:
                raise MiMError(
                    f"{path}: class '{name}' of '{target.name}' has {n} patients, fewer than {n_folds} folds: join "
                    "classes, leave their values empty, or give fewer --folds"
                )


def _rows(path: Path, needed: Sequence[str]) -> list[dict[str, str]]:
    """The rows of a CSV file by name of column, without spaces around values; every row names a case."""
    try:
        text = limited(path, MAX_TABLE).decode("utf-8-sig")
        heading = text.lstrip().split("\n", 1)[0]
        lines = enumerate(table_rows(text, max(",;\t", key=heading.count), one_line=True), start=1)
        rows = {line: row for line, row in lines if any(row)}
    except FileNotFoundError:
        raise MiMError(f"{path} does not exist: write it with the columns case and {', '.join(needed[1:])}") from None
    except OSError as error:
        raise MiMError(f"cannot read {path} ({error.strerror}): give another file with --labels") from None
    except UnicodeDecodeError:
        raise MiMError(f"{path} is no UTF-8 text: save it as CSV UTF-8") from None
    except ValueError as error:
        raise MiMError(f"{path} is no table ({error}): save it as CSV UTF-8") from None
    if len(rows) < 2:
        raise MiMError(f"{path} has no rows: write one per case below the heading")
    names = rows.pop(min(rows))
    if twice := [name for name, n in Counter(names).items() if name and n > 1]:
        raise MiMError(f"{path} has two columns '{twice[0]}': rename one")
    if missing := [name for name in needed if name not in names]:
        raise MiMError(f"{path} has no column '{missing[0]}': it has {', '.join(names)}")
    for line, row in rows.items():
        if len(row) != len(names):
            raise MiMError(f"{path}: row {line} has {len(row)} values, the heading {len(names)}: correct the row")
        if not row[names.index("case")]:
            raise MiMError(f"{path}: row {line} has no case: name it, or remove the row")
    return [dict(zip(names, row, strict=True)) for row in rows.values()]


def _cases(path: Path, rows: Sequence[Mapping[str, str]]) -> list[str]:
    seen: dict[str, Mapping[str, str]] = {}
    for row in rows:
        before = seen.setdefault(row["case"], row)
        if before is not row:
            different = [name for name in row if row[name] != before[name]]
            what = f"with different values of '{different[0]}'" if different else "twice"
            raise MiMError(f"{path} lists case '{row['case']}' {what}: leave one row")
    return list(seen)


def _target(path: Path, name: str, texts: Sequence[str]) -> Target:
    known = {text for text in texts if text.lower() not in MISSING}
    if not known:
        raise MiMError(f"{path}: column '{name}' is empty: choose another --target")
    are_numbers = all(map(_is_number, known))
    classes = sorted(known, key=float) if are_numbers else sorted(known)
    for one, other in pairwise(classes) if are_numbers else ():
        if float(one) == float(other):
            raise MiMError(f"{path}: column '{name}' says {one} and {other}, the same number: write it in one way")
    number = {text: i for i, text in enumerate(classes)}
    return Target(name, tuple(classes), np.array([number.get(text, -1) for text in texts], np.int64))


def _is_number(text: str) -> bool:
    try:
        return bool(np.isfinite(float(text))) and "_" not in text
    except ValueError:
        return False


def _number(path: Path, row: Mapping[str, str], name: str) -> float:
    if row[name].lower() in MISSING:
        return float("nan")
    if not _is_number(row[name]):
        what = f"'{name}' of case '{row['case']}' is '{row[name]}', no number"
        raise MiMError(f"{path}: {what}: correct it, or leave it empty")
    return float(row[name])


def _check_patients(path: Path, table: LabelTable) -> None:
    for target in table.targets:
        first: dict[str, int] = {}
        for row in np.flatnonzero(target.known).tolist():
            before = first.setdefault(table.patients[row], row)
            if target.labels[before] != target.labels[row]:
                raise MiMError(
                    f"{path}: patient '{table.patients[row]}' has different values of '{target.name}' in "
                    f"'{table.cases[before]}' and '{table.cases[row]}': correct one, or leave out --per_patient"
                )


def _take(table: LabelTable, rows: Sequence[int]) -> LabelTable:
    return LabelTable(
        tuple(table.cases[row] for row in rows),
        tuple(table.patients[row] for row in rows),
        tuple(replace(target, labels=target.labels[list(rows)]) for target in table.targets),
        table.covariates[list(rows)],
    )
