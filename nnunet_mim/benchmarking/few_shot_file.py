"""The few-shot protocol as entries of a `bench.yaml`: one dataset and fold, few labels and all of them."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from nnunet_mim.benchmarking.bench_file import KNOWN_ARMS, ArmSpec, complete_arm
from nnunet_mim.errors import MiMError


def default_arms(dataset: str, configuration: str) -> list[str]:
    """MiM, its control, and stock nnU-Net where its plans have been preprocessed."""
    folder = Path(os.environ["nnUNet_preprocessed"], dataset)
    if (folder / "nnUNetPlans.json").is_file() and (folder / f"nnUNetPlans_{configuration}").is_dir():
        return ["MiM", "Scratch", "nnUNet"]
    print(f"no stock arm: nnUNetPlans of {dataset} have not been preprocessed (nnUNetv2_plan_and_preprocess)")
    return ["MiM", "Scratch"]


def arm_entries(texts: Sequence[str], plans: str, settings: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """The entries of all arms by name, from arms as on the command line and settings of the recipe (see below).

    Raises MiMError for a bad arm, two of the same name, or a setting of no MiM arm.
    """
    arms = [parse_arm(text, plans) for text in texts]
    names = [arm.name for arm in arms]
    if len(set(names)) < len(names):
        raise MiMError(f"arm {max(names, key=names.count)} is there twice: every arm needs a name of its own")
    by_arm = settings_by_arm(settings, arms)
    entries = {arm.name: asdict(replace(arm, settings=by_arm.get(arm.name, {}))) for arm in arms}
    return {name: {k: v for k, v in own.items() if v and k != "name"} for name, own in entries.items()}


def parse_arm(text: str, plans: str) -> ArmSpec:
    """An arm from a known name, or NAME=TRAINER:PLANS[:CHECKPOINT]; `plans` for MiM arms and those that name none."""
    name, equals, description = text.partition("=")
    trainer, own_plans, checkpoint = [*description.split(":", 2), "", "", ""][:3]
    if not equals and name in KNOWN_ARMS:
        return complete_arm(ArmSpec(name), plans, Path())
    if not trainer or not name:
        raise MiMError(f"--arms {text}: give {', '.join(KNOWN_ARMS)}, or NAME=TRAINER:PLANS[:CHECKPOINT]")
    return complete_arm(ArmSpec(name, trainer, own_plans or plans, checkpoint or None), plans, Path.cwd())


def settings_by_arm(settings: Mapping[str, Any], arms: Sequence[ArmSpec]) -> dict[str, dict[str, Any]]:
    """Settings of every MiM arm by its name: `key` counts for all of them, `ARM.key` for one."""
    names = [arm.name for arm in arms if arm.is_mim]
    if settings and not names:
        raise MiMError(f"--set {next(iter(settings))}: no arm has a MiM recipe (nnUNetTrainerMiM…): leave it out")
    by_arm: dict[str, dict[str, Any]] = {name: {} for name in names}
    for key, value in sorted(settings.items(), key=lambda item: "." in item[0]):  # those of one arm come last
        arm, dot, own_key = key.partition(".")
        if dot and arm not in names:
            raise MiMError(f"--set {key}: no MiM arm {arm} (there are {', '.join(names) or 'none'})")
        for name in [arm] if dot else names:
            by_arm[name][own_key if dot else key] = value
    return by_arm
