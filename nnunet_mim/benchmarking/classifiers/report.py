"""The files of a report on classifiers: table.md, table.csv and one self-contained report.html."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from nnunet_mim.benchmarking.classifiers.matrix import ClassifierPlace
from nnunet_mim.benchmarking.classifiers.outcome import ClassifierOutcome
from nnunet_mim.benchmarking.outcome import MARK
from nnunet_mim.benchmarking.statistics import interval_text
from nnunet_mim.benchmarking.tables import Table, markdown_table
from nnunet_mim.classification.baselines import COVARIATES, PREVALENCE, describe_baselines, is_baseline
from nnunet_mim.classification.evaluation import FIGURE_NAMES, N_DRAWS
from nnunet_mim.classification.results import WITH_COVARIATES
from nnunet_mim.reporting.classifiers import Line, fractions_figure
from nnunet_mim.reporting.page import Section, markdown_text, write_page
from nnunet_mim.system.files import csv_text, write_atomically

PAGE = "report.html"
SHOWN = ("auroc", "average_precision")
"""figures of the main table; table.csv has all"""
N_NAMED = 5
"""seen cases that a note names; the page names all"""


def write_classifier_report(outcome: ClassifierOutcome, failed: Mapping[ClassifierPlace, str]) -> str:
    """Write all files from the trainings that are finished. Returns the Markdown."""
    output = outcome.matrix.bench.output
    output.mkdir(parents=True, exist_ok=True)
    text = _markdown(outcome)
    write_atomically(output / "table.md", text.encode())
    write_atomically(output / "table.csv", every_figure(outcome).encode())
    sections = [section for where in outcome.cases for section in _sections(outcome, *where)]
    sections += [_seen_section(outcome), _arms_section(outcome), _unfinished_section(outcome, failed)]
    write_page(output / PAGE, "Benchmark of classifiers", sections, _summary(outcome, failed))
    return text


def main_table(outcome: ClassifierOutcome, dataset: str, target: str) -> Table:
    """AUROC and average precision, one row per number of labelled patients and classifier."""
    table = [["labels", "classifier", "seeds", *(FIGURE_NAMES[figure] for figure in SHOWN)]]
    for labels in outcome.matrix.labels(dataset):
        for name in outcome.classifiers(dataset, target, labels):
            values = [outcome.values(dataset, target, labels, name, figure) for figure in SHOWN]
            row = [_labels_text(outcome, dataset, labels), _name(outcome, dataset, name), str(len(values[0]))]
            table.append([*row, *map(_with_sd, values)])
    return table


def comparison_table(outcome: ClassifierOutcome, dataset: str, target: str) -> Table:
    """Paired differences of the AUROC, first minus second."""
    table = [["labels", "first", "second", "seeds", "AUROC, first minus second", "p", "p corrected"]]
    for key, gap, n_seeds in outcome.comparisons:
        if (key.dataset, key.target) == (dataset, target):
            difference = f"{gap.interval.value:+.3f} {interval_text((gap.interval.low, gap.interval.high), 3)}"
            names = [_name(outcome, dataset, name) for name in (gap.first, gap.second)]
            ps = [f"{gap.p:.4f}", f"{gap.corrected_p:.4f}"]
            table.append([_labels_text(outcome, dataset, key.labels), *names, str(n_seeds), difference, *ps])
    return table


def every_figure(outcome: ClassifierOutcome) -> str:
    """CSV with one row per training, target and classifier, and all figures."""
    rows = [["dataset", "target", "labels", "classifier", "seed", *FIGURE_NAMES]]
    for key, score in sorted(outcome.scores.items()):
        rows.append([*map(str, key), *(f"{score.figures[figure]:.6g}" for figure in FIGURE_NAMES)])
    return csv_text(rows)


def notes(outcome: ClassifierOutcome, dataset: str) -> list[str]:
    """Sentences under the tables about what the pretrainings have seen."""
    lines = []
    for arm in outcome.matrix.arms:
        if seen := outcome.seen_cases(dataset, arm):
            names = f"{', '.join(seen[:N_NAMED])}{' …' if len(seen) > N_NAMED else ''}"
            total = len(next(cell for p, cell in outcome.matrix.cells.items() if p.dataset == dataset).job.table.cases)
            lines.append(
                f"{arm}{MARK}: its pretraining has seen the images, never the labels, of {len(seen)} of {total} cases "
                f"({names})"
            )
        elif not outcome.has_record(dataset, arm):
            lines.append(f"{arm}: its checkpoint does not say which cases it was pretrained on")
    return lines


def _how_to_read(outcome: ClassifierOutcome) -> str:
    """What the numbers of the tables are."""
    where = outcome.matrix.bench.where
    which = f"Only cases with {where[0]} from {where[1]} to below {where[2]} count. " if where else ""
    return (
        f"{which}Every case is predicted by the fold that has not seen its patient; mean ± standard deviation over "
        "seeds, which draw labelled patients and random weights. AUROC and average precision are those of the second "
        "of two classes, of more the mean over each against the others. Differences are paired, with a 95 % interval "
        f"for other patients and these trainings (bootstrap over patients, {N_DRAWS} draws); p of no difference, "
        "corrected for the number of comparisons in this report (Holm)."
    )


def _markdown(outcome: ClassifierOutcome) -> str:
    parts = [markdown_text(_how_to_read(outcome))]
    for dataset, target in outcome.cases:
        parts.append(f"## {markdown_text(_heading(outcome, dataset, target))}")
        parts.append(markdown_table(main_table(outcome, dataset, target)))
        if len(differences := comparison_table(outcome, dataset, target)) > 1:
            parts.append(markdown_table(differences))
        parts.append("\n".join(f"- {markdown_text(line)}" for line in notes(outcome, dataset)))
    return "\n\n".join(part for part in parts if part) + "\n"


def _sections(outcome: ClassifierOutcome, dataset: str, target: str) -> list[Section]:
    """The sections of the page about one target of a dataset."""
    table = main_table(outcome, dataset, target)
    marked = [number for number, row in enumerate(table) if number and row[1] == outcome.matrix.control]
    text = "\n\n".join(notes(outcome, dataset))
    figure = fractions_figure(_lines(outcome, dataset, target), f"{target} in {dataset}", "AUROC")
    heading = _heading(outcome, dataset, target)
    found = [Section(heading, text, _how_to_read(outcome), [figure], table, marked=marked)]
    if len(differences := comparison_table(outcome, dataset, target)) > 1:
        found.append(Section(f"{dataset}, {target}: differences", table=differences))
    return found


def _lines(outcome: ClassifierOutcome, dataset: str, target: str) -> list[Line]:
    """AUROC of classifiers by the mean number of labelled patients of a fold; that of the prevalence is one half."""
    points: dict[str, list[tuple[float, float, float]]] = {}
    for labels in outcome.matrix.labels(dataset):
        patients = float(np.mean(outcome.matrix.n_patients(dataset, labels)))
        for name in outcome.classifiers(dataset, target, labels):
            if name == PREVALENCE:
                continue
            values = outcome.values(dataset, target, labels, name, "auroc")
            sd = float(values.std(ddof=1)) if len(values) > 1 else 0.0
            points.setdefault(name, []).append((patients, float(values.mean()), sd))
    return [Line(_name(outcome, dataset, name), tuple(own), is_baseline(name)) for name, own in points.items()]


def _seen_section(outcome: ClassifierOutcome) -> Section:
    lines = []
    for dataset in outcome.matrix.datasets:
        for arm in outcome.matrix.arms:
            if seen := outcome.seen_cases(dataset, arm):
                lines.append(f"{arm}, {dataset}: {', '.join(seen)}")
    text = "" if lines else "No pretraining with a record of its cases has seen a case of the finished trainings."
    return Section("Cases that a pretraining has seen", text, code="\n".join(lines))


def _arms_section(outcome: ClassifierOutcome) -> Section:
    """Mode, start and settings of every arm, and what the baselines see."""
    table = [["classifier", "mode", "starts from", "settings"]]
    bench = outcome.matrix.bench
    for arm in bench.arms:
        cells = [cell for place, cell in outcome.matrix.cells.items() if place.arm == arm.name]
        settings = ", ".join(f"{name}={value}" for name, value in {**bench.settings, **arm.settings}.items())
        origins = ", ".join(sorted({cell.start.origin for cell in cells}))
        table.append([arm.name, str(arm.mode), origins, settings or "as by default"])
    covariates = next(iter(outcome.matrix.cells.values())).job.config.covariate
    for name, seen in describe_baselines(covariates).items():
        if covariates or name != COVARIATES:
            table.append([name, "logistic regression", f"sees {seen}", ""])
    return Section("Arms", table=table, words=True)


def _unfinished_section(outcome: ClassifierOutcome, failed: Mapping[ClassifierPlace, str]) -> Section:
    places = [place for place in outcome.matrix.cells if place not in outcome.results]
    code = "\n".join(f"{place}: {failed.get(place, 'not run yet')}" for place in places)
    return Section("Not finished", "" if code else "Everything is finished.", code=code)


def _summary(outcome: ClassifierOutcome, failed: Mapping[ClassifierPlace, str]) -> str:
    """How many trainings are finished, and every difference to the control, in a sentence."""
    matrix = outcome.matrix
    state = f"{len(outcome.results)} of {len(matrix.cells)} trainings are finished"
    state += f", {len(failed)} failed" if failed else ""
    parts = []
    for key, gap, _ in outcome.comparisons:
        if gap.second == matrix.control:
            interval = f"{gap.interval.value:+.3f} {interval_text((gap.interval.low, gap.interval.high), 3)}"
            where = f"{key.target} in {key.dataset} with labels {key.labels}"
            parts.append(f"{_name(outcome, key.dataset, gap.first)} on {where}: {interval} AUROC")
    return f"{state}. Against {matrix.control}: {'; '.join(parts)}." if parts else f"{state}."


def _heading(outcome: ClassifierOutcome, dataset: str, target: str) -> str:
    """A dataset and target with its cases and classes."""
    cases = outcome.cases[dataset, target]
    classes = enumerate(cases.target.classes)
    counts = ", ".join(f"{name}: {int((cases.target.labels == k).sum())}" for k, name in classes)
    return f"{dataset}, {target}: {len(cases.cases)} cases of {len(set(cases.patients))} patients ({counts})"


def _name(outcome: ClassifierOutcome, dataset: str, classifier: str) -> str:
    """A classifier's name, marked where its pretraining has seen cases."""
    return classifier + (MARK if outcome.seen_cases(dataset, classifier.removesuffix(WITH_COVARIATES)) else "")


def _labels_text(outcome: ClassifierOutcome, dataset: str, labels: str) -> str:
    """Labels as the user wrote them, and the number of patients of a fold that they are."""
    numbers = "/".join(map(str, sorted(set(outcome.matrix.n_patients(dataset, labels)))))
    return labels if labels == numbers else f"{labels} ({numbers})"


def _with_sd(values: Sequence[float] | np.ndarray) -> str:
    """Mean ± standard deviation over seeds."""
    mean = float(np.mean(values))
    return f"{mean:.3f} ± {float(np.std(values, ddof=1)):.3f}" if len(values) > 1 else f"{mean:.3f}"
