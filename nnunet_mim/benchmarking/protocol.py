"""The few-shot protocol: what pretraining is worth with few and with all labels."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from nnunet_mim.benchmarking.cell import Arm, Cell, Length, nested_subset

Place = tuple[int, int, str]
"""(labels, seed, arm)"""


@dataclass(frozen=True)
class Protocol:
    """What is run."""

    arms: tuple[Arm, ...]
    fold: int
    labels: tuple[int, ...]
    """numbers of training cases, ascending"""
    seeds: int
    length: Length
    settings: dict[str, dict[str, Any]]
    """of MiM arms, by name"""
    train_cases: tuple[str, ...]
    val_cases: tuple[str, ...]

    def cells(self) -> dict[Place, Cell]:
        """All trainings by (labels, seed, arm); seed by seed, so that every arm has a result early."""
        return {
            (count, seed, arm.name): Cell(
                arm, self.fold, nested_subset(self.train_cases, count, seed), self.val_cases, seed, self.length,
                self.settings.get(arm.name, {}),
            )
            for seed in range(self.seeds)
            for count in self.labels
            for arm in self.arms
        }  # fmt: skip


def cell_folder(output: Path, place: Place) -> Path:
    """Where a training of the protocol lies."""
    count, seed, arm = place
    return output / f"labels_{count:04d}" / f"seed_{seed}" / arm


def describe(place: Place) -> str:
    """A training in words."""
    return f"{place[2]}, {place[0]} labels, seed {place[1]}"


def mean_dice(result: dict[str, Any]) -> float:
    """Over the labels that are in a case, then over cases."""
    return float(np.nanmean([case_value(labels, "dice") for labels in result["cases"].values()]))


def case_value(labels: dict[str, dict[str, float]], metric: str, label: str | None = None) -> float:
    """A metric of one case: of one label, or the mean over all that the reference has in it; NaN where it has none.

    What is found where nothing is counts separately (see `false_alarms`): it would make 0 of one arm's Dice where
    another's is undefined.
    """
    there = [found[metric] for name, found in labels.items() if label in (None, name) and found["n_ref"]]
    return float(np.mean(there)) if there else float("nan")


def false_alarms(result: dict[str, Any]) -> tuple[int, int]:
    """Of all labels of all cases that the reference does not have: how many were found all the same, and how many there
    are.
    """
    absent = [found for labels in result["cases"].values() for found in labels.values() if not found["n_ref"]]
    return sum(bool(found["n_pred"]) for found in absent), len(absent)
