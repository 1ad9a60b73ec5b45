"""Tables of an experiment: rows of cells, the first row being the heading."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from nnunet_mim.benchmarking.guard import Seen
from nnunet_mim.benchmarking.matrix import Matrix, Place, case_value, describe, false_alarms
from nnunet_mim.benchmarking.statistics import Comparison, compare, holm, mean_sd

METRICS = ("dice", "hd95", "nsd", "n_ref", "n_pred")
SHOWN = {"dice": ("Dice %", 100), "hd95": ("HD95 mm", 1), "nsd": ("NSD %", 100)}
"""heading and factor of a metric"""
MARK = " *"
"""behind an arm whose pretraining has seen validation cases"""
Table = list[list[str]]
LATEX = {sign: rf"\{sign}" for sign in "&%$#_{}"} | {
    "\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "±": r"$\pm$", "<": "$<$",
    ">": "$>$", "–": "--", "…": r"\ldots{}",
}  # fmt: skip


@dataclass(frozen=True)
class Outcome:
    """What is reported: an experiment, its finished trainings, and what the arms' pretrainings have seen."""

    matrix: Matrix
    results: Mapping[Place, Mapping[str, Any]]
    seen: Seen
    _compared: dict[tuple[str, str, str], tuple[Comparison, list[int]] | None] = field(default_factory=dict, repr=False)

    def seeds(self, dataset: str, labels: str, arm: str) -> list[int]:
        """Seeds of which every fold is finished."""
        folds = self.matrix.folds(dataset)
        return [
            seed
            for seed in range(self.matrix.bench.seeds)
            if all(Place(dataset, fold, labels, seed, arm) in self.results for fold in folds)
        ]

    def trainings(self, dataset: str, labels: str, arm: str) -> list[Mapping[str, Any]]:
        """Results of the finished seeds, fold by fold."""
        return [
            self.results[Place(dataset, fold, labels, seed, arm)]
            for seed in self.seeds(dataset, labels, arm)
            for fold in self.matrix.folds(dataset)
        ]

    def values(
        self, dataset: str, labels: str, seeds: Sequence[int], arm: str, metric: str, label: str | None = None
    ) -> np.ndarray:
        """(seeds, cases of all folds) of a metric, see `case_value`."""
        rows = []
        for seed in seeds:
            cases = [self.results[Place(dataset, f, labels, seed, arm)]["cases"] for f in self.matrix.folds(dataset)]
            rows.append([case_value(found[case], metric, label) for found in cases for case in sorted(found)])
        return np.array(rows)

    def name(self, dataset: str, arm: str) -> str:
        """An arm's name, marked where its pretraining has seen validation cases of the dataset."""
        folds = self.matrix.folds(dataset)
        return arm + (MARK if any(self.seen[dataset, fold, arm].seen for fold in folds) else "")

    def comparison(self, dataset: str, labels: str, arm: str) -> tuple[Comparison, list[int]] | None:
        """Dice (%) of an arm and of the control, and the seeds that both have; None where there are none."""
        key = (dataset, labels, arm)
        if key not in self._compared:
            self._compared[key] = self._compare(*key)
        return self._compared[key]

    def _compare(self, dataset: str, labels: str, arm: str) -> tuple[Comparison, list[int]] | None:
        control = self.matrix.control
        both = [s for s in self.seeds(dataset, labels, arm) if s in self.seeds(dataset, labels, control)]
        if not both or arm == control:
            return None
        own, its = (self.values(dataset, labels, both, name, "dice") * 100 for name in (arm, control))
        return compare(own, its), both


def main_table(outcome: Outcome, dataset: str) -> Table:
    """One row a number of labels and arm: the three metrics."""
    tolerance = outcome.matrix.bench.nsd_tolerance_mm
    table = [["labels", "arm", "seeds", "Dice %", "HD95 mm", f"NSD % at {tolerance:g} mm"]]
    for labels in outcome.matrix.labels:
        for arm in outcome.matrix.arms:
            if seeds := outcome.seeds(dataset, labels, arm):
                figures = [outcome.values(dataset, labels, seeds, arm, m) for m in ("dice", "hd95", "nsd")]
                row = [label_text(outcome, dataset, labels), outcome.name(dataset, arm), str(len(seeds))]
                row += [with_sd(values * scale) for values, scale in zip(figures, (100, 1, 100), strict=True)]
                table.append(row)
    return table


def comparison_table(outcome: Outcome, dataset: str) -> Table:
    """One row a number of labels and arm but the control: Dice against the control's."""
    corrected = corrected_ps(outcome)
    heading = f"Dice % minus {outcome.matrix.control}"
    table = [["labels", "arm", "seeds", heading, "these trainings", "p", "p corrected", "iterations to reach it"]]
    for labels in outcome.matrix.labels:
        for arm in outcome.matrix.arms:
            found = outcome.comparison(dataset, labels, arm)
            if found is None:
                continue
            result, both = found
            table.append([
                label_text(outcome, dataset, labels),
                outcome.name(dataset, arm),
                str(len(both)),
                f"{result.difference:+.2f} [{result.interval[0]:+.2f}, {result.interval[1]:+.2f}]",
                f"[{result.bootstrap[0]:+.2f}, {result.bootstrap[1]:+.2f}]",
                p_text(result.p),
                p_text(corrected[dataset, labels, arm]),
                ", ".join(reaching(outcome, dataset, labels, arm, both)),
            ])  # fmt: skip
    return table


def corrected_ps(outcome: Outcome) -> dict[tuple[str, str, str], float]:
    """p of every comparison with the control, corrected for the number of all of them (Holm)."""
    places = [
        (dataset, labels, arm)
        for dataset in outcome.matrix.datasets
        for labels in outcome.matrix.labels
        for arm in outcome.matrix.arms
    ]
    found = {place: compared[0].p for place in places if (compared := outcome.comparison(*place)) is not None}
    return dict(zip(found, holm(list(found.values())), strict=True))


def reaching(outcome: Outcome, dataset: str, labels: str, arm: str, seeds: Sequence[int]) -> list[str]:
    """Iterations until the learning curve is where the control's ends, for every training."""
    length, control = outcome.matrix.bench.length, outcome.matrix.control
    texts = []
    for seed in seeds:
        for fold in outcome.matrix.folds(dataset):
            own, its = (outcome.results[Place(dataset, fold, labels, seed, name)]["curve"] for name in (arm, control))
            goal = smooth(its)[-1]
            epoch = reaches(smooth(own), goal)
            never = f"> {length.epochs * length.iterations}" if np.isfinite(goal) else "–"
            texts.append(str(epoch * length.iterations) if epoch is not None else never)
    return texts


def smoothed_epochs(epochs: int) -> int:
    """Over how many epochs a learning curve is averaged: three, or a fiftieth of all where these are more."""
    return max(3, epochs // 50)


def smooth(curve: Sequence[float]) -> list[float]:
    """Mean of every epoch's Dice and that of the epochs before. nnU-Net's moving average remembers its start, 0, for
    dozens of epochs. NaN do not count.
    """
    window = smoothed_epochs(len(curve))
    parts = [[v for v in curve[max(0, end - window) : end] if np.isfinite(v)] for end in range(1, len(curve) + 1)]
    return [float(np.mean(part)) if part else float("nan") for part in parts]


def reaches(curve: Sequence[float], goal: float) -> int | None:
    """First epoch (from 1 on) at which a learning curve is at `goal`; None if never."""
    return next((number for number, value in enumerate(curve, start=1) if value >= goal), None)


def label_table(outcome: Outcome, dataset: str, metric: str = "dice") -> Table:
    """One metric (dice, hd95, nsd) of every label."""
    labels_of = label_names(outcome, dataset)
    what, scale = SHOWN[metric]
    table = [["labels", "arm", *(f"{what} of {name}" for name in labels_of.values())]]
    for labels in outcome.matrix.labels:
        for arm in outcome.matrix.arms:
            if seeds := outcome.seeds(dataset, labels, arm):
                row = [with_sd(outcome.values(dataset, labels, seeds, arm, metric, key) * scale) for key in labels_of]
                table.append([label_text(outcome, dataset, labels), outcome.name(dataset, arm), *row])
    return table


def cost_table(outcome: Outcome, dataset: str) -> Table:
    """What a training has cost."""
    table = [["labels", "arm", "hours a training", "hours in all", "peak memory GB", "parameters (millions)", "device"]]
    for labels in outcome.matrix.labels:
        for arm in outcome.matrix.arms:
            costs = [result["cost"] for result in outcome.trainings(dataset, labels, arm) if result["cost"]]
            if costs:
                hours = [cost["seconds"] / 3600 for cost in costs]
                table.append([
                    label_text(outcome, dataset, labels), outcome.name(dataset, arm), f"{np.mean(hours):.2f}",
                    f"{np.sum(hours):.2f}",
                    f"{max(cost['peak_bytes'] for cost in costs) / 1e9:.2f}",
                    f"{costs[0]['parameters'] / 1e6:.2f}", ", ".join(sorted({cost["device"] for cost in costs})),
                ])  # fmt: skip
    return table


def notes(outcome: Outcome, dataset: str) -> list[str]:
    """Sentences that belong under the tables: what pretrainings have seen, and what was found where nothing is."""
    lines = []
    for (name, fold, arm), findings in outcome.seen.items():
        if name != dataset:
            continue
        if findings.seen:
            lines.append(
                f"{arm}{MARK}: WARNING: its pretraining has seen {len(findings.seen)} of the validation cases of fold "
                f"{fold} ({', '.join(findings.seen[:5])}{' …' if len(findings.seen) > 5 else ''})"
            )
        if findings.unknown:
            lines.append(
                f"{arm}: whether its pretraining has seen cases of fold {fold} is not sure: {findings.unknown}"
            )
    for place, result in sorted(outcome.results.items()):
        found, absent = false_alarms(result)
        if place.dataset == dataset and found:
            where = f"{describe(place)}: {found} of {absent}"
            lines.append(f"found where the reference has nothing (Dice 0, as in nnU-Net): {where}")
    return lines


def label_names(outcome: Outcome, dataset: str) -> dict[str, str]:
    """Names of the labels by their key in nnU-Net's summary; empty where nothing is finished."""
    first = next((result for place, result in outcome.results.items() if place.dataset == dataset), None)
    if first is None:
        return {}
    keys = list(next(iter(first["cases"].values())))
    return {key: first["names"].get(key, key) for key in keys}


def label_text(outcome: Outcome, dataset: str, labels: str) -> str:
    """Labels as the user wrote them, and how many cases these are."""
    matrix = outcome.matrix
    counts = sorted({matrix.train_counts[dataset, fold, labels] for fold in matrix.folds(dataset)})
    numbers = "/".join(map(str, counts))
    return labels if labels == numbers else f"{labels} ({numbers})"


def every_value(outcome: Outcome) -> str:
    """CSV: one row a training, case and label. seen: whether the pretraining has seen the case."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow([*Place._fields, "case", "seen", "label", "name", *METRICS])
    for place, result in sorted(outcome.results.items()):
        seen = outcome.seen[place.dataset, place.fold, place.arm].seen
        for case, labels in sorted(result["cases"].items()):
            for label, found in labels.items():
                name = result["names"].get(label, label)
                numbers = [f"{value:.6g}" if isinstance(value, float) else value for value in map(found.get, METRICS)]
                writer.writerow([*place, case, "yes" if case in seen else "", label, name, *numbers])
    return text.getvalue()


def markdown_table(table: Table) -> str:
    """As GitHub shows it."""
    lines = [f"| {' | '.join(cell.replace('|', '/') for cell in row)} |" for row in table]
    lines.insert(1, "|" + "---|" * len(table[0]))
    return "\n".join(lines)


def latex_table(table: Table, caption: str, below: Sequence[str] = ()) -> str:
    """With booktabs, and sentences below it."""
    rows = [" & ".join(latex_text(cell) for cell in row) + r" \\" for row in table]
    return "\n".join([
        r"\begin{table}", r"\centering", rf"\caption{{{latex_text(caption)}}}",
        rf"\begin{{tabular}}{{{'ll' + 'r' * (len(table[0]) - 2)}}}", r"\toprule", rows[0], r"\midrule", *rows[1:],
        r"\bottomrule", r"\end{tabular}", *(rf"\par {latex_text(line)}" for line in below), r"\end{table}",
    ])  # fmt: skip


def latex_text(text: str) -> str:
    """Text with LaTeX's own characters written so that they are shown."""
    return "".join(LATEX.get(sign, sign) for sign in text)


def with_sd(numbers: np.ndarray) -> str:
    """Mean ± standard deviation over seeds."""
    mean, sd = mean_sd(numbers)
    return f"{mean:.2f} ± {sd:.2f}" if np.isfinite(sd) else f"{mean:.2f}" if np.isfinite(mean) else "–"


def p_text(p: float) -> str:
    """A probability in three digits."""
    return "< 0.001" if p < 0.001 else f"{p:.3f}" if np.isfinite(p) else "–"
