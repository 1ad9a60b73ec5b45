"""Tables of an experiment: rows of cells, the first row being the heading."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from nnunet_mim.benchmarking.matrix import Place, false_alarms
from nnunet_mim.benchmarking.outcome import MARK, Outcome
from nnunet_mim.benchmarking.statistics import interval_text, mean_sd
from nnunet_mim.errors import printable
from nnunet_mim.reporting.page import markdown_text
from nnunet_mim.system.files import csv_text

METRICS = ("dice", "hd95", "nsd", "n_ref", "n_pred")
SHOWN = {"dice": ("Dice %", 100), "hd95": ("HD95 mm", 1), "nsd": ("NSD %", 100)}
"""heading and factor of a metric"""
Table = list[list[str]]
LATEX = str.maketrans(
    {sign: rf"\{sign}" for sign in "&%$#_{}"}
    | {"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "±": r"$\pm$"}
    | {"<": "$<$", ">": "$>$", "–": "--", "…": r"\ldots{}"}
)


def main_table(outcome: Outcome, dataset: str) -> Table:
    """The three metrics, one row per number of labels and arm."""
    tolerance = outcome.matrix.bench.nsd_tolerance_mm
    table = [["labels", "arm", "seeds", "Dice %", "HD95 mm", f"NSD % at {tolerance:g} mm"]]
    for labels, arm, seeds in outcome.rows(dataset):
        values = [outcome.values(dataset, labels, seeds, arm, metric) * scale for metric, (_, scale) in SHOWN.items()]
        table.append([*_row_name(outcome, dataset, labels, arm), str(len(seeds)), *map(with_sd, values)])
    return table


def comparison_table(outcome: Outcome, dataset: str) -> Table:
    """Dice against the control's, one row per number of labels and arm other than the control."""
    corrected = outcome.corrected_ps()
    heading = f"Dice % minus {outcome.matrix.control}"
    table = [["labels", "arm", "seeds", heading, "these trainings", "p", "p corrected"]]
    if not outcome.test:  # learning curves are those of validation patches
        table[0].append("iterations to reach it")
    for labels, arm, _ in outcome.rows(dataset):
        if (dataset, labels, arm) not in outcome.comparisons:
            continue
        result, seeds = outcome.comparisons[dataset, labels, arm]
        table.append([
            *_row_name(outcome, dataset, labels, arm),
            str(len(seeds)),
            f"{result.difference:+.2f} {interval_text(result.interval, 2)}",
            interval_text(result.bootstrap, 2),
            _p_text(result.p),
            _p_text(corrected[dataset, labels, arm]),
        ])  # fmt: skip
        if not outcome.test:
            table[-1].append(", ".join(_iterations_to_control(outcome, dataset, labels, arm, seeds)))
    return table


def _iterations_to_control(outcome: Outcome, dataset: str, labels: str, arm: str, seeds: Sequence[int]) -> list[str]:
    """Iterations until the learning curve is where the control's ends, for every training."""
    length, control = outcome.matrix.bench.length, outcome.matrix.control
    texts = []
    for seed in seeds:
        for fold in outcome.matrix.folds(dataset):
            places = [Place(dataset, fold, labels, seed, name) for name in (arm, control)]
            curve, goal = (smooth(outcome.results[place]["curve"]) for place in places)
            epoch = _first_epoch_at(curve, goal[-1])
            never = f"> {length.epochs * length.iterations}" if np.isfinite(goal[-1]) else "–"
            texts.append(str(epoch * length.iterations) if epoch is not None else never)
    return texts


def smoothing_window(epochs: int) -> int:
    """Number of epochs over which a learning curve is averaged: three, or a fiftieth of all if that is more."""
    return max(3, epochs // 50)


def smooth(curve: Sequence[float]) -> list[float]:
    """Mean of every epoch's Dice and that of the epochs before. NaN do not count. nnU-Net's moving average remembers
    its start, 0, for dozens of epochs.
    """
    window = smoothing_window(len(curve))
    parts = [[v for v in curve[max(0, end - window) : end] if np.isfinite(v)] for end in range(1, len(curve) + 1)]
    return [float(np.mean(part)) if part else float("nan") for part in parts]


def _first_epoch_at(curve: Sequence[float], goal: float) -> int | None:
    """First epoch (from 1) at which a learning curve reaches `goal`; None if never."""
    return next((number for number, value in enumerate(curve, start=1) if value >= goal), None)


def label_table(outcome: Outcome, dataset: str, metric: str = "dice") -> Table:
    """One metric (dice, hd95, nsd) of every label."""
    names = outcome.label_names(dataset)
    heading, scale = SHOWN[metric]
    table = [["labels", "arm", *(f"{heading} of {name}" for name in names.values())]]
    for labels, arm, seeds in outcome.rows(dataset):
        values = [outcome.values(dataset, labels, seeds, arm, metric, label) * scale for label in names]
        table.append([*_row_name(outcome, dataset, labels, arm), *map(with_sd, values)])
    return table


def cost_table(outcome: Outcome, dataset: str) -> Table:
    """Hours, memory and parameters of the trainings."""
    table = [["labels", "arm", "hours a training", "hours in all", "peak memory GB", "parameters (millions)", "device"]]
    for labels, arm, _ in outcome.rows(dataset):
        costs = [result["cost"] for result in outcome.trainings(dataset, labels, arm) if result["cost"]]
        if costs:
            hours = [cost["seconds"] / 3600 for cost in costs]
            table.append([
                *_row_name(outcome, dataset, labels, arm),
                f"{np.mean(hours):.2f}",
                f"{np.sum(hours):.2f}",
                f"{max(cost['peak_bytes'] for cost in costs) / 1e9:.2f}",
                f"{costs[0]['parameters'] / 1e6:.2f}",
                ", ".join(sorted({cost["device"] for cost in costs})),
            ])  # fmt: skip
    return table


def _row_name(outcome: Outcome, dataset: str, labels: str, arm: str) -> list[str]:
    return [outcome.label_text(dataset, labels), outcome.name(dataset, arm)]


def notes(outcome: Outcome, dataset: str) -> list[str]:
    """Sentences under the tables: cases that pretrainings have seen, and labels found where the reference has none."""
    lines = []
    for (name, fold, arm), findings in outcome.seen.items():
        if name != dataset:
            continue
        if seen := findings.seen:
            cases = f"{', '.join(seen[:5])}{' …' if len(seen) > 5 else ''}"
            where = f"cases of {outcome.test.dataset}" if outcome.test else f"validation cases of fold {fold}"
            warning = f"WARNING: its pretraining has seen {len(seen)} of the {where} ({cases})"
            lines.append(f"{arm}{MARK}: {warning}")
        if likely := findings.sentence():
            lines.append(f"{arm}{MARK}: {likely}")
        if findings.note:
            lines.append(f"{arm}: seen cases of fold {fold}: {findings.note}")
        if why := findings.unknown:
            lines.append(f"{arm}: whether its pretraining has seen cases of fold {fold} is not sure: {why}")
    alarm = "found where the reference has nothing (Dice 0, as in nnU-Net)"
    for place, result in sorted(outcome.results.items()):
        found, absent = false_alarms(result)
        if place.dataset == dataset and found:
            lines.append(f"{alarm}: {place}: {found} of {absent}")
    return lines


def every_value(outcome: Outcome) -> str:
    """CSV with one row per training, case and label. `seen`: whether the pretraining has seen the case, or probably."""
    rows: list[list[object]] = [[*Place._fields, "case", "seen", "label", "name", *METRICS]]
    for place, result in sorted(outcome.results.items()):
        findings = outcome.seen[place.dataset, place.fold, place.arm]
        seen = dict.fromkeys(findings.same, "yes") | dict.fromkeys(findings.probably_same, "probably")
        for case, labels in sorted(result["cases"].items()):
            for label, found in labels.items():
                name = result["names"].get(label, label)
                numbers = [f"{value:.6g}" if isinstance(value, float) else value for value in map(found.get, METRICS)]
                rows.append([*place, case, seen.get(case, ""), label, name, *numbers])
    return csv_text(rows)


def markdown_table(table: Table) -> str:
    """A table in GitHub's Markdown."""
    lines = [f"| {' | '.join(markdown_text(cell) for cell in row)} |" for row in table]
    lines.insert(1, "|" + "---|" * len(table[0]))
    return "\n".join(lines)


def latex_table(table: Table, caption: str, below: Sequence[str] = ()) -> str:
    """A LaTeX table with booktabs, and sentences below it."""
    rows = [" & ".join(_latex_text(cell) for cell in row) + r" \\" for row in table]
    return "\n".join([
        r"\begin{table}", r"\centering", rf"\caption{{{_latex_text(caption)}}}",
        rf"\begin{{tabular}}{{{'ll' + 'r' * (len(table[0]) - 2)}}}", r"\toprule", rows[0], r"\midrule", *rows[1:],
        r"\bottomrule", r"\end{tabular}", *(rf"\par {_latex_text(line)}" for line in below), r"\end{table}",
    ])  # fmt: skip


def _latex_text(text: str) -> str:
    """Text with LaTeX's special characters escaped."""
    return printable(text, None).translate(LATEX)


def with_sd(numbers: np.ndarray) -> str:
    """Mean ± standard deviation over seeds, see `mean_sd`."""
    mean, sd = mean_sd(numbers)
    return f"{mean:.2f} ± {sd:.2f}" if np.isfinite(sd) else f"{mean:.2f}" if np.isfinite(mean) else "–"


def _p_text(p: float) -> str:
    """A probability with three digits."""
    return "< 0.001" if p < 0.001 else f"{p:.3f}" if np.isfinite(p) else "–"
