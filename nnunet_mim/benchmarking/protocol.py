"""The few-shot protocol: what pretraining is worth with few and with all labels."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from nnunet_mim.benchmarking.cell import Arm, Cell, Length, nested_subset


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

    def cells(self) -> dict[tuple[int, int, str], Cell]:
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


def cell_folder(output: Path, place: tuple[int, int, str]) -> Path:
    """Where a training of the protocol lies."""
    count, seed, arm = place
    return output / f"labels_{count:04d}" / f"seed_{seed}" / arm


def describe(place: tuple[int, int, str]) -> str:
    """A training in words."""
    return f"{place[2]}, {place[0]} labels, seed {place[1]}"


def mean_dice(result: dict[str, Any]) -> float:
    """Over labels, then over cases; without those that are NaN."""
    by_case = [np.nanmean([label["dice"] for label in labels.values()]) for labels in result["cases"].values()]
    return float(np.nanmean(by_case))
