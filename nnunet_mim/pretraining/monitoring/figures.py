"""The figures of a run as attributes, and their names in train.csv, val.csv, TensorBoard and a checkpoint's
`loss_history`, which are made and read nowhere else.

A figure is a number, the tensor of one step, or the array of a whole column; None where it was not measured.

To log one more, add a field below (with `BY_TARGETS` if it is a mean over target tokens) and fill it in
`objective/levels.py`, or in `held_out.py` for val.csv alone. Its column is named after it.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import Field, dataclass, field, fields, replace
from typing import Any, Generic, TypeVar

T = TypeVar("T")
S = TypeVar("S")
F = TypeVar("F", bound="LevelFigures[Any] | TrainingFigures[Any]")

LEVELS = (1, 2, 3)
"""numbers of the levels, outermost first; a run whose data is thin skips the first ones"""

# How a field differs from the others; every field whose default is None is a figure.
BY_TARGETS = {"by_targets": True}
"""its mean is weighted by the number of target tokens"""
NO_COLUMN = {"column": None}


@dataclass(frozen=True)
class LevelFigures(Generic[T]):
    """Figures of one level: shares of its sums over passes and ranks, or their means over steps or held-out crops."""

    number: int
    """1 to 3"""
    reconstruction: T | None = field(default=None, metadata=BY_TARGETS)
    """mean over target tokens"""
    targets: T | None = None
    """number of target tokens"""
    padded_share: T | None = None
    """of the masked tokens"""
    flat_share: T | None = None
    """of the masked tokens"""
    alignment_top1: T | None = None
    """share of views whose own place is the most similar one"""
    alignment: T | None = None
    loss: T | None = None
    """weighted sum of the losses above"""
    unet: T | None = None
    """reconstruction loss of the U-Net around the encoder, where it learns; NaN in steps in which it does not"""
    nonfinite: T | None = field(default=None, metadata=NO_COLUMN)
    """(B,) number of views of each crop of this rank whose features are not finite"""

    @property
    def name(self) -> str:
        """`level1`"""
        return f"level{self.number}"

    @property
    def title(self) -> str:
        """`level 1`"""
        return f"level {self.number}"


@dataclass(frozen=True)
class GuessFigures(Generic[T]):
    """What trivial predictors reach at one level, see `trivial_losses`; PSNR in dB."""

    token_mean: T | None = None
    token_mean_psnr: T | None = None
    infill: T | None = None
    infill_psnr: T | None = None


@dataclass(frozen=True)
class HeldOutLevel(LevelFigures[T]):
    """Figures of one level on held-out cases."""

    psnr: T | None = None
    """dB, of voxels with each token's true mean and standard deviation put back"""
    alignment_chance: T | None = field(default=None, metadata=NO_COLUMN)
    """`alignment_top1` of a blind guess"""
    guesses: GuessFigures[T] = field(default_factory=GuessFigures)
    datasets: Mapping[str, T] = field(default_factory=dict)
    """reconstruction loss by dataset, where there are several"""


@dataclass(frozen=True)
class ProbeFigures(Generic[T]):
    """Dice of the label probe."""

    dice: T | None = None
    """mean over labels"""
    labels: Mapping[int, T] = field(default_factory=dict)


@dataclass(frozen=True)
class TrainingFigures(Generic[T]):
    """Figures of one step, or their means over the steps since the last row of train.csv."""

    iteration: Any = math.nan
    levels: tuple[LevelFigures[T], ...] = ()
    grad_norm: T | None = None
    """before clipping"""
    skipped: T | None = None
    """1 for a step whose gradient was not finite; number of such steps"""
    loss: T | None = None
    """sum of the levels"""
    learning_rate: T | None = field(default=None, metadata={"column": "lr"})
    crops_per_s: T | None = field(default=None, metadata={"column": "crops_per_s"})
    unread: T | None = None
    """number of cases that could not be read any more"""
    crops: Mapping[str, T] = field(default_factory=dict)
    """number of crops so far by dataset"""

    def level(self, number: int) -> LevelFigures[T]:
        """A level, empty where it was not computed."""
        return next((level for level in self.levels if level.number == number), LevelFigures(number))

    def row(self) -> dict[str, T]:
        """Figures by column, in the order of train.csv."""
        row: dict[str, T | None] = {}
        for level in self.levels:
            row |= _named(level, f"train/level{level.number}/")
        row |= _named(self, "train/")
        row |= {f"train/crops/{dataset}": number for dataset, number in self.crops.items()}
        return {name: value for name, value in row.items() if value is not None}

    @classmethod
    def from_row(cls, row: Mapping[str, T]) -> TrainingFigures[T]:
        """Read a row by `row`, or of another version: what is unknown is left out, what is missing is None."""
        levels = tuple(LevelFigures(n, **_read(LevelFigures, row, f"train/level{n}/")) for n in LEVELS)
        return cls(
            row.get("iteration", math.nan), levels, crops=_by_key(row, "train/crops/(.+)"), **_read(cls, row, "train/")
        )


@dataclass(frozen=True)
class Measurement(Generic[T]):
    """Figures on held-out cases: a row of val.csv."""

    iteration: Any = math.nan
    levels: tuple[HeldOutLevel[T], ...] = ()
    loss: T | None = None
    """sum of the levels"""
    feature_rank: T | None = field(default=None, metadata={"column": "val/features/rank"})
    """effective rank of the encoder's features, see held_out.py"""
    feature_std: T | None = field(default=None, metadata={"column": "val/features/std"})
    """their spread; 1 in all directions, 0 all the same"""
    probe: ProbeFigures[T] = field(default_factory=ProbeFigures)

    def level(self, number: int) -> HeldOutLevel[T]:
        """A level, empty where it was not measured."""
        return next((level for level in self.levels if level.number == number), HeldOutLevel(number))

    @property
    def reconstructed(self) -> tuple[HeldOutLevel[T], ...]:
        """The levels that have a reconstruction loss over at least one target token."""
        return tuple(level for level in self.levels if level.reconstruction is not None and level.targets != 0)

    def row(self) -> dict[str, T]:
        """Figures by column, in the order of val.csv."""
        row: dict[str, T | None] = {}
        datasets = list(dict.fromkeys(dataset for level in self.levels for dataset in level.datasets))
        for level in self.levels:
            row |= {f"val/{dataset}/level{level.number}": level.datasets.get(dataset) for dataset in datasets[:1]}
            row |= _named(level, f"val/level{level.number}/")
        for dataset in datasets[1:]:
            row |= {f"val/{dataset}/level{level.number}": level.datasets.get(dataset) for level in self.levels}
        row |= _named(self, "val/")
        for level in self.levels:
            row |= _named(level.guesses, f"baseline/level{level.number}/")
        row |= {f"val/level{level.number}/alignment_chance": level.alignment_chance for level in self.levels}
        row |= _named(self.probe, "val/probe/")
        row |= {f"val/probe/dice_{label}": dice for label, dice in self.probe.labels.items()}
        return {name: value for name, value in row.items() if value is not None}

    @classmethod
    def from_row(cls, row: Mapping[str, T]) -> Measurement[T]:
        """As `TrainingFigures.from_row`."""
        levels = tuple(
            HeldOutLevel(
                n,
                alignment_chance=row.get(f"val/level{n}/alignment_chance"),
                guesses=GuessFigures(**_read(GuessFigures, row, f"baseline/level{n}/")),
                datasets=_by_key(row, f"val/(.+)/level{n}"),
                **_read(HeldOutLevel, row, f"val/level{n}/"),
            )
            for n in LEVELS
        )
        labels = {int(label): dice for label, dice in _by_key(row, r"val/probe/dice_(\d{1,9})").items()}
        probe = ProbeFigures(**_read(ProbeFigures, row, "val/probe/"), labels=labels)
        return cls(row.get("iteration", math.nan), levels, probe=probe, **_read(cls, row, "val/"))


def measurements_of(history: Iterable[Mapping[str, float]]) -> list[Measurement[float]]:
    """The rows of a checkpoint's `loss_history`."""
    return [Measurement.from_row(row) for row in history]


def mapped(function: Callable[..., Any], *figures: F) -> F:
    """Apply a function to every field that is a figure, of one object or of several alike; the other fields stay."""
    names = [f.name for f in fields(figures[0]) if f.default is None and getattr(figures[0], f.name) is not None]
    return replace(figures[0], **{name: function(*(getattr(one, name) for one in figures)) for name in names})


def averaged(level: Sequence[LevelFigures[S]], mean: Callable[[list[S], list[S] | None], T]) -> LevelFigures[T]:
    """Figures of one level, averaged over steps or crops by `mean`, a function of values and weights: the numbers of
    target tokens, or None where all weigh the same.
    """
    targets = [one.targets for one in level if one.targets is not None]
    columns = [f for f in fields(LevelFigures) if _column(f) is not None and getattr(level[0], f.name) is not None]
    means = {
        f.name: mean([getattr(one, f.name) for one in level], targets if f.metadata == BY_TARGETS else None)
        for f in columns
    }
    return LevelFigures(level[0].number, **means)


def _column(figure: Field[Any], prefix: str = "") -> str | None:
    """Name of a field in a row; None for a field that is not a column."""
    return figure.metadata.get("column", prefix + figure.name) if figure.default is None else None


def _named(figures: Any, prefix: str) -> dict[str, Any]:
    return {name: getattr(figures, f.name) for f in fields(figures) if (name := _column(f, prefix)) is not None}


def _read(kind: Any, row: Mapping[str, Any], prefix: str) -> dict[str, Any]:
    return {f.name: row.get(name) for f in fields(kind) if (name := _column(f, prefix)) is not None}


def _by_key(row: Mapping[str, T], pattern: str) -> dict[str, T]:
    """Values by the part of their name that a group of a pattern stands for."""
    return {match[1]: value for name, value in row.items() if (match := re.fullmatch(pattern, name))}
