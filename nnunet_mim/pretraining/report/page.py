"""FOLDER/report.html: one page about a pretraining run."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from nnunet_mim.checkpoint.locate import FINAL
from nnunet_mim.errors import MiMError
from nnunet_mim.geometry import crop_start, levels_of
from nnunet_mim.networks.build import PretrainingNetwork
from nnunet_mim.nnunet.orientation import Orientation, direction_of, orientation_of
from nnunet_mim.pretraining.data.crops import Case, read_crop
from nnunet_mim.pretraining.data.run_data import RunData
from nnunet_mim.pretraining.monitoring.figures import Measurement, TrainingFigures
from nnunet_mim.pretraining.report import summary
from nnunet_mim.pretraining.report.curves import columns_of, panels_of, progress_figure, read_columns
from nnunet_mim.pretraining.report.pictures import LevelPicture, load_network, reconstruct_crop, upright
from nnunet_mim.pretraining.report.summary import Facts
from nnunet_mim.reporting.page import Section, write_page
from nnunet_mim.reporting.views import ReconstructedView, comparison_figure, views_figure

REPORT = "report.html"
CASES = 3
"""held-out cases that are shown"""


def write_run_report(folder: Path, checkpoint: Mapping[str, Any], data: RunData, device: str = "cpu") -> None:
    """Write FOLDER/report.html; a report that fails is a note, no reason to lose a run.

    Args:
        folder: of the run, with train.csv.
        checkpoint: of the run, as `load_checkpoint` returns it.
        data: cases of the run; the first few held-out ones are shown.
        device: to run the network on.
    """
    path = folder / REPORT
    try:
        facts = Facts(checkpoint)
        held_out = {source.dataset: int(n) for source, n in zip(data.val.sources, data.val.counts, strict=True)}
        cases = _shown_cases(facts, data, device)
        provenance, fold = facts.provenance, facts.provenance["fold"]
        where = ", ".join(provenance["datasets"]) or provenance.get("converted_from", "weights without data")
        title = f"MiM pretraining of {where}: {facts.config.preset}, {'all cases' if fold == 'all' else f'fold {fold}'}"
        sections = report_sections(facts, folder / FINAL, cases, folder, held_out)
        write_page(path, title, sections, facts.verdict_text())
    except (OSError, MiMError) as error:
        print(f"note: {path} could not be written ({error})", flush=True)


def report_sections(
    facts: Facts,
    path: Path,
    cases: Mapping[str, list[ReconstructedView]],
    folder: Path | None = None,
    held_out: Mapping[str, int] | None = None,
) -> list[Section]:
    """All that a page says about a checkpoint.

    Args:
        facts: of the checkpoint.
        path: of the checkpoint, for the commands.
        cases: views by the name of the case.
        folder: of the run, with train.csv, if it is there.
        held_out: number of held-out cases by dataset, if known.
    """
    note = f"""\
All sizes in the order of nnU-Net's arrays, that of the plans. Tokens have {summary.join(facts.token_size)} voxels. A
crop is the field of view of the widest level; each other view is cut from a masked place of the level above."""
    sections = [
        Section("The run", table=[["", ""], *summary.facts_table(facts, held_out)], words=True),
        Section("What is seen at each level", note=note, table=summary.levels_table(facts)),
    ]
    if facts.history:
        sections.append(losses_section(facts, folder))
    datasets = summary.datasets_table(facts)
    if len(datasets) > 2:
        text = "Crops drawn from each dataset so far, and the reconstruction loss on its held-out cases."
        sections.append(Section("Datasets", text, table=datasets))
    sections += views_sections(facts, cases)
    settings, marked = summary.settings_and_defaults(facts)
    text = f"{len(marked)} settings differ from their defaults and are marked."
    commands = "\n".join(summary.commands(facts, path))
    return [
        *sections,
        Section("Settings", text, table=settings, marked=marked, words=True),
        Section("Use it", facts.provenance.get("note", ""), code=commands),
    ]


def losses_section(facts: Facts, folder: Path | None = None) -> Section:
    """Table and curves of the measurements, and of train.csv in the folder of the run, if it is there."""
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


def views_sections(facts: Facts, cases: Mapping[str, list[ReconstructedView]]) -> list[Section]:
    """Pictures of some cases, and for the first of them a comparison with trivial ways to fill in."""
    if not cases:
        return []
    window = facts.units.grey(np.concatenate([views[0].input.ravel() for views in cases.values()]))
    text = """\
Each row is one view: the original, what the encoder gets to see, and what the network makes of the hidden part. The
blue frame is the hidden place that the next row is cut from and enlarged: a mask in a mask."""
    note = f"""\
{summary.NOTE} Grey scale from {window[0]:.3g} to {window[1]:.3g} {facts.units.name}; sizes left–right × front–back ×
foot–head."""
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


def _shown_cases(facts: Facts, data: RunData, device: str) -> dict[str, list[ReconstructedView]]:
    """Views of a few held-out cases, by the name of the case."""
    model = load_network(facts.checkpoint, device)
    shown = {}
    for number, position in enumerate(np.unique(np.linspace(0, len(data.val) - 1, CASES).round())):
        case = data.val[int(position)]
        name = f"{case.source.dataset} {case.info.case}" if len(data.sources) > 1 else case.info.case
        pictures = _reconstruct_case(model, facts, case, number)
        shown[name] = upright(pictures, case.source.spacing, _case_orientation(case))
    return shown


def _reconstruct_case(model: PretrainingNetwork, facts: Facts, case: Case, seed: int = 0) -> list[LevelPicture]:
    """The network's views of one preprocessed case, around the middle of its body; only that part is read."""
    size, shape = np.array(levels_of(facts.config)[0].fov), np.array(case.info.shape)
    centre = np.mean(case.info.body_points, axis=0) if case.info.body_points else shape / 2
    start = crop_start(shape, size, centre)
    crop, valid = read_crop(case, start, size)
    return reconstruct_crop(model, facts.checkpoint, crop, valid, start, seed)


def _case_orientation(case: Case) -> Orientation:
    """How the arrays of a case lie in the patient."""
    try:
        properties = case.source.dataset_class(str(case.source.folder), [case.info.case]).load_case(case.info.case)[-1]
    except Exception:  # only a picture is turned by it
        properties = {}
    return orientation_of(case.source.plans.get("transpose_forward", (0, 1, 2)), direction_of(properties))
