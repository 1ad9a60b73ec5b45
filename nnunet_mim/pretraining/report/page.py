"""FOLDER/report.html: one page about a pretraining run."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from nnunet_mim.checkpoint.locate import FINAL
from nnunet_mim.errors import MiMError
from nnunet_mim.geometry import levels_of
from nnunet_mim.networks.build import PretrainingNetwork
from nnunet_mim.nnunet.orientation import Orientation, direction_of, orientation_of
from nnunet_mim.pretraining.data.crops import Case, read_crop
from nnunet_mim.pretraining.data.run_data import RunData
from nnunet_mim.pretraining.monitoring.figures import Measurement, TrainingFigures
from nnunet_mim.pretraining.report import summary
from nnunet_mim.pretraining.report.curves import columns_of, panels_of, progress_figure, read_columns
from nnunet_mim.pretraining.report.pictures import LevelPicture, crop_start, load_network, reconstruct_crop, upright
from nnunet_mim.pretraining.report.summary import Facts
from nnunet_mim.reporting.page import Section, write_page
from nnunet_mim.reporting.views import ReconstructedView, comparison_figure, views_figure

REPORT = "report.html"
CASES = 3
"""held-out cases that are shown"""


def write_run_report(folder: Path, checkpoint: Mapping[str, Any], data: RunData, device: str = "cpu") -> Path | None:
    """Write FOLDER/report.html; a report that fails is no reason to lose a run.

    Args:
        folder: of the run, with train.csv.
        checkpoint: of the run, as `load_checkpoint` returns it.
        data: cases of the run; the first few held-out ones are shown.
        device: to run the network on.

    Returns:
        path of the page; None where it could not be written (a note is printed).
    """
    path = folder / REPORT
    try:
        facts = Facts.of(checkpoint)
        held_out = {source.dataset: int(n) for source, n in zip(data.val.sources, data.val.counts, strict=True)}
        sections = [
            facts_section(facts, held_out),
            levels_section(facts),
            losses_section(facts, folder),
            *datasets_sections(facts),
            *views_sections(facts, shown_cases(facts, data, device)),
            settings_section(facts),
            next_section(facts, folder / FINAL),
        ]
        write_page(path, run_title(facts), sections, verdict_text(facts))
    except (OSError, MiMError) as error:
        print(f"note: {path} could not be written ({error})", flush=True)
        return None
    return path


def run_title(facts: Facts) -> str:
    """Heading of the page."""
    where = ", ".join(facts.provenance["datasets"]) or facts.provenance.get("converted_from", "weights without data")
    fold = facts.provenance["fold"]
    return f"MiM pretraining of {where}: {facts.config.preset}, {'all cases' if fold == 'all' else f'fold {fold}'}"


def verdict_text(facts: Facts) -> str:
    """The verdict with a capital and a full stop."""
    sentence = facts.verdict().sentence
    return f"{sentence[0].upper()}{sentence[1:]}."


def facts_section(facts: Facts, held_out: Mapping[str, int] | None = None) -> Section:
    """Network, cases and units."""
    return Section("The run", table=[["", ""], *summary.facts_table(facts, held_out)], words=True)


def levels_section(facts: Facts) -> Section:
    """Fields of view."""
    note = f"""\
All sizes in the order of nnU-Net's arrays, that of the plans. Tokens have {summary.join(facts.token_size)} voxels. A
crop is the field of view of the widest level; each other view is cut from a masked place of the level above."""
    return Section("What is seen at each level", "", note, table=summary.levels_table(facts))


def losses_section(facts: Facts, folder: Path | None = None) -> Section:
    """Table and curves.

    Args:
        facts: of the checkpoint.
        folder: of the run, with train.csv; without one the curves are those of the checkpoint's measurements.
    """
    history = columns_of(facts.provenance["loss_history"])
    train = (read_columns(folder / "train.csv") if folder is not None else {}) or history
    panels = panels_of(TrainingFigures.from_row(train), Measurement.from_row(history))
    table = summary.losses_table(facts)
    text = """\
Error of the filled-in tokens (mean squared, in units of each token's own variance) on held-out cases, and what two
trivial guesses reach on the same tokens: 1 is no better than a token's mean; below in-filling from the nearest visible
voxels, the network knows more than can be read off its surroundings."""
    figures = [progress_figure(panels, width=11.5, height=1.8)] if panels else []
    return Section("Losses", text, "", figures, table if len(table) > 1 else None)


def datasets_sections(facts: Facts) -> list[Section]:
    """How often each dataset was drawn and what the network makes of it, where there are several."""
    table = summary.datasets_table(facts)
    if len(table) < 3:
        return []
    text = "Crops drawn from each dataset so far, and the reconstruction loss on its held-out cases."
    return [Section("Datasets", text, table=table)]


def shown_cases(facts: Facts, data: RunData, device: str) -> dict[str, list[ReconstructedView]]:
    """Views of a few held-out cases, by the name of the case."""
    model = load_network(facts.checkpoint, device)
    chosen = [data.val[int(i)] for i in np.unique(np.linspace(0, len(data.val) - 1, CASES).round())]
    several = len(data.sources) > 1
    shown = {}
    for number, case in enumerate(chosen):
        name = f"{case.source.dataset} {case.info.case}" if several else case.info.case
        pictures = reconstruct_case(model, facts, case, number)
        shown[name] = upright(pictures, case.source.spacing, case_orientation(case))
    return shown


def reconstruct_case(model: PretrainingNetwork, facts: Facts, case: Case, seed: int = 0) -> list[LevelPicture]:
    """The network's views of one preprocessed case, around the middle of its body; only that part is read."""
    size, shape = np.array(levels_of(facts.config)[0].fov), np.array(case.info.shape)
    centre = np.mean(case.info.body_points, axis=0) if case.info.body_points else shape / 2
    start = crop_start(shape, size, centre)
    crop, valid = read_crop(case, start, size)
    return reconstruct_crop(model, facts.checkpoint, crop, valid, start, seed)


def case_orientation(case: Case) -> Orientation:
    """How the arrays of a case lie in the patient."""
    try:
        properties = case.source.dataset_class(str(case.source.folder), [case.info.case]).load_case(case.info.case)[-1]
    except Exception:  # only a picture is turned by it
        properties = {}
    return orientation_of(case.source.plans.get("transpose_forward", (0, 1, 2)), direction_of(properties))


def views_sections(facts: Facts, cases: Mapping[str, list[ReconstructedView]]) -> list[Section]:
    """Pictures of some cases, and for the first of them a comparison with trivial ways to fill in."""
    if not cases:
        return []
    window = facts.units.grey(np.concatenate([views[0].input.ravel() for views in cases.values()]))
    ends = f"{window[0]:.3g} to {window[1]:.3g} {facts.units.name}"
    text = """\
Each row is one view: the original, what the encoder gets to see, and what the network makes of the hidden part. The
blue frame is the hidden place that the next row is cut from and enlarged: a mask in a mask."""
    note = f"{summary.NOTE} Grey scale from {ends}; sizes left–right × front–back × foot–head."
    sections = [
        Section(f"Case {name}", "" if number else text, "" if number else note, [views_figure(views, window)])
        for number, (name, views) in enumerate(cases.items())
    ]
    first, views = next(iter(cases.items()))
    text = f"""\
Case {first} again, with the masked tokens filled in three ways. All three are given the mean of each token, so the
first is what can be had for nothing. The other two are given its standard deviation as well. A network that has learnt
something looks better than the nearest visible voxels."""
    return [*sections, Section("What the network adds", text, "", [comparison_figure(views, window)])]


def settings_section(facts: Facts) -> Section:
    """All settings, those that are not the default standing out."""
    table, marked = summary.settings_and_defaults(facts)
    text = f"{len(marked)} settings differ from their defaults and are marked."
    return Section("Settings", text, table=table, marked=marked, words=True)


def next_section(facts: Facts, path: Path) -> Section:
    """Commands for finetuning, and what has to be known before."""
    note = facts.provenance.get("note", "")
    return Section("Use it", note, code="\n".join(summary.commands(facts, path)))
