"""The files of a report: table.md, table.tex, table.csv, figures and one self-contained report.html."""

from __future__ import annotations

from collections.abc import Mapping

from nnunet_mim.benchmarking.bench_figures import bars_figure, cases_figure, curves_figure
from nnunet_mim.benchmarking.case_pictures import case_pictures
from nnunet_mim.benchmarking.matrix import Place
from nnunet_mim.benchmarking.outcome import MARK, Outcome
from nnunet_mim.benchmarking.published_numbers import WARNING, numbers_for, published_table
from nnunet_mim.benchmarking.tables import (
    SHOWN,
    Table,
    comparison_table,
    cost_table,
    every_value,
    label_table,
    latex_table,
    main_table,
    markdown_table,
    notes,
    smoothing_window,
)
from nnunet_mim.reporting.page import Section, figure_png, write_page
from nnunet_mim.system.files import write_atomically

PAGE = "report.html"
EVERY_LABEL, COST = "every label", "cost"


def write_bench_report(outcome: Outcome, failed: Mapping[Place, str]) -> str:
    """Write all files from the trainings that are finished. Returns the Markdown."""
    output, datasets = outcome.matrix.bench.output, outcome.matrix.datasets
    output.mkdir(parents=True, exist_ok=True)
    text = markdown(outcome)
    write_atomically(output / "table.md", text.encode())
    write_atomically(output / "table.csv", every_value(outcome).encode())
    write_atomically(output / "table.tex", latex(outcome).encode())
    for dataset in datasets:
        write_atomically(output / f"figure_{dataset}.png", figure_png(curves_figure(outcome, dataset), 150))
    sections = [section for dataset in datasets for section in dataset_sections(outcome, dataset)]
    sections += [arms_section(outcome), unfinished_section(outcome, failed)]
    write_page(output / PAGE, "Benchmark", sections, summary(outcome, failed))
    return text


def summary(outcome: Outcome, failed: Mapping[Place, str]) -> str:
    """How many trainings are finished, and every difference to the control, in a sentence."""
    matrix = outcome.matrix
    parts = []
    for dataset in matrix.datasets:
        for arm in matrix.arms:
            for labels in matrix.labels:
                if (compared := outcome.comparison(dataset, labels, arm)) is not None:
                    low, high = compared[0].interval
                    difference = f"{compared[0].difference:+.1f} Dice [{low:+.1f}, {high:+.1f}]"
                    parts.append(f"{outcome.name(dataset, arm)} on {dataset} with labels {labels}: {difference}")
    state = f"{len(outcome.results)} of {len(matrix.cells)} trainings are finished"
    state += f", {len(failed)} failed" if failed else ""
    against = f" Against {matrix.control}: {'; '.join(parts)}." if parts else ""
    return f"{state}.{against}"


def how_to_read(outcome: Outcome) -> str:
    """What the numbers of the tables are."""
    bench = outcome.matrix.bench
    return (
        f"{bench.iterations} iterations; mean ± standard deviation over seeds. HD95: the larger one "
        "of both directions, a missed organ counts as the image's diagonal; NSD: share of the surfaces within "
        f"{bench.nsd_tolerance_mm:g} mm. Dice minus {outcome.matrix.control}: with a 95 % interval for "
        "other seeds and cases (for other cases only, with one seed), and one for other cases and these trainings "
        "(bootstrap), for which Wilcoxon's p is too; corrected for the number of comparisons in this report (Holm). "
        "Iterations to reach it: in the learning curves, nnU-Net's Dice on validation patches (mean of "
        f"{smoothing_window(bench.length.epochs)} epochs)."
    )


def dataset_title(outcome: Outcome, dataset: str) -> str:
    """A dataset with its folds and number of validation cases."""
    folds = outcome.matrix.folds(dataset)
    cases = {(place.fold, case) for place, cell in outcome.matrix.cells.items() if place.dataset == dataset
             for case in cell.val_cases}  # fmt: skip
    return f"{dataset}, fold{'s' if len(folds) > 1 else ''} {', '.join(map(str, folds))}, {len(cases)} validation cases"


def further_tables(outcome: Outcome, dataset: str) -> dict[str, Table]:
    """All tables but the main one by title; empty ones are left out."""
    tables = {f"against {outcome.matrix.control}": comparison_table(outcome, dataset)}
    for metric, (heading, _) in SHOWN.items():
        title = EVERY_LABEL if metric == "dice" else f"{heading}, {EVERY_LABEL}"
        tables[title] = label_table(outcome, dataset, metric)
    tables[COST] = cost_table(outcome, dataset)
    return {title: table for title, table in tables.items() if len(table) > 1}


def markdown(outcome: Outcome) -> str:
    """All tables as Markdown."""
    parts = [how_to_read(outcome)]
    for dataset in outcome.matrix.datasets:
        tables = [main_table(outcome, dataset), *further_tables(outcome, dataset).values()]
        parts += [f"## {dataset_title(outcome, dataset)}", *map(markdown_table, tables)]
        parts += ["\n".join(f"- {line}" for line in notes(outcome, dataset))]
        if numbers_for(dataset):
            parts += ["### Published elsewhere", WARNING, markdown_table(published_table(dataset))]
    return "\n\n".join(part for part in parts if part) + "\n"


def latex(outcome: Outcome) -> str:
    """All tables but the costs as LaTeX."""
    parts = ["% needs \\usepackage{booktabs}"]
    for dataset in outcome.matrix.datasets:
        name, below = dataset_title(outcome, dataset), notes(outcome, dataset)
        parts.append(latex_table(main_table(outcome, dataset), f"{name}. {how_to_read(outcome)}", below))
        for title, table in further_tables(outcome, dataset).items():
            if title != COST:
                parts.append(latex_table(table, f"{name}: {EVERY_LABEL if EVERY_LABEL in title else title}.", below))
        if numbers_for(dataset):
            parts.append(latex_table(published_table(dataset), f"{dataset}: published elsewhere. {WARNING}"))
    return "\n".join(parts) + "\n"


def dataset_sections(outcome: Outcome, dataset: str) -> list[Section]:
    """The sections of the page about one dataset."""
    table = main_table(outcome, dataset)
    if len(table) == 1:
        return [Section(dataset, "Nothing is finished yet.")]
    marked = [number for number, row in enumerate(table) if number and row[1] == outcome.matrix.control]
    text = "\n\n".join(notes(outcome, dataset))
    curves = [curves_figure(outcome, dataset)]
    sections = [
        Section(dataset_title(outcome, dataset), text, how_to_read(outcome), table=table, marked=marked, figures=curves)
    ]
    for title, further in further_tables(outcome, dataset).items():
        if title == COST:
            sections += cases_sections(outcome, dataset)
        bars = bars_figure(outcome, dataset) if title == EVERY_LABEL else None
        sections.append(Section(f"{dataset}: {title}", table=further, figures=[bars] if bars else []))
    if numbers_for(dataset):
        sections.append(Section(f"{dataset}: published elsewhere", WARNING, table=published_table(dataset), words=True))
    return sections


def cases_sections(outcome: Outcome, dataset: str) -> list[Section]:
    """Pictures of cases; none where there are no pictures."""
    names = label_numbers(outcome, dataset)
    pictures = case_pictures(outcome, dataset, names)
    if not pictures:
        return []
    note = f"Dice is that of the whole case. Worst, median and best are those of {outcome.matrix.arms[0]}."
    return [Section(f"{dataset}: cases", "", note, figures=[cases_figure(pictures, names)])]


def label_numbers(outcome: Outcome, dataset: str) -> dict[int, str]:
    """Names of the numbers in label images. Numbers that regions share are named by the number."""
    cell = next(cell for place, cell in outcome.matrix.cells.items() if place.dataset == dataset)
    names: dict[int, str] = {}
    for name, value in cell.dataset_json["labels"].items():
        for number in value if isinstance(value, list | tuple) else [value]:
            if int(number) > 0 and name != "ignore":
                names[int(number)] = name if isinstance(value, int) else f"label {number}"
    return names


def arms_section(outcome: Outcome) -> Section:
    """Trainer, plans and checkpoint of every arm."""
    table = [["arm", "trainer", "plans", "starts from"]]
    for spec in outcome.matrix.bench.arms:
        cells = {place: cell for place, cell in outcome.matrix.cells.items() if place.arm == spec.name}
        checkpoints = sorted({cell.arm.checkpoint or "random weights" for cell in cells.values()})
        seen = any(outcome.seen[place.dataset, place.fold, spec.name].seen for place in cells)
        settings = ", ".join(f"{key}={value}" for key, value in spec.settings.items())
        trainer = f"{spec.trainer} ({settings})" if settings else spec.trainer
        table.append([spec.name + (MARK if seen else ""), trainer, spec.plans, ", ".join(checkpoints)])
    return Section("Arms", table=table, words=True)


def unfinished_section(outcome: Outcome, failed: Mapping[Place, str]) -> Section:
    """What is missing, and why."""
    places = [place for place in outcome.matrix.cells if place not in outcome.results]
    lines = [f"{place}: {failed.get(place, 'not run yet')}" for place in places]
    return Section("Not finished", "" if lines else "Everything is finished.", code="\n".join(lines))
