"""The files of a report: table.md, table.tex, table.csv, figures and one self-contained report.html."""

from __future__ import annotations

from collections.abc import Mapping

from nnunet_mim.benchmarking.bench_figures import bars_figure, cases_figure, curves_figure
from nnunet_mim.benchmarking.case_pictures import case_pictures
from nnunet_mim.benchmarking.matrix import Place, describe
from nnunet_mim.benchmarking.published_numbers import WARNING, numbers_for, published_table
from nnunet_mim.benchmarking.tables import (
    MARK,
    SHOWN,
    Outcome,
    Table,
    comparison_table,
    cost_table,
    every_value,
    label_table,
    latex_table,
    main_table,
    markdown_table,
    notes,
    smoothed_epochs,
)
from nnunet_mim.reporting.page import Section, figure_png, write_page
from nnunet_mim.system.files import write_atomically

PAGE = "report.html"


def write_report(outcome: Outcome, failed: Mapping[Place, str]) -> str:
    """Write all files from the trainings that are finished. Returns the Markdown."""
    output = outcome.matrix.bench.output
    output.mkdir(parents=True, exist_ok=True)
    text = markdown(outcome)
    write_atomically(output / "table.md", text.encode())
    write_atomically(output / "table.csv", every_value(outcome).encode())
    write_atomically(output / "table.tex", latex(outcome).encode())
    for dataset in outcome.matrix.datasets:
        write_atomically(output / f"figure_{dataset}.png", figure_png(curves_figure(outcome, dataset), 150))
    sections = [section for dataset in outcome.matrix.datasets for section in dataset_sections(outcome, dataset)]
    sections += [protocol_section(outcome), unfinished_section(outcome, failed)]
    write_page(output / PAGE, "Benchmark", sections, lead(outcome, failed))
    return text


def lead(outcome: Outcome, failed: Mapping[Place, str]) -> str:
    """How far it is, and the differences to the control with the most labels, in a sentence."""
    total, done = len(outcome.matrix.cells), len(outcome.results)
    parts = []
    for dataset in outcome.matrix.datasets:
        for arm in outcome.matrix.arms:
            for labels in outcome.matrix.labels:
                if (found := outcome.comparison(dataset, labels, arm)) is not None:
                    low, high = found[0].interval
                    difference = f"{found[0].difference:+.1f} Dice [{low:+.1f}, {high:+.1f}]"
                    parts.append(f"{outcome.name(dataset, arm)} on {dataset} with labels {labels}: {difference}")
    state = f"{done} of {total} trainings are finished" + (f", {len(failed)} failed" if failed else "")
    against = f" Against {outcome.matrix.control}: {'; '.join(parts)}." if parts else ""
    return f"{state}.{against}"


def how_to_read(outcome: Outcome) -> str:
    """What the figures of the main table are."""
    length = outcome.matrix.bench.length
    return (
        f"{length.epochs * length.iterations} iterations; mean ± standard deviation over seeds. HD95: the larger one "
        "of both directions, a missed organ counts as the image's diagonal; NSD: share of the surfaces within "
        f"{outcome.matrix.bench.nsd_tolerance_mm:g} mm. Dice minus {outcome.matrix.control}: with a 95 % interval for "
        "other seeds and cases (for other cases only, with one seed), and one for other cases and these trainings "
        "(bootstrap), for which Wilcoxon's p is too; corrected for the number of comparisons in this report (Holm). "
        "Iterations to reach it: in the learning curves, nnU-Net's Dice on validation patches (mean of "
        f"{smoothed_epochs(length.epochs)} epochs)."
    )


def markdown(outcome: Outcome) -> str:
    """All tables."""
    parts = [how_to_read(outcome)]
    for dataset in outcome.matrix.datasets:
        parts += [f"## {dataset}, {folds_text(outcome, dataset)}", markdown_table(main_table(outcome, dataset))]
        tables = [comparison_table(outcome, dataset), *label_tables(outcome, dataset), cost_table(outcome, dataset)]
        parts += [markdown_table(table) for table in tables if len(table) > 1]
        parts += ["\n".join(f"- {line}" for line in notes(outcome, dataset))]
        if numbers_for(dataset):
            parts += ["### Published elsewhere", WARNING, markdown_table(published_table(dataset))]
    return "\n\n".join(part for part in parts if part) + "\n"


def latex(outcome: Outcome) -> str:
    """The main table and that of the labels, for every dataset."""
    parts = ["% needs \\usepackage{booktabs}"]
    for dataset in outcome.matrix.datasets:
        name = f"{dataset}, {folds_text(outcome, dataset)}"
        below = notes(outcome, dataset)
        parts.append(latex_table(main_table(outcome, dataset), f"{name}. {how_to_read(outcome)}", below))
        if len(compared := comparison_table(outcome, dataset)) > 1:
            parts.append(latex_table(compared, f"{name}: against {outcome.matrix.control}.", below))
        parts += [latex_table(table, f"{name}: every label.", below) for table in label_tables(outcome, dataset)]
        if numbers_for(dataset):
            parts.append(latex_table(published_table(dataset), f"{dataset}: published elsewhere. {WARNING}"))
    return "\n".join(parts) + "\n"


def folds_text(outcome: Outcome, dataset: str) -> str:
    """Folds and validation cases in words."""
    folds = outcome.matrix.folds(dataset)
    cells = outcome.matrix.cells
    cases = sum(
        len(next(cell for place, cell in cells.items() if (place.dataset, place.fold) == (dataset, fold)).val_cases)
        for fold in folds
    )
    return f"fold{'s' if len(folds) > 1 else ''} {', '.join(map(str, folds))}, {cases} validation cases"


def dataset_sections(outcome: Outcome, dataset: str) -> list[Section]:
    """Everything about one dataset."""
    table = main_table(outcome, dataset)
    if len(table) == 1:
        return [Section(dataset, "Nothing is finished yet.")]
    marked = [number for number, row in enumerate(table) if number and row[1] == outcome.matrix.control]
    found = notes(outcome, dataset)
    sections = [
        Section(f"{dataset}, {folds_text(outcome, dataset)}", "\n\n".join(found), how_to_read(outcome), table=table,
                marked=marked, figures=[curves_figure(outcome, dataset)]),
        *against_section(outcome, dataset),
        *label_sections(outcome, dataset),
    ]  # fmt: skip
    numbers = label_numbers(outcome, dataset)
    if pictures := case_pictures(outcome, dataset, numbers):
        note = f"Dice is that of the whole case. Worst, median and best are those of {outcome.matrix.arms[0]}."
        figure = cases_figure(pictures, numbers)
        sections.append(Section(f"{dataset}: cases", "", note, figures=[figure]))
    sections.append(Section(f"{dataset}: cost", table=cost_table(outcome, dataset)))
    if numbers_for(dataset):
        sections.append(Section(f"{dataset}: published elsewhere", WARNING, table=published_table(dataset), words=True))
    return sections


def label_tables(outcome: Outcome, dataset: str) -> list[Table]:
    """Every metric of every label."""
    return [label_table(outcome, dataset, metric) for metric in SHOWN]


def label_sections(outcome: Outcome, dataset: str) -> list[Section]:
    """One a metric; Dice with bars."""
    dice, *others = label_tables(outcome, dataset)
    bars = bars_figure(outcome, dataset)
    first = Section(f"{dataset}: every label", table=dice, figures=[bars] if bars else [])
    names = list(SHOWN.values())[1:]
    rest = [Section(f"{dataset}: {n}, every label", table=t) for (n, _), t in zip(names, others, strict=True)]
    return [first, *rest]


def against_section(outcome: Outcome, dataset: str) -> list[Section]:
    """Against the control; nothing where nothing can be compared."""
    table = comparison_table(outcome, dataset)
    return [Section(f"{dataset}: against {outcome.matrix.control}", table=table)] if len(table) > 1 else []


def label_numbers(outcome: Outcome, dataset: str) -> dict[int, str]:
    """Names of the numbers in label images; regions share numbers, which then go without a name."""
    cell = next(cell for place, cell in outcome.matrix.cells.items() if place.dataset == dataset)
    names: dict[int, str] = {}
    for name, value in cell.dataset_json["labels"].items():
        for number in value if isinstance(value, list | tuple) else [value]:
            if int(number) > 0 and name != "ignore":
                names[int(number)] = name if isinstance(value, int) else f"label {number}"
    return names


def protocol_section(outcome: Outcome) -> Section:
    """What the arms are."""
    bench = outcome.matrix.bench
    table = [["arm", "trainer", "plans", "starts from"]]
    for spec in bench.arms:
        cells = {place: cell for place, cell in outcome.matrix.cells.items() if place.arm == spec.name}
        checkpoints = sorted({cell.arm.checkpoint or "random weights" for cell in cells.values()})
        seen = any(outcome.seen[place.dataset, place.fold, spec.name].seen for place in cells)
        settings = ", ".join(f"{key}={value}" for key, value in spec.settings.items())
        trainer = f"{spec.trainer} ({settings})" if settings else spec.trainer
        table.append([spec.name + (MARK if seen else ""), trainer, spec.plans, ", ".join(checkpoints)])
    return Section("Arms", table=table, words=True)


def unfinished_section(outcome: Outcome, failed: Mapping[Place, str]) -> Section:
    """What is missing, and why."""
    left = [place for place in outcome.matrix.cells if place not in outcome.results]
    lines = [f"{describe(place)}: {failed.get(place, 'not run yet')}" for place in left]
    return Section("Not finished", "" if lines else "Everything is finished.", code="\n".join(lines))
