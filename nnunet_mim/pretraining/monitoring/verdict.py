"""One honest sentence about a pretraining run, from its measurements on held-out cases."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import NamedTuple

import numpy as np

from nnunet_mim.config import PretrainConfig
from nnunet_mim.pretraining.monitoring.figures import HeldOutLevel, Measurement

Rows = Sequence[Measurement[float]]
"""measurements, oldest first"""

TOO_EARLY = "too early to say"
LEARNING = "learning"
PLATEAUED = "plateaued"
COLLAPSED = "collapsed"
WORSE = "worse than in-filling"

MIN_MEASUREMENTS = 3
"""with fewer there is no verdict"""
MIN_STRETCH = 5
"""minimum number of measurements that a trend is judged on; the last quarter of them where that is more"""
MIN_CHANGE = 0.01
"""a smaller relative change counts as none"""
STANDARD_ERRORS = 3.0
"""a change by fewer may be noise"""
JUMP = 4.0
"""times the median step between measurements: a value that far above both its neighbours is an outlier"""
NOISE_ROWS = 8
"""minimum number of measurements that the noise is estimated from; the last quarter of them where that is more"""
MIN_RANK = 3.0
"""effective rank of the features below which they say next to nothing"""
MIN_STD = 0.05
"""spread of the features (1 = all directions) below which all of them are the same"""
AT_CHANCE = 0.02
"""maximum relative distance from the alignment loss of a blind guess that counts as none"""
BETTER_THAN_CHANCE = 0.9
"""share of the alignment loss of a blind guess; a network with a lower one has learnt something"""


class Verdict(NamedTuple):
    """What to think of a run."""

    kind: str
    """one of the five constants of this module"""
    sentence: str
    """begins with the kind"""


class _Series(NamedTuple):
    """The finite values of one figure."""

    iterations: np.ndarray
    values: np.ndarray


class _Trend(NamedTuple):
    """Straight line through one figure over a stretch of measurements."""

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
        """Whether it falls by more than MIN_CHANGE and than the noise explains."""
        return self.fall > MIN_CHANGE and self.first - self.last > STANDARD_ERRORS * self.error

    @property
    def rises(self) -> bool:
        """Whether it rises by as much."""
        return -self.fall > MIN_CHANGE and self.last - self.first > STANDARD_ERRORS * self.error


def verdict(rows: Rows, warmup_iterations: float = 0, level_weights: Sequence[float] = (1.0, 1.0, 1.0)) -> Verdict:
    """Judge a run.

    Args:
        rows: measurements, oldest first; figures that are missing (or not a number) are not judged.
        warmup_iterations: in which the learning rate still rises.
        level_weights: of the reconstruction losses; a level of weight 0 is not trained, and so not judged.

    Returns:
        `collapsed`: features, or what alignment compares, are all the same, or the loss is no number any more.
        `too early to say`: fewer than 3 measurements, or warm-up not over. `learning`: the reconstruction loss of a
        level still falls by more than 1 % and more than its noise over the last quarter. Otherwise `worse than
        in-filling` if a level is, else `plateaued`.
    """
    rows = [
        replace(row, levels=tuple(level for level in row.levels if level_weights[level.number - 1]))
        for row in rows
        if math.isfinite(row.iteration)
    ]
    kind, text = _judge(rows, warmup_iterations)
    return Verdict(kind, f"{kind}: {text}")


def _judge(rows: Rows, warmup_iterations: float) -> tuple[str, str]:
    """Kind of verdict, and what follows it in the sentence."""
    if broken := _collapse(rows):
        return COLLAPSED, broken
    if len(rows) < MIN_MEASUREMENTS:
        return TOO_EARLY, f"{len(rows)} measurements on held-out cases, {MIN_MEASUREMENTS} are needed"
    if rows[-1].iteration <= warmup_iterations:
        return TOO_EARLY, f"{rows[-1].iteration:.0f} of {warmup_iterations:.0f} warm-up iterations done"

    if len(rows) > MIN_STRETCH and rows[0].iteration == 0:
        rows = rows[1:]  # the untrained network: what it takes to say nothing wrong is no progress
    iterations, losses = [row.iteration for row in rows], _losses(rows)
    start, stop, trends = _last_stretch(iterations, losses)
    if not trends:
        return TOO_EARLY, "no reconstruction loss on held-out cases"
    if len(rows) <= 2 * MIN_STRETCH and _no_better(rows, "token_mean").keys() == trends.keys():
        return TOO_EARLY, "no level is better than predicting each token's mean yet"
    worse = _no_better(rows, "infill")
    if any(trend.falls for trend in trends.values()):
        ends = f"from iteration {iterations[start]:.0f} to {iterations[stop - 1]:.0f}"
        return LEARNING, f"{ends} the held-out loss {_changes(trends)}{_compared(rows, worse)}"
    if better := _new_bests(losses, iterations[start]):
        falls = _and([f"{fall:.1%} at {name}" for name, fall in better.items()])
        since = f"since iteration {iterations[start]:.0f} the best held-out loss fell by {falls}"
        return LEARNING, f"{since}{_compared(rows, worse)}"
    if len(rows) < MIN_STRETCH:
        return TOO_EARLY, f"{len(rows)} measurements, and no level improved"

    flat = _flat_since(iterations, losses, start)
    text = f"no level improved beyond its noise since iteration {iterations[flat]:.0f}"
    if useless := _no_better(rows, "token_mean"):
        text += f", and {_and(list(useless))} no better than predicting each token's mean"
    if rising := [name for name, trend in _trends(losses, iterations[flat:]).items() if trend.rises]:
        text += f", and {_and(rising)} got worse (the network learns the training cases by heart)"
    if worse:
        return WORSE, f"{_beside(worse)}; {text}"
    return PLATEAUED, f"{text}{_compared(rows, worse)}"


def verdict_on(rows: Rows, config: PretrainConfig) -> Verdict:
    """`verdict` on a run with these settings."""
    return verdict(rows, config.warmup_fraction * config.iterations, config.level_weights)


def _series(rows: Rows, figure: Callable[[Measurement[float]], float | None]) -> _Series:
    """One figure of all measurements in which it is finite."""
    pairs = [(row.iteration, figure(row)) for row in rows]
    pairs = [(iteration, value) for iteration, value in pairs if value is not None and math.isfinite(value)]
    return _Series(*np.array(pairs, dtype=float).reshape(-1, 2).T)


def _level_series(
    rows: Rows, level: HeldOutLevel[float], figure: Callable[[HeldOutLevel[float]], float | None]
) -> _Series:
    """One figure of one level."""
    return _series(rows, lambda row: figure(row.level(level.number)))


def _losses(rows: Rows) -> dict[str, _Series]:
    """Reconstruction loss of each level that the last row has, or the loss of all where there are no levels."""
    levels = rows[-1].reconstructed
    if not levels:
        return {"all levels": _series(rows, lambda row: row.loss)}
    return {level.title: _level_series(rows, level, lambda one: one.reconstruction) for level in levels}


def _last_stretch(iterations: Sequence[float], losses: Mapping[str, _Series]) -> tuple[int, int, dict[str, _Trend]]:
    """First and one-past-last number of the rows that are judged, and their trends: the last quarter, at least
    MIN_STRETCH rows; where no loss falls there, the same without the last row, which may be a bad measurement.
    """
    stop = len(iterations)
    start = stop - _shortest(stop)
    trends = _trends(losses, iterations[start:])
    before = _trends(losses, iterations[start - 1 : stop - 1]) if start > 0 else {}
    if any(trend.falls for trend in before.values()) and not any(trend.falls for trend in trends.values()):
        return start - 1, stop - 1, before
    return start, stop, trends


def _flat_since(iterations: Sequence[float], losses: Mapping[str, _Series], start: int) -> int:
    """Number of the earliest row after which no level falls, neither to the end nor over the first rows."""
    length = _shortest(len(iterations))
    while start > 0:
        earlier = iterations[start - 1 :]
        both = [*_trends(losses, earlier).values(), *_trends(losses, earlier[:length]).values()]
        if any(trend.falls for trend in both):
            break
        start -= 1
    return start


def _shortest(n_rows: int) -> int:
    """Minimum number of rows that are judged."""
    return min(n_rows, max(MIN_STRETCH, math.ceil(n_rows / 4)))


def _new_bests(losses: Mapping[str, _Series], start: float) -> dict[str, float]:
    """Relative fall, by level, of the lowest loss from iteration `start` on below the lowest one before, where it is
    more than MIN_CHANGE and than noise: what a slow fall with much noise looks like.
    """
    falls = {}
    for name, (x, y) in losses.items():
        before, after = y[x < start], y[x >= start]
        if len(before) and len(after):
            fall = before.min() - after.min()
            if fall > max(MIN_CHANGE * abs(before.min()), STANDARD_ERRORS * _noise(_without_jumps(y))):
                falls[name] = float(fall / abs(before.min()))
    return falls


def _trends(losses: Mapping[str, _Series], iterations: Sequence[float]) -> dict[str, _Trend]:
    """Trends of losses over a stretch of iterations; none where it has fewer than two values."""
    trends = {}
    for name, (x, y) in losses.items():
        y = _without_jumps(y)
        inside = (x >= iterations[0]) & (x <= iterations[-1])
        trends[name] = _trend(x[inside], y[inside], _noise(y))
    return {name: trend for name, trend in trends.items() if trend is not None}


def _trend(x: np.ndarray, y: np.ndarray, noise: float) -> _Trend | None:
    """Least-squares line; None for fewer than two points."""
    if len(x) < 2 or x[0] == x[-1]:
        return None
    centred = x - x.mean()
    spread = float((centred**2).sum())
    slope = float((centred * y).sum()) / spread
    span = float(x[-1] - x[0])
    first = float(y.mean()) + slope * float(centred[0])
    return _Trend(first, first + slope * span, noise * span / math.sqrt(spread))


def _without_jumps(y: np.ndarray) -> np.ndarray:
    """Replace values far above both neighbours by the mean of these: at a high learning rate a held-out loss jumps now
    and then, and is back at the next measurement.
    """
    if len(y) < 4:
        return y
    far = JUMP * np.median(np.abs(np.diff(y)))
    jumps = np.flatnonzero(y[1:-1] - np.maximum(y[:-2], y[2:]) > far) + 1
    smooth = y.copy()
    smooth[jumps] = (y[jumps - 1] + y[jumps + 1]) / 2
    return smooth


def _noise(y: np.ndarray) -> float:
    """Standard deviation of the last values about their own smooth course, from second differences; 0 for fewer than
    three values.
    """
    later = y[-max(NOISE_ROWS, len(y) // 4) :]
    return float(np.sqrt(np.mean(np.diff(later, 2) ** 2) / 6)) if len(later) > 2 else 0.0


def _no_better(rows: Rows, guess: str) -> dict[str, tuple[float, float]]:
    """Loss of each level that is no better than a trivial guess (an attribute of GuessFigures), and that of the guess;
    means of the last two measurements.
    """
    levels = {}
    for level in rows[-1].reconstructed:
        _, loss = _level_series(rows[-2:], level, lambda one: one.reconstruction)
        _, other = _level_series(rows[-2:], level, lambda one: getattr(one.guesses, guess))
        if len(loss) and len(other) and loss.mean() > (1 - MIN_CHANGE) * other.mean():
            levels[level.title] = float(loss.mean()), float(other.mean())
    return levels


def _collapse(rows: Rows) -> str:
    """How the run is broken, or an empty text."""
    if not rows:
        return ""
    last = rows[-1]
    losses = [last.loss, *(level.reconstruction for level in last.levels)]
    if not all(math.isfinite(loss) for loss in losses if loss is not None):
        return f"at iteration {last.iteration:.0f} the held-out loss is no finite number"
    _, rank = _series(rows[-2:], lambda row: row.feature_rank)
    _, std = _series(rows[-2:], lambda row: row.feature_std)
    if len(rank) and rank.max() < MIN_RANK:
        return f"the encoder's features have an effective rank of {rank[-1]:.1f}: they say next to nothing"
    if len(std) and std.max() < MIN_STD:
        return f"the encoder's features are all but the same everywhere (spread {std[-1]:.3f}, 1 would be good)"
    aligned = [level for level in last.reconstructed if level.alignment_chance is not None]
    if aligned and all(_fell_to_chance(rows, level) for level in aligned):
        return f"alignment fell back to chance at {_and([level.title for level in aligned])}"
    return ""


def _fell_to_chance(rows: Rows, level: HeldOutLevel[float]) -> bool:
    """Whether the last two alignment losses are those of a blind guess, after better ones; `level` of the last row."""
    _, loss = _level_series(rows, level, lambda one: one.alignment)
    chance = level.alignment_chance
    if len(loss) < MIN_MEASUREMENTS or chance is None or not 0 < chance < 1:
        return False
    blind = -math.log(chance)
    return bool(loss.min() < BETTER_THAN_CHANCE * blind and (np.abs(loss[-2:] - blind) < AT_CHANCE * blind).all())


def _changes(trends: Mapping[str, _Trend]) -> str:
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
    guesses = [_level_series(rows[-2:], level, lambda one: one.guesses.infill) for level in rows[-1].reconstructed]
    return "; every level is better than in-filling" if any(len(guess.values) for guess in guesses) else ""


def _beside(worse: Mapping[str, tuple[float, float]]) -> str:
    losses = _and([f"{loss:.3f} against {infill:.3f}" for loss, infill in worse.values()])
    still = "is still no better" if len(worse) == 1 else "are still no better"
    return f"{_and(list(worse))} {still} than in-filling ({losses})"


def _and(words: Sequence[str]) -> str:
    return " and ".join([", ".join(words[:-1]), words[-1]] if len(words) > 1 else words)
