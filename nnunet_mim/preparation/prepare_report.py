"""The page of a prepared dataset, and the tables of what is doubtful and of what was left out."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from nnunet_mim.nnunet.orientation import direction_of, orientation_of
from nnunet_mim.nnunet.source import Source
from nnunet_mim.preparation.case_log import CaseLog
from nnunet_mim.preparation.prepare import Prepared
from nnunet_mim.preparation.prepare_case import CONFIGURATION, HISTOGRAM_HU
from nnunet_mim.reporting.figures import Slices, gallery_figure, histogram_figure
from nnunet_mim.reporting.page import Section, write_page
from nnunet_mim.system.files import csv_text, write_atomically


def summary_lines(prepared: Prepared) -> list[str]:
    """The numbers of cases that are prepared, doubtful and left out, then a line per kind of warning and of reason."""
    log, doubts = prepared.log, prepared.doubts()
    doubtful = f"{_doubtful_cases(doubts)} of them doubtful, " if doubts else ""
    counts = f"{len(log.prepared)} cases prepared, {doubtful}{len(log.skipped)} left out"
    return [counts, *_lines_by_kind("doubtful: ", doubts), *_lines_by_kind("", _reasons(log))]


def _reasons(log: CaseLog) -> list[list[str]]:
    """Case, file and reason of each case that was left out."""
    return [[case, entry["files"][0], entry["reason"]] for case, entry in log.skipped.items()]


def _doubtful_cases(doubts: Sequence[Sequence[str]]) -> int:
    """Number of cases in the rows of `Prepared.doubts`."""
    return len({case for case, *_ in doubts})


def _lines_by_kind(start: str, rows: Sequence[Sequence[str]]) -> list[str]:
    """One line per kind of reason or warning: the number of its rows, and an example."""
    kinds = defaultdict(list)
    for _, file, remark in rows:
        kind = remark.split(" (")[0].split(":")[0]  # without figures and details
        kinds[kind].append(f"e.g. {file}: {remark}")
    by_number = sorted(kinds.items(), key=lambda item: -len(item[1]))
    return [f"  {len(examples):5} {start + kind:32} {examples[0]}" for kind, examples in by_number]


def write_report(prepared: Prepared) -> Path:
    """Write the page, `…_doubtful.csv` and `…_skipped.csv` into the folder of the log. Returns the path of the page."""
    log, entries, source = prepared.log, prepared.log.prepared, prepared.source
    folder, stem = log.path.parent, log.path.stem
    tables = {
        "doubtful": [["case", "file", "warning"], *prepared.doubts()],
        "skipped": [["case", "file", "reason"], *_reasons(log)],
    }
    for name, table in tables.items():
        write_atomically(folder / f"{stem}_{name}.csv", csv_text(table).encode())
    shown = np.unique(np.linspace(0, len(entries) - 1, 6).round()).astype(int)  # up to six, evenly spread
    gallery = gallery_figure([_slices_of(source, list(entries)[i]) for i in shown])
    views = "From the front and from below, all in the same scale. The patient's right is on the left."
    sections = [
        Section("Cases", table=_facts_table(prepared), words=True),
        Section("Pictures", views, figures=[gallery]),
    ]
    if window := source.intensities.hounsfield_window():
        counts = np.sum([entry["histogram"] for entry in entries.values()], axis=0)
        beyond = counts[HISTOGRAM_HU[1:] <= window[0]].sum(), counts[HISTOGRAM_HU[:-1] >= window[1]].sum()
        share = [f"{100 * n / counts.sum():.1f} %" for n in beyond]
        explanation = (
            f"Voxels of all cases by HU before resampling. {share[0]} lie below the window and {share[1]} above it; "
            "they are set to its ends."
        )
        sections.append(Section("Intensities", explanation, figures=[histogram_figure(HISTOGRAM_HU, counts, window)]))
    for title, (name, table) in zip(("Accepted, but doubtful", "Left out"), tables.items(), strict=True):
        if len(table) > 1:
            note = f"The first 200 of {len(table) - 1}; {stem}_{name}.csv holds all." if len(table) > 201 else ""
            sections.append(Section(title, note, table=[row[1:] for row in table[:201]], words=True))
    sections.append(Section("Plans", code="\n".join(prepared.notes)))
    sections.append(Section("Next", code=next_command([source])))
    path = folder / f"{stem}.html"
    doubtful = _doubtful_cases(prepared.doubts())
    doubts = f"{doubtful} of them are doubtful, " if doubtful else ""
    left_out = f"{len(log.skipped)} images were left out" if log.skipped else "no image was left out"
    summary = f"{len(entries)} cases are ready for pretraining, {doubts}{left_out}."
    write_page(path, f"{source.dataset}, prepared", sections, summary)
    return path


def next_command(sources: Sequence[Source]) -> str:
    """The command that pretrains the network of the plans."""
    numbers = " ".join(source.dataset[7:].split("_")[0] for source in sources)
    return f"mim_pretrain -d {numbers} -p {sources[0].plans_name}"


def _facts_table(prepared: Prepared) -> list[list[str]]:
    entries, source = prepared.log.prepared, prepared.source
    shapes = np.array([entry["info"]["shape"] for entry in entries.values()])
    before = np.array([entry["spacing"] for entry in entries.values()])
    size = sum(file.stat().st_size for file in source.folder.iterdir())
    low, median, high = (" × ".join(f"{n:.0f}" for n in f(shapes, axis=0)) for f in (np.min, np.median, np.max))
    finest, usual, coarsest = (" × ".join(f"{n:.3g}" for n in f(before, axis=0)) for f in (np.min, np.median, np.max))
    return [
        ["", ""],
        ["prepared", f"{len(entries)} cases, {'with' if prepared.labelled else 'without'} labels"],
        ["doubtful", f"{_doubtful_cases(prepared.doubts())} of these"],
        ["left out", f"{len(prepared.log.skipped)} images"],
        ["spacing", f"{' × '.join(f'{s:g}' for s in source.spacing)} mm (z, y, x)"],
        ["spacing of the images", f"{usual} mm (median), from {finest} to {coarsest} (z, y, x)"],
        ["voxels a case", f"{median} (median), from {low} to {high} (z, y, x)"],
        ["on disk", f"{size / 1e9:.2f} GB in {source.folder.name}"],
        ["plans", f"{source.plans_name}, {CONFIGURATION}"],
    ]


def _slices_of(source: Source, case: str) -> Slices:
    """Two slices through the middle of a preprocessed case, turned upright; HU where it is CT."""
    data, _, _, properties = source.dataset_class(str(source.folder), [case]).load_case(case)
    turn = orientation_of((0, 1, 2), direction_of(properties))
    std, mean = source.intensities.scale()
    image = turn.array(np.asarray(data[0:1])[0] * std + mean)
    z, y, _ = (n // 2 for n in image.shape)
    return Slices(case, image[:, y], image[z], turn.triple(source.spacing))
