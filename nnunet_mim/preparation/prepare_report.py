"""What `mim_prepare` has made of a dataset: one page, and a table of what was left out."""

from __future__ import annotations

import csv
import io
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from nnunet_mim.config import PretrainConfig
from nnunet_mim.nnunet.orientation import direction_of, orientation_of
from nnunet_mim.nnunet.source import Source
from nnunet_mim.preparation.case_log import Entry
from nnunet_mim.preparation.common_plans import CONFIGURATION
from nnunet_mim.preparation.prepare import Prepared
from nnunet_mim.preparation.prepare_case import HISTOGRAM_HU
from nnunet_mim.reporting.gallery import Slices, gallery_figure, histogram_figure
from nnunet_mim.reporting.page import Section, write_atomically, write_page

SHOWN_CASES = 6


def reason_kind(reason: str) -> str:
    """A reason without its figures, to count by."""
    return reason.split(" (")[0].split(":")[0]


def skipped_lines(skipped: Mapping[str, Entry]) -> list[str]:
    """How many cases were left out and why, for the eyes of the user: one line a reason, with an example."""
    kinds = Counter(reason_kind(entry["reason"]) for entry in skipped.values())
    lines = []
    for kind, count in kinds.most_common():
        first = next(entry for entry in skipped.values() if reason_kind(entry["reason"]) == kind)
        lines.append(f"  {count:5} {kind:32} e.g. {first['files'][0]}: {first['reason']}")
    return lines


def write_report(prepared: Prepared, preset: str | None) -> Path:
    """Write a page and `…_skipped.csv` beside the log. Returns the page's path."""
    entries, skipped, source = prepared.log.prepared, prepared.log.skipped, prepared.source
    folder = prepared.log.path.parent
    stem = prepared.log.path.stem
    write_atomically(folder / f"{stem}_skipped.csv", skipped_table(skipped))
    sections = [
        Section("Cases", table=facts_table(prepared), words=True),
        Section(
            "Pictures", "From the front and from below, all in the same scale. The patient's right is on the left.",
            figures=[gallery_figure([slices_of(source, name) for name in evenly(list(entries), SHOWN_CASES)])],
        ),
    ]  # fmt: skip
    if source.intensities.is_ct():
        counts = np.sum([entry["histogram"] for entry in entries.values()], axis=0)
        properties = source.intensity_properties["0"]
        window = properties["percentile_00_5"], properties["percentile_99_5"]
        beyond = counts[HISTOGRAM_HU[1:] <= window[0]].sum(), counts[HISTOGRAM_HU[:-1] >= window[1]].sum()
        share = [f"{100 * n / counts.sum():.1f} %" for n in beyond]
        text = (
            f"Voxels of all cases by HU before resampling. {share[0]} lie below the window and {share[1]} above it; "
            "they are set to its ends."
        )
        sections.append(Section("Intensities", text, figures=[histogram_figure(HISTOGRAM_HU, counts, window)]))
    if skipped:
        table = [["file", "reason"], *([entry["files"][0], entry["reason"]] for entry in skipped.values())]
        more = f"The first 200 of {len(skipped)}; {stem}_skipped.csv holds all." if len(table) > 201 else ""
        sections.append(Section("Left out", more, table=table[:201], words=True))
    sections.append(Section("Plans", code="\n".join(prepared.notes)))
    sections.append(Section("Next", code=next_command([source], preset)))
    path = folder / f"{stem}.html"
    left_out = f"{len(skipped)} images were left out" if skipped else "no image was left out"
    lead = f"{len(entries)} cases are ready for pretraining, {left_out}."
    write_page(path, f"{source.dataset}, prepared", sections, lead)
    return path


def next_command(sources: Sequence[Source], preset: str | None) -> str:
    """How to go on: the command that pretrains the network of the plans."""
    numbers = " ".join(source.dataset[7:].split("_")[0] for source in sources)
    size = "" if preset in (None, PretrainConfig().preset) else f" --preset {preset}"
    return f"mim_pretrain -d {numbers} -p {sources[0].plans_name}{size}"


def skipped_table(skipped: Mapping[str, Entry]) -> bytes:
    """CSV of what was left out: case, file, reason."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["case", "file", "reason"])
    writer.writerows([entry["case"], entry["files"][0], entry["reason"]] for entry in skipped.values())
    return text.getvalue().encode()


def facts_table(prepared: Prepared) -> list[list[str]]:
    """Counts and sizes."""
    entries, source = prepared.log.prepared, prepared.source
    shapes = np.array([entry["info"]["shape"] for entry in entries.values()])
    before = np.array([entry["spacing"] for entry in entries.values()])
    size = sum(file.stat().st_size for file in source.folder.iterdir())
    low, median, high = (" × ".join(f"{n:.0f}" for n in f(shapes, axis=0)) for f in (np.min, np.median, np.max))
    finest, usual, coarsest = (" × ".join(f"{n:.3g}" for n in f(before, axis=0)) for f in (np.min, np.median, np.max))
    return [
        ["", ""],
        ["prepared", f"{len(entries)} cases, {'with' if prepared.labelled else 'without'} labels"],
        ["left out", f"{len(prepared.log.skipped)} images"],
        ["spacing", f"{' × '.join(f'{s:g}' for s in source.spacing)} mm, array order (z, y, x)"],
        ["spacing of the images", f"{usual} mm (median), from {finest} to {coarsest}"],
        ["voxels a case", f"{median} (median), from {low} to {high}"],
        ["on disk", f"{size / 1e9:.2f} GB in {source.folder.name}"],
        ["plans", f"{source.plans_name}, {CONFIGURATION}"],
    ]


def evenly(names: Sequence[str], count: int) -> list[str]:
    """Up to `count` of the names, from all over the list."""
    return [names[int(i)] for i in np.unique(np.linspace(0, len(names) - 1, count).round())]


def slices_of(source: Source, case: str) -> Slices:
    """Two slices through the middle of a preprocessed case, turned for the picture, in HU where it is CT."""
    data, _, _, properties = source.dataset_class(str(source.folder), [case]).load_case(case)
    turn = orientation_of((0, 1, 2), direction_of(properties))
    std, mean = source.to_hounsfield()
    volume = np.asarray(data[0:1])[0] * std + mean
    image = turn.array(volume)
    z, y, _ = (n // 2 for n in image.shape)
    return Slices(case, image[:, y], image[z], turn.triple(source.spacing))
