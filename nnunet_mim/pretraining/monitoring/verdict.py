"""One honest sentence about a pretraining run, from its measurements on held-out cases."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import NamedTuple

import numpy as np

from nnunet_mim.config import PretrainConfig
from nnunet_mim.pretraining.monitoring.figures import HeldOutLevel, Measurement

Rows = Sequence[Measurement[float]]
"""measurements, oldest first"""
Series = tuple[np.ndarray, np.ndarray]
"""iterations and values of one figure where it is finite"""

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


def verdict(rows: Rows, warmup_iterations: float = 0, level_weights: Sequence[float] = (1.0, 1.0, 1.0)) -> Verdict:
    """Judge a run.

    Args:
        rows: figures that are missing (or not a number) are not judged.
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


def verdict_on(rows: Rows, config: PretrainConfig) -> Verdict:
    """`verdict` on a run with these settings."""
    return verdict(rows, config.warmup_fraction * config.iterations, config.level_weights)


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
    start, stop, falls = _last_stretch(iterations, losses)
    if not falls:
        return TOO_EARLY, "no reconstruction loss on held-out cases"
    useless = _no_better(rows, "token_mean")
    if len(rows) <= 2 * MIN_STRETCH and useless.keys() == falls.keys():
        return TOO_EARLY, "no level is better than predicting each token's mean yet"
    worse = _no_better(rows, "infill")
    compared = _compared(rows, worse)
    ending = f"; {compared}" if compared else ""
    if _any_fell(falls):
        ends = f"from iteration {iterations[start]:.0f} to {iterations[stop - 1]:.0f}"
        return LEARNING, f"{ends} the held-out loss {_changes(falls)}{ending}"
    if better := _new_bests(losses, iterations[start]):
        best = _and([f"{fall:.1%} at {name}" for name, fall in better.items()])
        return LEARNING, f"since iteration {iterations[start]:.0f} the best held-out loss fell by {best}{ending}"
    if len(rows) < MIN_STRETCH:
        return TOO_EARLY, f"{len(rows)} measurements, and no level improved"

    flat = _flat_since(iterations, losses, start)
    text = f"no level improved beyond its noise since iteration {iterations[flat]:.0f}"
    if useless:
        text += f", and {_and(list(useless))} no better than predicting each token's mean"
    if rising := [name for name, fall in _falls(losses, iterations[flat:]).items() if fall < 0]:
        text += f", and {_and(rising)} got worse (the network learns the training cases by heart)"
    return (WORSE, f"{compared}; {text}") if worse else (PLATEAUED, f"{text}{ending}")


def _series(rows: Rows, values: Iterable[float | None]) -> Series:
    """The finite ones among the values of a figure in all rows."""
    pairs = [(row.iteration, value) for row, value in zip(rows, values, strict=True) if value is not None]
    x, y = np.array(pairs, dtype=float).reshape(-1, 2).T
    return x[np.isfinite(y)], y[np.isfinite(y)]


def _losses(rows: Rows) -> dict[str, Series]:
    """Reconstruction loss of each level that the last row has, or the loss of all where there are no levels."""
    levels = rows[-1].reconstructed
    if not levels:
        return {"all levels": _series(rows, [row.loss for row in rows])}
    return {level.title: _series(rows, [row.level(level.number).reconstruction for row in rows]) for level in levels}


def _last_stretch(iterations: Sequence[float], losses: Mapping[str, Series]) -> tuple[int, int, dict[str, float]]:
    """First and one-past-last number of the rows that are judged, and `_falls` over them; where no loss falls there,
    those one earlier, as the last row may be a bad measurement.
    """
    stop = len(iterations)
    start = stop - _shortest(stop)
    falls = _falls(losses, iterations[start:])
    if start > 0 and not _any_fell(falls):
        earlier = _falls(losses, iterations[start - 1 : stop - 1])
        if _any_fell(earlier):
            return start - 1, stop - 1, earlier
    return start, stop, falls


def _flat_since(iterations: Sequence[float], losses: Mapping[str, Series], start: int) -> int:
    """Number of the earliest row after which no level falls, neither to the end nor over the first rows."""
    length = _shortest(len(iterations))
    while start > 0:
        earlier = iterations[start - 1 :]
        if _any_fell(_falls(losses, earlier)) or _any_fell(_falls(losses, earlier[:length])):
            break
        start -= 1
    return start


def _shortest(n_rows: int) -> int:
    """Number of rows that are judged: the last quarter, at least MIN_STRETCH where there are so many."""
    return min(n_rows, max(MIN_STRETCH, math.ceil(n_rows / 4)))


def _new_bests(losses: Mapping[str, Series], start: float) -> dict[str, float]:
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


def _falls(losses: Mapping[str, Series], iterations: Sequence[float]) -> dict[str, float]:
    """Relative fall, by level, of the least-squares line through a loss over a stretch of iterations; negative for a
    rise, 0 where it is less than MIN_CHANGE or may be noise. A level with fewer than two values there is left out.
    """
    falls = {}
    for name, (x, y) in losses.items():
        y = _without_jumps(y)
        noise = _noise(y)
        inside = (x >= iterations[0]) & (x <= iterations[-1])
        if len(np.unique(x[inside])) < 2:
            continue
        x, y = x[inside], y[inside]
        centred = x - x.mean()
        spread = float((centred**2).sum())
        slope = float((centred * y).sum()) / spread
        span = float(x[-1] - x[0])
        first = float(y.mean()) + slope * float(centred[0])
        last = first + slope * span
        fall = (first - last) / max(abs(first), 1e-12)
        is_clear = abs(fall) > MIN_CHANGE and abs(first - last) > STANDARD_ERRORS * noise * span / math.sqrt(spread)
        falls[name] = fall if is_clear else 0.0
    return falls


def _any_fell(falls: Mapping[str, float]) -> bool:
    return any(fall > 0 for fall in falls.values())


def _without_jumps(y: np.ndarray) -> np.ndarray:
    """Replace values far above both neighbours by the mean of these, as they occur at a high learning rate."""
    if len(y) < 4:
        return y
    far = JUMP * np.median(np.abs(np.diff(y)))
    jumps = np.flatnonzero(y[1:-1] - np.maximum(y[:-2], y[2:]) > far) + 1
    smooth = y.copy()
    smooth[jumps] = (y[jumps - 1] + y[jumps + 1]) / 2
    return smooth


def _noise(y: np.ndarray) -> float:
    """Standard deviation of the last values about their smooth course, from second differences; 0 for fewer than 3."""
    later = y[-max(NOISE_ROWS, len(y) // 4) :]
    return float(np.sqrt(np.mean(np.diff(later, 2) ** 2) / 6)) if len(later) > 2 else 0.0


def _no_better(rows: Rows, guess: str) -> dict[str, tuple[float, float]]:
    """Loss of each level that is no better than a trivial guess (an attribute of GuessFigures), and that of the guess;
    means of the last two measurements.
    """
    levels, rows = {}, rows[-2:]
    for level in rows[-1].reconstructed:
        figures = [row.level(level.number) for row in rows]
        _, loss = _series(rows, [one.reconstruction for one in figures])
        _, other = _series(rows, [getattr(one.guesses, guess) for one in figures])
        if len(other) and loss.mean() > (1 - MIN_CHANGE) * other.mean():
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
    _, rank = _series(rows[-2:], [row.feature_rank for row in rows[-2:]])
    _, std = _series(rows[-2:], [row.feature_std for row in rows[-2:]])
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
    _, loss = _series(rows, [row.level(level.number).alignment for row in rows])
    chance = level.alignment_chance
    if len(loss) < MIN_MEASUREMENTS or chance is None or not 0 < chance < 1:
        return False
    blind = -math.log(chance)
    return bool(loss.min() < BETTER_THAN_CHANCE * blind and (np.abs(loss[-2:] - blind) < AT_CHANCE * blind).all())


def _changes(falls: Mapping[str, float]) -> str:
    """`fell by 3.7% at level 1 and 5.5% at level 2, and did not change beyond its noise at level 3`."""
    parts = {
        "fell by": [f"{fall:.1%} at {name}" for name, fall in falls.items() if fall > 0],
        "rose by": [f"{-fall:.1%} at {name}" for name, fall in falls.items() if fall < 0],
        "did not change beyond its noise at": [name for name, fall in falls.items() if fall == 0],
    }
    return ", and ".join(f"{what} {_and(levels)}" for what, levels in parts.items() if levels)


def _compared(rows: Rows, worse: Mapping[str, tuple[float, float]]) -> str:
    """Clause on in-filling, where it has been measured; `worse` as of `_no_better`."""
    if worse:
        losses = _and([f"{loss:.3f} against {infill:.3f}" for loss, infill in worse.values()])
        return f"{_and(list(worse))} {'is' if len(worse) == 1 else 'are'} still no better than in-filling ({losses})"
    infill = [row.level(level.number).guesses.infill for level in rows[-1].reconstructed for row in rows[-2:]]
    measured = any(loss is not None and math.isfinite(loss) for loss in infill)
    return "every level is better than in-filling" if measured else ""


def _and(words: Sequence[str]) -> str:
    return " and ".join([", ".join(words[:-1]), words[-1]] if len(words) > 1 else words)
