"""Compares all classifiers and baselines of some targets: report.html, report.csv, report.md."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from nnunet_mim.classification.baselines import SIZE, is_baseline
from nnunet_mim.classification.comparison import Evaluation, evaluate_arms, verdict
from nnunet_mim.classification.documents import read_settings
from nnunet_mim.classification.evaluation import FIGURE_NAMES, N_DRAWS, Interval
from nnunet_mim.classification.pictures import pictures_of, saliency_pictures
from nnunet_mim.classification.results import NETWORK, SETTINGS, Predictions, trained_arms
from nnunet_mim.errors import MiMError
from nnunet_mim.nnunet.source import Source
from nnunet_mim.reporting.classifiers import (
    CasePicture,
    calibration_figure,
    cases_figure,
    confusion_figure,
    curves_figure,
)
from nnunet_mim.reporting.page import Section, markdown_text, write_page
from nnunet_mim.system.files import csv_text, write_atomically

N_PICTURES = 4
CT_GREY = (-1000.0, 400.0)
"""HU shown black and white, with lung and soft tissue in between"""


def write_report(
    folder: Path, source: Source | None, kept: set[str] | None = None, which: str = "", seed: int = 0,
    saliency: str | None = None,
) -> list[str]:  # fmt: skip
    """Write report.html, report.csv and report.md into the folder of some targets. Returns lines to print.

    The names of a report on some of the cases say which.

    Args:
        folder: of the targets.
        source: preprocessed dataset, for pictures of cases; None: without.
        kept: cases that count; None: all.
        which: which cases these are, in words.
        seed: of the bootstrap.
        saliency: device that computes maps of what the best trained network rests on; None: no maps.

    Raises:
        MiMError: nothing to compare, or no trained network to show maps of.
    """
    stem = f"report_{re.sub(r'[^0-9A-Za-z.]+', '_', which)}" if which else "report"
    evaluations, notes = evaluate_arms(folder, kept, seed)
    summary = " ".join(verdict(evaluation) for evaluation in evaluations)
    notes += _seen_notes(folder)
    if which:
        notes.insert(0, f"Only cases with {which}.")
    sections = []
    for evaluation in evaluations:
        sections += _sections(evaluation, folder, source)
        if saliency is not None and source is not None:
            sections += _saliency_sections(evaluation, folder, source, saliency)
    sections.append(Section("Settings", note="\n\n".join(notes), table=_settings_table(folder), words=True))
    title = f"Classification of {folder.parent.parent.name}: {', '.join(e.target for e in evaluations)}"
    write_page(folder / f"{stem}.html", title, sections, summary)
    write_atomically(folder / f"{stem}.csv", _csv(evaluations))
    write_atomically(folder / f"{stem}.md", _markdown(title, summary, evaluations, notes).encode())
    return [summary, *notes, f"wrote {folder / stem}.html, .csv, .md"]


def _sections(evaluation: Evaluation, folder: Path, source: Source | None) -> list[Section]:
    main, first = evaluation.main, next(iter(evaluation.arms.values()))
    shown = {name: evaluation.arms[name] for name in (evaluation.networks + [SIZE]) if name in evaluation.arms}
    labels = first.target.labels
    classes = [1] if len(evaluation.classes) == 2 else range(len(evaluation.classes))
    n_patients = len(set(first.patients))
    counts = ", ".join(f"{name}: {int((labels == k).sum())}" for k, name in enumerate(evaluation.classes))
    intro = (
        f"{len(labels)} cases of {n_patients} patients ({counts}). Every case is predicted by a classifier that was "
        f"not trained on its patient. Intervals: 95 %, bootstrap over patients ({N_DRAWS} draws)."
    )
    curves = [
        curves_figure(labels == k, {name: arm.calibrated[:, k] for name, arm in shown.items()}, _title(evaluation, k))
        for k in classes
    ]
    sections = [
        Section(f"{evaluation.target}: figures", intro, table=_figures_table(evaluation)),
        Section(
            f"{evaluation.target}: differences of the AUROC",
            "First minus second on the same cases; p of no difference, corrected for all pairs in the table (Holm).",
            table=_differences_table(evaluation),
        ),
        Section(f"{evaluation.target}: curves", figures=curves),
    ]
    if main is None:
        return sections
    arm = evaluation.arms[main]
    calibration = [
        calibration_figure(
            labels == k, {"calibrated": arm.calibrated[:, k], "as given": arm.raw[:, k]}, _title(evaluation, k)
        )
        for k in classes
    ]
    confusion = confusion_figure(labels, arm.calibrated.argmax(axis=1), evaluation.classes, main)
    sections.append(Section(f"{evaluation.target}: {main}", figures=[*calibration, confusion]))
    sections.append(
        Section(f"{evaluation.target}: each class against the others ({main})", table=_class_table(evaluation, main))
    )
    if source is not None:
        roi = _settings(folder / main).get("config", {}).get("roi", "")
        sections += _case_sections(evaluation, arm, source, roi)
    return sections


def _case_sections(evaluation: Evaluation, arm: Predictions, source: Source, roi: str) -> list[Section]:
    """The cases that were told with the highest and with the lowest probability of their class."""
    text = "True class, and the probability that was given to it."
    sections = []
    for kind, titles in _extreme_cases(arm).items():
        try:
            pictures = pictures_of(source, roi, titles)
        except MiMError as error:
            return [Section(f"{evaluation.target}: cases", note=f"No pictures: {error}")]
        figure = cases_figure(pictures, _window(source, pictures))
        sections.append(Section(f"{evaluation.target}: {kind} cases", text, figures=[figure]))
    return sections


def _saliency_sections(evaluation: Evaluation, folder: Path, source: Source, device: str) -> list[Section]:
    """What the best trained network rests on, in its worst and best cases. Raises MiMError where none is trained."""
    folds_of = trained_arms(folder)
    networks = [n for n in evaluation.networks if all((fold / NETWORK).is_file() for fold in folds_of[n])]
    if not networks:
        remedy = "leave it out, or run mim_classify train with --mode finetune"
        raise MiMError(f"--saliency: {folder} has no trained network, and a probe has no gradients: {remedy}")
    name = networks[0]
    arm, last = evaluation.arms[name], evaluation.classes[-1]
    folds = dict(zip(arm.cases, arm.folds.tolist(), strict=True))
    text = (
        f"Above the true class, and the probability that was given to it. Below what the network rests on: red speaks "
        f"for {last}, blue against it (integrated gradients, as a share of the largest value in the case). The network "
        "is that of the fold that has not seen the patient."
    )
    sections = []
    for kind, titles in _extreme_cases(arm).items():
        pictures = saliency_pictures(source, folder / name, evaluation.target, titles, folds, device)
        figure = cases_figure(pictures, _window(source, pictures))
        sections.append(Section(f"{evaluation.target}: what {name} rests on, {kind} cases", text, figures=[figure]))
    return sections


def _extreme_cases(arm: Predictions) -> dict[str, dict[str, str]]:
    """Titles of the cases whose class was given the lowest and the highest probability, by worst and best."""
    right = arm.calibrated[np.arange(len(arm.cases)), arm.target.labels]
    order = np.argsort(right)
    return {
        kind: {
            arm.cases[row]: f"{arm.cases[row]}\n{arm.target.classes[arm.target.labels[row]]} with p = {right[row]:.2f}"
            for row in rows
        }
        for kind, rows in (("worst", order[:N_PICTURES]), ("best", order[::-1][:N_PICTURES]))
    }


def _window(source: Source, pictures: Sequence[CasePicture]) -> tuple[float, float]:
    """Minimum and maximum of the grey scale."""
    return CT_GREY if source.intensities.is_ct() else _range([picture.image for picture in pictures])


def _range(images: Sequence[np.ndarray]) -> tuple[float, float]:
    values = np.concatenate([image.ravel() for image in images])
    return float(values.min()), float(values.max())


def _title(evaluation: Evaluation, k: int) -> str:
    return f"{evaluation.target} = {evaluation.classes[k]}"


def _figures_table(evaluation: Evaluation) -> list[list[str]]:
    order = [*evaluation.networks, *[name for name in evaluation.arms if is_baseline(name)]]
    rows = [[name, *[str(evaluation.figures[name][figure]) for figure in FIGURE_NAMES]] for name in order]
    return [["", *FIGURE_NAMES.values()], *rows]


def _differences_table(evaluation: Evaluation) -> list[list[str]]:
    rows = []
    for each in evaluation.differences:
        value, low, high = (f"{number:+.3f}" for number in (each.interval.value, each.interval.low, each.interval.high))
        rows.append([each.first, each.second, value, f"{low} to {high}", f"{each.p:.4f}", f"{each.corrected_p:.4f}"])
    return [["first", "second", "difference", "interval", "p", "corrected p"], *rows]


def _class_table(evaluation: Evaluation, arm: str) -> list[list[str]]:
    rows = [[label, *[str(found[name]) for name in FIGURE_NAMES]] for label, found in evaluation.per_class[arm].items()]
    return [["class", *FIGURE_NAMES.values()], *rows]


def _settings(arm: Path) -> dict[str, Any]:
    for path in sorted(arm.glob(f"fold_*/{SETTINGS}")):
        return read_settings(path.parent)
    return {}


def _settings_table(folder: Path) -> list[list[str]]:
    rows = []
    for name in trained_arms(folder):
        settings = _settings(folder / name)
        config = settings.get("config", {})
        encoder = settings.get("encoder", {}).get("origin", "none")
        looked_at = config.get("roi") or "whole case"
        rows.append([name, encoder, looked_at, f"{config.get('margin')} mm", settings.get("folds", "")])
    return [["", "encoder", "looked at", "margin", "folds"], *rows]


def _seen_notes(folder: Path) -> list[str]:
    """Which arms' encoders were pretrained on cases that they are tried on."""
    notes = []
    for name, folds in trained_arms(folder).items():
        settings = [read_settings(fold) for fold in folds]
        seen = sum(len(each.get("encoder", {}).get("seen_validation_cases", [])) for each in settings)
        total = sum(each.get("n_validation_cases", 0) for each in settings)
        if seen:
            which = f"the images of {seen} of {total} validation cases, without labels"
            notes.append(f"{name}: the encoder was pretrained on {which}.")
    return notes


def _csv(evaluations: Sequence[Evaluation]) -> bytes:
    rows = [["target", "classifier", "class", "figure", "value", "low", "high"]]
    for evaluation in evaluations:
        for name, found in evaluation.figures.items():
            rows += _figure_rows([evaluation.target, name, ""], found)
            for label, of_class in evaluation.per_class[name].items():
                rows += _figure_rows([evaluation.target, name, label], of_class)
    return csv_text(rows).encode()


def _figure_rows(start: list[str], found: Mapping[str, Interval]) -> list[list[str]]:
    return [
        [*start, figure, *[f"{value:.6g}" for value in (each.value, each.low, each.high)]]
        for figure, each in found.items()
    ]


def _markdown(title: str, summary: str, evaluations: Sequence[Evaluation], notes: Sequence[str]) -> str:
    parts = [f"# {markdown_text(title)}", markdown_text(summary)]
    for evaluation in evaluations:
        parts += [_markdown_table(_figures_table(evaluation)), _markdown_table(_differences_table(evaluation))]
    return "\n\n".join([*parts, *map(markdown_text, notes)]) + "\n"


def _markdown_table(table: Sequence[Sequence[str]]) -> str:
    lines = [table[0], ["---"] * len(table[0]), *table[1:]]
    return "\n".join(f"| {' | '.join(map(markdown_text, line))} |" for line in lines)
