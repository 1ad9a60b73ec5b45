"""Tables and figure of the few-shot protocol."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from nnunet_mim.benchmarking.protocol import Place, Protocol, case_value, false_alarms
from nnunet_mim.benchmarking.statistics import compare, mean_sd
from nnunet_mim.files import write_atomically

METRICS = ("dice", "hd95", "n_ref", "n_pred")


def write_report(protocol: Protocol, results: Mapping[Place, dict[str, Any]], output: Path) -> str:
    """Write table.md, table.csv and figure.png from the trainings that are finished. Returns the Markdown."""
    text = markdown(protocol, results)
    write_atomically(output / "table.md", text.encode())
    write_atomically(output / "table.csv", every_value(results).encode())
    picture = io.BytesIO()
    figure(protocol, results).savefig(picture, format="png", dpi=150)
    write_atomically(output / "figure.png", picture.getvalue())
    return text


def markdown(protocol: Protocol, results: Mapping[Place, dict[str, Any]]) -> str:
    """One row a number of labels and arm."""
    control = control_of(protocol)
    length = protocol.length
    lines = [
        f"{length.epochs * length.iterations} iterations, fold {protocol.fold}, {len(protocol.val_cases)} validation "
        f"cases; mean ± sd over seeds. Difference of Dice to {control}: with a 95 % interval for other seeds and cases "
        "(for other cases only, with one seed), and one for other cases and these trainings (bootstrap), for which "
        "Wilcoxon's p is too",
        "",
        "| labels | arm | seeds | Dice % | HD95 mm | difference | these trainings | p | iterations to reach it |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for count in protocol.labels:
        for arm in protocol.arms:
            seeds = seeds_of(protocol, results, count, arm.name)
            if not seeds:
                continue
            dice = values(results, count, seeds, arm.name, "dice") * 100
            row = [str(count), arm.name, str(len(seeds)), with_sd(dice)]
            row.append(with_sd(values(results, count, seeds, arm.name, "hd95")))
            row += [""] * 4 if arm.name == control else against(protocol, results, count, arm.name, control)
            lines.append(f"| {' | '.join(row)} |")
    lines += ["", *label_table(protocol, results)]
    alarms = [(place, *false_alarms(result)) for place, result in sorted(results.items())]
    if any(n for _, n, _ in alarms):
        lines += ["", "Found where the reference has nothing (not in the figures above):"]
        lines += [f"- {arm}, {count} labels, seed {seed}: {n} of {m}" for (count, seed, arm), n, m in alarms if n]
    if leaked := sorted({case for result in results.values() for case in result["leaked"]}):
        lines += ["", f"WARNING: the pretraining has seen {len(leaked)} of the validation cases ({leaked[0]} first)"]
    return "\n".join(lines) + "\n"


def control_of(protocol: Protocol) -> str:
    """The arm that others are compared with: the first one without a pretraining."""
    return next((arm.name for arm in protocol.arms if arm.checkpoint is None), protocol.arms[-1].name)


def against(
    protocol: Protocol, results: Mapping[Place, dict[str, Any]], count: int, arm: str, control: str
) -> list[str]:
    """Cells of a row: difference to the control, p, iterations that the arm needs to reach it."""
    both = [s for s in seeds_of(protocol, results, count, arm) if (count, s, control) in results]
    if not both:
        return [""] * 4
    own, its = (values(results, count, both, name, "dice") * 100 for name in (arm, control))
    found = compare(own, its)
    epochs = [reaches(results[count, seed, arm]["curve"], results[count, seed, control]["curve"][-1]) for seed in both]
    per_epoch, total = protocol.length.iterations, protocol.length.epochs
    needed = [str(n * per_epoch) if n is not None else f"> {total * per_epoch}" for n in epochs]
    return [
        f"{found.difference:+.2f} [{found.interval[0]:+.2f}, {found.interval[1]:+.2f}]",
        f"[{found.bootstrap[0]:+.2f}, {found.bootstrap[1]:+.2f}]",
        "< 0.001" if found.p < 0.001 else f"{found.p:.3f}" if np.isfinite(found.p) else "–",
        ", ".join(needed),
    ]


def reaches(curve: list[float], goal: float) -> int | None:
    """First epoch (from 1 on) at which a learning curve is at `goal`; None if never."""
    return next((number for number, value in enumerate(curve, start=1) if value >= goal), None)


def label_table(protocol: Protocol, results: Mapping[Place, dict[str, Any]]) -> list[str]:
    """Dice of every label."""
    first = next(iter(results.values()))
    labels = list(next(iter(first["cases"].values())))
    heading = " | ".join(f"Dice % of {first['names'].get(label, label)}" for label in labels)
    lines = [f"| labels | arm | {heading} |", "|---" * (2 + len(labels)) + "|"]
    for count in protocol.labels:
        for arm in protocol.arms:
            if seeds := seeds_of(protocol, results, count, arm.name):
                row = [with_sd(values(results, count, seeds, arm.name, "dice", label) * 100) for label in labels]
                lines.append(f"| {count} | {arm.name} | {' | '.join(row)} |")
    return lines


def seeds_of(protocol: Protocol, results: Mapping[Place, dict[str, Any]], count: int, arm: str) -> list[int]:
    """Seeds with a result."""
    return [seed for seed in range(protocol.seeds) if (count, seed, arm) in results]


def values(
    results: Mapping[Place, dict[str, Any]],
    count: int,
    seeds: list[int],
    arm: str,
    metric: str,
    label: str | None = None,
) -> np.ndarray:
    """(seeds, cases) of a metric, see `case_value`."""
    rows = []
    for seed in seeds:
        cases = results[count, seed, arm]["cases"]
        rows.append([case_value(cases[case], metric, label) for case in sorted(cases)])
    return np.array(rows)


def with_sd(numbers: np.ndarray) -> str:
    """Mean ± standard deviation over seeds."""
    mean, sd = mean_sd(numbers)
    return f"{mean:.2f} ± {sd:.2f}" if np.isfinite(sd) else f"{mean:.2f}"


def every_value(results: Mapping[Place, dict[str, Any]]) -> str:
    """CSV: one row a training, case and label."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["labels", "seed", "arm", "case", "label", *METRICS])
    for (count, seed, arm), result in sorted(results.items()):
        for case, labels in sorted(result["cases"].items()):
            for label, found in labels.items():
                writer.writerow([count, seed, arm, case, label, *(f"{found[metric]:.6g}" for metric in METRICS)])
    return text.getvalue()


def figure(protocol: Protocol, results: Mapping[Place, dict[str, Any]]) -> Figure:
    """Dice by number of labels, and the learning curves with all of them."""
    picture = Figure(figsize=(10, 4), layout="constrained")
    left, right = picture.subplots(1, 2)
    for number, arm in enumerate(protocol.arms):
        colour = f"C{number}"
        found = {count: seeds_of(protocol, results, count, arm.name) for count in protocol.labels}
        points = {
            count: np.nanmean(values(results, count, seeds, arm.name, "dice"), axis=1) * 100
            for count, seeds in found.items()
            if seeds
        }
        for count, means in points.items():
            left.scatter([count] * len(means), means, color=colour, s=14, alpha=0.6)
        left.plot(list(points), [means.mean() for means in points.values()], color=colour, label=arm.name)
        most = max(points, default=0)
        for seed in found.get(most, []):
            curve = results[most, seed, arm.name]["curve"]
            steps = protocol.length.iterations * np.arange(1, len(curve) + 1)
            right.plot(steps, np.array(curve) * 100, color=colour, alpha=0.8, label=arm.name if not seed else None)
    left.set(xlabel="labelled cases", ylabel="Dice on the fold's validation cases, %", xscale="log")
    left.set_xticks(protocol.labels, [str(count) for count in protocol.labels])
    left.minorticks_off()
    right.set(xlabel="iterations", ylabel="moving average of nnU-Net's pseudo-Dice, %")
    right.set_title("learning curves with the most labels", fontsize=10)
    for axes in (left, right):
        axes.grid(alpha=0.3)
        axes.legend(frameon=False)
    return picture
