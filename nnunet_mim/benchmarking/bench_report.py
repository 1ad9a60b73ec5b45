"""The files of a report: table.md, table.tex, table.csv, figures and one self-contained report.html."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from nnunet_mim.benchmarking import tables
from nnunet_mim.benchmarking.bench_figures import bars_figure, case_pictures, cases_figure, curves_figure, label_numbers
from nnunet_mim.benchmarking.matrix import Place
from nnunet_mim.benchmarking.outcome import MARK, Outcome
from nnunet_mim.benchmarking.published_numbers import WARNING, published_table
from nnunet_mim.benchmarking.statistics import interval_text
from nnunet_mim.reporting.page import Section, figure_png, markdown_text, write_page
from nnunet_mim.system.files import write_atomically

PAGE = "report.html"
MAIN, EVERY_LABEL, COST = "", "every label", "cost"
"""titles of tables"""


def write_bench_report(outcome: Outcome, failed: Mapping[Place, str], tests: Sequence[Outcome] = ()) -> str:
    """Write all files from the trainings that are finished, also evaluated on test sets. Returns the Markdown."""
    output, datasets = outcome.matrix.bench.output, outcome.matrix.datasets
    output.mkdir(parents=True, exist_ok=True)
    text = "\n".join(map(_markdown, (outcome, *tests)))
    write_atomically(output / "table.md", text.encode())
    write_atomically(output / "table.csv", tables.every_value(outcome).encode())
    write_atomically(output / "table.tex", "".join(map(_latex, (outcome, *tests))).encode())
    for dataset in datasets:
        write_atomically(output / f"figure_{dataset}.png", figure_png(curves_figure(outcome, dataset), 150))
    for tested in tests:
        assert tested.test is not None
        write_atomically(output / f"test_{tested.test.dataset}.csv", tables.every_value(tested).encode())
    evaluated = [(one, dataset) for one in (outcome, *tests) for dataset in datasets]
    sections = [section for one, dataset in evaluated for section in _dataset_sections(one, dataset)]
    places = [place for place in outcome.matrix.cells if place not in outcome.results]
    code = "\n".join(f"{place}: {failed.get(place, 'not run yet')}" for place in places)
    unfinished = Section("Not finished", "" if code else "Everything is finished.", code=code)
    summary = " ".join([_summary(outcome, failed), *filter(None, map(_differences, tests))])
    write_page(output / PAGE, "Benchmark", [*sections, _arms_section(outcome, tests), unfinished], summary)
    return text


def _summary(outcome: Outcome, failed: Mapping[Place, str]) -> str:
    """How many trainings are finished, and every difference to the control, in a sentence."""
    state = f"{len(outcome.results)} of {len(outcome.matrix.cells)} trainings are finished"
    state += f", {len(failed)} failed" if failed else ""
    return f"{state}. {_differences(outcome)}".strip()


def _differences(outcome: Outcome) -> str:
    """Every difference to the control in a sentence; empty where there is none."""
    parts = []
    for (dataset, labels, arm), (found, _) in outcome.comparisons.items():
        difference = f"{found.difference:+.1f} Dice {interval_text(found.interval, 1)}"
        parts.append(f"{outcome.name(dataset, arm)} on {outcome.place(dataset)} with labels {labels}: {difference}")
    return f"Against {outcome.matrix.control}: {'; '.join(parts)}." if parts else ""


def _how_to_read(outcome: Outcome) -> str:
    """What the numbers of the tables are."""
    bench = outcome.matrix.bench
    return (
        f"{bench.iterations} iterations; mean ± standard deviation over seeds. HD95: the larger one "
        "of both directions, a missed organ counts as the image's diagonal; NSD: share of the surfaces within "
        f"{bench.nsd_tolerance_mm:g} mm. Dice minus {outcome.matrix.control}: with a 95 % interval for "
        "other seeds and cases (for other cases only, with one seed), and one for other cases and these trainings "
        "(bootstrap), for which Wilcoxon's p is too; corrected for the number of comparisons in this report (Holm). "
        "Iterations to reach it: in the learning curves, nnU-Net's Dice on validation patches (mean of "
        f"{tables.smoothing_window(bench.length.epochs)} epochs)."
    )


def _heading(outcome: Outcome, dataset: str) -> str:
    """A dataset with its folds and number of validation cases."""
    folds, n_cases = outcome.matrix.folds(dataset), outcome.case_count(dataset)
    numbers = f"fold{'s' if len(folds) > 1 else ''} {', '.join(map(str, folds))}"
    cases = f"{'test' if outcome.test else 'validation'} case{'s' if n_cases != 1 else ''}"
    return f"{outcome.place(dataset)}, {numbers}, {n_cases} {cases}"


def _tables(outcome: Outcome, dataset: str) -> dict[str, tables.Table]:
    """All tables by title; empty ones but the main one are left out."""
    found = {MAIN: tables.main_table(outcome, dataset)}
    found[f"against {outcome.matrix.control}"] = tables.comparison_table(outcome, dataset)
    for metric, (heading, _) in tables.SHOWN.items():
        title = EVERY_LABEL if metric == "dice" else f"{heading}, {EVERY_LABEL}"
        found[title] = tables.label_table(outcome, dataset, metric)
    if not outcome.test:
        found[COST] = tables.cost_table(outcome, dataset)
    return {title: table for title, table in found.items() if title == MAIN or len(table) > 1}


def _markdown(outcome: Outcome) -> str:
    """All tables as Markdown."""
    parts = [] if outcome.test else [markdown_text(_how_to_read(outcome))]
    for dataset in outcome.matrix.datasets:
        parts += [f"## {markdown_text(_heading(outcome, dataset))}"]
        parts += map(tables.markdown_table, _tables(outcome, dataset).values())
        parts += ["\n".join(f"- {markdown_text(line)}" for line in tables.notes(outcome, dataset))]
        if published := _published(outcome, dataset):
            parts += ["### Published elsewhere", WARNING, tables.markdown_table(published)]
    return "\n\n".join(part for part in parts if part) + "\n"


def _latex(outcome: Outcome) -> str:
    """All tables but the costs as LaTeX."""
    parts = ["% needs \\usepackage{booktabs}"]
    for dataset in outcome.matrix.datasets:
        name, below = _heading(outcome, dataset), tables.notes(outcome, dataset)
        for title, table in _tables(outcome, dataset).items():
            short = EVERY_LABEL if EVERY_LABEL in title else title
            caption = f"{name}. {_how_to_read(outcome)}" if title == MAIN else f"{name}: {short}."
            if title != COST:
                parts.append(tables.latex_table(table, caption, below))
        if published := _published(outcome, dataset):
            parts.append(tables.latex_table(published, f"{dataset}: published elsewhere. {WARNING}"))
    return "\n".join(parts) + "\n"


def _dataset_sections(outcome: Outcome, dataset: str) -> list[Section]:
    """The sections of the page about one dataset."""
    further = _tables(outcome, dataset)
    main = further.pop(MAIN)
    if len(main) == 1:
        return [Section(outcome.place(dataset), "Nothing is finished yet.")]
    marked = [number for number, row in enumerate(main) if number and row[1] == outcome.matrix.control]
    text, curves = "\n\n".join(tables.notes(outcome, dataset)), [curves_figure(outcome, dataset)]
    heading, note = _heading(outcome, dataset), _how_to_read(outcome)
    sections = [Section(heading, text, note, table=main, marked=marked, figures=curves)]
    names = label_numbers(outcome, dataset)
    pictures = case_pictures(outcome, dataset, names)
    costs = further.pop(COST, [])
    for title, table in further.items():
        bars = bars_figure(outcome, dataset) if title == EVERY_LABEL else None
        sections.append(Section(f"{outcome.place(dataset)}: {title}", table=table, figures=[bars] if bars else []))
    if pictures:
        note = f"Dice is that of the whole case. Worst, median and best are those of {outcome.matrix.arms[0]}."
        sections.append(Section(f"{outcome.place(dataset)}: cases", "", note, [cases_figure(pictures, names)]))
    if costs:
        sections.append(Section(f"{dataset}: {COST}", table=costs))
    if published := _published(outcome, dataset):
        sections.append(Section(f"{dataset}: published elsewhere", WARNING, table=published, words=True))
    return sections


def _published(outcome: Outcome, dataset: str) -> tables.Table | None:
    """Numbers that were published for the dataset's cases; None where there are none."""
    return None if outcome.test else published_table(dataset)


def _arms_section(outcome: Outcome, tests: Sequence[Outcome]) -> Section:
    """Trainer, plans and checkpoint of every arm."""
    table = [["arm", "trainer", "plans", "starts from"]]
    for spec in outcome.matrix.bench.arms:
        cells = {place: cell for place, cell in outcome.matrix.cells.items() if place.arm == spec.name}
        checkpoints = sorted({cell.arm.checkpoint or "random weights" for cell in cells.values()})
        findings = [one.seen[place.dataset, place.fold, spec.name] for one in (outcome, *tests) for place in cells]
        seen = any(found.seen for found in findings)
        settings = ", ".join(f"{key}={value}" for key, value in spec.settings.items())
        trainer = f"{spec.trainer} ({settings})" if settings else spec.trainer
        table.append([spec.name + (MARK if seen else ""), trainer, spec.plans, ", ".join(checkpoints)])
    return Section("Arms", table=table, words=True)
