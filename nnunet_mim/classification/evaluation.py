"""How good probabilities are, with intervals by bootstrap over patients.

Every figure takes weights of the cases, one row per bootstrap draw, and computes all draws at once: scikit-learn's
functions give the same numbers one by one (tests/unit/classification/test_evaluation.py), some hundred times slower.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from scipy.stats import rankdata

AT_SPECIFICITY = 0.9
N_DRAWS = 2000
N_BINS = 10
LEVEL = 0.95

Weights = np.ndarray
"""(B, N) float: how often each case counts in each draw"""


def auroc(positive: np.ndarray, score: np.ndarray, weights: Weights) -> np.ndarray:
    """Area under the ROC curve: (N,) bool, (N,), (B, N) → (B,); NaN without both classes in a draw."""
    order, last = _thresholds(score)
    w_pos, w_neg = (_cumulated(weights * side, order, last) for side in (positive, ~positive))
    n_pos, n_neg = w_pos[:, -1:], w_neg[:, -1:]
    true, false = (_from_zero(w / np.where(n > 0, n, np.nan)) for w, n in ((w_pos, n_pos), (w_neg, n_neg)))
    return (np.diff(false, axis=1) * (true[:, 1:] + true[:, :-1]) / 2).sum(axis=1)


def average_precision(positive: np.ndarray, score: np.ndarray, weights: Weights) -> np.ndarray:
    """Area under the precision-recall curve as a step function; NaN without a positive case in a draw."""
    order, last = _thresholds(score)
    true, false = (_cumulated(weights * side, order, last) for side in (positive, ~positive))
    recall = _from_zero(true / np.where(true[:, -1:] > 0, true[:, -1:], np.nan))
    precision = true / np.maximum(true + false, 1e-12)
    return (np.diff(recall, axis=1) * precision).sum(axis=1)


def sensitivity_at(
    positive: np.ndarray, score: np.ndarray, weights: Weights, specificity: float = AT_SPECIFICITY
) -> np.ndarray:
    """Largest sensitivity of all thresholds with at least this specificity; NaN without both classes in a draw."""
    order, last = _thresholds(score)
    true, false = (_from_zero(_cumulated(weights * side, order, last)) for side in (positive, ~positive))
    n_pos, n_neg = true[:, -1:], false[:, -1:]
    allowed = false <= (1 - specificity) * n_neg * (1 + 1e-9)
    found = np.where(allowed, true, 0).max(axis=1) / np.where(n_pos[:, 0] > 0, n_pos[:, 0], np.nan)
    return np.where(n_neg[:, 0] > 0, found, np.nan)


def recalls(labels: np.ndarray, predicted: np.ndarray, weights: Weights, n_classes: int) -> np.ndarray:
    """(B, K) share of each class that is told as such; NaN of a class that is not in a draw."""
    found = [
        _share(weights * ((labels == k) & (predicted == k)), weights * (labels == k)) for k in range(n_classes)
    ]
    return np.stack(found, axis=1)


def f1_scores(labels: np.ndarray, predicted: np.ndarray, weights: Weights, n_classes: int) -> np.ndarray:
    """(B, K) F1 of each class; NaN of a class that is neither there nor told in a draw."""
    found = []
    for k in range(n_classes):
        both = weights * (1.0 * (labels == k) + (predicted == k))
        found.append(_share(2 * weights * ((labels == k) & (predicted == k)), both))
    return np.stack(found, axis=1)


def brier(labels: np.ndarray, probabilities: np.ndarray, weights: Weights) -> np.ndarray:
    """Mean squared error of the probabilities; of two classes that of the second, of more the sum over all."""
    truth = np.eye(probabilities.shape[1])[labels]
    error = ((probabilities - truth) ** 2).sum(axis=1)
    error = error / 2 if probabilities.shape[1] == 2 else error
    return _share(weights * error, weights)


def calibration_error(labels: np.ndarray, probabilities: np.ndarray, weights: Weights) -> np.ndarray:
    """Expected calibration error in N_BINS bins of equal width (arXiv 1706.04599).

    Of two classes that of the second one's probability, of more that of the most probable class.
    """
    if probabilities.shape[1] == 2:
        confidence, right = probabilities[:, 1], labels == 1
    else:
        confidence, right = probabilities.max(axis=1), labels == probabilities.argmax(axis=1)
    bins = np.minimum((confidence * N_BINS).astype(int), N_BINS - 1)
    in_bin = np.eye(N_BINS)[bins]  # (N, bins)
    gap = np.abs((weights * (confidence - right)) @ in_bin)
    return gap.sum(axis=1) / weights.sum(axis=1)


def figures(labels: np.ndarray, probabilities: np.ndarray, weights: Weights) -> dict[str, np.ndarray]:
    """All figures by name, (B,) each.

    Of two classes AUROC, average precision, F1 and sensitivity are those of the second class; of more the mean over
    classes, each against the others. The told class is the most probable one.
    """
    n_classes = probabilities.shape[1]
    classes = [1] if n_classes == 2 else range(n_classes)
    predicted = probabilities.argmax(axis=1)

    def mean(figure: Callable[[np.ndarray, np.ndarray, Weights], np.ndarray]) -> np.ndarray:
        return np.mean([figure(labels == k, probabilities[:, k], weights) for k in classes], axis=0)

    f1 = f1_scores(labels, predicted, weights, n_classes)
    return {
        "auroc": mean(auroc),
        "average_precision": mean(average_precision),
        "balanced_accuracy": recalls(labels, predicted, weights, n_classes).mean(axis=1),
        "f1": f1[:, 1] if n_classes == 2 else f1.mean(axis=1),
        "sensitivity": mean(sensitivity_at),
        "brier": brier(labels, probabilities, weights),
        "calibration_error": calibration_error(labels, probabilities, weights),
    }


FIGURE_NAMES = {
    "auroc": "AUROC",
    "average_precision": "average precision",
    "balanced_accuracy": "balanced accuracy",
    "f1": "F1",
    "sensitivity": f"sensitivity at {AT_SPECIFICITY:.0%} specificity",
    "brier": "Brier score",
    "calibration_error": "calibration error",
}


@dataclass(frozen=True)
class Interval:
    """A figure with its bootstrap interval."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        known = math.isfinite(self.low + self.high)
        return f"{self.value:.3f} ({f'{self.low:.3f} to {self.high:.3f}' if known else 'no interval'})"


@dataclass(frozen=True)
class Difference:
    """A paired difference of the AUROC of two classifiers."""

    first: str
    second: str
    interval: Interval
    """of first minus second"""
    p: float
    """two-sided, of no difference"""
    corrected_p: float
    """by Holm, over all differences that were computed with it"""

    @property
    def is_better(self) -> bool:
        """Whether the first is better, the interval excluding 0."""
        return self.interval.low > 0


def patient_draws(patients: Sequence[str], n_draws: int, seed: int) -> Weights:
    """(B, N) how often each case is drawn when patients are drawn with replacement, with all of their cases."""
    _, number = np.unique(np.array(patients), return_inverse=True)
    n = int(number.max()) + 1
    drawn = np.random.default_rng(seed).multinomial(n, np.full(n, 1 / n), size=n_draws)
    return drawn[:, number].astype(np.float64)


def evaluate(
    labels: np.ndarray, probabilities: np.ndarray, draws: Weights
) -> tuple[dict[str, Interval], dict[str, np.ndarray]]:
    """Figures with intervals, and their values in every draw.

    Args:
        labels: (N,) classes, all known.
        probabilities: (N, K).
        draws: as of `patient_draws`.
    """
    value = figures(labels, probabilities, np.ones((1, len(labels))))
    drawn = figures(labels, probabilities, draws)
    return {name: interval(float(value[name][0]), drawn[name]) for name in value}, drawn


def interval(value: float, drawn: np.ndarray) -> Interval:
    """Percentile interval of a figure from its values in draws; draws without a value are left out."""
    drawn = drawn[np.isfinite(drawn)]
    if not len(drawn):
        return Interval(value, float("nan"), float("nan"))
    low, high = np.quantile(drawn, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return Interval(value, float(low), float(high))


def differences(
    values: Mapping[str, float], drawn: Mapping[str, np.ndarray], pairs: Sequence[tuple[str, str]]
) -> list[Difference]:
    """Paired differences of a figure, with p-values corrected for their number.

    Args:
        values: of each classifier.
        drawn: (B,) in the same draws.
        pairs: of names; the difference is first minus second.
    """
    rows = []
    for first, second in pairs:
        gap = drawn[first] - drawn[second]
        gap = gap[np.isfinite(gap)]
        tail = min(int((gap <= 0).sum()), int((gap >= 0).sum()))
        rows.append((interval(values[first] - values[second], gap), min(1.0, 2 * (tail + 1) / (len(gap) + 1))))
    corrected = holm([p for _, p in rows])
    return [Difference(*pair, *row, p) for pair, row, p in zip(pairs, rows, corrected, strict=True)]


def holm(ps: Sequence[float]) -> list[float]:
    """p values corrected for their number (Holm 1979). The probability of even one false finding stays below 5 % if
    values below 0.05 are called findings. NaN stay NaN and do not count.
    """
    finite = sorted((p, index) for index, p in enumerate(ps) if math.isfinite(p))
    corrected, maximum = [math.nan] * len(ps), 0.0
    for rank, (p, index) in enumerate(finite):
        maximum = max(maximum, min(1.0, p * (len(finite) - rank)))
        corrected[index] = maximum
    return corrected


def _thresholds(score: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Cases in descending order of the score, and the positions of the last one of each value in it."""
    order = np.argsort(-score, kind="stable")
    ranks = rankdata(-score[order], method="dense")
    return order, np.flatnonzero(np.diff(ranks, append=np.inf))


def _cumulated(weights: np.ndarray, order: np.ndarray, last: np.ndarray) -> np.ndarray:
    """(B, thresholds) weight of cases at or above each threshold."""
    return np.cumsum(weights[:, order], axis=1)[:, last]


def _from_zero(values: np.ndarray) -> np.ndarray:
    return np.concatenate([np.zeros_like(values[:, :1]), values], axis=1)


def _share(part: np.ndarray, whole: np.ndarray) -> np.ndarray:
    """(B,) sum of part over sum of whole; NaN where that is 0."""
    total = whole.sum(axis=1)
    return part.sum(axis=1) / np.where(total > 0, total, np.nan)
