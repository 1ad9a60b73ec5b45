"""Few labels: the training patients of a fold that count as labelled."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from nnunet_mim.classification.folds import Folds, joint_classes
from nnunet_mim.classification.labels import LabelTable
from nnunet_mim.errors import MiMError
from nnunet_mim.nnunet.splits import labelled_count

FEWEST = 2
"""patients of each class: one to fit on, and one for the inner split"""


def labelled_folds(folds: Folds, table: LabelTable, labelled: str, seed: int) -> Folds:
    """The folds with the cases of some training patients only; the validation cases stay.

    Args:
        folds: with all training cases.
        table: of all cases.
        labelled: the training patients of a fold that are kept: a number, a percentage (10%: rounded up), or all.
        seed: of the choice; of one seed a larger number of patients holds the smaller ones.

    Raises:
        MiMError: `labelled` is none of these, or leaves fewer than FEWEST patients of a class.
    """
    if labelled == "all":
        return folds
    chosen = [_labelled_rows(table, rows, labelled, seed, fold) for fold, rows in enumerate(folds.training)]
    return replace(folds, training=tuple(chosen))


def labelled_order(labels: np.ndarray, patients: Sequence[str], seed: int) -> list[str]:
    """Patients in the order in which they get their labels: the first ones have each class in its share.

    A patient counts as the rarest class among its cases. The first n patients of the order have as many of a class as
    Webster's apportionment of n seats gives it; within a class the order is random.

    Args:
        labels: (N,) classes of cases, from 0.
        patients: (N,).
        seed: of the order.
    """
    counts = np.bincount(labels)
    class_of: dict[str, int] = {}
    for patient, label in zip(patients, labels.tolist(), strict=True):
        rarest = class_of.get(patient, label)
        class_of[patient] = min(rarest, label, key=lambda k: (counts[k], k))
    generator = np.random.default_rng(seed)
    places = []
    for label in sorted(set(class_of.values())):
        members = generator.permutation(sorted(p for p, own in class_of.items() if own == label)).tolist()
        places += [((rank + 0.5) / len(members), label, patient) for rank, patient in enumerate(members)]
    return [patient for _, _, patient in sorted(places)]


def _labelled_rows(table: LabelTable, rows: Sequence[int], labelled: str, seed: int, fold: int) -> tuple[int, ...]:
    """The rows of labelled patients among the training rows of a fold. Raises MiMError as `labelled_folds`."""
    patients = [table.patients[row] for row in rows]
    joint = joint_classes([target.labels[list(rows)] for target in table.targets])
    order = labelled_order(joint, patients, seed)
    count = labelled_count(labelled, len(order), f"the training patients of fold {fold}")
    chosen = set(order[:count])
    kept = tuple(row for row in rows if table.patients[row] in chosen)
    for target in table.targets:
        for number, name in enumerate(target.classes):
            found = {table.patients[row] for row in kept if target.labels[row] == number}
            if len(found) < FEWEST:
                raise MiMError(
                    f"labels {labelled}: {len(found)} of {count} patients of fold {fold} have '{target.name}' "
                    f"'{name}', at least {FEWEST} are needed: give more labels"
                )
    return kept
