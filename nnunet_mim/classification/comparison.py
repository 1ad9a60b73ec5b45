"""All classifiers and baselines of some targets on the same cases, and what the comparison says."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from nnunet_mim.classification.baselines import PREVALENCE, SIZE, is_baseline
from nnunet_mim.classification.evaluation import (
    N_DRAWS,
    Difference,
    Interval,
    differences,
    evaluate,
    patient_draws,
)
from nnunet_mim.classification.results import (
    PREDICTIONS,
    WITH_COVARIATES,
    Predictions,
    joined,
    read_predictions,
    trained_arms,
)
from nnunet_mim.errors import MiMError

CONTROLS = ("scratch", "random")
"""parts of the names of arms that start from random weights"""


@dataclass(frozen=True)
class Evaluation:
    """All arms on one target."""

    target: str
    classes: tuple[str, ...]
    arms: dict[str, Predictions]
    """of the same cases in the same order, classes known"""
    figures: dict[str, dict[str, Interval]]
    """by arm and name"""
    per_class: dict[str, dict[str, dict[str, Interval]]]
    """by arm, class and name, of the class against the others"""
    differences: list[Difference]
    """of the AUROC: each network against baselines and other networks"""

    @property
    def networks(self) -> list[str]:
        """Arms that are no baselines, the highest AUROC first."""
        names = [name for name in self.arms if not is_baseline(name)]
        return sorted(names, key=lambda name: -self.figures[name]["auroc"].value)

    @property
    def main(self) -> str | None:
        """The arm that the page is about: the best without covariates, if possible of those that were pretrained."""
        images_only = [name for name in self.networks if not name.endswith(WITH_COVARIATES)]
        pretrained = [name for name in images_only if not any(part in name for part in CONTROLS)]
        return next(iter(pretrained + images_only), None)


def evaluate_arms(
    folder: Path, kept: set[str] | None = None, seed: int = 0, n_draws: int = N_DRAWS
) -> tuple[list[Evaluation], list[str]]:
    """Evaluate every complete arm in the folder of some targets.

    Args:
        folder: of the targets.
        kept: cases that count; None: all.
        seed: of the bootstrap.
        n_draws: of the bootstrap.

    Returns:
        One evaluation per target, and notes about arms that were left out.

    Raises:
        MiMError: no arm is there, or no case is left.
    """
    folds_of = trained_arms(folder)
    parts = {name: [read_predictions(fold / PREDICTIONS) for fold in folds] for name, folds in folds_of.items()}
    if not parts:
        raise MiMError(f"nothing is trained in {folder}: run mim_classify train with the same -d, -p, -c and --target")
    joint = {name: [joined(list(target)) for target in zip(*folds, strict=True)] for name, folds in parts.items()}
    every = {case for arm in joint.values() for case in arm[0].cases}
    notes = [
        f"{name} is left out: {len(every) - len(arm[0].cases)} of {len(every)} cases are not predicted yet"
        for name, arm in joint.items()
        if len(arm[0].cases) < len(every)
    ]
    complete = {name: arm for name, arm in joint.items() if len(arm[0].cases) == len(every)}
    first = next(iter(complete.values()), None)
    if first is None:
        raise MiMError(f"no classifier in {folder} has all folds: run mim_classify train with -f all")
    evaluations = []
    for number in range(len(first)):
        arms = {name: kept_cases(arm[number], kept) for name, arm in complete.items()}
        evaluations.append(_evaluation(arms, seed, n_draws))
    return evaluations, notes


def kept_cases(predictions: Predictions, cases: set[str] | None) -> Predictions:
    """Those whose class is known, and that are among some cases."""
    rows = [
        row
        for row in np.flatnonzero(predictions.target.known).tolist()
        if cases is None or predictions.cases[row] in cases
    ]
    if not rows:
        raise MiMError(f"no case of '{predictions.target.name}' is left: widen --where")
    return Predictions(
        tuple(predictions.cases[row] for row in rows), tuple(predictions.patients[row] for row in rows),
        predictions.folds[rows], replace(predictions.target, labels=predictions.target.labels[rows]),
        predictions.raw[rows], predictions.calibrated[rows],
    )  # fmt: skip


def _evaluation(arms: dict[str, Predictions], seed: int, n_draws: int) -> Evaluation:
    first = next(iter(arms.values()))
    labels, classes = first.target.labels, first.target.classes
    draws = patient_draws(first.patients, n_draws, seed)
    found = {name: evaluate(labels, arm.calibrated, draws) for name, arm in arms.items()}
    figures = {name: values for name, (values, _) in found.items()}
    per_class = {
        name: {
            label: evaluate((labels == k).astype(int), _against_others(arm.calibrated[:, k]), draws)[0]
            for k, label in enumerate(classes)
        }
        for name, arm in arms.items()
    }
    networks = [name for name in arms if not is_baseline(name)]
    pairs = [(a, b) for a in networks for b in arms if is_baseline(b) and not b.startswith(PREVALENCE)]
    pairs += [(a, b) for i, a in enumerate(networks) for b in networks[i + 1 :]]
    values = {name: each["auroc"].value for name, each in figures.items()}
    gaps = differences(values, {name: drawn["auroc"] for name, (_, drawn) in found.items()}, pairs)
    return Evaluation(first.target.name, classes, arms, figures, per_class, gaps)


def _against_others(probability: np.ndarray) -> np.ndarray:
    return np.stack([1 - probability, probability], axis=1)


def verdict(evaluation: Evaluation) -> str:
    """What the comparison says, in two sentences: about the size of the region alone, and about the best control."""
    main = evaluation.main
    if main is None:
        return f"{evaluation.target}: only baselines are trained."
    sentences = []
    if SIZE in evaluation.arms:
        gap = _difference(evaluation, main, SIZE)
        does = "beats" if gap.low > 0 else "does not beat"
        sentences.append(f"{main} {does} the size alone: {_against(evaluation, main, SIZE, gap)}.")
    else:
        sentences.append(f"{main} has an AUROC of {evaluation.figures[main]['auroc']}.")
    controls = [name for name in evaluation.networks if name != main and any(part in name for part in CONTROLS)]
    for best in controls[:1]:
        gap = _difference(evaluation, main, best)
        word = "is better than" if gap.low > 0 else "is worse than" if gap.high < 0 else "does not differ from"
        sentences.append(f"It {word} {best}: {_against(evaluation, main, best, gap)}.")
    return f"{evaluation.target}: {' '.join(sentences)}"


def _difference(evaluation: Evaluation, first: str, second: str) -> Interval:
    for each in evaluation.differences:
        if (each.first, each.second) == (first, second):
            return each.interval
        if (each.first, each.second) == (second, first):
            return Interval(-each.interval.value, -each.interval.high, -each.interval.low)
    raise KeyError((first, second))


def _against(evaluation: Evaluation, first: str, second: str, gap: Interval) -> str:
    one, other = (evaluation.figures[name]["auroc"].value for name in (first, second))
    return f"AUROC {one:.3f} against {other:.3f}, difference {gap.value:+.3f} ({gap.low:+.3f} to {gap.high:+.3f})"
