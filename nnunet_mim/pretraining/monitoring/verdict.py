"""One honest sentence about a pretraining run, from its measurements on held-out cases."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from nnunet_mim.config import PretrainConfig

Rows = Sequence[Mapping[str, float]]

TOO_EARLY = "too early to say"
LEARNING = "learning"
PLATEAUED = "plateaued"
COLLAPSED = "collapsed"
WORSE = "worse than in-filling"

FEWEST = 3
"""measurements, below which nothing is said"""
STRETCH = 5
"""fewest measurements that a plateau is judged on; the last quarter where that is more"""
SMALL = 0.01
"""a relative change that counts as none"""
SURE = 3.0
"""standard errors that a change must be away from none"""
JUMP = 4.0
"""median steps from one measurement to the next, above both neighbours, that make a jump"""
NOISE_ROWS = 8
"""fewest measurements that the noise is estimated from; the last quarter where that is more"""
LOWEST_RANK = 3.0
"""effective rank of the features below which they say next to nothing"""
LOWEST_STD = 0.05
"""spread of the features (1 = all directions) below which all of them are the same"""
AT_CHANCE = 0.02
"""relative distance from the alignment loss of a blind guess that counts as none"""
WAS_BETTER = 0.9
"""share of the alignment loss of a blind guess that a network that has learnt something has been below"""


class Verdict(NamedTuple):
    """What to think of a run."""

    kind: str
    """one of the five constants of this module"""
    sentence: str
    """begins with the kind"""


class Trend(NamedTuple):
    """Straight line through one column over a stretch of measurements."""

    first: float
    """start of the line"""
    last: float
    """end of the line"""
    error: float
    """standard error of `last` − `first`"""

    @property
    def fall(self) -> float:
        """Relative fall from start to end; negative for a rise."""
        return (self.first - self.last) / max(abs(self.first), 1e-12)

    @property
    def falls(self) -> bool:
        """Falls by more than a little and more than the noise explains."""
        return self.fall > SMALL and self.first - self.last > SURE * self.error

    @property
    def rises(self) -> bool:
        """The same, upwards."""
        return -self.fall > SMALL and self.last - self.first > SURE * self.error


def verdict(rows: Rows, warmup_iterations: float = 0, level_weights: Sequence[float] = (1.0, 1.0, 1.0)) -> Verdict:
    """Judge a run.

    Args:
        rows: measurements, oldest first: `iteration`, `val/level1/reconstruction`, `baseline/level1/infill` and the
            other columns of val.csv; those that are missing (or not a number) are not judged.
        warmup_iterations: in which the learning rate still rises.
        level_weights: of the reconstruction losses; a level of weight 0 is not trained, and so not judged.

    Returns:
        `collapsed`: features, or what alignment compares, are all the same, or the loss is no number any more.
        `too early to say`: fewer than 3 measurements, or warm-up not over. `learning`: the reconstruction loss of a
        level still falls by more than 1 % and more than its noise over the last quarter. Otherwise `worse than
        in-filling` if a level is, else `plateaued`.
    """
    untrained = {f"val/level{n}/reconstruction" for n, weight in enumerate(level_weights, start=1) if not weight}
    rows = [
        {name: value for name, value in row.items() if name not in untrained}
        for row in rows
        if math.isfinite(row.get("iteration", math.nan))
    ]
    if broken := _collapse(rows):
        return Verdict(COLLAPSED, f"{COLLAPSED}: {broken}")
    if len(rows) < FEWEST:
        return Verdict(TOO_EARLY, f"{TOO_EARLY}: {len(rows)} measurements on held-out cases, {FEWEST} are needed")
    last = rows[-1]["iteration"]
    if last <= warmup_iterations:
        warmup = f"{last:.0f} of {warmup_iterations:.0f} warm-up iterations done"
        return Verdict(TOO_EARLY, f"{TOO_EARLY}: {warmup}")

    if len(rows) > STRETCH and rows[0]["iteration"] == 0:
        rows = rows[1:]  # the untrained network: what it takes to say nothing wrong is no progress
    start, stop, trends = _last_stretch(rows)
    if not trends:
        return Verdict(TOO_EARLY, f"{TOO_EARLY}: no reconstruction loss on held-out cases")
    if len(rows) <= 2 * STRETCH and _no_better(rows, "token_mean").keys() == trends.keys():
        return Verdict(TOO_EARLY, f"{TOO_EARLY}: no level is better than predicting each token's mean yet")
    worse = _no_better(rows, "infill")
    if any(trend.falls for trend in trends.values()):
        ends = f"from iteration {rows[start]['iteration']:.0f} to {rows[stop - 1]['iteration']:.0f}"
        return Verdict(LEARNING, f"{LEARNING}: {ends} the held-out loss {_changes(trends)}{_compared(rows, worse)}")
    if better := _new_bests(rows, start):
        falls = _and([f"{fall:.1%} at {name}" for name, fall in better.items()])
        since = f"since iteration {rows[start]['iteration']:.0f} the best held-out loss fell by {falls}"
        return Verdict(LEARNING, f"{LEARNING}: {since}{_compared(rows, worse)}")
    if len(rows) < STRETCH:
        return Verdict(TOO_EARLY, f"{TOO_EARLY}: {len(rows)} measurements, and no level improved")

    flat = _flat_since(rows, start)
    said = f"no level improved beyond its noise since iteration {rows[flat]['iteration']:.0f}"
    if useless := _no_better(rows, "token_mean"):
        said += f", and {_and(list(useless))} no better than predicting each token's mean"
    if rising := [name for name, trend in _trends(rows, flat).items() if trend.rises]:
        said += f", and {_and(rising)} got worse (the network learns the training cases by heart)"
    if worse:
        return Verdict(WORSE, f"{WORSE}: {_beside(worse)}; {said}")
    return Verdict(PLATEAUED, f"{PLATEAUED}: {said}{_compared(rows, worse)}")


def verdict_on(history: Rows, config: PretrainConfig) -> Verdict:
    """`verdict` on a run with these settings."""
    return verdict(history, config.warmup_fraction * config.iterations, config.level_weights)


def levels_in(rows: Rows) -> list[str]:
    """`level1`, … of which the last row has a reconstruction loss."""
    names = (re.fullmatch(r"val/(level\d)/reconstruction", name) for name in (rows[-1] if rows else ()))
    return sorted(match[1] for match in names if match)


def shown(level: str) -> str:
    """`level1` → `level 1`."""
    return level.replace("level", "level ")


def _column(rows: Rows, name: str) -> tuple[np.ndarray, np.ndarray]:
    """Iterations and values of a column, where it has a finite value."""
    pairs = [(row["iteration"], row[name]) for row in rows if math.isfinite(row.get(name, math.nan))]
    x, y = np.array(pairs, dtype=float).reshape(-1, 2).T
    return x, y


def _last_stretch(rows: Rows) -> tuple[int, int, dict[str, Trend]]:
    """First and one-past-last number of the rows that are judged, and their trends: the last quarter, at least
    `STRETCH` rows; but where no fall is seen there, the same without the very last one, which may be a bad measurement.
    """
    stop = len(rows)
    start = stop - _shortest(rows)
    trends = _trends(rows, start)
    before = _trends(rows, start - 1, stop - 1) if start > 0 else {}
    if any(trend.falls for trend in before.values()) and not any(trend.falls for trend in trends.values()):
        return start - 1, stop - 1, before
    return start, stop, trends


def _flat_since(rows: Rows, start: int) -> int:
    """Number of the earliest row from which on no level falls, neither to the end nor over the first few rows."""
    length = _shortest(rows)
    while start > 0:
        both = [*_trends(rows, start - 1).values(), *_trends(rows, start - 1, start - 1 + length).values()]
        if any(trend.falls for trend in both):
            break
        start -= 1
    return start


def _shortest(rows: Rows) -> int:
    """Fewest measurements that are judged."""
    return min(len(rows), max(STRETCH, math.ceil(len(rows) / 4)))


def _new_bests(rows: Rows, start: int) -> dict[str, float]:
    """Levels whose lowest loss from row `start` on is below the lowest before by more than a little and than the noise,
    and the relative fall: what a slow fall with much noise looks like.
    """
    falls = {}
    for name, column in _loss_columns(rows).items():
        (_, before), (_, after), (_, all_of_it) = (_column(part, column) for part in (rows[:start], rows[start:], rows))
        if len(before) and len(after):
            fall = before.min() - after.min()
            if fall > max(SMALL * abs(before.min()), SURE * _noise(_without_jumps(all_of_it))):
                falls[name] = float(fall / abs(before.min()))
    return falls


def _loss_columns(rows: Rows) -> dict[str, str]:
    """Column of the reconstruction loss by level, or that of the whole loss where there are no levels."""
    return {shown(level): f"val/{level}/reconstruction" for level in levels_in(rows)} or {"all levels": "val/loss"}


def _trends(rows: Rows, start: int, stop: int | None = None) -> dict[str, Trend]:
    """Trend of the reconstruction loss over some rows by level, or of the whole loss where there are no levels."""
    trends = {}
    for name, column in _loss_columns(rows).items():
        x, y = _column(rows, column)
        y = _without_jumps(y)
        first, *_, last = [row["iteration"] for row in rows[start:stop]] * 2
        inside = (x >= first) & (x <= last)
        trends[name] = _trend(x[inside], y[inside], _noise(y))
    return {name: trend for name, trend in trends.items() if trend is not None}


def _trend(x: np.ndarray, y: np.ndarray, noise: float) -> Trend | None:
    """Least-squares line; None for fewer than two points."""
    if len(x) < 2 or x[0] == x[-1]:
        return None
    centred = x - x.mean()
    spread = float((centred**2).sum())
    slope = float((centred * y).sum()) / spread
    span = float(x[-1] - x[0])
    first = float(y.mean()) + slope * float(centred[0])
    return Trend(first, first + slope * span, noise * span / math.sqrt(spread))


def _without_jumps(y: np.ndarray) -> np.ndarray:
    """A column in which a measurement that lies far above both its neighbours is their mean: at a high learning rate a
    held-out loss jumps now and then, and is back at the next measurement.
    """
    if len(y) < 4:
        return y
    far = JUMP * np.median(np.abs(np.diff(y)))
    jumps = np.flatnonzero(y[1:-1] - np.maximum(y[:-2], y[2:]) > far) + 1
    smooth = y.copy()
    smooth[jumps] = (y[jumps - 1] + y[jumps + 1]) / 2
    return smooth


def _noise(y: np.ndarray) -> float:
    """Standard deviation of the end of a column about its own smooth course, from its second differences; 0 below three
    points.
    """
    later = y[-max(NOISE_ROWS, len(y) // 4) :]
    return float(np.sqrt(np.mean(np.diff(later, 2) ** 2) / 6)) if len(later) > 2 else 0.0


def _no_better(rows: Rows, guess: str) -> dict[str, tuple[float, float]]:
    """Levels that are no better than a trivial guess, `token_mean` or `infill`: their loss and that of the guess, means
    of the last two measurements.
    """
    levels = {}
    for level in levels_in(rows):
        loss, other = (
            _column(rows[-2:], name)[1] for name in (f"val/{level}/reconstruction", f"baseline/{level}/{guess}")
        )
        if len(loss) and len(other) and loss.mean() > (1 - SMALL) * other.mean():
            levels[shown(level)] = float(loss.mean()), float(other.mean())
    return levels


def _collapse(rows: Rows) -> str:
    """How the run is broken, or an empty text."""
    losses = [v for n, v in rows[-1].items() if re.fullmatch(r"val/(loss|level\d/reconstruction)", n)] if rows else []
    if not all(math.isfinite(loss) for loss in losses):
        return f"at iteration {rows[-1]['iteration']:.0f} the held-out loss is no finite number"
    _, rank = _column(rows[-2:], "val/features/rank")
    _, std = _column(rows[-2:], "val/features/std")
    if len(rank) and rank.max() < LOWEST_RANK:
        return f"the encoder's features have an effective rank of {rank[-1]:.1f}: they say next to nothing"
    if len(std) and std.max() < LOWEST_STD:
        return f"the encoder's features are all but the same everywhere (spread {std[-1]:.3f}, 1 would be good)"
    fallen = [level for level in levels_in(rows) if _fell_to_chance(rows, level)]
    aligned = [level for level in levels_in(rows) if len(_column(rows[-1:], f"val/{level}/alignment_chance")[0])]
    if fallen and fallen == aligned:
        return f"alignment fell back to chance at {_and([shown(level) for level in fallen])}"
    return ""


def _fell_to_chance(rows: Rows, level: str) -> bool:
    """Whether the last two alignment losses are those of a blind guess, after better ones."""
    _, loss = _column(rows, f"val/{level}/alignment")
    _, chance = _column(rows[-1:], f"val/{level}/alignment_chance")
    if len(loss) < FEWEST or not len(chance) or not 0 < chance[0] < 1:
        return False
    blind = -math.log(chance[0])
    return bool(loss.min() < WAS_BETTER * blind and (np.abs(loss[-2:] - blind) < AT_CHANCE * blind).all())


def _changes(trends: Mapping[str, Trend]) -> str:
    """`fell by 3.7% at level 1 and 5.5% at level 2, and did not change beyond its noise at level 3`."""
    falls = [f"{trend.fall:.1%} at {name}" for name, trend in trends.items() if trend.falls]
    rises = [f"{-trend.fall:.1%} at {name}" for name, trend in trends.items() if trend.rises]
    others = [name for name, trend in trends.items() if not (trend.falls or trend.rises)]
    parts = [f"fell by {_and(falls)}" if falls else "", f"rose by {_and(rises)}" if rises else ""]
    parts.append(f"did not change beyond its noise at {_and(others)}" if others else "")
    return ", and ".join(part for part in parts if part)


def _compared(rows: Rows, worse: Mapping[str, tuple[float, float]]) -> str:
    """Clause on in-filling, where it has been measured."""
    if worse:
        return f"; {_beside(worse)}"
    known = any(len(_column(rows[-2:], f"baseline/{level}/infill")[0]) for level in levels_in(rows))
    return "; every level is better than in-filling" if known else ""


def _beside(worse: Mapping[str, tuple[float, float]]) -> str:
    losses = _and([f"{loss:.3f} against {infill:.3f}" for loss, infill in worse.values()])
    still = "is still no better" if len(worse) == 1 else "are still no better"
    return f"{_and(list(worse))} {still} than in-filling ({losses})"


def _and(words: Sequence[str]) -> str:
    return " and ".join([", ".join(words[:-1]), words[-1]] if len(words) > 1 else words)
