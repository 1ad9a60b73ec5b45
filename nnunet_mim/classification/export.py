"""Exports: a finished classifier as a folder to share, from which it predicts without the dataset.

README.md          card: what it tells, from what, how well, how to use it
settings.json      dataset, plans name, configuration, targets, settings
plans.json, dataset.json    for nnU-Net's preprocessing of new images
encoder_HASH.safetensors, fold_K/    as in the results folder, without names of cases and predictions
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from nnunet_mim.checkpoint.format import CITATIONS
from nnunet_mim.checkpoint.locate import CARD
from nnunet_mim.classification.comparison import evaluate_arms
from nnunet_mim.classification.documents import read_export_settings, read_settings, read_training
from nnunet_mim.classification.predict import load_classifier
from nnunet_mim.classification.results import NETWORK, PREDICTIONS, PROBE, RETRAIN, SETTINGS, TRAINING, write_json
from nnunet_mim.errors import MiMError
from nnunet_mim.nnunet.documents import read_plans
from nnunet_mim.nnunet.plans import configuration_of
from nnunet_mim.nnunet.source import Source
from nnunet_mim.reporting.page import markdown_text, yaml_text

PLANS, DATASET = "plans.json", "dataset.json"


def export_classifier(classifier: Path, source: Source, folder: Path, licence: str | None, data: str | None) -> None:
    """Write a folder that `mim_classify predict -m` takes.

    Args:
        classifier: results folder with trained folds.
        source: dataset and plans that it was trained with.
        folder: to be made; appears whole or not at all.
        licence: of the weights; None: the card says that it is not stated.
        data: a sentence on the images and their licence, for the card; None: likewise.

    Raises:
        MiMError: the folder exists or cannot be written, or a fold is missing or damaged.
    """
    if folder.exists():
        raise MiMError(f"{folder} exists already: choose another one with -o")
    settings = read_settings(min(classifier.glob(f"fold_*/{SETTINGS}")).parent)
    temporary = folder.with_name(f".{folder.name}.{os.getpid()}")
    try:
        temporary.mkdir(parents=True)
        for path in sorted(classifier.glob("fold_*")):
            if (path / PREDICTIONS).is_file():
                _copy_fold(path, temporary / path.name)
        for path in classifier.glob("encoder_*.safetensors"):
            shutil.copyfile(path, temporary / path.name)
        write_json(temporary / PLANS, source.plans)
        shutil.copyfile(source.folder.parent / "dataset.json", temporary / DATASET)
        names = ("mim_version", "dataset", "plans", "configuration", "spacing", "targets")
        write_json(temporary / SETTINGS, {**{n: settings[n] for n in names}, "config": _shared(settings["config"])})
        (temporary / CARD).write_text(card(classifier, settings, licence, data), encoding="utf-8")
        load_classifier(temporary, ["all"], "cpu")
        os.replace(temporary, folder)
    except shutil.SpecialFileError as error:  # "`FILE` is a named pipe"
        raise MiMError(f"{error}, no file of a classifier: {RETRAIN}") from error
    except OSError as error:
        raise MiMError(f"cannot write {folder} ({error.strerror}): free space, or choose another -o") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def exported_source(folder: Path) -> Source:
    """Plans and units of an export, in place of a preprocessed dataset. Raises MiMError for a folder that is none."""
    try:
        settings = read_export_settings(folder)
        dataset, plans_name, configuration = (settings[n] for n in ("dataset", "plans", "configuration"))
    except MiMError as error:
        raise MiMError(f"-m {folder} is no folder of mim_classify export ({error}): take another copy") from error
    plans = read_plans(folder / PLANS)
    if configuration not in plans["configurations"]:
        raise MiMError(f"{folder / PLANS} has no configuration '{configuration}': take another copy of the export")
    block = configuration_of(plans, configuration)
    return Source(
        dataset, plans_name, configuration, folder / "cases", None, (), tuple(float(s) for s in block["spacing"]),
        tuple(block["normalization_schemes"]), plans["foreground_intensity_properties_per_channel"], plans,
    )  # fmt: skip


def _copy_fold(path: Path, to: Path) -> None:
    """Copy a fold without names of cases and paths of its maker."""
    to.mkdir()
    settings = read_settings(path)
    encoder = {**settings["encoder"], "seen_validation_cases": [], "origin": Path(settings["encoder"]["origin"]).name}
    write_json(to / SETTINGS, {**settings, "config": _shared(settings["config"]), "encoder": encoder})
    for name in (NETWORK, PROBE):
        if (path / name).is_file():
            shutil.copyfile(path / name, to / name)
    if (path / TRAINING).is_file():
        training = read_training(path)
        write_json(to / TRAINING, {**training, "inner_cases": len(training["inner_cases"])})


def _shared(config: Mapping[str, Any]) -> dict[str, Any]:
    """Settings without paths of the maker's machine."""
    roi = config["roi"] if config["roi"] in ("", "labels") else "masks"
    return {**config, "roi": roi, "labels": Path(config["labels"]).name, "checkpoint": Path(config["checkpoint"]).name}


def card(classifier: Path, settings: Mapping[str, Any], licence: str | None, data: str | None) -> str:
    """Text for those who find the folder."""
    targets, config = settings["targets"], settings["config"]
    looked_at = f"a box of {config['margin']:g} mm around a mask" if config["roi"] else "whole cases"
    spacing = " x ".join(f"{s:g}" for s in settings["spacing"])
    encoder = f"{config['encoder']}, started from {Path(settings['encoder']['origin']).name}"
    terms = licence or "not stated: ask those who made them before you use them"
    roi = "--roi MASKS " if config["roi"] else ""
    lines = [
        "---",
        "library_name: nnunet_mim",
        *([f"license: {yaml_text(licence)}"] if licence else []),
        "tags: [medical, ct, nnu-net, classification]",
        "---",
        "",
        f"# Classifier of {markdown_text(', '.join(targets))} ({markdown_text(settings['dataset'])})",
        "",
        "Not a medical device: for research.",
        "",
        *[f"- {markdown_text(target)}: {markdown_text(', '.join(classes))}" for target, classes in targets.items()],
        f"- Looks at {looked_at}, resampled to {spacing} mm (the plans' order of axes)",
        f"- Mode {config['mode']}, encoder {markdown_text(encoder)}",
        f"- Data: {markdown_text(data or 'not stated')}",
        f"- Licence of the weights: {markdown_text(terms)}",
        "",
        "## Measured out of fold",
        "",
        *_figures(classifier),
        "",
        "## Use",
        "",
        "```bash",
        f"mim_classify predict -m THIS_FOLDER -i IMAGES {roi}-o out.csv",
        "```",
        "",
        "## Cite",
        "",
        *[f"- {citation}" for citation in CITATIONS],
    ]
    return "\n".join(lines) + "\n"


def _figures(classifier: Path) -> Sequence[str]:
    """AUROC with its interval, by target."""
    try:
        evaluations, _ = evaluate_arms(classifier.parent)
    except MiMError:
        return ["not all folds are trained"]
    lines = []
    for evaluation in evaluations:
        if classifier.name not in evaluation.figures:
            return ["not all folds are trained"]
        arm, figures = evaluation.arms[classifier.name], evaluation.figures[classifier.name]
        lines.append(f"- {markdown_text(evaluation.target)}: AUROC {figures['auroc']}, {len(arm.cases)} cases")
    return lines
